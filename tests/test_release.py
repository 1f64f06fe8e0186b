"""What is released: metadata that agree, a wheel with all it needs, and philens without its extras."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from releasing import dist, layer
from releasing.steps import Failed, requirements, same_release
from rich.console import Console
from safetensors.torch import load_file, save_file

import philens
from philens.commands.environment import environment
from philens.support.errors import ConfigError
from philens.support.extras import require
from philens.training.folder import RunFolder
from philens.training.recipe import load_recipe, recipe_yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What an extra brings is imported by these names.
MODULES = (
    "bitsandbytes",
    "gguf",
    "gradio",
    "minicons",
    "mkdocstrings",
    "peft",
    "ray",
    "tensorboard",
    "trl",
    "vllm",
    "wandb",
    "zensical",
)


def test_one_version_everywhere():
    assert metadata.version("philens") == philens.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == philens.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == philens.__version__
    assert (citation["license"], citation["title"].partition(":")[0]) == (PROJECT["license"], PROJECT["name"])
    (paper,) = citation["references"]
    assert "2503.13431" in paper["url"]


def test_extras_are_documented_and_bounds_agree():
    page = (ROOT / "docs" / "extras.md").read_text()
    found = requirements()  # each has a lower bound
    for extra in EXTRAS:
        row = re.search(rf"^\| `{extra}` \|.*$", page, re.MULTILINE)
        assert row, extra
        for one in found:
            if one.extra == extra and extra not in ("test", "release"):
                assert f"{one.package} {one.least}" in row[0].lower().replace("≥ ", ""), one
    for one in found:
        if one.package in ("torch", "transformers"):
            assert f"{one.package} {one.least}" in page
    # What tests use of other extras has the bound that is promised there.
    least = {one.package: one.least for one in found if one.extra not in (None, "test")}
    for one in found:
        if one.extra == "test" and one.package in least:
            assert one.least == least[one.package], one.package


def test_versions_are_compared_as_releases():
    assert same_release("2.13.0+cpu", "2.13")
    assert same_release("6.0", "6")
    assert not same_release("2.10", "2.1")
    assert not same_release("", "2.1")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_is_the_package_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        about = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
        commands = archive.read(next(name for name in names if name.endswith("/entry_points.txt"))).decode()
    outside = [name for name in names if not name.startswith(("philens/", "philens-"))]
    assert outside == []
    assert not [
        name
        for name in names
        if "tests/" in name or "test_" in name.replace("driving_test", "") or "__pycache__" in name
    ]
    for name in ("py.typed", "recipes/smoke.yaml", "shipped/small/model/model.safetensors", "cli.py"):
        assert f"philens/{name}" in names
    package = ROOT / "src" / "philens"
    for folder in ("recipes", "shipped"):
        here = {
            path.relative_to(package).as_posix() for path in (package / folder).rglob("*") if path.is_file()
        }
        assert {f"philens/{path}" for path in here} <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "philens = philens.cli:main" in commands
    assert f"Version: {philens.__version__}\n" in about
    assert "License-Expression: MIT\n" in about
    assert set(re.findall(r"^Provides-Extra: (.+)$", about, re.MULTILINE)) == set(EXTRAS)


def test_a_file_too_many_or_too_few_is_named():
    with pytest.raises(dist.Failed, match=r"x.whl misses b \(1 files\)"):
        dist._compare("x.whl", {"a"}, {"a", "b"})
    with pytest.raises(dist.Failed, match=r"x.whl must not hold c, d \(2 files\)"):
        dist._compare("x.whl", {"a", "c", "d"}, {"a"})


def test_environment_says_what_a_report_needs():
    sections = environment()
    system = sections["system"]
    assert system["philens"] == philens.__version__
    assert "small (adapter)" in system["models"]
    assert {"python", "platform", "devices", "threads"} <= set(system)
    declared = [one for one in requirements() if one.extra is None]
    assert set(sections["dependencies"]) == {one.package for one in declared}
    assert "not installed" not in sections["dependencies"].values()
    assert set(sections["extras"]) == set(EXTRAS)
    said = json.dumps(sections)
    assert str(Path.home()) not in said
    assert str(ROOT) not in said


def test_what_require_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert require("json", "any", "It") is json
    with pytest.raises(ConfigError) as caught:
        require("philens_none.part", "any", "It")
    assert str(caught.value) == "It needs philens_none: install it with `pip install 'philens[any]'`."
    (tmp_path / "philens_broken.py").write_text("import philens_none")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        require("philens_broken", "any", "It")
    assert str(caught.value) == (
        "It needs philens_broken, which is installed but cannot be imported "
        "(No module named 'philens_none'); "
        "install it again with `pip install --upgrade 'philens[any]'`."
    )


# As in an environment without the extras: neither modules nor their distributions are found.
WITHOUT = """
import contextlib, io, json, sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in BLOCKED else PathFinder.find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context):
        return (one for one in PathFinder.find_distributions(*context) if one.name.lower() not in BLOCKED)

BLOCKED = set(sys.argv[1].split(","))
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
import philens
from philens.cli import main

done = []
for words in json.loads(sys.argv[2]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    done.append((code, out.getvalue(), err.getvalue()))
philens.PHiReward
print(json.dumps(done))
"""


def test_without_any_extra(tmp_path: Path):
    (tmp_path / "text.txt").write_text("abc abd abc")
    model = str(philens.SHIPPED / "model")
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
    save_file({"weight": torch.ones(1)}, lora / "adapter_model.safetensors")
    works = [
        ["--help"],
        ["demo", "--documents", "2"],
        ["env"],
        ["score", "text.txt", "--model", str(philens.SHIPPED)],
    ]
    train = ["train", "smoke", "--output", "run"]
    needs = {
        "explore": (["explore"], "philens explore needs gradio"),
        "gguf": (["solve", "--model", "model.gguf", "--problems", "arithmetic"], "A GGUF file needs gguf"),
        "lora": (
            ["solve", "--model", "lora", "--problems", "arithmetic"],
            "lora, an adapter of peft, needs peft",
        ),
        "quantize": (
            ["train", "any_model", "--model.base", model, "--phi.layer", "1", "--model.quantization", "int4"],
            "A base in int4 needs bitsandbytes",
        ),
        "ray": (["score", "text.txt", "--engine", "ray"], "The engine ray needs ray"),
        "tensorboard": (
            [*train, "--train.report_to", "tensorboard"],
            "train.report_to tensorboard needs tensorboard",
        ),
        "wandb": ([*train, "--train.report_to", "wandb"], "train.report_to wandb needs wandb"),
        "vllm": (
            ["solve", "--model", model, "--problems", "arithmetic", "--engine", "vllm", "--output", "solved"],
            "The engine vllm needs vllm",
        ),
    }
    commands = json.dumps(works + [words for words, _ in needs.values()])
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT, ",".join(MODULES), commands],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        # Formal languages alone; tests/test_demo.py has SmolLM2 read.
        env=os.environ | {"PHILENS_CACHE": str(tmp_path / "cache"), "PIP_FIND_LINKS": ""},
    )
    assert run.returncode == 0, run.stderr
    done = json.loads(run.stdout.splitlines()[-1])
    for words, (code, out, err) in zip(works, done, strict=False):
        assert code == 0, (words, err)
        assert out
    assert (tmp_path / "philens-demo" / "tasks" / "page.html").is_file()
    assert re.search(r"explore +gradio not installed", done[2][1])
    for (extra, (_, start)), (code, out, err) in zip(needs.items(), done[len(works) :], strict=True):
        assert (code, out) == (2, ""), (extra, err)
        assert err == f"philens: error: {start}: install it with `pip install 'philens[{extra}]'`.\n"
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "solved").exists()


def test_the_layer_of_a_run_ships_without_what_is_of_its_machine(tmp_path, text_model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layer, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    shutil.copytree(text_model / "model", "tiny")
    shutil.copytree(text_model / "adapter", "run/checkpoint-2/adapter")
    notes = tmp_path / "here" / "train.jsonl"
    notes.parent.mkdir()
    notes.write_text("{}")
    parts = {"notes": {"source": str(notes)}, "code": {"source": "installed"}}
    recipe = load_recipe("any_model", {"model.base": str(tmp_path / "tiny"), "data.parts": parts})
    Path("run/recipe.yaml").write_text(recipe_yaml(recipe))
    Path("run/versions.json").write_text("{}")
    Path("run/metrics.jsonl").write_text('{"step": 1, "eval/phi": 2.5}\n{"step": 2}\n{"step": 3}\n')

    layer.ship(Console(width=200), Path("run/checkpoint-2"), "tiny")
    assert "after step 2" in capsys.readouterr().out
    shipped = load_recipe("shipped/tiny/recipe.yaml")
    assert shipped.model.base == "tiny"
    assert {name: part.source for name, part in shipped.data.parts.items()} == {
        "notes": "notes",
        "code": "installed",
    }
    assert [record["step"] for record in RunFolder("shipped/tiny").metrics()] == [1, 2]
    files = [path for path in Path("shipped").rglob("*") if path.suffix in (".json", ".yaml", ".md")]
    assert len(files) == 4
    assert not any(str(tmp_path) in path.read_text() for path in files)
    # As it was, but for what bfloat16 rounds.
    before = load_file("run/checkpoint-2/adapter/phi_layer.safetensors")
    after = load_file("shipped/tiny/adapter/phi_layer.safetensors")
    for name, value in before.items():
        rounded = value.bfloat16() if value.ndim > 1 else value
        assert after[name].dtype == rounded.dtype
        assert torch.equal(after[name], rounded)
    lens, _ = philens.load_run("shipped/tiny")
    assert {parameter.dtype for parameter in lens.phi.parameters()} == {torch.float32}

    # Nothing is written of a layer that rounding changes.
    monkeypatch.setattr(layer, "MOST", 0.0)
    shutil.rmtree("shipped/tiny")
    with pytest.raises(Failed, match="phi of a text may differ by 0%"):
        layer.ship(Console(), Path("run/checkpoint-2"), "tiny")
    assert not Path("shipped/tiny").exists()
