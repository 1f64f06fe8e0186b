"""docs/errors has one entry for each message that philens raises or warns with, and each is one sentence.

Messages are collected from the source by its syntax. What varies in a message is a hole here and an
UPPERCASE word in the docs: `There is no file {path}; check the path.` is written as
`There is no file PATH; check the path.`
"""

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

import philens
from philens.cli import main
from philens.support import errors

SOURCE = Path(philens.__file__).parent
DOCS = Path(__file__).parents[1] / "docs"
ERRORS = dict(inspect.getmembers(errors, inspect.isclass))

# What varies in a message, with a word for it.
HOLE = re.compile("\0([A-Z0-9_]+)\0")
WORD = "[A-Z][A-Z0-9_]*"
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module:
    """The messages of one source file, each with holes where it varies."""

    def __init__(self, path: Path) -> None:
        self.place = path.relative_to(SOURCE).as_posix()
        self.tree = ast.parse(path.read_text())
        self.above = {below: node for node in ast.walk(self.tree) for below in ast.iter_child_nodes(node)}
        self.calls = defaultdict(list)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                self.calls[ast.unparse(node.func)].append(node)

    def messages(self, whole: bool = False) -> Iterator[tuple[str, str]]:
        """Message and place; `whole` fills holes with the texts that the function puts into them."""
        for name, node in [(name, node) for name, calls in self.calls.items() for node in calls if node.args]:
            if re.fullmatch(r"log\w*\.(warning|error)|warnings\.warn", name):
                texts = self.texts(node.args[0], whole)
                for argument in node.args[1:]:
                    texts = [
                        re.sub(r"%[\d.]*[sdg]", f"\0{word(argument)}\0", text, count=1) for text in texts
                    ]
            elif name in ERRORS or name == "type(error)":
                texts = self.texts(node.args[0], whole)
            else:
                continue
            for text in texts:
                # Others' messages passed on, such as InputError(str(error)), are not messages.
                if re.search(r"[a-z]{2}", HOLE.sub("", text)):
                    yield text, f"{self.place}:{node.lineno}"

    def texts(self, node: ast.expr, whole: bool) -> list[str]:
        """The texts that an expression can be."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return ["".join(one) for one in product(*(self.texts(part, whole) for part in parts))]
            case ast.FormattedValue(value=ast.Name(id=name) as value, conversion=-1):
                if whole or name.lstrip("_").isupper():
                    return self.texts(value, whole)
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                return [a + b for a, b in product(self.texts(left, whole), self.texts(right, whole))]
            case ast.IfExp(body=body, orelse=other):
                return self.texts(body, whole) + self.texts(other, whole)
            case ast.Call(func=ast.Attribute(attr="format", value=value)):
                return [re.sub(r"\{\w*\}", "\0VALUE\0", text) for text in self.texts(value, whole)]
            case ast.Name(id=name):
                values = self.values(node, name)
                if values and not any(name in map(ast.unparse, ast.walk(value)) for value in values):
                    return [text for value in values for text in self.texts(value, whole)]
        return [f"\0{word(node)}\0"]

    def values(self, node: ast.AST, name: str) -> list[ast.expr]:
        """What a name is set to in the function around a node, else by that function's callers, else in the
        module."""
        scope = node
        while not isinstance(scope, Function | ast.Module):
            scope = self.above[scope]
        if values := [value for found, value in assigned(scope) if found == name]:
            return values
        if isinstance(scope, Function):
            names = [argument.arg for argument in scope.args.args]
            if name in names:
                place = names.index(name)
                return [call.args[place] for call in self.calls[scope.name] if len(call.args) > place]
        return CONSTANTS.get((self.place, name)) or CONSTANTS.get(("", name), [])


def assigned(scope: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Names and what they are set to, in a function or at the top of a module."""
    for node in ast.walk(scope) if isinstance(scope, Function) else ast.iter_child_nodes(scope):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                yield from ((ast.unparse(name), value) for name, value in zip(names, values, strict=False))
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
                | ast.NamedExpr(target=ast.Name(id=name), value=value)
            ):
                yield name, value


def word(node: ast.AST) -> str:
    """A word for what an expression puts into a message."""
    match node:
        case ast.FormattedValue(value=value) | ast.BinOp(left=value) | ast.Subscript(value=value):
            return word(value)
        case ast.Attribute(attr="__name__"):
            return "KIND"
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.strip("_").upper() or "VALUE"
        case ast.Call(func=ast.Name(id="len")):
            return "COUNT"
        case ast.Call(args=[value, *_]):
            return word(value)
        case _:
            return "VALUE"


MODULES = [Module(path) for path in sorted(SOURCE.rglob("*.py"))]
# By module, and those that modules take from one another, of which a name that means two things is none.
CONSTANTS: dict[tuple[str, str], list[ast.expr]] = defaultdict(list)
for _module in MODULES:
    for _name, _value in assigned(_module.tree):
        CONSTANTS[_module.place, _name].append(_value)
        if isinstance(_value, ast.Constant) and isinstance(_value.value, str):
            CONSTANTS["", _name].append(_value)
for _place, _name in [key for key, values in CONSTANTS.items() if not key[0] and len(values) > 1]:
    del CONSTANTS[_place, _name]


def as_documented(message: str) -> str:
    """A message as its entry has it."""
    return HOLE.sub(r"\1", re.sub("(\0[A-Z0-9_]+\0)+", r"\1", message))


def pattern(message: str) -> str:
    """The form of a message's entry, as a regular expression: whatever the words for what varies."""
    literal = re.split("(?:\0[A-Z0-9_]+\0)+", message)
    return WORD.join(map(re.escape, literal))


@pytest.fixture(scope="module")
def messages() -> dict[str, list[str]]:
    """By the form of its entry, each message as it is to be added, and its places."""
    found: dict[str, list[str]] = {}
    for module in MODULES:
        for message, place in module.messages():
            found.setdefault(pattern(message), [as_documented(message)]).append(place)
    return found


@pytest.fixture(scope="module")
def headings() -> list[str]:
    """The messages that have an entry."""
    lines = [
        line for page in sorted((DOCS / "errors").glob("*.md")) for line in page.read_text().splitlines()
    ]
    return [found[2] for line in lines if (found := re.fullmatch(r"### (`+) ?(.+?) ?\1", line))]


@pytest.fixture(scope="module")
def entries(messages, headings) -> dict[str, list[str]]:
    """By the form of its entry, the entries of each message, and below "" those of none. Of several forms
    that fit, the one with most words does: "X is Y." is of `{x} is Y.` and not of `{x} is {y}.`"""
    found = defaultdict(list)
    for heading in headings:
        fitting = [form for form in messages if re.fullmatch(form, heading)]
        found[max(fitting, key=lambda form: len(form.replace(WORD, "")), default="")].append(heading)
    return found


def test_collects_messages_however_they_are_built(messages):
    """From constants, variables, parameters, conditions, formats and calls of the log."""
    shown = {entry for entry, *_ in messages.values()}
    assert len(shown) > 350
    for built in (
        "There is no file PATH; check the path.",
        "There is no folder NAME, and it is no Hub id either: those look like owner/name.",
        "NAME is gated: accept the licence on PAGE and log in with `hf auth login` or set HF_TOKEN.",
        "PATH holds no solutions.jsonl; give a folder of philens solve, or a file.",
        "There is no checkpoint in PATH yet; starting from the beginning.",
        "WHAT needs PACKAGE: install it with `pip install 'philens[EXTRA]'`.",
        'PLACE is no record: it must look like {"text": ...}.',
        "data.parts.NAME: ERROR",
    ):
        assert built in shown


def test_each_message_has_one_entry(messages, entries):
    missing = []
    for form, (entry, *places) in messages.items():
        if form not in entries:
            quotes = ("`` ", " ``") if "`" in entry else ("`", "`")
            missing.append(f"{', '.join(places)}\n### {entry.join(quotes)}")
    assert not missing, "Add to a page of docs/errors, with their cause and remedy:\n\n" + "\n".join(missing)


def test_each_entry_has_a_message(entries):
    left = entries.pop("", [])
    assert not left, "No code raises these any more; take them out of docs/errors:\n" + "\n".join(left)
    twice = [found for found in entries.values() if len(found) > 1]
    assert not twice, f"These are entries of one message each: {twice}; leave one."


def test_each_entry_has_cause_and_remedy():
    """Messages with one cause stand together above one text; none says the message over again."""
    for page in sorted((DOCS / "errors").glob("*.md")):
        parts = re.split(r"((?:^### .*\n)+)", page.read_text(), flags=re.MULTILINE)
        for headings, text in zip(parts[1::2], parts[2::2], strict=True):
            text = text.partition("\n## ")[0].strip()
            assert re.fullmatch(r"\*\*Why\.\*\* .+\n\n\*\*What to do\.\*\* .+", text, re.DOTALL), headings
            for heading in headings.splitlines():
                assert heading.strip("#` ") not in text


def test_each_message_is_one_sentence():
    """It begins with a capital letter, a name or what varies, ends with a period or asks what was meant."""
    names = set()
    for module in MODULES:
        for node in ast.walk(module.tree):
            match node:
                case ast.arg(arg=name) | ast.AnnAssign(target=ast.Name(id=name)) | ast.FunctionDef(name=name):
                    names.add(name)
    for message, place in (found for module in MODULES for found in module.messages(whole=True)):
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
def test_what_a_user_sees_is_in_the_docs(command, headings, tmp_path, monkeypatch, capsys):
    """The sentence of a command that goes wrong is found on the pages by its words."""
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    Path("list.jsonl").write_text("[1, 2]\n")
    assert main(command.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("philens: error: ")
    assert said.count("\n") == 1
    said = said.removeprefix("philens: error: ").strip()
    forms = [".+".join(map(re.escape, re.split("[A-Z][A-Z0-9_]{2,}", heading))) for heading in headings]
    assert any(re.fullmatch(form, said) for form in forms), said


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
