"""W&B never stops a run: down, slow, refusing or dying, the run goes on, warns once, and is kept offline."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
import wandb_files
from lightning.pytorch.loggers import WandbLogger
from wandb_stand_in import ENTITY, KEY, StandIn, stand_in

from steerfm.callbacks.live_table import LiveTable, picture, table
from steerfm.report import wandb_run
from steerfm.report.wandb_run import WandbRun, bounded
from steerfm.types import Cost, Samples


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    with stand_in(monkeypatch, tmp_path / "home") as server:
        yield server


def begin(folder: Path) -> WandbRun:
    return WandbRun(folder, "online", seconds=2, seconds_to_send=2, project="steerfm", id="abc", resume="allow")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelname == "WARNING" and "steerfm" in each.name]


def offline(folder: Path) -> list[Path]:
    return list((folder / "wandb").glob("offline-run-*-abc"))


def cores() -> list[int]:
    """Return the processes of wandb's that this one has started and that have not ended."""
    shown = subprocess.run(
        ["ps", "-o", "pid=,stat=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in shown.stdout.splitlines()]
    return [int(line[0]) for line in lines if "Z" not in line[1] and "wandb-core" in line[2]]


def a_table() -> object:
    return table([{"step": 0, "picture": picture(np.zeros((4, 4, 3), np.uint8))}])


def test_a_run_is_told_and_goes_on_under_its_id(server: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for value in (1.0, 2.0):
        with begin(tmp_path) as run:
            assert run.url == f"{server.url}/{ENTITY}/steerfm/runs/abc"
            assert (run.id, run.project, run.entity) == ("abc", "steerfm", ENTITY)
            run.log({"reward": value})
            run.set_summary({"best": value})
    assert [row["reward"] for row in server.history("abc")] == [1.0, 2.0]
    assert list(server.runs) == ["abc"] and server.summary("abc")["best"] == 2.0
    assert warnings(caplog) == [] and offline(tmp_path) == []
    run.log({"reward": 3.0})  # after its end nothing happens
    run.config.update({"lr": 1.0}, allow_val_change=True)


@pytest.mark.parametrize("trouble", ["down", "silent", "unauthorised"])
def test_a_server_that_cannot_be_had_leaves_the_run_offline(
    server: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str
):
    if trouble == "down":
        server.stop()
    else:
        server.mood = trouble  # type: ignore[assignment]
    began = time.monotonic()
    with begin(tmp_path) as run:
        run.log({"reward": 1.0, "samples": a_table()})
        assert run.mode == "offline" and run.url == ""
    assert time.monotonic() - began < 20
    (warned,) = warnings(caplog)
    assert "could not be reached" in warned and warned.endswith("the run is kept offline.")
    assert len(offline(tmp_path)) == 1


@pytest.mark.parametrize("trouble", ["down", "silent"])
def test_a_server_that_dies_on_the_way_leaves_the_rest_on_disk(
    server: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str
):
    with begin(tmp_path) as run:
        run.log({"reward": 1.0})
        kept = run.kept
        if trouble == "down":
            server.stop()
        else:
            server.mood = "silent"
        began = time.monotonic()
        run.log({"reward": 2.0})
    assert time.monotonic() - began < 20
    (warned,) = warnings(caplog)
    assert warned.endswith(f"what it does not have yet is kept: wandb sync {kept}.")


def test_a_question_without_an_answer_is_not_waited_for(
    server: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with begin(tmp_path) as run:
        server.mood = "silent"
        began = time.monotonic()
        run.log({"samples": a_table()})  # before which wandb asks for the artifact's type
        run.log({"reward": 2.0})
        assert time.monotonic() - began < 15
        assert run.mode == "offline"
    (warned,) = warnings(caplog)
    assert "no answer within 2 s" in warned and len(offline(tmp_path)) == 1
    assert len(cores()) == 1  # the one that waits for an answer has been ended


def test_the_death_of_wandbs_own_process_is_survived(server: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with begin(tmp_path) as run:
        (core,) = cores()
        os.kill(core, signal.SIGKILL)
        time.sleep(0.2)
        for value in range(3):
            run.log({"reward": value})
        assert run.mode == "offline"
        run.log({"reward": object()}, step="no number")  # what W&B refuses is left out, and the run goes on
        assert run.kept is not None
    (warned,) = warnings(caplog)
    assert warned.endswith("the rest of the run is kept offline.") and len(offline(tmp_path)) == 1


def test_a_table_goes_on_growing_where_wandb_died(server: StandIn, tmp_path: Path):
    shown = Samples(torch.zeros(2, 1, 4, 4), torch.rand(2, 1, 4, 4), ["a", "b"], [0, 1], Cost(1))
    growing = LiveTable()
    with begin(tmp_path / "run") as run:
        trainer = SimpleNamespace(loggers=[WandbLogger(experiment=run)])  # type: ignore[arg-type]
        for step in range(4):
            growing.add(trainer, shown, step)  # type: ignore[arg-type]
            if step == 1:
                os.kill(cores()[0], signal.SIGKILL)
                time.sleep(0.2)
        assert run.mode == "offline"
    wandb.teardown()
    (kept,) = offline(tmp_path / "run")
    told = [row for row in wandb_files.histories(kept) if row.get("progress/_type") == "incremental-table-file"]
    assert [row["trainer/global_step"] for row in told] == [2, 3]
    assert told[-1]["progress/nrows"] == 4


def test_without_a_key_nothing_is_asked(
    server: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with begin(tmp_path) as run:
        assert run.mode == "offline"
    assert warnings(caplog) == [
        "W&B could not be reached (no API key: set WANDB_API_KEY): the run is kept offline."
    ]  # fmt: skip
    assert server.asked == []


def test_disabled_leaves_nothing(tmp_path: Path):
    with WandbRun(tmp_path, "disabled", project="p") as run:
        run.log({"a": 1})
        assert run.kept is None
    assert not list(tmp_path.rglob("*run-*"))


def test_a_bounded_call_gives_what_it_gives():
    assert bounded(5, lambda a, b: a + b, 1, b=2) == 3
    with pytest.raises(KeyError):
        bounded(5, {}.__getitem__, "a")
    with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
        bounded(0.01, time.sleep, 0.2)


def test_the_folder_of_data_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for before in (None, "elsewhere"):
        monkeypatch.delenv(wandb_run.DATA_VARIABLE, raising=False)
        if before is not None:
            monkeypatch.setenv(wandb_run.DATA_VARIABLE, before)
        with wandb_run.files_in(tmp_path):
            assert os.environ[wandb_run.DATA_VARIABLE] == str(tmp_path / "wandb" / "data")
        assert os.environ.get(wandb_run.DATA_VARIABLE) == before
    assert KEY not in os.environ.get(wandb_run.DATA_VARIABLE, "")
