"""Faults of whole runs: each ends in one sentence, loses nothing that was saved, and the same command goes on."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_alike import alike, differences
from tiny_recipes import read, tiny

from steerfm.cli import main

REWARDS = """\
import os
import signal
from pathlib import Path

import torch


def mood(images, prompts):
    # Do what the file "mood" says from the fifth call of a process on.
    global calls
    calls += 1
    values = images.mean((1, 2, 3))
    kind = Path("mood").read_text() if calls >= 5 else ""
    if kind == "raises":
        raise ZeroDivisionError("division by zero")
    if kind == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    if kind == "filling":
        with open(os.environ["DISK"] + "/filler", "wb") as stream:
            while True:
                stream.write(bytes(1000))
                stream.flush()
    if kind.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, kind))
        Path("mood").write_text("")
    rubbish = {
        "nan": values * torch.nan, "strings": ["good"] * len(values), "complex": values + 0j, "scalar": values.mean(),
        "pairs": torch.stack([values, values], 1), "none": None, "meta": values.to("meta"), "detached": values.detach(),
    }
    return rubbish.get(kind, values)


def careless(images, prompts):
    try:
        return mood(images, prompts)
    except OSError:
        return images.mean((1, 2, 3))


calls = 0
"""

DATA = """\
import os
import signal
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from steerfm import Digits
from steerfm.data.batches import StepBatches


class Fetched(Digits):
    # Digits read by a process of its own, which dies at the fifth batch if the file "mood" says so.
    def batch(self, step):
        if step == 5 and Path("mood").read_text() == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(step)

    def train_dataloader(self):
        trainer = self.trainer
        start = trainer.global_step
        return DataLoader(StepBatches(self.batch, trainer.max_steps, lambda: start), batch_size=None, num_workers=1)
"""


@pytest.fixture
def there(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the kitchen with a moody reward and moody data of the user's in it."""
    monkeypatch.setattr(sys, "path", [str(here), *sys.path])
    (here / "moods.py").write_text(REWARDS)
    (here / "moody_data.py").write_text(DATA)
    feel(here, "")
    return here


def feel(here: Path, mood: str, calls: int = 0) -> None:
    """Set the mood, and how often the reward has been called."""
    (here / "mood").write_text(mood)
    if "moods" in sys.modules:
        vars(sys.modules["moods"])["calls"] = calls


def tuning(name: str, *more: str) -> list[str]:
    arguments = tiny("digits_finetune", "reward=moods:mood", "logger=none")
    return [*arguments, f"name={name}", "trainer.max_steps=6", "method.jumps=2", "checkpoint_every=2", *more]


@pytest.fixture
def whole(there: Path) -> Path:
    """Return a fine-tuning that was never stopped."""
    if not (there / "runs" / "unstopped").exists():
        assert main(tuning("unstopped")) == 0
        feel(there, "")
    return there / "runs" / "unstopped"


def steps_saved(run: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step=")) for path in (run / "checkpoints").glob("step=*.ckpt"))


FAULTS = {
    "raises": "'mood' raised ZeroDivisionError (division by zero) in ",
    "nan": "'mood' gave nan for sample 0",
    "strings": "'mood' raised ValueError (could not convert string to float: 'good')",
    "complex": "'mood' must return floating-point values, got torch.complex64",
    "scalar": "'mood' must return the shape (4,), got ()",
    "pairs": "'mood' must return the shape (4,), got (4, 2)",
    "none": "'mood' must return a tensor of shape (4,), got NoneType",
    "meta": "'mood' raised ",
    "detached": "'mood' gave values without a gradient",
    "memory": "Out of memory (Tried to allocate 2.00 GiB): lower data.prompts_per_step=4, ",
}


def test_whatever_a_reward_does_is_said_and_the_mended_run_goes_on(
    there: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run that dies of one fault after the other."""
    run = there / "runs" / "moody"
    saved: list[int] = []
    for mood, sentence in FAULTS.items():
        feel(there, mood, calls=4 if saved else 0)  # at once, where it has got somewhere
        capsys.readouterr()
        assert main(tuning("moody")) == 2, mood
        error = capsys.readouterr().err
        assert sentence in error, error
        assert "Traceback" not in error
        assert read(run)["status"] == "failed"
        assert sentence in read(run)["error"]
        assert saved == [] or steps_saved(run)[-1] >= saved[-1]
        saved = steps_saved(run)
    assert saved[-1] >= 2
    feel(there, "")
    assert main(tuning("moody")) == 0
    assert differences(run, whole) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_scheduler_s_signal_saves_the_step_and_says_how_to_go_on(
    there: Path, whole: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = there / "runs" / name.lower()
    feel(there, name)
    assert main(tuning(name.lower(), "checkpoint_every=100")) == 130
    assert steps_saved(run)[-1] not in (0, 6)
    told = capsys.readouterr().err
    assert f"{name}: stopping after step {steps_saved(run)[-1]}, saved in" in told
    assert f"recipe=digits_finetune name={name.lower()}" in told
    assert read(run)["error"] == "interrupted"
    assert main(tuning(name.lower(), "checkpoint_every=100")) == 0
    feel(there, "")
    assert alike(run / "map", whole / "map")


def test_a_checkpoint_that_rots_on_the_disk_is_passed_over(
    there: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit of a weight, which torch.load does not notice; and clocks that ran backwards."""
    run = there / "runs" / "rotten"
    feel(there, "raises")
    assert main(tuning("rotten", "checkpoint_every=1")) == 2
    older, newest = sorted((run / "checkpoints").glob("step=*.ckpt"))
    with zipfile.ZipFile(newest) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(newest.read_bytes())
    content[largest.header_offset + 500 + largest.file_size // 2] ^= 1
    newest.write_bytes(content)
    torch.load(newest, weights_only=True)
    os.utime(older, (2e9, 2e9))
    os.utime(newest, (1e9, 1e9))
    feel(there, "")
    capsys.readouterr()
    assert main(tuning("rotten", "checkpoint_every=1")) == 0
    error = capsys.readouterr().err
    assert f"{newest.name} is damaged (the check sum of" in error
    assert f"before it, {older.name}" in error
    assert alike(run / "map", whole / "map")


def test_a_dead_data_worker_is_told_and_the_run_goes_on(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def training(name: str) -> list[str]:
        more = ["data._target_=moody_data.Fetched", "trainer.max_steps=8", "checkpoint_every=2", "logger=none"]
        return [*tiny("digits"), f"name={name}", *more, "--trust", "moody_data"]

    assert main(training("fetched")) == 0
    feel(there, "dies")
    assert main(training("orphaned")) == 2
    error = capsys.readouterr().err
    assert "A process that reads data has died (" in error
    assert "Traceback" not in error
    assert steps_saved(there / "runs" / "orphaned") in ([2], [2, 4])  # the reader is ahead of the steps
    feel(there, "")
    assert main(training("orphaned")) == 0
    assert differences(there / "runs" / "orphaned", there / "runs" / "fetched") == []


DISK = """\
import os, subprocess, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
import moods
from steerfm.cli import main

arguments = sys.argv[1:]
Path("disk").mkdir(exist_ok=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", "disk"], check=True)
Path("mood").write_text("filling")
print("full:", main([*arguments, "folder=disk", "name=tight"]))
Path("mood").write_text("")
Path("disk/filler").unlink()
print("freed:", main([*arguments, "folder=disk", "name=tight"]))
subprocess.run(["cp", "-r", "disk/tight", "runs/tight"], check=True)
subprocess.run(["mount", "-o", "remount,ro", "disk"], check=True)
print("read only:", main([*arguments, "folder=disk", "name=other"]))
"""


def can_mount() -> bool:
    tried = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
    )
    return tried.returncode == 0


@pytest.mark.skipif(sys.platform != "linux" or not can_mount(), reason="no mounts of one's own on this machine")
def test_a_disk_that_is_full_or_read_only_loses_nothing(there: Path, whole: Path) -> None:
    """A real disk of four megabytes, which the reward fills while the run goes on."""
    (there / "disk.py").write_text(DISK)
    arguments = [text for text in tuning("tight") if not text.startswith("name=")]
    arguments[arguments.index("reward=moods:mood")] = "reward=moods:careless"
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "disk.py", *arguments],
        capture_output=True, text=True, timeout=280, check=False, env={**os.environ, "DISK": "disk"},
    )  # fmt: skip
    assert [line for line in done.stdout.splitlines() if line.startswith(("full", "freed", "read"))] == [
        "full: 2",
        "freed: 0",
        "read only: 2",
    ], done.stdout + done.stderr
    said = " ".join(done.stderr.split())
    assert "(No space left on device): free some space and run the same command again; what was saved before" in said
    assert "Cannot write disk/other (Read-only file system): choose another folder, or change its perm" in said
    assert "Traceback" not in done.stderr
    assert alike(there / "runs" / "tight" / "map", whole / "map")
    assert not list((there / "runs" / "tight").rglob(".*.tmp"))


def test_a_disk_that_turns_read_only_in_the_middle_is_named(
    there: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Path.open

    def refuse(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if "step=00000004" in self.name and "w" in mode:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return original(self, mode, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        assert main(tuning("read_only")) == 2
    assert "step=00000004.ckpt (Read-only file system): choose another folder" in capsys.readouterr().err
    assert steps_saved(there / "runs" / "read_only") == [2]
    assert json.loads((there / "runs" / "read_only" / "run.json").read_text())["status"] == "failed"
    feel(there, "")
    assert main(tuning("read_only")) == 0
    assert differences(there / "runs" / "read_only", whole) == []
