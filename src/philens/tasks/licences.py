"""Licences that lie on this machine: texts that language models know by heart, each work once."""

import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Where systems keep licences, and Debian what each of its packages is under.
KEPT = (Path("/usr/share/common-licenses"), Path("/usr/share/licenses"))
DEBIAN = Path("/usr/share/doc")
# With fewer words it is a notice that names a licence; with fewer terms, something else in such a file.
_WORDS, _TERMS = 100, 3
# Two texts are one work if more than this share of the shorter one's runs of so many words is in the other.
# Of long texts the beginnings are compared.
_SAME, _RUN, _COMPARED = 0.4, 5, 2000

_FILE = re.compile(r"(licen[cs]e|copying)", re.IGNORECASE)
_TERM = re.compile(r"\b(permission|permitted|warrant(?:y|ies)|licen[cs]e[ds]?|liable|liability)\b")
_NOTICE = re.compile(r"\bcommon-licenses\b|\bunder the terms of the gnu\b", re.IGNORECASE)


@dataclass
class _Work:
    name: str
    text: str
    runs: set[tuple[str, ...]]
    copies: int


def find_licences(first: Path, limit: int) -> list[tuple[str, str]]:
    """Name and text of at most `limit` different licences.

    `first` comes first, then those that the system keeps in a folder of licences, then those that the most
    packages brought, of Python or of Debian. A copy with other names in it is the same work, and so is a file
    that quotes a licence found before.
    """
    works: list[_Work] = []
    _add(works, [("MIT", _read(first))], may_be_notice=False)
    _add(works, _kept(), may_be_notice=False)
    foremost = len(works)
    # Short ones first: a file of several licences is then a copy of the first one that it holds.
    _add(works, sorted(_of_packages(), key=lambda found: (len(found[1]), found)), may_be_notice=True)
    by_copies = sorted(works[foremost:], key=lambda work: -work.copies)
    chosen = [*works[:foremost], *by_copies][:limit]
    used = Counter[str]()
    named = []
    for work in chosen:
        used[work.name] += 1
        named.append((work.name if used[work.name] == 1 else f"{work.name} ({used[work.name]})", work.text))
    return named


def _add(works: list[_Work], found: Iterable[tuple[str, str]], may_be_notice: bool) -> None:
    """Add what is no copy of a work; count what is."""
    same: dict[str, list[str]] = {}
    for name, text in found:
        same.setdefault(text, []).append(name)
    for text, names in same.items():
        words = re.findall(r"[a-z0-9]+", text.lower())
        if len(words) < _WORDS or len(_TERM.findall(text.lower())) < _TERMS:
            continue
        if may_be_notice and len(words) < 4 * _WORDS and _NOTICE.search(text):
            continue
        runs = {tuple(words[at : at + _RUN]) for at in range(min(len(words), _COMPARED) - _RUN + 1)}
        for work in works:
            if len(runs & work.runs) > _SAME * min(len(runs), len(work.runs)):
                work.copies += len(names)
                break
        else:
            works.append(_Work(names[0], text, runs, len(names)))


def _kept() -> Iterator[tuple[str, str]]:
    for folder in KEPT:
        for path in sorted(folder.rglob("*")):
            # Links are names of the newest version.
            if path.is_file() and not path.is_symlink():
                yield path.name, _read(path)


def _of_packages() -> Iterator[tuple[str, str]]:
    paths = sysconfig.get_paths()
    for root in sorted({paths["purelib"], paths["platlib"]}):
        for package in sorted(Path(root).glob("*.dist-info")):
            for path in sorted(package.rglob("*")):
                if _FILE.match(path.name) and path.is_file():
                    text = _read(path)
                    yield _title(text) or f"{package.name.partition('-')[0]} licence", text
    for path in sorted(DEBIAN.glob("*/copyright")):
        yield from _paragraphs(_read(path))


def _title(text: str) -> str | None:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 50 and re.search(r"licen[cs]e", line, re.IGNORECASE) else None


def _paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """The licences in Debian's machine-readable form: `License: NAME`, and its indented text below."""
    for paragraph in re.split(r"\n[ \t]*\n", text):
        heading, *lines = paragraph.strip("\n").split("\n")
        if heading.startswith("License:") and lines and all(line.startswith(" ") for line in lines):
            body = ["" if line.strip() == "." else line[1:] for line in lines]
            yield heading.removeprefix("License:").strip(), "\n".join(body)


def _read(path: Path) -> str:
    """A file's text; nothing where it cannot be read, for there are others."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
