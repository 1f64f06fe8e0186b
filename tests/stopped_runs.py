"""Train in processes of their own, each with a mishap: `python stopped_runs.py SCENARIOS.json`.

A scenario has `arguments` (of the command line), `mishap` and `step` (what happens, and in which step), and
`log` (a file for what the process says). Torch is imported once; each scenario is a fork, which writes its
exit code to `log` with the suffix `.code`, unless it is killed.
"""

import gc
import json
import os
import resource
import signal
import sys
from pathlib import Path

import torch

from philens.cli import main
from philens.training import trainer as trainer_module
from philens.training.folder import RunFolder
from philens.training.trainer import PHiTrainer

compute_loss, save_model = PHiTrainer.compute_loss, RunFolder.save_model


def kill(trainer):
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(trainer):
    os.kill(os.getpid(), signal.SIGINT)


def fill_disk(trainer):
    """From now on, no file may grow to the size of the optimizer's state."""
    checkpoint = max(trainer.run.path.glob("checkpoint-*"))
    sizes = sorted(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    limit = (sizes[-2] + sizes[-1]) // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def fill_disk_to_the_brim(trainer):
    """From now on, no file may grow beyond what a record needs."""
    size = trainer.run.metrics_file.stat().st_size + 1000
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


MISHAPS = {f.__name__: f for f in (kill, interrupt, fill_disk, fill_disk_to_the_brim)}


def run(scenario) -> None:
    trainer_module.draw_course = lambda folder: None  # the picture takes longer than the training
    done = []

    def in_step(trainer, *args, **kwargs):
        if trainer.state.global_step + 1 == scenario["step"] and not done:
            done.append(True)  # only in the first pass of the step
            MISHAPS[scenario["mishap"]](trainer)
        return compute_loss(trainer, *args, **kwargs)

    def while_saving(folder, *args):
        save_model(folder, *args)
        if f"checkpoint-{scenario['step']}." in folder.path.name:
            kill(folder)

    if scenario["mishap"] == "kill_while_saving":
        RunFolder.save_model = while_saving
    else:
        PHiTrainer.compute_loss = in_step
    output = os.open(scenario["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = main(scenario["arguments"])
    Path(scenario["log"] + ".code").write_text(str(code))
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is not searched for garbage
    for one in json.loads(Path(sys.argv[1]).read_text()):
        child = os.fork()
        if child == 0:
            run(one)
        os.waitpid(child, 0)
