"""What happens when something goes wrong: Ctrl-C, kill, a damaged checkpoint, a NaN reward, a folder in the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipes import read, tiny

from steerfm.cli import main

REWARDS = """\
import os
import signal
from pathlib import Path


def signalling(number, images):
    # Send this process a signal at the seventh batch, once.
    calls = Path("calls")
    count = int(calls.read_text()) + 1 if calls.exists() else 1
    calls.write_text(str(count))
    if count == 7:
        os.kill(os.getpid(), number)
    return images.mean((1, 2, 3))


def impatient(images, prompts):
    return signalling(signal.SIGINT, images)


def deadly(images, prompts):
    return signalling(signal.SIGKILL, images)


def broken(images, prompts):
    return images.mean((1, 2, 3)) * float("nan")
"""


@pytest.fixture
def there(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the kitchen with rewards of the user's in it, and no counter left over."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (here / "tempers.py").write_text(REWARDS)
    (here / "calls").unlink(missing_ok=True)
    return here


def tuning(name: str, reward: str = "tempers:impatient") -> list[str]:
    return [*tiny("digits_finetune", f"reward={reward}"), f"name={name}", "trainer.max_steps=8", "method.jumps=2"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "map" / "flow_map.safetensors")


def equal(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def whole(there: Path) -> Path:
    """Return a fine-tuning that was never stopped."""
    if not (there / "runs" / "whole").exists():
        (there / "calls").write_text("1000")
        assert main(tuning("whole")) == 0
        (there / "calls").unlink()
    return there / "runs" / "whole"


def test_ctrl_c_says_how_to_go_on_and_the_same_command_goes_on(
    there: Path, whole: Path, capsys: pytest.CaptureFixture[str]
):
    handler = signal.getsignal(signal.SIGINT)
    assert main(tuning("stopped")) == 130
    assert "steerfm finetune recipe=digits_finetune name=stopped" in capsys.readouterr().err
    assert (read(there / "runs" / "stopped")["status"], read(there / "runs" / "stopped")["error"]) == (
        "failed",
        "interrupted",
    )
    assert not (there / "runs" / "stopped" / "map").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    assert main(tuning("stopped")) == 0
    assert "Continuing" in capsys.readouterr().out
    assert equal(there / "runs" / "stopped", whole)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    there: Path, whole: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(tuning("damaged")) == 130
    last = (there / "runs" / "damaged" / "checkpoints" / "last.ckpt").resolve()
    last.write_bytes(last.read_bytes()[:1000])
    assert main(tuning("damaged")) == 0
    assert "is damaged" in capsys.readouterr().err
    assert equal(there / "runs" / "damaged", whole)


def test_if_every_checkpoint_is_damaged_one_sentence_says_what_to_do(there: Path, capsys: pytest.CaptureFixture[str]):
    assert main(tuning("ruined")) == 130
    for path in sorted((there / "runs" / "ruined" / "checkpoints").glob("step*.ckpt")):
        path.write_bytes(b"no checkpoint")
    capsys.readouterr()
    assert main(tuning("ruined")) == 2
    error = capsys.readouterr().err
    assert ".ckpt is damaged" in error and "delete" in error and "Traceback" not in error


def test_a_nan_reward_is_named_and_what_was_saved_stays(there: Path, capsys: pytest.CaptureFixture[str]):
    assert main(tuning("sick", "tempers:broken")) == 2
    error = capsys.readouterr().err
    assert "'broken' gave nan for sample 0" in error and "Traceback" not in error
    assert read(there / "runs" / "sick")["status"] == "failed"
    arguments = [*tiny("digits_steer", "reward=tempers:broken", "method=best_of_n"), "name=sick_too"]
    assert main(arguments) == 2
    assert "'broken' gave nan" in capsys.readouterr().err


def test_stopped_sampling_starts_again(there: Path):
    arguments = [*tiny("digits_steer", "reward=tempers:impatient", "method=guidance"), "name=sampling"]
    assert main([*arguments, "method.steps=16"]) == 130
    assert read(there / "runs" / "sampling")["error"] == "interrupted"
    assert main([*arguments, "method.steps=16"]) == 0
    assert len((there / "runs" / "sampling" / "samples.jsonl").read_text().splitlines()) == 2


def test_a_finished_run_is_never_overwritten(there: Path, whole: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("[!.]*")}
    assert main(tuning("whole")) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("[!.]*")} == before


def test_a_folder_that_cannot_be_written_is_named(there: Path, capsys: pytest.CaptureFixture[str]):
    (there / "in_the_way").write_text("a file, not a folder")
    assert main([*tiny("digits"), "folder=in_the_way"]) == 2
    error = capsys.readouterr().err
    assert "Cannot write in_the_way" in error and error.count("\n") == 1


def test_a_sweep_runs_every_point_under_a_name_of_its_own(there: Path):
    arguments = [*tiny("digits_steer", "method=best_of_n", "method.n=1,2"), "name=swept"]
    assert main([*arguments, "-m"]) == 0
    costs = {}
    for n in (1, 2):
        first = (there / "runs" / "swept" / f"n-{n}" / "samples.jsonl").read_text().splitlines()[0]
        costs[n] = json.loads(first)["cost"]["reward_calls"]
    assert costs == {1: 1, 2: 2}


def test_a_run_in_wandb_keeps_its_page_when_it_goes_on(there: Path):
    arguments = [*tuning("logged"), "logger=wandb", "trainer.log_every_n_steps=1"]
    assert main(arguments) == 130
    assert main(arguments) == 0
    pages = {path.name.split("-")[3] for path in (there / "runs" / "logged" / "wandb").glob("offline-run-*")}
    assert len(pages) == 1


def test_a_killed_run_goes_on_as_if_nothing_had_happened(there: Path, whole: Path):
    arguments = tuning("killed", "tempers:deadly")
    process = subprocess.run([sys.executable, "-m", "steerfm.cli", *arguments], capture_output=True)
    assert process.returncode == -signal.SIGKILL
    assert read(there / "runs" / "killed")["status"] == "running"
    assert main(arguments) == 0
    assert equal(there / "runs" / "killed", whole)
