"""Faults on one of two processes: run as `python faults_pair.py FOLDER`; Lightning starts the second process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import SGD

from steerfm import MLP, Digits, FlowMap, FlowMapTraining, Lagrangian, Triangle
from steerfm.callbacks import Checkpoints, RandomState, SkipNonFinite, StopOnSignal
from steerfm.conditions import Labels
from steerfm.digits import CAPTIONS
from steerfm.modules.common import require_finite
from steerfm.networks.mlp import randomise


class Doubled(Digits):
    """Digits in float64, where sums in any order agree."""

    def batch(self, step: int) -> dict[str, Any]:
        batch = super().batch(step)
        return batch | {"x0": batch["x0"].double()}


class Sick(FlowMapTraining):
    """Training whose loss is not finite on rank 1, at step 1."""

    def losses(self, batch: dict[str, Any], generator: Any, diagonal_only: bool) -> tuple[Tensor, Tensor, Tensor]:
        losses, s, t = super().losses(batch, generator, diagonal_only)
        if self.global_rank == 1 and self.global_step == 1:
            losses = losses * torch.nan
            require_finite(self, losses, "sick", s, t)
        return losses, s, t


class Terminated(Callback):
    """Send SIGTERM to rank 1 alone, in its third step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def training(kind: type[FlowMapTraining] = FlowMapTraining) -> FlowMapTraining:
    network = MLP((1, 8, 8), width=16, depth=1, frequencies=4, num_classes=10)
    randomise(network)
    flow_map = FlowMap(network, conditioner=Labels(CAPTIONS)).double()
    return kind(flow_map, Lagrangian(), Triangle(0.5), optimizer=partial(SGD, lr=0.05, momentum=0.5))


def fit(module: FlowMapTraining, steps: int, *callbacks: Any, devices: int = 2, resume: Path | None = None) -> None:
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
        enable_checkpointing=any(isinstance(each, Checkpoints) for each in callbacks), enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, Doubled(8, validation_size=0), ckpt_path=resume, weights_only=True)


def main(folder: Path) -> None:
    """Skip a step, go on from what one process has saved, and be stopped."""
    torch.set_num_threads(1)
    module, skip = training(Sick), SkipNonFinite()
    fit(module, 4, skip)
    found = {f"skipped/{name}": tensor for name, tensor in module.state_dict().items()}
    found["total"] = torch.tensor(skip.total)
    module = training()
    fit(module, 4, RandomState(), Checkpoints(folder / "two", 4), resume=folder / "one" / "step=00000002.ckpt")
    found |= {f"resumed/{name}": tensor for name, tensor in module.state_dict().items()}
    save_file({k: t.detach().clone().contiguous() for k, t in found.items()}, folder / f"{module.global_rank}.tensors")
    with contextlib.suppress(SystemExit):
        fit(training(), 9, Terminated(), StopOnSignal(), Checkpoints(folder / "stopped", 99))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
