"""Checkpoints: a resumed run draws what it would have drawn, and a full disk leaves the last good one."""

from __future__ import annotations

import contextlib
import io
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from steerfm import DurableCheckpoints, RandomState, files
from steerfm.callbacks.checkpoints import KEY, gathered_states, restore
from steerfm.commands.common import in_one_sentence
from steerfm.errors import CheckpointError, RunError, causes


class Drawing(lightning.LightningModule):
    """A module whose every step draws: dropout, Python's and NumPy's numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1))
        self.drawn: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.drawn.append(random.gauss(0, 1) + np.random.normal())  # noqa: NPY002
        return self.network(batch[0]).square().mean() * (1 + 0.1 * self.drawn[-1] ** 2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fitted(folder: Path, steps: int, *, resume: Path | None = None, keep: bool = True) -> Drawing:
    module = Drawing()
    data = TensorDataset(torch.ones(16, 4))  # all batches alike: this loader would begin its epoch again
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, plugins=[DurableCheckpoints()],
        callbacks=[RandomState()] if keep else [],
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module


def seeded(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def weights(module: Drawing) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("keep", [True, False])
def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path: Path, keep: bool) -> None:
    seeded(1)
    whole = fitted(tmp_path, 8)
    seeded(1)
    first = fitted(tmp_path, 6, keep=keep)
    seeded(9)
    second = fitted(tmp_path, 8, resume=tmp_path / "6.ckpt", keep=keep)
    assert (first.drawn + second.drawn == whole.drawn) is keep
    assert torch.equal(weights(second), weights(whole)) is keep


def test_states_are_plain_data_that_is_safe_to_load(tmp_path: Path) -> None:
    random.gauss(0, 1)
    torch.save(gathered_states(torch.device("cpu")), tmp_path / "state")
    expected = random.gauss(0, 1), random.random(), np.random.normal(), torch.rand(1)  # noqa: NPY002
    (state,) = torch.load(tmp_path / "state", weights_only=True)
    restore(state)
    assert (random.gauss(0, 1), random.random(), np.random.normal(), torch.rand(1)) == expected  # noqa: NPY002


@pytest.mark.parametrize("strict", [True, False])
def test_another_number_of_processes_is_refused_where_it_matters(strict: bool) -> None:
    callback, trainer, module = RandomState(strict), lightning.Trainer(accelerator="cpu", logger=False), Drawing()
    checkpoint = {KEY: gathered_states(torch.device("cpu")) * 2}
    if strict:
        with pytest.raises(CheckpointError, match="written by 2 processes and is read by 1"):
            callback.on_load_checkpoint(trainer, module, checkpoint)
    else:
        callback.on_load_checkpoint(trainer, module, checkpoint)
        before = torch.get_rng_state()
        callback.on_train_batch_start(trainer, module, None, 0)
        assert torch.equal(before, torch.get_rng_state())
    callback.on_load_checkpoint(trainer, module, {})  # of an earlier steerfm


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    plugin = DurableCheckpoints()
    plugin.save_checkpoint({"weights": torch.ones(10)}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            RunError, match=r"Cannot write .*last\.ckpt.*free some space and run the same command again"
        ):
            plugin.save_checkpoint({"weights": torch.ones(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(plugin.load_checkpoint(path, weights_only=True)["weights"], torch.ones(10))
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    with pytest.raises(TypeError, match="no storage_options"):
        plugin.save_checkpoint({}, path, storage_options={})


class Interrupting(io.RawIOBase):
    """A file during whose n-th writing a data worker dies, which PyTorch raises from a signal handler."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.calls -= 1
        if self.calls == 0:
            raise RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. ")
        return memoryview(data).nbytes


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_a_data_worker_that_dies_while_a_checkpoint_is_written_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    @contextlib.contextmanager
    def replacing(path: Path) -> Iterator[Interrupting]:
        yield Interrupting(calls)

    monkeypatch.setattr(files, "replacing", replacing)
    with pytest.raises(RuntimeError) as died:
        DurableCheckpoints().save_checkpoint({"weights": torch.ones(10)}, tmp_path / "last.ckpt")
    told = str(in_one_sentence(died.value, {}))
    assert told.startswith("A process that reads data has died (DataLoader worker (pid 4711) is killed by signal")


def test_an_error_s_causes_are_told_once_each() -> None:
    first, second = OSError("first"), RuntimeError("second")
    second.__context__ = first
    assert list(causes(second)) == [second, first]
    first.__cause__ = second
    assert list(causes(second)) == [second, first]
    assert list(causes(None)) == []
