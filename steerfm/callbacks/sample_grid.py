"""Pictures of the map as it learns: fixed seeds at 1, 2, 4 and 8 jumps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from steerfm import images
from steerfm.callbacks.ema import averaged
from steerfm.callbacks.live_table import LiveTable, log_sheet
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.sampling import Unsteered
from steerfm.types import Samples


class SampleGrid(Callback):
    """Write a grid of samples every `every` steps and at the end: a row a number of jumps, a column a seed.

    Files go to pictures/ in the trainer's default_root_dir, and to W&B and TensorBoard, as "grid", where the run logs
    there; in W&B the samples of the most jumps also go to the table "progress" (`LiveTable`), unless a callback that
    scores its samples does that. Points are drawn as a histogram on [-limit, limit]^2. prompts: one for all seeds, or
    one a seed.
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
        self.table = LiveTable()
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
            drawn = self.draw(flow_map)
        keep_picture(trainer, self.joined(drawn), "step", "grid", self.scale)
        if not any(getattr(other, "scores_samples", False) for other in trainer.callbacks):  # type: ignore[attr-defined]
            self.table.add(trainer, drawn[-1], self.written)

    def sheet(self, flow_map: FlowMap) -> Tensor:
        """Return the grid as one picture (C, H, W) in [0, 1]."""
        return self.joined(self.draw(flow_map))

    def draw(self, flow_map: FlowMap) -> list[Samples]:
        """Return the samples of each number of jumps, of the same seeds."""
        count = 4096 if len(flow_map.data_shape) == 1 else self.columns
        prompts = [self.prompts[i % len(self.prompts)] for i in range(count)]
        return [Unsteered("jumps", jumps)(flow_map, prompts=prompts, seeds=range(count)) for jumps in self.jumps]

    def joined(self, drawn: Sequence[Samples]) -> Tensor:
        """Return samples as one picture (C, H, W) in [0, 1], a row each; of points a histogram each."""
        points = drawn[0].x0.ndim == 2
        rows = [histogram(each.x0, self.limit)[None] if points else each.images for each in drawn]
        return images.grid(torch.cat([row.cpu().float() for row in rows]), len(rows) if points else self.columns)


def keep_picture(trainer: Trainer, sheet: Tensor, file: str, title: str, scale: int) -> None:
    """Write a sheet (C, H, W) to pictures/FILE_STEP.png in default_root_dir, and to the run's loggers of pictures."""
    step = trainer.global_step
    images.save_png(sheet, Path(trainer.default_root_dir) / "pictures" / f"{file}_{step:07d}.png", scale)
    log_sheet(trainer.loggers, sheet, title, step)


def histogram(points: Tensor, limit: float, bins: int = 64) -> Tensor:
    """Return a picture (1, bins, bins) of where (N, 2) points lie on [-limit, limit]^2; white is dense."""
    edges = torch.linspace(-limit, limit, bins + 1, dtype=torch.float64)
    counts = torch.histogramdd(points.double().cpu(), bins=[edges, edges]).hist
    return (counts / counts.max().clamp_min(1)).sqrt().T.flip(0)[None]
