"""Solve in processes of their own, each with a mishap: `python stopped_solve.py SCENARIOS.json`.

A scenario has `mishap`, the `options` of `solve`, and `problems`. Everything is imported once; each process
is a fork. What came of each scenario is printed as a line of JSON: `code`, `err`, and `kills`, the lines that
were there when it was killed.
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

import torch

from philens.bases.hub import load_pretrained
from philens.reasoning import engines  # noqa: F401  (imported once)
from philens.reasoning.folder import PART_FILE
from philens.reasoning.sampling import solve
from philens.support.errors import PhilensError
from philens.tasks.problem import Problem, Prompt


def lines(folder: str) -> int:
    part = Path(folder, PART_FILE)
    return part.read_bytes().count(b"\n") if part.exists() else 0


def start(scenario: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    os.nice(5)  # so that the parent is there in time to stop it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    os.dup2(os.open("err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if scenario["mishap"] == "full_disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
    code = 0
    try:
        problems = [Problem(**problem) for problem in scenario["problems"]]
        solve(problems=problems, prompt=Prompt(""), **scenario["options"])
    except PhilensError as error:
        sys.stderr.write(str(error))
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.stderr.flush()
    os._exit(code)


def stop(scenario: dict[str, Any], number: int, how: int) -> int:
    """Send a signal at a random moment after the file has so many lines; returns the process' status."""
    child = start(scenario)
    while lines(scenario["options"]["output"]) < number:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), Path("err").read_text()
        time.sleep(0.001)
    time.sleep(random.random() * 0.03)
    os.kill(child, how)
    return os.waitpid(child, 0)[1]


def run(scenario: dict[str, Any]) -> dict[str, Any]:
    kills = []
    for number in scenario.get("kill_after", []):
        assert os.WIFSIGNALED(stop(scenario, number, signal.SIGKILL)), "it ended by itself"
        kills.append(lines(scenario["options"]["output"]))
    if scenario["mishap"] == "interrupt":
        code = os.waitstatus_to_exitcode(stop(scenario, 1, signal.SIGINT))
    else:
        code = os.waitstatus_to_exitcode(os.waitpid(start(scenario), 0)[1])
    return {"code": code, "err": Path("err").read_text(), "kills": kills}


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda file: None  # for power cuts, and slow
    scenarios = json.loads(Path(sys.argv[1]).read_text())
    load_pretrained(scenarios[0]["options"]["model"])
    gc.freeze()  # what is imported is not searched for garbage
    for one in scenarios:
        sys.stdout.write(json.dumps(run(one)) + "\n")
        sys.stdout.flush()
