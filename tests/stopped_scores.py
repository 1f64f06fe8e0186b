"""Score in processes of their own, each with a mishap: `python stopped_scores.py SCENARIOS.json`.

A scenario has `words` (the command line) and `mishap`. Everything is imported once; each process is a fork.
What came of each scenario is printed as a line of JSON: `code`, `out`, `err`, and `kills`.
"""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from philens.cli import main
from philens.scoring.run import load_lens


def shards(folder: str) -> int:
    try:
        return json.loads(Path(folder, "_manifest.json").read_text())["progress"]["shards"]
    except FileNotFoundError:
        return 0


def start(scenario: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
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
    # Killed at a random moment, when the manifest knows of so many shards.
    for number in scenario.get("kill_after", []):
        child = start(scenario)
        while shards(scenario["folder"]) < number:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), Path("err").read_text()
            time.sleep(0.001)
        time.sleep(random.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it ended by itself"
        kills.append(shards(scenario["folder"]))
    code = os.waitstatus_to_exitcode(os.waitpid(start(scenario), 0)[1])
    return {"code": code, "out": Path("out").read_text(), "err": Path("err").read_text(), "kills": kills}


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda file: None  # for power cuts, and slow
    scenarios = json.loads(Path(sys.argv[1]).read_text())
    load_lens(scenarios[0]["words"][-1])
    for one in scenarios:
        sys.stdout.write(json.dumps(run(one)) + "\n")
        sys.stdout.flush()
