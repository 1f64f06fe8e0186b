"""The texts that come with philens, and licences that lie on a machine."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from philens.tasks import levels, licences, sources
from philens.tasks.levels import load_levels, own_levels
from philens.tasks.licences import find_licences
from philens.tasks.sources import SHIPPED_TEXTS, installed_files

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def own() -> list[levels.LevelText]:
    return own_levels()


def test_five_levels_of_different_works(own: list[levels.LevelText]) -> None:
    counts = Counter(text.level for text in own)
    assert counts.keys() == {"trivial", "memorised", "shuffled", "code", "prose"}
    assert all(counts[level] >= 20 for level in counts.keys() - {"memorised"})
    assert 1 <= counts["memorised"] <= levels.LICENCES
    assert len({text.text for text in own}) == len(own)
    for level in counts:
        names = [text.name for text in own if text.level == level]
        assert len(set(names)) == len(names)
    assert all(text.user and text.text.strip() == text.text for text in own)
    assert {text.level for text in own if text.built} == {"trivial", "shuffled"}
    assert next(text.name for text in own if text.level == "memorised") == "MIT"


def test_shuffled_texts_have_words_of_prose_and_code(own: list[levels.LevelText]) -> None:
    written = Counter(w for text in own if text.level in ("prose", "code") for w in text.text.split())
    shuffled = Counter(w for text in own if text.level == "shuffled" for w in text.text.split())
    assert not shuffled - written
    assert shuffled.total() > 5000


def test_what_comes_with_philens_is_described() -> None:
    prompts = json.loads((SHIPPED_TEXTS / "prompts.json").read_text(encoding="utf-8"))
    files = {path.relative_to(SHIPPED_TEXTS).as_posix() for path in SHIPPED_TEXTS.glob("*/*")}
    assert prompts.keys() == files
    assert len(set(prompts.values())) == len(prompts) == 40
    assert sum(path.stat().st_size for path in SHIPPED_TEXTS.rglob("*") if path.is_file()) < 250_000
    assert (SHIPPED_TEXTS / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    readme = (SHIPPED_TEXTS / "README.md").read_text(encoding="utf-8")
    for told in ("November 2026", "MIT", "training data"):
        assert told in readme
    for name in files:
        text = (SHIPPED_TEXTS / name).read_text(encoding="utf-8")
        if name.startswith("prose/"):
            assert 350 <= len(text.split()) <= 600, name
        else:
            assert 60 <= text.count("\n") <= 160, name


def test_the_programs_in_python_are_programs() -> None:
    paths = sorted(SHIPPED_TEXTS.glob("code/*.py.txt"))
    assert len(paths) == 12
    for path in paths:
        compile(path.read_text(encoding="utf-8"), path.name, "exec")


def test_no_training_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where philens is installed, it lies among what `source: installed` takes for text."""
    texts = tmp_path / "philens" / "shipped" / "texts"
    (texts / "prose").mkdir(parents=True)
    for path in (texts / "prose" / "a.txt", texts / "LICENSE", texts.parent / "b.py", tmp_path / "c.md"):
        path.write_text("text")
    paths = dict.fromkeys(("stdlib", "purelib", "platlib"), str(tmp_path))
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(sources, "SHIPPED_TEXTS", texts.resolve())
    sources._installed.cache_clear()
    try:
        assert {path.name for path in installed_files()} == {"b.py", "c.md"}
    finally:
        sources._installed.cache_clear()


# --- licences


def terms(seed: int, words: int = 300) -> str:
    """A text with the words of licences, unlike that of another seed."""
    middle = " ".join(f"w{(seed * 7919 + n * n * 31) % 9973}" for n in range(words))
    return f"Permission is granted by this license {middle} without warranty of any kind, and no liability."


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own: folders of the system, Debian's packages, Python's packages."""
    for name in ("common", "doc", "python"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(licences, "KEPT", (tmp_path / "common", tmp_path / "nowhere"))
    monkeypatch.setattr(licences, "DEBIAN", tmp_path / "doc")
    paths = dict.fromkeys(("purelib", "platlib"), str(tmp_path / "python"))
    monkeypatch.setattr(licences.sysconfig, "get_paths", lambda: paths)
    (tmp_path / "first").write_text(terms(0))
    return tmp_path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_a_machine_without_licences_has_one(machine: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find_licences(machine / "first", 9) == [("MIT", terms(0))]
    with caplog.at_level("INFO"):
        texts = load_levels()
    assert [text.name for text in texts if text.level == "memorised"] == ["MIT"]
    assert "Found 1 different licence on this machine, fewer than 20." in caplog.text


def test_the_same_seed_gives_the_same_texts(machine: Path) -> None:
    put(machine / "common" / "B", terms(1))
    put(machine / "common" / "C", terms(2))
    own = own_levels()
    assert own == own_levels()
    some = load_levels(documents=3)
    assert Counter(text.level for text in some) == dict.fromkeys(levels.ROLES.keys() - {"own"}, 3)
    assert set(some) < set(own)


def test_licences_are_found_once_each_and_frequent_ones_first(machine: Path) -> None:
    put(machine / "common" / "GPL-9", terms(1))
    os.symlink(machine / "common" / "GPL-9", machine / "common" / "GPL")
    put(machine / "python" / "a-1.0.dist-info" / "licenses" / "LICENSE", f"Rare License\n\n{terms(2)}")
    for n in range(3):  # the same work, with another holder
        put(machine / "python" / f"b{n}-1.0.dist-info" / "COPYING", f"Copyright {n} by X{n}\n{terms(3)}")
    put(machine / "python" / "c-1.0.dist-info" / "LICENSE.txt", f"{terms(0)}\nand also\n{terms(5, 40)}")
    put(machine / "python" / "d-1.0.dist-info" / "AUTHORS", terms(6))
    put(machine / "python" / "e-1.0.dist-info" / "LICENSE", "See the license of something else.")
    put(machine / "python" / "f-1.0.dist-info" / "LICENSE", "word " * 400)
    indented = re.sub("(?m)^", " ", "Two paragraphs\n.\n" + terms(4))
    put(machine / "doc" / "g" / "copyright", f"Files: *\nLicense: Odd\n\nLicense: Odd-1\n{indented}\n")
    notice = "You can use it under the terms of the GNU license, without warranty or liability. " * 8
    put(machine / "doc" / "h" / "copyright", f"License: GPL-9+\n {notice}\n\nLicense: Odd-1\n{indented}\n")
    found = find_licences(machine / "first", 9)
    assert [name for name, _ in found] == ["MIT", "GPL-9", "b0 licence", "Odd-1", "Rare License"]
    assert dict(found)["Odd-1"] == f"Two paragraphs\n\n{terms(4)}"
    assert find_licences(machine / "first", 3) == found[:3]


def test_a_file_that_cannot_be_read_is_left_out(machine: Path) -> None:
    put(machine / "common" / "bytes", terms(1) + "\n")
    (machine / "common" / "bytes").write_bytes(b"\xff" + terms(1).encode())
    (machine / "doc" / "x").mkdir()
    os.symlink(machine / "nowhere", machine / "doc" / "x" / "copyright")
    assert [name for name, _ in find_licences(machine / "first", 9)] == ["MIT", "bytes"]


def test_two_licences_of_one_name_have_two(machine: Path) -> None:
    put(machine / "common" / "MIT", terms(8))
    assert [name for name, _ in find_licences(machine / "first", 9)] == ["MIT", "MIT (2)"]
