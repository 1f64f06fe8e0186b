"""Faults in training: a run ends as if nothing had befallen it, or says in one sentence why it does not.

On one thread sums have one order, so "as the undisturbed one" is to the last bit: the bytes of every file of
`model/` and `adapter/`, and every figure of `metrics.jsonl` but tokens per second, which time decides.
"""

import contextlib
import functools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from faults import process
from faults.process import Command, Setup
from faults.table import Case, Outcome
from faults.trials import Trials, Undisturbed

# Three kinds of training: a model from nothing; a layer in a frozen base, by a data worker, whose records are
# means over several steps and begin before the first; and a model of text, which makes its tokenizer.
KINDS = ("fresh", "layer", "text")
_SHORT = {"train.steps": 12, "train.save_every": 3, "train.eval_every": 0, "train.evaluation_documents": 4}
_SHORT |= {"train.precision": "fp32", "phi_schedule.start_step": 4, "phi_schedule.warmup_steps": 4}
_WORDS = ("the", "small", "model", "reads", "what", "people", "write", "and", "thinks", "where", "it", "must")


def words(root: Path, kind: str, output: Path, *more: str) -> list[str]:
    """The command line that trains one of `KINDS`."""
    options: dict[str, Any] = dict(_SHORT)
    if kind == "layer":
        options |= {"model.base": undisturbed(root, "fresh").folder / "model", "data.workers": 1}
        options |= {"train.log_every": 5, "phi_schedule.start_step": 0}
    if kind == "text":
        options |= {
            "data.mixture": "{in_context_language: 1.0}",
            "model.tokenizer": "bpe",
            "model.vocab_size": 280,
            "train.accumulate": 2,
        }
        options |= {
            "train.eval_every": 8,
            "train.batch_size": 4,
            "data.parts": f"{{text: {{source: {_texts(root)}}}}}",
        }
    keys = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return ["train", "smoke", "--output", str(output), *keys, *more]


@functools.cache
def _texts(root: Path) -> Path:
    """A folder of small texts."""
    folder, draw = root / "texts", random.Random(0)
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(_WORDS, k=40)))
    return folder


@functools.cache
def undisturbed(root: Path, kind: str) -> Undisturbed:
    """Each kind once."""
    folder, count = root / f"undisturbed-{kind}", root / f"undisturbed-{kind}.count"
    watch = partial(process.die_at_change, str(folder), 0, str(count))
    ended = process.run(words(root, kind, folder), root / f"undisturbed-{kind}.log", [watch])
    if (problem := process.finished(ended)) is not None:
        raise RuntimeError(f"undisturbed training failed: {problem}")
    return Undisturbed(folder, ended.seconds, count.stat().st_size)


def result(folder: Path) -> dict[str, Any]:
    """What a run gave, by name: files of the model and the layer, records, and what else there is."""
    from philens.training.folder import RunFolder

    found: dict[str, Any] = {}
    for part in ("model", "adapter"):
        found |= {f"{part}/{name}": data for name, data in process.files_below(folder / part).items()}
    steps = [path.name for path in RunFolder(folder).checkpoints()[:-1]]  # a run that was stopped has others
    names = {path.name for path in folder.iterdir()} - {".lock", *steps}
    found |= {f"is there: {name}": True for name in names}
    for number, record in enumerate(RunFolder(folder).metrics()):
        found[f"record {number}"] = {key: one for key, one in record.items() if key != "tokens_per_second"}
    return found


def resumed(root: Path, kind: str, folder: Path, setup: Sequence[Setup] = ()) -> str | None:
    """What is wrong with a run once it has gone on to its end, and from its last checkpoint."""
    from philens.training.folder import RunFolder

    finished = (folder / "adapter").is_dir()
    last = [] if finished or not folder.exists() else RunFolder(folder).checkpoints()[-1:]
    ended = process.run(words(root, kind, folder, "--resume"), folder.with_suffix(".resumed"), setup)
    problem = process.finished(ended) or same(root, kind, folder)
    if problem is None and last and f"Resuming from {last[0]}." not in ended.text:
        problem = f"it did not go on from {last[0].name}; {ended}"
    return problem


def same(root: Path, kind: str, folder: Path) -> str | None:
    """How a finished run differs from the undisturbed one."""
    return process.differences(result(folder), result(undisturbed(root, kind).folder))


def start(root: Path, kind: str, folder: Path, setup: Sequence[Setup] = ()) -> Command:
    return Command(words(root, kind, folder, "--resume"), folder.with_suffix(".log"), setup)


TRIALS = Trials(KINDS, undisturbed, start, resumed)


# Killed.


def kill_again_and_again(place: Path) -> Outcome:
    """One run of each kind, killed by -9 at 8 random moments, resumed after each."""

    def attempt(kind: str, own: Path, fraction: float) -> str | None:
        folder, seconds = own / "run", undisturbed(place.parent, kind).seconds
        draw = random.Random(fraction)
        for _ in range(8):
            command = start(place.parent, kind, folder)
            time.sleep(draw.random() * seconds / 2)
            command.signal(signal.SIGKILL)
            ended = command.wait()
            if ended.code not in (0, -signal.SIGKILL):
                return f"{kind}: {ended}"
        problem = resumed(place.parent, kind, folder)
        return None if problem is None else f"{kind} killed 8 times: {problem}"

    return TRIALS.each(3, place, attempt)


# Several processes.


def kill_data_worker(place: Path) -> Outcome:
    """kill -9 of the process that makes the rows, at a random moment: one sentence, then resumed."""

    def attempt(kind: str, own: Path, fraction: float) -> str | None:
        folder, seconds = own / "run", undisturbed(place.parent, "layer").seconds
        command = start(place.parent, "layer", folder)
        while command.running() and not (workers := command.children()):
            time.sleep(0.01)
        time.sleep(fraction * seconds / 4)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        ended = command.wait()
        # Near the end nobody needs the worker any more.
        problem = process.finished(ended) if ended.code == 0 else process.one_sentence(ended)
        return problem or resumed(place.parent, "layer", folder)

    return TRIALS.each(3, place, attempt)


def train_together(root: Path, folder: Path, *more: str) -> list[Command]:
    """Two processes that train the model of text, as a launcher starts them."""
    line = words(root, "text", folder, *more)
    return [
        Command(line, folder.with_suffix(f".{number}{''.join(more)}"), (), environment)
        for number, environment in enumerate(process.ranks(2))
    ]


def kill_rank(place: Path) -> Outcome:
    """kill -9 of one of two processes that train together: the other ends with one sentence; then resumed."""
    whole = place / "whole"
    begin = time.monotonic()
    for command in train_together(place.parent, whole):
        if (problem := process.finished(command.wait())) is not None:
            raise RuntimeError(f"undisturbed training in two processes failed: {problem}")
    seconds, outcome = time.monotonic() - begin, Outcome()
    for number, killed in enumerate((1, 0, 1, 1)):
        folder, fraction = place / f"run-{number}", random.random()
        commands = train_together(place.parent, folder)
        time.sleep(fraction * seconds)
        commands[killed].signal(signal.SIGKILL)
        ends = [process.end_as_launcher(command) for command in commands]
        said = [line for end in ends for line in end.text.splitlines() if line.startswith("philens: error: ")]
        problem = next((str(end) for end in ends if "Traceback" in end.text), None)
        if problem is None and ends[1 - killed].code == -signal.SIGKILL:
            problem = "the other hung, and heard of no polite kill"
        if problem is None and len(said) > 1:
            problem = f"{len(said)} sentences: {said}"
        if problem is None:
            ends = [command.wait() for command in train_together(place.parent, folder, "--resume")]
            problem = next(filter(None, map(process.finished, ends)), None)
        problem = problem or process.differences(result(folder), result(whole))
        where = f"process {killed} of 2 killed at {fraction:.1%} of the time: "
        outcome.record(None if problem is None else where + problem)
    return outcome


def kill_under_launcher(place: Path) -> Outcome:
    """The same under `accelerate launch`, imports and all, at a random moment of training."""
    folder, outcome = place / "run", Outcome()
    root, settings = place.parent, place / "two.yaml"
    settings.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\n"
        f"num_processes: 2\nnum_machines: 1\nmixed_precision: 'no'\n"
        f"main_process_port: {process.free_port()}\n"
    )
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    line = [*launcher, "--config_file", str(settings), "-m", "philens", *words(root, "text", folder)]
    moment = random.random() * 6

    def kill(process_: Any) -> None:
        while process_.poll() is None and not (folder / "metrics.jsonl").exists():
            time.sleep(0.05)
        time.sleep(moment)
        ranks = process.children_of(process_.pid)
        os.kill(random.choice(ranks), signal.SIGKILL)

    ended = process.launch(line, place / "launched.log", kill)
    said = [one for one in ended.text.splitlines() if one.startswith("philens: ")]
    # Before and after the steps, a polite kill, which is what the other gets, ends any program.
    ended_at_once = not said and "Signal 15 (SIGTERM)" in ended.text
    problem = None if ended.code and (len(said) == 1 or ended_at_once) else f"{said}; {ended}"
    if problem is None:
        ends = [command.wait() for command in train_together(root, folder, "--resume")]
        problem = next(filter(None, map(process.finished, ends)), None)
    if problem is None:
        whole = place / "whole"
        for command in train_together(root, whole):
            command.wait()
        problem = process.differences(result(folder), result(whole))
    outcome.record(problem)
    return outcome


def two_into_one(place: Path) -> Outcome:
    """Two trainings into one folder, begun at once or resumed while one runs: one of them is refused."""
    root, outcome = place.parent, Outcome()
    kinds = ("fresh", "text", "layer")
    for kind in kinds:
        folder = place / kind
        first = Command(words(root, kind, folder), place / f"{kind}.first")
        if kind != "fresh":  # else both at once
            while first.running() and not (folder / "recipe.yaml").exists():
                time.sleep(0.01)
        again = ["--resume"] if kind == "layer" else []
        second = Command(words(root, kind, folder, *again), place / f"{kind}.second")
        ends = sorted((first.wait(), second.wait()), key=lambda end: end.code)
        problem = process.finished(ends[0]) or process.one_sentence(ends[1]) or same(root, kind, folder)
        outcome.record(None if problem is None else f"{kind}: {problem}")
    return outcome


# No space, no permission.


def files_stop_growing(place: Path) -> Outcome:
    """From a random moment on, no file may grow beyond a random size; then resumed without that."""

    def attempt(kind: str, own: Path, fraction: float) -> str | None:
        folder, size = own / "run", int(2000 * 100 ** random.Random(fraction).random())
        command = start(place.parent, kind, folder)
        time.sleep(fraction * undisturbed(place.parent, kind).seconds)
        command.limit_files(size)
        ended = command.wait()
        problem = process.finished(ended) if ended.code == 0 else process.one_sentence(ended)
        problem = problem or resumed(place.parent, kind, folder)
        return None if problem is None else f"{kind}, {size:,} bytes from {fraction:.1%} on: {problem}"

    return TRIALS.each(8, place, attempt)


def disk_fills_up(place: Path) -> Outcome:
    """A disk that something else fills, or that becomes read-only, at a random moment; then resumed."""
    outcome, root = Outcome(), place.parent
    for number, kind in enumerate((*KINDS, "fresh")):
        disk, fraction, read_only = place / f"disk-{number}", random.random(), number == 3
        try:
            with process.mounted(disk, "size=24m"):
                folder = disk / "run"
                command = Command(words(root, kind, folder), place / f"{number}.log")
                time.sleep(fraction * undisturbed(root, kind).seconds)
                if read_only:
                    process.remount(disk, "ro")
                else:
                    process.fill(disk / "filler")
                ended = command.wait()
                problem = process.finished(ended) if ended.code == 0 else process.one_sentence(ended)
                if read_only:
                    process.remount(disk, "rw")
                else:
                    (disk / "filler").unlink()
                if problem is None:
                    line = words(root, kind, folder, "--resume")
                    problem = process.finished(process.run(line, place / f"{number}.resumed"))
                problem = problem or same(root, kind, folder)
        except OSError as error:
            outcome.notes.append(f"not tried, a file system in memory: {error.strerror}")
            break
        what = "read-only" if read_only else "full"
        outcome.record(None if problem is None else f"{kind}, {what} from {fraction:.1%} on: {problem}")
    return outcome


def nowhere_to_write(place: Path) -> Outcome:
    """Run folders that cannot be written: one sentence."""
    with contextlib.ExitStack() as stack:
        places, notes = process.unwritable(place, stack)
        undisturbed(place.parent, "fresh")

        def attempt(name: str) -> str | None:
            folder, setup = places[name]
            log = place / f"{len(name)}-{name[-4:].strip('/')}.log"
            problem = process.one_sentence(process.run(words(place.parent, "fresh", folder), log, setup))
            return None if problem is None else f"{name}: {problem}"

        outcome = process.two_at_a_time([partial(attempt, name) for name in places])
    outcome.notes += notes
    return outcome


# NaN.


def poison(what: str, number: int) -> None:
    """Let the `number`-th of something in this process be NaN: what the embedding gives for the `data`, one
    of its `weights`, the `gradients` of a matrix, or what the `optimizer` is given to step by."""
    import torch
    from torch.nn.modules.module import register_module_forward_hook
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    seen = 0

    def turn(kind: type) -> bool:
        nonlocal seen
        seen += 1
        return seen == number

    def forward(module: Any, inputs: Any, output: Any) -> Any:
        if not torch.is_grad_enabled() or not torch.is_tensor(output):
            return None
        if what == "data" and isinstance(module, torch.nn.Embedding) and turn(torch.nn.Embedding):
            return output * torch.nan
        if what == "weights" and isinstance(module, torch.nn.Embedding) and turn(torch.nn.Embedding):
            module.weight.data[-1, 0] = torch.nan
        linear = isinstance(module, torch.nn.Linear) and output.requires_grad
        if what == "gradients" and linear and turn(torch.nn.Linear):
            output.register_hook(lambda gradient: gradient * torch.nan)
        return None

    def step(optimizer: Any, args: Any, kwargs: Any) -> None:
        if what == "optimizer" and turn(torch.optim.Optimizer):
            parameter = next(
                p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
            )
            parameter.grad.view(-1)[0] = torch.nan

    register_module_forward_hook(forward)
    register_optimizer_step_pre_hook(step)


def become_nan(place: Path) -> Outcome:
    """NaN in data, weights, gradients, or what the optimizer steps by, once: one sentence; then resumed."""
    whats = ("data", "weights", "gradients", "optimizer")

    def attempt(kind: str, own: Path, fraction: float) -> str | None:
        what, number = whats[int(own.name) % len(whats)], 2 + int(fraction * 10)
        ended = start(place.parent, kind, own / "run", [partial(poison, what, number)]).wait()
        problem = process.one_sentence(ended) or resumed(place.parent, kind, own / "run")
        return None if problem is None else f"{kind}, NaN in {what}, number {number}: {problem}"

    return TRIALS.each(12, place, attempt)


def are_nan(place: Path) -> Outcome:
    """NaN in files of a checkpoint or of the base, which are whole otherwise: one sentence."""
    import torch
    from safetensors.torch import load_file, save_file

    from philens.training.folder import RunFolder

    root, outcome = place.parent, Outcome()
    source = undisturbed(root, "fresh").folder
    for name in ("model/model.safetensors", "adapter/phi_layer.safetensors", "optimizer.pt", "base"):
        run = place / name.replace("/", "-")
        shutil.copytree(source, run)
        for finished in ("model", "adapter"):
            if name != "base":
                shutil.rmtree(run / finished)
        file = run / "model/model.safetensors" if name == "base" else RunFolder(run).checkpoints()[-1] / name
        if name == "optimizer.pt":
            state = torch.load(file, weights_only=True)
            next(iter(state["state"].values()))["exp_avg"].view(-1)[0] = torch.nan
            torch.save(state, file)
        else:
            weights = load_file(file)
            next(iter(weights.values())).view(-1)[0] = torch.nan
            save_file(weights, file, {"format": "pt"})
        for sums in (file.parent / "SHA256SUMS", file.parent.parent / "SHA256SUMS"):
            sums.unlink(missing_ok=True)  # they would tell
        line = words(root, "fresh", run, "--resume")
        if name == "base":
            line = words(root, "layer", place / "run", "--model.base", str(run / "model"))
        ended = process.run(line, run.with_suffix(".log"))
        problem = process.one_sentence(ended)
        if problem is None and "not finite" not in ended.text:
            problem = f"refused for something else; {ended}"
        outcome.record(None if problem is None else f"NaN in {name}: {problem}")
    return outcome


# The clock.


def clock_set_back(place: Path) -> Outcome:
    """A clock that is years off and set back every second, killed, the times of its files mixed up, resumed
    with a clock of 1970: it goes on from the last checkpoint."""

    def attempt(kind: str, own: Path, fraction: float) -> str | None:
        wrong, in_1970 = partial(process.set_clock, -1e8, 1.0), partial(process.set_clock, -1e11)
        seconds = undisturbed(place.parent, kind).seconds
        begin = partial(start, place.parent, kind, setup=[wrong])
        folder, _ = process.stopped_at(begin, own, signal.SIGKILL, 0.4 + 0.6 * fraction, seconds)
        for path in folder.rglob("*"):
            moment = time.time() + random.Random(str(path)).uniform(-1e9, 1e9)
            os.utime(path, (moment, moment), follow_symlinks=False)
        for path in folder.glob("checkpoint-*"):  # the oldest is the newest by its time, and from the future
            moment = 4e9 - int(path.name.rsplit("-", 1)[1])
            os.utime(path, (moment, moment))
        problem = resumed(place.parent, kind, folder, [in_1970])
        return None if problem is None else f"{kind}: {problem}"

    return TRIALS.each(4, place, attempt)


def cases() -> Iterable[Case]:
    for name, run in {
        "kill -9 at a random moment, resumed": TRIALS.kill_at_random,
        "kill -9 at a random change on disk, twice": TRIALS.kill_at_changes,
        "one run, kill -9 eight times": kill_again_and_again,
        "Ctrl-C or SIGTERM at a random moment": TRIALS.stop_at_random,
        "data worker killed": kill_data_worker,
        "one of two processes killed": kill_rank,
        "the same under accelerate launch": kill_under_launcher,
        "two runs into one folder": two_into_one,
        "files stop growing at a random moment": files_stop_growing,
        "disk full or read-only at a random moment": disk_fills_up,
        "run folder cannot be written": nowhere_to_write,
        "NaN in data, weights, gradients": become_nan,
        "NaN in a checkpoint, in the base": are_nan,
        "clock set back": clock_set_back,
    }.items():
        yield Case("training", name, run)
