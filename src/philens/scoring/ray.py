"""Shards scored by workers of a Ray cluster, one model each, in a pipeline of Ray Data.

One task reads the input and hands on the shards that the folder lacks; it waits when the workers don't keep
up. Each worker writes its shards into the folder itself, whole or not at all. A worker that dies is started
again and its shard given once more, which replaces what was there by the same rows; so each row is there
exactly once. The machines must see the inputs, the model and the folder under the same paths.
"""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from philens.bases.hub import reason
from philens.scoring.corpus import Corpus, Document
from philens.scoring.shards import Done, Job, Shard, Writer
from philens.support.errors import ConfigError, InputError, OutputError, PhilensError
from philens.support.extras import require

# A shard on which so many workers died would kill any number of them.
_RETRIES = 4
# Ray keeps to itself: no statistics are sent; it warns at each start of actors that can be started again.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
Rows = dict[str, list[Any]]


@dataclass(frozen=True)
class RaySchedule:
    """A `philens.scoring.shards.Schedule` on the cluster of RAY_ADDRESS, else on one that starts here.

    Attributes:
        workers: models at work at once; None means one for each GPU of the cluster, or one where it has none.
    """

    workers: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers must be at least 1, not {self.workers}.")
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        require("ray.data", "ray", "The engine ray")

    def __call__(self, job: Job, done: Done) -> Iterator[None]:
        """Have the shards of a job written, and yield after each.

        Raises:
            InputError: a document cannot be read or scored, or a worker cannot write.
            OutputError: Ray gave up.
        """
        import ray
        from ray.exceptions import RayError

        started = not ray.is_initialized()
        if started:
            self._connect()
        try:
            for row in self._pipeline(job):
                if row["error"]:
                    raise InputError(row["error"])
                if row["total"]:
                    job.total = row["total"]
                    if isinstance(job.documents, Corpus):
                        job.documents.skipped = row["skipped"]
                else:
                    done(row["documents"], row["tokens"], row["end"])
                    yield
        except RayError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1].rstrip(".")
            raise OutputError(
                f"Ray gave up on {job.writer.folder} ({reason}); the same command goes on from what is there."
            ) from error
        finally:
            if started:
                ray.shutdown()

    def _connect(self) -> None:
        import ray

        address = os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"address": address}
        if address is None:
            options = {"address": "local", "include_dashboard": False}
            if self.workers is not None:
                options["num_cpus"] = max(self.workers, os.cpu_count() or 1)
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ConfigError(
                f"Ray cannot be reached ({reason(error)}); check RAY_ADDRESS or unset it."
            ) from error

    def _pipeline(self, job: Job) -> Iterator[dict[str, Any]]:
        import ray
        from ray.data import ActorPoolStrategy, DataContext
        from ray.util.annotations import RayDeprecationWarning

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # each row, one shard, is a block of its own
        gpus = int(ray.cluster_resources().get("GPU", 0))
        shards = ray.data.from_items([0], override_num_blocks=1).map_batches(
            partial(_read, job, os.getcwd()),
            batch_size=None,
            num_cpus=0,  # it shall not wait for a worker's processor
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
        )
        with warnings.catch_warnings():
            # Ray is to rename arguments and has as yet no other names for those of restarts.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            rows = shards.map_batches(
                _Worker,
                fn_constructor_args=[job.writer, os.getcwd()],
                batch_size=None,
                compute=ActorPoolStrategy(size=self.workers or max(gpus, 1), max_tasks_in_flight_per_actor=2),
                num_cpus=1,
                num_gpus=1 if gpus else 0,
                max_restarts=-1,
                max_task_retries=_RETRIES,
            )
        yield from rows.iter_rows()


def _read(job: Job, folder: str, _: Any) -> Iterator[Any]:
    """Rows with a shard each, then one with what was read."""
    _go_to(folder)
    try:
        for shard, known in job.shards():
            if not known:
                documents = [[document.id, document.content, document.end] for document in shard.documents]
                yield _row(number=shard.number, digest=shard.digest, documents=json.dumps(documents))
    except (PhilensError, OSError) as error:
        yield _row(error=str(error))
    else:
        yield _row(total=job.total, skipped=getattr(job.documents, "skipped", 0))


def _row(**values: Any) -> Rows:
    empty = {"number": 0, "digest": "", "documents": "", "total": 0, "skipped": 0, "error": ""}
    return {name: [value] for name, value in (empty | values).items()}


class _Worker:
    """A process with a model, that scores and writes shards."""

    def __init__(self, writer: Writer, folder: str) -> None:
        _go_to(folder)
        self.writer = writer

    def __call__(self, rows: Rows) -> Rows:
        """What came of the shards: `documents`, `tokens`, where they `end`, or an `error`."""
        results = []
        for number, digest, documents, total, skipped, error in zip(*rows.values(), strict=True):
            result = {
                "documents": 0,
                "tokens": 0,
                "end": 0,
                "total": total,
                "skipped": skipped,
                "error": error,
            }
            if documents:
                shard = Shard(number, [Document(*one) for one in json.loads(documents)], digest)
                try:
                    record = self.writer.write(shard)
                    result |= {"documents": record.documents, "tokens": record.tokens}
                    result["end"] = shard.documents[-1].end
                except (PhilensError, OSError) as failure:
                    result["error"] = str(failure)
            results.append(result)
        return {name: [result[name] for result in results] for name in results[0]}


def _go_to(folder: str) -> None:
    """Names without a folder mean the same as where the command was given."""
    with suppress(OSError):
        os.chdir(folder)
