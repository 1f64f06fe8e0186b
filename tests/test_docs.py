"""The README and the pages of docs/: their code runs, their commands exist, and the site they make is whole.

A Python block that cannot run here follows a comment that says why: `<!-- not run: needs the Hub -->`. Blocks
of one page share their names, in order; one inside a comment is run like the others and not shown.
"""

import csv
import importlib
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from html import unescape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import philens
from browser import WAIT, open_browser
from conftest import needs_smollm2, skip_without_smollm2
from philens.cli import main, parse
from philens.commands import COMMANDS, lens
from philens.training.recipe import load_recipe

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "docs" / "notebooks"  # made by `make docs`; tests/test_notebooks.py runs them
MESSAGES = ROOT / "docs" / "errors" / "messages.md"  # and so is this one
DOCS = [
    page
    for page in sorted((ROOT / "docs").rglob("*.md"))
    if NOTEBOOKS not in page.parents and page != MESSAGES
]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
WRITTEN = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHELLS = ("sh", "bash", "console", "text", "")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


class Block(NamedTuple):
    """A code block: its language ("" for an indented one), text, first line, and why it is not run."""

    language: str
    text: str
    line: int
    reason: str | None


def prose(page: Path) -> str:
    """The Markdown of a page, or of a notebook's cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return text


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in order: fenced ones, and those indented after an empty line."""
    text = prose(page)
    found = []
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        before = re.search(r"<!--\s*not run((?:(?!-->).)*)-->\s*\Z", text[: match.start()], re.DOTALL)
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(match[1], match[2], line, before and before[1].strip(" :\n")))
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for match in re.finditer(r"(?<=\n\n)(?: {4}.*\n+)+", outside):
        found.append(Block("", re.sub(r"^ {4}", "", match[0], flags=re.MULTILINE), 0, None))
    return found


# Code.


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name_of)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    code = [block for block in blocks(page) if block.language == "python"]
    if any(re.search(r"load_lens\(\)|\"smollm2\"", block.text) for block in code if block.reason is None):
        skip_without_smollm2()
    assert len(code) == page.read_text().count("```python")
    for block in code:
        if block.reason is not None:
            assert len(block.reason) > 8, f"{page}:{block.line}: say why it is not run"
            continue
        # With as many lines before it, a traceback names the line of the page.
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)


def test_the_snippet_of_formal_languages_prints_a_line_for_each_letter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(next(block.text for block in blocks(PAGES[0]) if "philens.SHIPPED" in block.text), {})
    lines = re.findall(r"^'.' phi +(\S+) nats, surprisal +(\S+) nats$", capsys.readouterr().out, re.MULTILINE)
    assert len(lines) == 12
    assert [surprisal == "nan" for _, surprisal in lines] == [True] + [False] * 11
    assert all(float(phi) >= 0 for phi, _ in lines)


def test_the_yaml_of_a_page_is_what_it_is_for(tmp_path: Path) -> None:
    """Parts of a recipe, and a configuration of accelerate."""
    for page in PAGES:
        for block in blocks(page):
            if block.language == "yaml":
                path = tmp_path / "block.yaml"
                path.write_text(block.text, encoding="utf-8")
                if page.name == "scale.md":
                    load_config_from_file(str(path))
                else:
                    load_recipe(path)


# Figures.


def intervals_of(value: object) -> Iterator[tuple[float, ...]]:
    """Value, low and high of all that results.json gives an interval."""
    if isinstance(value, dict):
        found = value.get("mean", value.get("value", value.get("ratio"))), *(value.get("ci95") or ())
        if len(found) == 3 and None not in found:
            yield found
    if isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            yield from intervals_of(below)


def test_every_interval_of_a_finding_is_one_of_the_results() -> None:
    """Of trials, whose files are not kept, the option that gives them stands in the row. Times are of a
    machine, and by a command."""
    results = ROOT / "results"
    known = {
        found
        for path in results.rglob("results.json")
        for found in intervals_of(json.loads(path.read_text(encoding="utf-8")))
    }
    for path in results.rglob("*.csv"):
        with path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name in (name.removesuffix("_low") for name in row if name.endswith("_low")):
                    values = [row.get(key) for key in (name, f"{name}_low", f"{name}_high")]
                    if all(values):
                        known.add(tuple(map(float, values)))

    @cache
    def rounded(places: tuple[int, ...]) -> set[tuple[float, ...]]:
        """All of them as a page may have written them, as they are and in percent."""
        scaled = ([value * scale for value in values] for values in known for scale in (1, 100))
        return {tuple(map(round, values, places)) for values in scaled}

    number, count = r"([\u2212-]?\d+(?:\.\d+)?)", 0
    for page in (page for page in PAGES if page.name != "performance.md"):
        for line in page.read_text(encoding="utf-8").splitlines():
            for found in re.findall(rf"{number} \[{number}, {number}\]", line):
                written = [part.replace("\u2212", "-") for part in found]
                places = tuple(len(part.partition(".")[2]) for part in written)
                is_known = tuple(map(float, written)) in rounded(places)
                assert re.search(r"^\| `--", line) or is_known, f"{name_of(page)}: {found}"
                count += 1
    assert count > 150


# Commands.


def command_lines(page: Path) -> list[str]:
    """The shell lines of a page, each whole though it goes on after a backslash."""
    shell = [block.text for block in blocks(page) if block.language in SHELLS]
    return [line for text in shell for line in text.replace("\\\n", " ").splitlines()]


def mentions(page: Path) -> list[str]:
    """Commands in a page's prose."""
    text = re.sub(r"^```.*?^```$", "", prose(page), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(found.split()) for found in re.findall(r"`((?:philens|make) [^`]+)`", text)]


def calls(line: str) -> Iterator[list[str]]:
    """The arguments of each call of philens in a shell line, whatever starts it and where its output goes."""
    if "philens " not in line:
        return
    words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|;&<>")
    words.whitespace_split, words.commenters = True, ""
    parts: list[list[str]] = [[]]
    for word in words:
        if word.startswith("#"):
            break
        if set(word) <= set("|;&<>"):
            parts.append([])
        else:
            parts[-1].append(word)
    for part in parts:
        while part and re.match(r"[A-Z_]+=", part[0]):
            part.pop(0)
        launched = part[:1] in (["accelerate"], ["torchrun"], ["python"]) and "philens" in part
        if part and Path(part[0]).name == "philens":
            yield part[1:]
        elif launched:
            yield part[part.index("philens") + 1 :]


def spelled_out(arguments: list[str]) -> list[str]:
    """Arguments of a synopsis, `train RECIPE [--key value ...] [--resume]`, as some that can be given."""
    words = [word.strip("[]") for word in arguments if word.strip("[].…")]
    if "--key" in words:
        del words[words.index("--key") : words.index("--key") + 2]
    return [{"RECIPE": "smoke", "N": "1"}.get(word, word) for word in words]


LINES = [(page, line) for page in [*PAGES, *WRITTEN] for line in command_lines(page)]
MENTIONS = [(page, line) for page in [*PAGES, *WRITTEN] for line in mentions(page)]
CALLS = [(page, spelled_out(call)) for page, line in LINES for call in calls(line)]
MENTIONED = [(page, spelled_out(call)) for page, line in MENTIONS for call in calls(line)]


def test_every_command_is_on_some_page() -> None:
    assert {call[0] for _, call in CALLS + MENTIONED} >= set(COMMANDS)
    assert len(CALLS) > 60


def try_to_parse(arguments: list[str]) -> None:
    """Everything that is refused before a command begins: its options, their values, keys of recipes."""
    if arguments[-1] in ("--help", "--version"):
        return
    command, options = parse(arguments)
    if command not in (lens.train, lens.sweep) or options["recipe"].endswith(".yaml"):
        return
    base = {"model.base": options["model"]} if command is lens.sweep else {}
    own = inspect.signature(command).parameters
    load_recipe(options["recipe"], base | {key: value for key, value in options.items() if key not in own})


@pytest.mark.parametrize("page", dict.fromkeys(page for page, _ in CALLS + MENTIONED), ids=name_of)
def test_the_commands_of_a_page_exist_with_their_options(page: Path) -> None:
    for arguments in (call for where, call in CALLS if where == page):
        try:
            try_to_parse(arguments)
        except philens.PhilensError as error:
            pytest.fail(f"philens {shlex.join(arguments)}: {error}")
    for arguments in (call for where, call in MENTIONED if where == page):
        try:
            try_to_parse(arguments)
        except philens.PhilensError as error:
            # `philens sweep` in a sentence is the command's name.
            if not re.search("required|must be given|needs a value|expected one argument", str(error)):
                pytest.fail(f"`philens {shlex.join(arguments)}`: {error}")


@needs_smollm2
def test_the_first_commands_of_your_own_texts_do_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("import os\n", encoding="utf-8")
    own_texts = [
        call for page, call in CALLS if page.name == "own_texts.md" and call[:2] == ["score", "notes.txt"]
    ]
    assert len(own_texts) == 3
    for arguments in own_texts:
        assert main(arguments) == 0, arguments
    shown = capsys.readouterr().out
    assert "import" in shown
    assert "surprisal" in shown
    assert "<html" in Path("page.html").read_text(encoding="utf-8")


def test_the_make_targets_of_pages_exist() -> None:
    rules = re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    for page, line in LINES + MENTIONS:
        if found := re.match(r"(?:\$ )?make ([a-z-]+)", line):
            assert found[1] in targets, f"{page}: {line}"


# What GitHub shows.


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w -]", "", words).replace(" ", "-")


def test_links_of_pages_resolve_in_the_repository() -> None:
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        text = re.sub(r"^```.*?^```$", "", prose(page), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            place, _, anchor = link.partition("#")
            if urlsplit(link).scheme or "notebooks/" in place:
                continue
            target = page.parent / place if place else page
            assert target.exists(), f"{name_of(page)}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", prose(target), re.MULTILINE)
                assert anchor in map(slug, headings), f"{name_of(page)}: {link}"


def test_every_picture_is_shown() -> None:
    shown = {Path(link).name for page in PAGES for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", prose(page))}
    assert shown == {path.name for path in (ROOT / "docs/images").glob("*.png")}


def test_the_forms_of_issues_are_forms() -> None:
    """By what GitHub asks of them; it shows none that breaks a rule."""
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form.keys() <= {"name", "description", "title", "labels", "assignees", "body"}
        assert form["name"]
        assert form["description"]
        asked = [item for item in form["body"] if item["type"] != "markdown"]
        assert asked
        assert len({item["id"] for item in asked}) == len(asked)
        for item in form["body"]:
            assert item.keys() <= {"type", "id", "attributes", "validations"}
            needed = {"markdown": {"value"}, "textarea": {"label"}, "dropdown": {"label", "options"}}
            assert needed[item["type"]] <= item["attributes"].keys(), path


# The site.


class Page(HTMLParser):
    """What a page of the site links to, what it loads, and what can be linked to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links, self.loaded, self.anchors, self.texts = [], [], {""}, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {values.get("id"), values.get("name") if tag == "a" else ""}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        self.loaded += [values[name] for name in ("src", "poster", "data") if values.get(name)]
        self.loaded += [part.split()[0] for part in (values.get("srcset") or "").split(",") if part.strip()]
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.loaded.append(values["href"])

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def build_site(folder: Path) -> subprocess.CompletedProcess[str]:
    """The site of this tree, built in `folder`."""
    for name in ("src", "notebooks", "releasing"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("zensical.toml", "Makefile"):  # a link would be followed, and the site built in this tree
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("notebooks", MESSAGES.name))
    command = ["make", "docs", "STAMP=", f"BIN={Path(sys.executable).parent}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build_site(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    # Docstrings that say what the signature does not are only logged.
    assert "No issues found" in done.stdout + done.stderr
    assert "griffe" not in done.stdout + done.stderr, done.stdout + done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def html(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


@pytest.mark.docs
def test_every_page_is_in_the_site_and_in_its_navigation(site: Path) -> None:
    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]

    def paths(entries: object) -> Iterator[str]:
        if isinstance(entries, str):
            yield entries
        elif entries:
            for entry in entries.values() if isinstance(entries, dict) else entries:  # pyright: ignore
                yield from paths(entry)

    listed = list(paths(project["nav"]))
    assert len(listed) == len(set(listed))
    made = {"errors/messages.md"} | {
        f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")
    }
    assert set(listed) == {page.relative_to(ROOT / "docs").as_posix() for page in DOCS} | made
    for path in listed:
        place = site / path.removesuffix("index.md").removesuffix(".md")
        assert (place / "index.html").is_file(), path


@pytest.mark.docs
def test_every_link_anchor_and_image_of_the_site_resolves(site: Path, html: dict[Path, Page]) -> None:
    assert len(html) > 30
    for path, page in html.items():
        for link in page.links + page.loaded:
            scheme, host, place, _, anchor = urlsplit(link)
            if scheme or host or path.name == "404.html":
                continue
            target = (path.parent / unquote(place)).resolve() if place else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(site)}: {link}"
            assert target.is_relative_to(site), f"{path.relative_to(site)}: {link}"
            if target.suffix == ".html" and not link.startswith("data:"):
                assert unquote(anchor) in html[target].anchors, f"{path.relative_to(site)}: {link}"


@pytest.mark.docs
def test_no_command_of_a_block_is_taken_for_prose(site: Path) -> None:
    """Indented too little, as below an item of a list."""
    commands = {" ".join(line.split()) for _, line in LINES if line.strip()}
    for path in site.rglob("*.html"):
        paragraphs = re.findall(r"<p>([^<]*)</p>", path.read_text(encoding="utf-8"))
        shown = commands & {" ".join(unescape(text).split()) for text in paragraphs}
        assert not shown, f"{path}: {shown}"


@pytest.mark.docs
def test_the_site_loads_nothing_from_elsewhere(site: Path, html: dict[Path, Page]) -> None:
    for path, page in html.items():
        for source in page.loaded:
            assert urlsplit(source).netloc == "", f"{path}: {source}"
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", path.read_text()), path


@pytest.mark.docs
def test_every_public_name_has_an_entry_with_a_description(site: Path, html: dict[Path, Page]) -> None:
    anchors = {
        anchor for path, page in html.items() if path.is_relative_to(site / "api") for anchor in page.anchors
    }
    for name in philens.__all__:
        assert f"philens.{name}" in anchors, name
    # And what pages and notebooks take from modules, constants left out.
    for page in [*PAGES, *WRITTEN]:
        text = page.read_text(encoding="utf-8").replace("\\n", "\n")
        for module, names in re.findall(r"^[\s\"]*from (philens[\w.]*) import ([\w, ]+)", text, re.MULTILINE):
            for name in names.split(","):
                if callable(getattr(importlib.import_module(module), name.strip())):
                    assert f"{module}.{name.strip()}" in anchors, f"{name_of(page)}: {module}.{name}"
    # A docstring that is not understood would be shown as it stands.
    for path, page in html.items():
        if path.is_relative_to(site / "api"):
            raw = [
                text
                for text in page.texts
                if re.match(r"(Args|Attributes|Returns|Raises|Yields):\s+\S", text)
            ]
            assert not raw, f"{path.relative_to(site)}: {raw}"
            # Of several names before one colon all but the first would stand where the type belongs.
            several = [text for text in page.texts if re.fullmatch(r"[a-z]\w*,", text)]
            assert not several, f"{path.relative_to(site)}: {several}"


# In a browser.


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.docs
def test_the_site_in_light_and_dark_on_screen_and_phone(site: Path) -> None:
    with open_browser() as browser, served(site) as address:
        for scheme, width in (("light", 1280), ("dark", 390)):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.set_default_timeout(WAIT)
            requests, faults = [], []
            page.on("request", lambda request, to=requests: to.append(request.url))
            page.on("pageerror", lambda error, to=faults: to.append(str(error)))
            for path in ("", "findings/", "architectures/", "api/scoring/"):
                page.goto(address + path)
                page.wait_for_load_state("networkidle")
                assert page.locator("h1").is_visible()
                assert page.evaluate("document.documentElement.scrollWidth") <= width, (path, width)
                broken = "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
                assert page.evaluate(broken) == [], path
            colours = page.locator("body").get_attribute("data-md-color-scheme")
            assert colours == {"light": "default", "dark": "slate"}[scheme]
            assert {url for url in requests if not url.startswith((address, "data:", "blob:"))} == set()
            assert not faults
            page.close()


@pytest.mark.docs
def test_a_public_name_is_found_by_the_search(site: Path) -> None:
    with open_browser() as browser, served(site) as address:
        page = browser.new_page()
        page.set_default_timeout(WAIT)
        page.goto(address)
        page.wait_for_load_state("networkidle")
        page.keyboard.press("Control+k")
        page.keyboard.type("TokenScores")
        page.get_by_text(re.compile(r"^\d+ results$")).wait_for()
        first = page.locator("a[href*='api/scoring']").filter(has_text="philens.TokenScores")
        assert "#philens.TokenScores" in first.first.get_attribute("href")
