"""Places to write to, streams and names that are not what a command hopes for: one sentence, nothing lost."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from faults.damage import Damage
from faults.files import damaged
from faults.subjects import Subject
from safetensors.torch import load_file, save_file

import philens
from conftest import make_llama
from philens import cli
from philens.bases.tokenizer import byte_tokenizer
from philens.lens.adapter import CONFIG_FILE, _hash_of
from philens.reasoning.problems import load_problems
from philens.scoring.corpus import Corpus
from philens.scoring.texts import render_chat
from philens.support.errors import AdapterError, InputError, OutputError
from philens.support.files import SUMS_FILE, file_hash, write_atomically, written_whole
from philens.training.opening import load_lens


def write(path):
    write_atomically(path, lambda file: file.write(b"new"))


# Places.


def test_a_pipe_is_written_into(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write(pipe)
    reader.join(20)
    assert found == [b"new"]
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_device_is_never_replaced(tmp_path):
    """As root, what is moved to /dev/null takes its place for the whole machine."""
    device, link = tmp_path / "null", tmp_path / "link"
    try:
        os.mknod(device, 0o20666, os.makedev(1, 3))
        device.open("wb").close()
    except OSError:
        pytest.skip("no devices can be made here")
    link.symlink_to(device)
    for path in (device, link):
        write(path)
    assert device.is_char_device()
    assert link.is_symlink()


def test_a_link_is_followed(tmp_path):
    target, link = tmp_path / "below" / "page.html", tmp_path / "link.html"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    write(link)
    assert (link.is_symlink(), target.read_text()) == (True, "new")
    with written_whole(tmp_path / "real") as staging:
        (staging / "a").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with written_whole(tmp_path / "link") as staging:
        (staging / "a").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"below", "link.html", "real", "link"}


def test_a_folder_is_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("abc")
    for place in (".", "", "/", str(tmp_path)):
        with pytest.raises(OutputError, match=r"it is a folder; name a file\."):
            write(place)
        line = ["score", "a.txt", "--model", str(philens.SHIPPED), "--format", "html", "--output", place]
        assert cli.main(line) == 2
        assert "is a folder; name a file in it." in capsys.readouterr().err


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_what_was_there_stays_until_the_new_has_its_name(tmp_path, monkeypatch, stop):
    folder = tmp_path / "adapter"
    with written_whole(folder) as staging:
        (staging / "a").write_text("old")
    rename = Path.rename

    def stopped(path, target):
        if Path(target) == folder and not path.name.endswith(".old"):
            raise stop
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises((OutputError, KeyboardInterrupt)), written_whole(folder) as staging:
        (staging / "a").write_text("new")
    assert (folder / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, sync = [], os.fsync

    def synced(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        assert not (tmp_path / "new").exists()
        sync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc")
    monkeypatch.setattr(os, "fsync", synced)
    with written_whole(tmp_path / "new") as staging:
        (staging / "below").mkdir()
        for name in ("a", "below/b"):
            (staging / name).write_text(name)
    assert sorted(done) == ["a", "b"]


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", "''", '"\\0"'])
def test_a_recipe_leads_nowhere_else(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "smoke", "--name", name]) == 2
    assert "name must be that of a folder in runs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Streams.


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_standard_error_on_a_full_disk():
    command = [sys.executable, "-m", "philens", "score", "--no-such-option"]
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>/dev/full', "sh", *command], stdout=subprocess.DEVNULL)
    assert done.returncode == 2


def test_closed_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="Standard input is closed"):
        Corpus(["-"])


# Sentences stay short.


def test_a_record_with_thousands_of_fields(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({f"k{number}" * 50: 1 for number in range(5000)}))
    for read in (lambda: list(Corpus([str(path)])), lambda: load_problems(str(path))):
        with pytest.raises(InputError, match="and 4,970 more") as raised:
            read()
        assert len(str(raised.value)) < 4000


def test_a_chat_template_that_says_a_lot():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('a' * 100000) }}"
    with pytest.raises(InputError, match="The chat template refuses it") as raised:
        render_chat(tokenizer, [{"role": "user", "content": "a"}], "it")
    assert len(str(raised.value)) < 400


def test_a_file_without_a_name():
    with pytest.raises(InputError, match="There is no file ''; check the path"):
        Corpus([""])


# Weights.


def with_weights(folder, edit):
    """Change an adapter's weights, with hashes that fit."""
    path = folder / "phi_layer.safetensors"
    save_file({name: edit(value) for name, value in load_file(path).items()}, path, {"format": "pt"})
    description = json.loads((folder / CONFIG_FILE).read_text())
    description["weights_sha256"] = file_hash(path)
    description["config_sha256"] = _hash_of(description)
    (folder / CONFIG_FILE).write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda value: value * torch.nan, "holds a weight that is not finite"),
        (lambda value: value + torch.inf, "holds a weight that is not finite"),
        (lambda value: value.long(), "of type int64, not float32"),
        (lambda value: value.to(torch.complex64), "of type complex64, not float32"),
    ],
)
def test_weights_that_are_no_numbers(tmp_path, edit, message):
    base = make_llama()
    philens.attach(base, philens.PHiConfig(layer=1, prior="mlp")).save_pretrained(tmp_path / "adapter")
    with_weights(tmp_path / "adapter", edit)
    base = make_llama()
    with pytest.raises(AdapterError, match=message):
        philens.load(base, tmp_path / "adapter")
    philens.attach(base, philens.PHiConfig(layer=1, prior="mlp"))  # nothing was left in it


def test_a_base_that_is_not_finite(tmp_path):
    run = shutil.copytree(philens.SHIPPED, tmp_path / "run")
    (run / "model" / SUMS_FILE).unlink(missing_ok=True)
    path = run / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(AdapterError, match=r"not finite \(model\.norm\.weight\); give another model"):
        load_lens(str(run))


# Faults that look for all this can see it.


def test_faults_see_what_is_read_though_it_must_be_refused(tmp_path):
    folder = tmp_path / "subject"
    folder.mkdir()
    (folder / "a.pt").write_text("abc")
    cut = [Damage("a.pt", "cut", lambda path: path.write_text("a"), refused=True)]

    def refuses(place):
        raise AdapterError("It is refused.")

    for number, (read, found) in enumerate(
        (
            (lambda place: 1, "read, and not refused"),
            (refuses, "'nothing'.*refused: It is refused"),
            (lambda place: refuses(place) if (place / "a.pt").read_text() == "a" else 1, None),
        )
    ):
        place = tmp_path / str(number)
        place.mkdir()
        outcome = damaged(Subject(folder, read, 1), cut, place)
        assert outcome.tried == 1
        assert outcome.survived == (found is None)
        if found is not None:
            assert re.search(found, outcome.notes[0])
