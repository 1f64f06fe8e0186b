"""Several processes that train one model: what each reads, who speaks, and the whole of what is sharded."""

import contextlib
import functools
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils.data import Sampler

from philens.support.errors import PhilensError, TrainingError
from philens.support.output import printable
from philens.training.recipe import TrainRecipe

_FAILED = "philens/failed"


def join() -> tuple[int, int]:
    """Join the processes that `accelerate launch` or `torchrun` started, if they are several.

    Returns:
        This process's rank, and the number of processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    from accelerate import PartialState

    # Loading a base on the first process only would leave no hidden states to calibrate a layer by on others.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.process_index:
        logging.getLogger("philens").setLevel(logging.ERROR)  # the first process speaks for all
    return state.process_index, state.num_processes


def is_sharded() -> bool:
    """Whether accelerate was told to shard the model.

    Raises:
        TrainingError: by FSDP1.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise TrainingError(
            "A model is sharded by FSDP2 only; give accelerate launch --fsdp_version 2, or set "
            "fsdp_version: 2 in its configuration."
        )
    return True


def processes() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def passes_each(train: TrainRecipe, processes: int) -> int:
    """Forward passes of a step that each process makes.

    Raises:
        TrainingError: they cannot be shared out evenly.
    """
    if train.accumulate % processes:
        rows = train.batch_size * train.accumulate
        way = f"make train.accumulate a multiple of {processes}"
        if rows % processes == 0:
            way = (
                f"--train.batch_size {rows // processes} --train.accumulate {processes} reads as many rows "
                "in a step"
            )
        raise TrainingError(
            f"The {train.accumulate} forward passes of a step (train.accumulate) cannot be shared among "
            f"{processes} processes; {way}."
        )
    return train.accumulate // processes


class StepSampler(Sampler[int]):
    """The rows of a training set in the order that accelerate deals them out in.

    It gives each process a batch in turn. A process should get passes of a step that follow each other: rows
    are made in groups, and a group that several processes need is made by each of them.

    Args:
        steps, passes, batch_size: rows in the set are their product.
        processes: among which the passes of each step are shared.
    """

    def __init__(self, steps: int, passes: int, batch_size: int, processes: int) -> None:
        self.steps, self.passes, self.batch_size, self.processes = steps, passes, batch_size, processes

    def __len__(self) -> int:
        return self.steps * self.passes * self.batch_size

    def __iter__(self) -> Iterator[int]:
        each = self.passes // self.processes
        for step in range(self.steps):
            for dealt in range(self.passes):
                number = step * self.passes + dealt % self.processes * each + dealt // self.processes
                yield from range(number * self.batch_size, (number + 1) * self.batch_size)


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor that each process has; `values` itself is changed."""
    if processes() > 1:
        dist.all_reduce(values)
        values /= processes()
    return values


@functools.cache
def _talk() -> Any:
    """A process group on the CPU, whose answers do not wait for an accelerator."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def any_process(flag: bool) -> bool:
    """Whether the flag is set in one of the processes; all of them must ask."""
    if processes() == 1:
        return flag
    found = torch.tensor(float(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_talk())
    return bool(found)


def wait_for_all() -> None:
    """Go on when every process has come here."""
    any_process(False)


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Of several processes, let the first that fails say why; the others, which fail by that, end quietly
    with its exit code."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        try:
            error = _of_data_worker(error)
        except RuntimeError as late:  # torch tells of a worker's end by a signal, which may come only now
            error = _of_data_worker(late)
        if processes() == 1:
            raise error
        code = 130 if isinstance(error, KeyboardInterrupt) else 2
        if not _first_to_fail():
            raise SystemExit(code) from error
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            error = TrainingError(
                "Another process of this training ended without a word (killed, or out of memory); "
                "--resume goes on from the last checkpoint."
            )
        elif not isinstance(error, PhilensError | OSError | KeyboardInterrupt):
            raise  # a mistake of ours: the traceback is wanted
        if dist.get_rank() == 0:
            raise error from None
        sys.stderr.write(printable(f"philens: error: {error}\n"))
        raise SystemExit(code) from None


def _of_data_worker(error: BaseException) -> BaseException:
    """What befell a data worker, in a sentence; any other error, and mistakes of ours, as they are."""
    text = " ".join(str(error).split())
    places = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    # Rows are fetched from a worker by a connection, which may break before its end is noticed.
    cut_off = isinstance(error, EOFError | OSError) and "_try_get_data" in places
    if "DataLoader worker" not in text and not cut_off:
        return error
    if "Traceback" not in text:
        return TrainingError(
            "A data worker ended without a word (killed, or out of memory or shared memory); --resume goes "
            "on from the last checkpoint, with another data.workers if you like."
        ).with_traceback(error.__traceback__)
    # torch hands on a worker's error with the worker's traceback as its message.
    reason = str(error).strip().splitlines()[-1].partition(": ")[2]
    return type(error)(reason) if isinstance(error, PhilensError | OSError) else error


def _first_to_fail() -> bool:
    try:
        return dist.distributed_c10d._get_default_store().add(_FAILED, 1) == 1
    except RuntimeError:  # the store is gone with the process that kept it
        return False


def whole(value: Any, keep: bool = True) -> Any:
    """A value, and what lists and dicts in it hold, with sharded tensors whole on the CPU; all processes must
    ask. Without `keep`, tensors that are sharded become None."""
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, dict):
        return {key: whole(one, keep) for key, one in value.items()}
    if isinstance(value, list):
        return [whole(one, keep) for one in value]
    return value


@contextlib.contextmanager
def whole_weights(model: nn.Module, keep: bool) -> Iterator[None]:
    """Within this context, a model's sharded parameters are whole, on the CPU; all processes must enter.

    Args:
        keep: whether this process keeps them; its model is of no use otherwise.
    """
    model.state_dict()  # of a sharded model, takes back what a forward pass left whole
    sharded, found = [], {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                sharded.append((module, name, parameter))
                if id(parameter) not in found:  # tied weights stay tied
                    full = whole(parameter.detach(), keep)
                    found[id(parameter)] = nn.Parameter(full, parameter.requires_grad) if keep else None
    try:
        for module, name, parameter in sharded:
            module._parameters[name] = found[id(parameter)]
        yield
    finally:
        for module, name, parameter in sharded:
            module._parameters[name] = parameter


def shard_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's whole state, sharded as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def like(parameter: Tensor, value: Any) -> Any:
        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    sharded = {
        number: {name: like(parameters[number], value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return state | {"state": sharded}
