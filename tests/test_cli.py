import os
import re
import subprocess
import sys

import pytest
import yaml

from philens import __version__, cli
from philens.commands import lens
from philens.support.errors import ConfigError
from philens.training.opening import load_run
from philens.training.recipe import load_recipe
from tiny import TINY, as_options, tiny_values


@pytest.fixture
def philens(capsys, caplog):
    """Run a command in this process: exit code, what was printed, and the error."""

    def run(*words):
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def error_of(philens):
    def run(*words):
        code, out, err = philens(*words)
        assert code == 2
        assert out == ""
        assert re.fullmatch(r"philens: error: [^\n]+\.\n", err), err
        return err.removeprefix("philens: error: ").strip()

    return run


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_help_and_version_do_not_wait_for_torch():
    code = (
        "import sys; from philens.cli import main; "
        "codes = [main(['--help']), main(['train', '--help']), main(['--version']), main([])]; "
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'scipy', 'pandas'} & set(sys.modules); "
        "sys.exit(f'{codes} {heavy}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == "[0, 0, 0, 2] set()"
    assert f"philens {__version__}" in done.stdout
    for command in cli.COMMANDS:
        assert re.search(rf"^    {command} ", done.stdout, re.MULTILINE) or command in done.stdout


def test_help_describes_every_option(philens):
    def every(commands, words):
        for name, command in commands.items():
            if isinstance(command, dict):
                yield from every(command, [*words, name])
            else:
                yield [*words, name], command

    found = list(every(cli.COMMANDS, []))
    assert ["reproduce", "texts"] in [words for words, _ in found]
    for words, command in found:
        code, out, _ = philens(*words, "--help")
        assert code == 0
        for name in cli._parameters(command):
            described = rf"^  ({name if name != 'files' else 'FILE'}|--{name.replace('_', '-')}( \S+)?)\s+\S"
            assert re.search(described, out, re.MULTILINE), (words, name)
        assert "None" not in out


def test_print_config_is_the_whole_recipe(philens, tmp_path):
    code, out, err = philens("train", "smoke", "--print_config", "--train.steps", "7", "--model.layers=3")
    assert (code, err) == (0, "")
    path = tmp_path / "mine.yaml"
    path.write_text(out)
    expected = load_recipe("smoke", {"train.steps": 7, "model.layers": 3})
    assert load_recipe(path) == expected
    assert yaml.safe_load(out)["optimizer"]["weight_decay"] == 0.0
    assert philens("train", path, "--print-config")[1] == out
    assert not (tmp_path / "runs").exists()


def test_a_plain_base_is_told_how_to_get_a_layer(philens, tmp_path):
    keys = {key: value for key, value in tiny_values(train__steps=3).items() if not key.startswith("phi")}
    keys |= {"phi": None, "phi_schedule.start_step": 0, "phi_schedule.warmup_steps": 0}
    code, out, err = philens("train", "smoke", *as_options(keys), "--output", "base")
    assert code == 0, err
    assert "philens train any_model --model.base base/model" in out
    assert (tmp_path / "base" / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "base" / "adapter").exists()


def test_train_takes_any_key(philens, tmp_path):
    keys = tiny_values(train__steps=5, name="mine", phi__layer=-1, data__mixture__copy=3, seed=4)
    code, out, err = philens("train", "smoke", *as_options(keys))
    assert code == 0, err
    assert "Wrote runs/mine; read it with philens.load_run('runs/mine')." in out
    lens, recipe = load_run(tmp_path / "runs" / "mine")
    assert lens.module_paths[0] == "model.layers.1"
    assert recipe.data.mixture["copy"] == 3.0
    assert recipe.seed == 4
    assert recipe.train.batch_size == TINY["train.batch_size"]


def test_env(philens):
    code, out, _ = philens("env")
    assert code == 0
    assert re.search(r"^  torch +2\.", out, re.MULTILINE)
    base = "base (not fetched yet|fetched)"
    assert re.search(rf"^  models +small \(adapter\); smollm2 \(adapter, {base}\)$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "invalid choice: 'trian'"),
        (["--foo"], "see philens --help."),
        (["train"], "The following arguments are required: recipe; see philens train --help."),
        (["train", "nothing"], "There is no recipe nothing; give a YAML file or one of any_model,"),
        (["train", "smoke", "--ouptut", "x"], "no option --ouptut; the nearest valid one is --output."),
        (["train", "smoke", "--steps", "3"], "no option --steps; the nearest valid one is --train.steps."),
        (["train", "smoke", "--train.stesp", "3"], "the nearest valid one is 'train.steps'."),
        (["train", "smoke", "--train.steps"], "--train.steps needs a value."),
        (["train", "smoke", "--train.steps", "--resume"], "--train.steps needs a value."),
        (["train", "smoke", "--train.steps", "few"], "train.steps must be a whole number, not 'few'."),
        (["train", "smoke", "--output"], "--output: expected one argument"),
        (["train", "smoke", "--resume=3"], "--resume: ignored explicit argument '3'"),
        (["train", "smoke", "more"], "Unrecognized arguments: more"),
        (["train", "smoke", "--phi.layer", "9"], "Layer 9 is out of range: LlamaForCausalLM has 2 blocks"),
        (["train", "smoke", "--phi.module", "model.blocks.0"], "There is no module 'model.blocks.0'"),
        (["reproduce", "everything"], "invalid choice: 'everything' (choose from"),
        (["reproduce"], "The following arguments are required: FINDING; see philens reproduce --help."),
        (["reproduce", "tasks", "--scale", "big"], "--scale must be one of smoke, small, paper, not 'big'."),
        (["reproduce", "tasks", "--seeds", "x"], "--seeds must be a whole number, not 'x'."),
        (["reproduce", "tasks", "--seeds", "0"], "seeds must be at least 1"),
        (["reproduce", "tasks", "--documents", "1"], "documents at least 2."),
        (["reproduce", "tasks", "--model", "nowhere"], "nowhere is not a run folder"),
        (["reproduce", "tasks", "--model", "x", "--seeds", "2"], "leave out seeds and recipe keys"),
        (["demo", "--documents", "1"], "documents must be at least 2, not 1."),
        (["demo", "--documnets", "1"], "no option --documnets; the nearest valid one is --documents."),
        (["demo", "--train.steps", "1"], "There is no option --train.steps"),
        (["env", "--all"], "There is no option --all; the nearest valid one is --help."),
    ],
)
def test_errors_are_one_sentence(error_of, words, message, tmp_path):
    assert message in error_of(*words)
    assert not list(tmp_path.iterdir())


def test_output_that_cannot_be_written(error_of, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file is a file; choose another --output." in error_of("train", "smoke", "--output", "file")
    assert "Not a directory" in error_of("train", "smoke", "--output", "file/run")
    (tmp_path / "runs").write_text("")
    assert "Not a directory" in error_of("train", "smoke")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    assert "full is not empty; give --resume" in error_of("train", "smoke", "--output", "full")


def test_unexpected_errors_of_the_system(error_of, monkeypatch):
    def denied():
        """Fails."""
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setitem(cli.COMMANDS, "env", denied)
    assert error_of("env") == "/somewhere: Permission denied; check the path and the space left there."


def test_ctrl_c_at_any_moment(philens, monkeypatch):
    def stop():
        """Stops."""
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "env", stop)
    code, _, err = philens("env")
    assert code == 130
    assert err == (
        "philens: stopped; train goes on with --resume, solve, sweep and reproduce by the same command.\n"
    )


def test_split_keys():
    words = "small --print_config --train.steps=3 --phi.layer -1 --output=a_b=c --seed 2"
    own, keys = cli.split_keys(lens.train, words.split())
    assert own == ["small", "--print-config", "--output=a_b=c"]
    assert keys == {"train.steps": "3", "phi.layer": "-1", "seed": "2"}
    with pytest.raises(ConfigError):
        cli.split_keys(lens.demo, ["--seed", "2"])


def test_the_module_is_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "philens.cli", "train"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("philens: error: The following arguments are required: recipe")
