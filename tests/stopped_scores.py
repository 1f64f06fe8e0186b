"""Score in processes of their own, each with a mishap: `python stopped_scores.py SCENARIOS.json`.

A scenario has `words` (the command line) and `mishap`. Everything is imported once; each process is a fork.
It may have `ranks`: how many processes run the command together at the first start and at each one after a
kill. What came of each scenario is printed as a line of JSON: `code`, `out`, `err`, and `kills`.
"""

import gc
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pandas  # noqa: F401  (imported once)
import pyarrow.parquet  # noqa: F401
import torch

from philens.cli import main
from philens.training.opening import load_lens


def shards(folder: str) -> int:
    try:
        known = json.loads(Path(folder, "_manifest.json").read_text())["progress"]["shards"]
    except FileNotFoundError:
        return 0
    return known + sum(int(path.name[6:11]) >= known for path in Path(folder).glob("_part-*"))


def start(scenario: dict[str, Any], ranks: int) -> list[int]:
    for name in ("out", "err"):
        Path(name).write_text("")
    return [start_rank(scenario, rank, ranks) for rank in range(ranks)]


def start_rank(scenario: dict[str, Any], rank: int, ranks: int) -> int:
    child = os.fork()
    if child:
        return child
    os.nice(5)  # so that the parent is there in time to stop it
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    if scenario["mishap"] == "full_disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    if scenario["mishap"] == "reader_goes_away":
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(read)
    code = main(scenario["words"])
    sys.stdout.flush()
    os._exit(code)


def run(scenario: dict[str, Any]) -> dict[str, Any]:
    kills = []
    ranks = scenario.get("ranks", [1] * 9)
    # Killed at a random moment, when the folder knows of so many shards.
    for number, count in zip(scenario.get("kill_after", []), ranks, strict=False):
        children = start(scenario, count)
        while shards(scenario["folder"]) < number:
            for child in children:
                assert os.waitpid(child, os.WNOHANG) == (0, 0), Path("err").read_text()
            time.sleep(0.001)
        time.sleep(random.random() * 0.05)
        for child in children:
            os.kill(child, signal.SIGKILL)
        ends = [os.waitpid(child, 0)[1] for child in children]
        assert any(map(os.WIFSIGNALED, ends)), "all ended by themselves"
        kills.append(shards(scenario["folder"]))
    children = start(scenario, ranks[len(kills)])
    code = max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    return {"code": code, "out": Path("out").read_text(), "err": Path("err").read_text(), "kills": kills}


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda file: None  # for power cuts, and slow
    scenarios = json.loads(Path(sys.argv[1]).read_text())
    words = scenarios[0]["words"]
    load_lens(words[words.index("--model") + 1])
    gc.freeze()  # what is imported is not searched for garbage
    for one in scenarios:
        sys.stdout.write(json.dumps(run(one)) + "\n")
        sys.stdout.flush()
