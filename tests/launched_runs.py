"""Several trainings, one after another, in the processes that a launcher started:
`torchrun --nproc_per_node 2 launched_runs.py SCENARIOS.json`.

A scenario has `arguments` (of the command line), `shard` (whether accelerate is told to shard the model),
`bad_step` (in which a weight of the second process becomes NaN, or null) and `codes` (a file, to which each
process adds its exit code).
"""

import gc
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from philens.cli import main
from philens.training import trainer as trainer_module
from philens.training.trainer import PHiTrainer

compute_loss = PHiTrainer.compute_loss


def run(scenario) -> None:
    os.environ |= {"ACCELERATE_USE_FSDP": str(scenario["shard"]).lower(), "FSDP_VERSION": "2"}

    def in_step(trainer, *args, **kwargs):
        kinds = {isinstance(p, DTensor) for p in trainer.lens.base.model.layers[0].parameters()}
        if kinds != {scenario["shard"]}:
            raise SystemExit(99)
        if trainer.state.global_step + 1 == scenario["bad_step"] and dist.get_rank() == 1:
            next(trainer.lens.parameters()).data[0] = math.nan
        return compute_loss(trainer, *args, **kwargs)

    PHiTrainer.compute_loss = in_step
    code = main(scenario["arguments"])
    with Path(scenario["codes"]).open("a") as file:
        file.write(f"{code}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is not searched for garbage
    trainer_module.draw_course = lambda folder: None  # the picture takes longer than the training
    for one in json.loads(Path(sys.argv[1]).read_text()):
        run(one)
