"""SIGKILL at any moment: no checkpoint is lost, and what is resumed ends bitwise as what was never stopped.

Twenty-five deaths of a training and twenty-five of a fine-tuning run, checkpoints every third step. A process is
forked from one that has imported everything, so that a life of it takes a second.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints_alike import differences
from tiny_recipes import read, tiny

LIVES = """\
import os, signal, sys, time
import torch
import steerfm.commands.finetune, steerfm.commands.train
from steerfm.cli import main

# Read "SECONDS ARGUMENT ARGUMENT ..." and let a child run that command for as long, then kill it; 0 waits for its end.
torch.set_num_threads(1)
for line in sys.stdin:
    seconds, *arguments = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        os.setpgrp()
        quiet = os.open("lives.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        os._exit(main(arguments))
    deadline = time.monotonic() + float(seconds)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if float(seconds) and time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
log = logging.getLogger(__name__)

EVERY = 3  # steps between checkpoints


class Lives:
    """Run commands in forks of one process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-c", LIVES], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def live(self, seconds: float, arguments: list[str]) -> int:
        """Return the exit code of a command, -9 where it was killed after so many seconds (0: never)."""
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write("\t".join([str(seconds), *arguments]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(60)


@pytest.fixture
def lives(here: Path):
    """Return a server of lives in the kitchen."""
    server = Lives(here)
    yield server
    server.close()


def command(recipe: str, name: str, steps: int) -> list[str]:
    more = [f"name={name}", f"trainer.max_steps={steps}", f"checkpoint_every={EVERY}", "logger=none"]
    return [*tiny(recipe), *more, *(["method.jumps=2"] if recipe == "digits_finetune" else [])]


def step_of(run: Path) -> int:
    """Return the step of the newest checkpoint; all that are there must be whole."""
    found = (run / "checkpoints").glob("step*.ckpt")
    return max(
        (int(torch.load(path, weights_only=True, map_location="cpu")["global_step"]) for path in found), default=0
    )


def killed(lives: Lives, folder: Path, recipe: str, kills: int, steps: int) -> None:
    """Kill a run at random moments and compare what it ends as with a run that was never stopped."""
    torch.manual_seed(0)
    chance = random.Random(recipe)
    whole, broken = command(recipe, f"{recipe}_whole", steps), command(recipe, f"{recipe}_killed", steps)
    assert lives.live(0, ["--version"]) == 0  # the server has imported everything before the clock starts
    started = time.monotonic()
    assert lives.live(0, whole) == 0
    longest = time.monotonic() - started
    run, done, deaths, ends, reached = folder / "runs" / f"{recipe}_killed", 0, 0, 0, set()
    while deaths < kills:
        code = lives.live(chance.uniform(0.1, 1.2) * longest, broken)
        assert code in (0, -signal.SIGKILL), (folder / "lives.log").read_text()[-2000:]
        if code == 0:  # it came to its end before: the rest of the deaths are another run's
            assert differences(run, folder / "runs" / f"{recipe}_whole") == []
            ends, done = ends + 1, 0
            run.rename(run.with_name(f"{run.name}-{ends}"))
            continue
        deaths += 1
        assert step_of(run) >= done, f"after {deaths} deaths the run fell back from step {done} to {step_of(run)}"
        done = step_of(run)
        reached.add(done)
    assert len(reached) > 5, f"the deaths came at steps {sorted(reached)} only"
    assert lives.live(0, broken) == 0, (folder / "lives.log").read_text()[-2000:]
    assert read(run)["status"] == "finished"
    assert differences(run, folder / "runs" / f"{recipe}_whole") == []
    assert not list(run.rglob(".*.tmp"))
    assert len(list((run / "checkpoints").glob("step*.ckpt"))) == 2
    log.info("%s: %d deaths, %d runs to their end, deaths after steps %s", recipe, deaths, ends + 1, sorted(reached))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", ["digits", "digits_finetune"])
def test_killed_fifty_times_it_ends_as_if_never_stopped(lives: Lives, here: Path, recipe: str) -> None:
    killed(lives, here, recipe, kills=25, steps=120)
