"""Faults on one of two processes, in one real run of Lightning (faults_pair.py), and another number of processes."""

import logging
import subprocess
import sys
from pathlib import Path

import faults_pair
import pytest
import torch
from faults_pair import Sick, fit, training
from ports import with_port
from safetensors.torch import load_file
from torch import Tensor

from steerfm.callbacks import Checkpoints, RandomState, SkipNonFinite

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the pair, which goes on from what one process has saved."""
    folder = tmp_path_factory.mktemp("pair")
    fit(training(), 2, RandomState(), Checkpoints(folder / "one", 2), devices=1)
    command = [sys.executable, faults_pair.__file__, str(folder)]
    done = subprocess.run(command, env=with_port(), capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{rank}.tensors") for rank in range(2)]


def close(found: dict[str, Tensor], prefix: str, expected: dict[str, Tensor]) -> bool:
    return all(torch.allclose(found[f"{prefix}/{name}"], value, rtol=1e-9) for name, value in expected.items())


def test_both_skip_the_step_that_one_has_to(ranks: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [int(found["total"]) for found in ranks] == [1, 1]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    alone, skip = training(Sick), SkipNonFinite()
    monkeypatch.setattr(Sick, "global_rank", 1)
    fit(alone, 4, skip, devices=1)
    assert skip.total == 1
    assert close(ranks[0], "skipped", alone.state_dict())


def test_a_run_goes_on_with_another_number_of_processes(
    folder: Path, ranks: list[dict[str, Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    """Two steps on one process, two on two, two on one again: up to rounding what one alone does."""
    whole = training()
    fit(whole, 6, Checkpoints(folder / "whole", 2, keep=9), devices=1)
    middle = torch.load(folder / "whole" / "step=00000004.ckpt", weights_only=True)["state_dict"]
    assert close(ranks[0], "resumed", middle)
    again = training()
    with caplog.at_level(logging.WARNING):
        fit(again, 6, RandomState(), devices=1, resume=folder / "two" / "step=00000004.ckpt")
    assert "written by 2 processes and is read by 1: what steerfm draws and learns stays the same" in caplog.text
    assert close({f"again/{name}": value for name, value in again.state_dict().items()}, "again", whole.state_dict())


def test_a_signal_to_one_stops_both_after_saving(folder: Path) -> None:
    assert [path.name for path in (folder / "stopped").glob("step*")] == ["step=00000003.ckpt"]
