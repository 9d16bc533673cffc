"""Pictures of the map as it learns: fixed seeds at 1, 2, 4 and 8 jumps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from steerfm import images
from steerfm.callbacks.ema import averaged
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.sampling import Unsteered


class SampleGrid(Callback):
    """Write a grid of samples every `every` steps and at the end: a row a number of jumps, a column a seed.

    Files go to pictures/ in the trainer's default_root_dir, and to W&B where the run logs there. Points are
    drawn as a histogram on [-limit, limit]^2. prompts: one for all seeds, or one a seed.
    """

    def __init__(
        self,
        every: int = 1000,
        jumps: Sequence[int] = (1, 2, 4, 8),
        columns: int = 10,
        prompts: Sequence[str] = ("",),
        limit: float = 1.25,
        scale: int = 4,
    ) -> None:
        self.every = every
        self.jumps = list(jumps)
        self.columns = columns
        self.prompts = list(prompts)
        self.limit = limit
        self.scale = scale
        self.written = 0  # the last step that has a picture
        if every < 1:
            raise ConfigError(f"every counts steps and must be at least 1, got {every}.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step != self.written:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self.written:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.written = trainer.global_step
        if not trainer.is_global_zero:
            return
        flow_map = getattr(pl_module, "flow_map", None)
        if not isinstance(flow_map, FlowMap):
            raise ConfigError(
                f"SampleGrid draws a module's flow_map, and {type(pl_module).__name__} has none: drop it."
            )
        with averaged(pl_module):
            sheet = self.sheet(flow_map)
        keep_picture(trainer, sheet, "step", "samples", self.scale)

    def sheet(self, flow_map: FlowMap) -> Tensor:
        """Return the grid as one picture (C, H, W) in [0, 1]."""
        points = len(flow_map.data_shape) == 1
        count = 4096 if points else self.columns
        prompts = [self.prompts[i % len(self.prompts)] for i in range(count)]
        rows = []
        for jumps in self.jumps:
            samples = Unsteered("jumps", jumps)(flow_map, prompts=prompts, seeds=range(count))
            pictures = histogram(samples.x0, self.limit)[None] if points else samples.images
            rows.append(pictures.cpu().float())
        return images.grid(torch.cat(rows), columns=len(rows) if points else self.columns)


def keep_picture(trainer: Trainer, sheet: Tensor, file: str, title: str, scale: int) -> None:
    """Write a sheet (C, H, W) to pictures/FILE_STEP.png in default_root_dir, and to W&B where the run logs there."""
    step = trainer.global_step
    images.save_png(sheet, Path(trainer.default_root_dir) / "pictures" / f"{file}_{step:07d}.png", scale)
    for logger in trainer.loggers:
        if type(logger).__name__ == "WandbLogger":
            import wandb

            pixels = np.ascontiguousarray(images.to_uint8(sheet[None])[0])
            picture = {title: wandb.Image(pixels), "trainer/global_step": step}
            logger.experiment.log(picture)  # type: ignore[attr-defined]


def histogram(points: Tensor, limit: float, bins: int = 64) -> Tensor:
    """Return a picture (1, bins, bins) of where (N, 2) points lie on [-limit, limit]^2; white is dense."""
    edges = torch.linspace(-limit, limit, bins + 1, dtype=torch.float64)
    counts = torch.histogramdd(points.double().cpu(), bins=[edges, edges]).hist
    return (counts / counts.max().clamp_min(1)).sqrt().T.flip(0)[None]
