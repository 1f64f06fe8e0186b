"""Every Python snippet of the README runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number: int, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SNIPPETS[number]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_first_snippet_prints_a_line_for_each_letter(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SNIPPETS[0]], cwd=tmp_path, capture_output=True, text=True)
    lines = re.findall(r"^'.' phi +(\S+) nats, surprisal +(\S+) nats$", done.stdout, re.MULTILINE)
    assert len(lines) == 12
    assert [surprisal == "nan" for _, surprisal in lines] == [True] + [False] * 11
    assert all(float(phi) >= 0 for phi, _ in lines)


def test_images_exist() -> None:
    root = Path(__file__).parent.parent
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (root / path).is_file(), path
    for path in re.findall(r"\]\((docs/.*?)\)", README):
        assert (root / path).is_file(), path
