"""The loss by length of the interval |t - s|: where on the triangle a flow map still errs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torchmetrics import MeanMetric

from steerfm.errors import ConfigError


class LossByInterval(Callback):
    """Log the mean unweighted loss of the diagonal and of each band of |t - s|, since the last log.

    edges: upper ends of the bands, rising, the last at least 1. The module's training step returns
    {"losses", "s", "t"} beside the loss.
    """

    def __init__(self, edges: Sequence[float] = (0.25, 0.5, 0.75, 1.0)) -> None:
        if list(edges) != sorted(edges) or edges[-1] < 1:
            raise ConfigError(f"edges must rise and end at 1 or later, got {list(edges)}.")
        self.edges = torch.tensor([0.0, *edges])
        names = ["diagonal", *(f"{a:g}-{b:g}" for a, b in pairwise([0, *edges]))]
        self.means = {name: MeanMetric() for name in names}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        bands = torch.bucketize((outputs["t"] - outputs["s"]).abs(), self.edges.to(outputs["t"]))
        for i, metric in enumerate(self.means.values()):
            rows = outputs["losses"][bands == i]
            if len(rows):
                metric.to(rows.device).update(rows)
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for name, metric in self.means.items():
                if metric.update_called:
                    pl_module.log(f"loss_by_interval/{name}", metric.compute())
                    metric.reset()
