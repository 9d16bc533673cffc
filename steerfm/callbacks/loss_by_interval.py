"""The loss by length of the interval |t - s|: where on the triangle a flow map still errs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from steerfm.distributed import gather
from steerfm.errors import ConfigError


class LossByInterval(Callback):
    """Log the mean unweighted loss of the diagonal and of each band of |t - s|, since the last log.

    edges: upper ends of the bands, rising, the last at least 1. The module's training step returns
    {"losses", "s", "t"} beside the loss. Means are over the rows of all processes.
    """

    def __init__(self, edges: Sequence[float] = (0.25, 0.5, 0.75, 1.0)) -> None:
        if not edges or list(edges) != sorted(edges) or edges[-1] < 1:
            raise ConfigError(f"edges must rise and end at 1 or later, got {list(edges)}.")
        self.edges = torch.tensor([0.0, *edges])
        self.names = ["diagonal", *(f"{a:g}-{b:g}" for a, b in pairwise([0, *edges]))]
        self.sums = torch.zeros(2, len(self.names))  # of the losses, and of their rows, by band
        self.logged = 0  # the last step that was logged

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(outputs, Mapping) or not {"losses", "s", "t"} <= set(outputs):
            raise ConfigError(
                f"LossByInterval needs a training step that returns 'losses', 's' and 't', as FlowMapTraining's does, "
                f"and {type(pl_module).__name__}'s does not: drop the callback."
            )
        losses: Tensor = outputs["losses"]
        bands = torch.bucketize((outputs["t"] - outputs["s"]).abs(), self.edges.to(losses))
        self.sums = self.sums.to(losses).index_add(1, bands, torch.stack([losses, torch.ones_like(losses)]))
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every == 0 and step != self.logged:
            self.logged = step
            self._log(pl_module)

    def _log(self, pl_module: LightningModule) -> None:
        """Log the bands that any process has rows in; every process must come here."""
        total, rows = gather(self.sums[None]).sum(0)
        for i, name in enumerate(self.names):
            if rows[i] > 0:
                pl_module.log(f"loss_by_interval/{name}", total[i] / rows[i])
        self.sums = torch.zeros_like(self.sums)
