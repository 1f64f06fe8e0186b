"""Every message that philens raises or warns with is one sentence and stands in the docs: all on a page made
from the source (`releasing/messages.py`), and those that need more words in an entry of docs/errors.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest
from releasing.messages import ERRORS, SOURCE, WORD, all_messages, as_documented, modules, page

from philens.cli import main

DOCS = Path(__file__).parents[1] / "docs"
# Made by `make docs`.
PAGES = sorted(set(DOCS.glob("errors/*.md")) - {DOCS / "errors/messages.md"})


@pytest.fixture(scope="module")
def messages() -> dict[str, list[str]]:
    return all_messages()


@pytest.fixture(scope="module")
def headings() -> list[str]:
    """The messages that have an entry."""
    lines = [line for path in PAGES for line in path.read_text().splitlines()]
    return [found[2] for line in lines if (found := re.fullmatch(r"### (`+) ?(.+?) ?\1", line))]


@pytest.fixture(scope="module")
def entries(messages, headings) -> dict[str, list[str]]:
    """By the form of its entry, the entries of each message, and below "" those of none. Of several forms
    that fit, the one with most words does: "X is Y." is of `{x} is Y.` and not of `{x} is {y}.`"""
    found, forms = defaultdict(list), {form: re.compile(form) for form in messages}
    for heading in headings:
        fitting = [form for form in forms if forms[form].fullmatch(heading)]
        found[max(fitting, key=lambda form: len(form.replace(WORD, "")), default="")].append(heading)
    return found


@pytest.fixture(scope="module")
def listed() -> list[re.Pattern[str]]:
    """The messages on the page of all."""
    found = re.findall(r"^- (`+) ?(.+?) ?\1$", page(), re.MULTILINE)
    forms = [".+".join(map(re.escape, re.split("[A-Z][A-Z0-9_]{2,}", message))) for _, message in found]
    return [re.compile(form) for form in forms]


def test_collects_messages_however_they_are_built(messages):
    """From constants, variables, parameters, conditions, formats and calls of the log."""
    shown = {entry for entry, *_ in messages.values()}
    assert len(shown) > 350
    for built in (
        "There is no file PATH; check the path.",
        "There is no folder NAME, and it is no Hub id either: those look like owner/name.",
        "NAME is gated: accept the licence on PAGE and log in with `hf auth login` or set HF_TOKEN.",
        "PATH has no solutions.jsonl; give a folder of philens solve, or a file.",
        "There is no checkpoint in PATH yet; starting from the beginning.",
        "WHAT needs PACKAGE: install it with `pip install 'philens[EXTRA]'`.",
        'PLACE is no record: it must look like {"text": ...}.',
        "data.parts.NAME: ERROR",
    ):
        assert built in shown


def test_no_message_is_missed():
    """What is raised and not collected passes on the message of another error."""
    passed_on = {
        (module.place, ast.unparse(node.exc))
        for module in modules()
        for places in [{place for _, place in module.messages()}]
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        if ast.unparse(node.exc.func) in ERRORS and f"{module.place}:{node.exc.lineno}" not in places
    }
    assert {place for place, _ in passed_on} == {"findings/knobs.py", "scoring/ray.py", "training/recipe.py"}
    assert len(passed_on) == 4, passed_on


def test_each_entry_has_a_message(entries):
    left = entries.pop("", [])
    assert not left, "No code raises these any more; take them out of docs/errors:\n" + "\n".join(left)
    twice = [found for found in entries.values() if len(found) > 1]
    assert not twice, f"These are entries of one message each: {twice}; leave one."


def test_each_entry_has_cause_and_remedy():
    """Messages with one cause stand together above one text; none says the message over again."""
    for path in PAGES:
        parts = re.split(r"((?:^### .*\n)+)", path.read_text(), flags=re.MULTILINE)
        for headings, text in zip(parts[1::2], parts[2::2], strict=True):
            text = text.partition("\n## ")[0].strip()
            assert re.fullmatch(r"\*\*Why\.\*\* .+\n\n\*\*What to do\.\*\* .+", text, re.DOTALL), headings
            for heading in headings.splitlines():
                assert heading.strip("#` ") not in text


def test_each_message_is_one_sentence():
    """It begins with a capital letter, a name or what varies, ends with a period or asks what was meant."""
    names = set()
    for module in modules():
        for node in ast.walk(module.tree):
            match node:
                case ast.arg(arg=name) | ast.AnnAssign(target=ast.Name(id=name)) | ast.FunctionDef(name=name):
                    names.add(name)
    for message, place in (found for module in modules() for found in module.messages(whole=True)):
        text = f"{place}: {as_documented(message)}"
        first = re.split("[ ,.=[]", message)[0]
        assert re.match(r"[A-Z\0]|--|\w+[_.]\w|[a-z]+[A-Z]", message) or first in names, text
        assert message.endswith((".", "\0ERROR\0")) or re.search(r"; did you mean .*\?$", message), text
        assert "\n" not in message, text
        assert not re.search(r"[a-z)]{2}[.!?] [A-Z\0]", message), text


@pytest.mark.parametrize(
    "command",
    [
        "scor notes.txt",
        "score notes.txt",
        "score --fromat table",
        "score . ",
        "score empty.txt --metrics fhi",
        "score empty.txt",
        "score empty.txt --format html",
        "score empty.txt --model nothing/there/at/all",
        "score latin.txt",
        "score latin.txt --format html --output ./latin.txt",
        "score --generate once --max-new-tokens 0",
        "score --generate once --sample --temperature 0",
        "score list.jsonl",
        "score list.jsonl --field a --model empty.txt",
        "train nothing",
        "train smoke --train.steps 0",
        "train smoke --phi.layr 1",
        "train smoke --phi.layer one",
        "train smoke --phi.layer 9 --output new",
        "train smoke --output .",
        "train list.jsonl",
        "train any_model",
        "solve",
        "solve --model a --problems empty.txt --temperature -1",
        "grade list.jsonl",
        "rank empty.txt",
        "rank list.jsonl --model . --format csv --output list.jsonl",
        "rank empty.txt --model .",
        "sweep . --layers 4-8",
        "reproduce texts --levels nothing",
        "reproduce tasks --scale huge",
        "demo --documents 1",
    ],
)
def test_what_a_user_sees_is_in_the_docs(listed, command, tmp_path, monkeypatch, capsys):
    """The sentence of a command that goes wrong is found on the page of all by its words."""
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    Path("list.jsonl").write_text("[1, 2]\n")
    assert main(command.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("philens: error: ")
    assert said.count("\n") == 1
    said = said.removeprefix("philens: error: ").strip()
    assert any(form.fullmatch(said) for form in listed), said


CODE = (DOCS / "code.md").read_text()


def test_the_map_of_the_code_names_every_package_and_nothing_else():
    root = DOCS.parent
    named = set(re.findall(r"`([\w/.]+(?:\.py|/|\.md))`", CODE))
    for path in named - {"findings/NAME.py"}:
        # Within the package by their end, as `lens.py` in `commands/`.
        assert (root / path).exists() or any(SOURCE.rglob(path)), path
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages
    assert packages <= {path.removesuffix("/") for path in named}
    modules = {path.name for path in SOURCE.glob("*.py")} - {"__init__.py", "__main__.py", "demo.py"}
    assert modules <= named


def test_the_map_of_the_code_names_things_that_are_there():
    words = {
        word for path in DOCS.parent.glob("src/**/*.py") for word in re.findall(r"\w+", path.read_text())
    }
    for name in re.findall(r"`([\w.]+)(?:\(\))?`", CODE):
        if not name.endswith((".py", ".md")) and name not in ("torch.distributions", "highest_NAME"):
            assert set(name.split(".")) <= words, name
