"""What the Lightning modules share: optimisers from partials, noise by step, a guard against NaN, frozen guests."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steerfm.callbacks.ema import averaged
from steerfm.callbacks.skip_non_finite import non_finite
from steerfm.distributed import world
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.objectives.teachers import Following
from steerfm.seeds import BatchGenerator
from steerfm.types import Values


def configure(
    parameters: Iterable[nn.Parameter],
    optimizer: Callable[..., Optimizer],
    scheduler: Callable[..., Any] | None,
    apart: Iterable[nn.Parameter] = (),
    rate: float = 1.0,
) -> Any:
    """Return what configure_optimizers returns: the optimiser of the trainable parameters, its schedule by step.

    Those that are `apart` move at `rate` times the others' learning rate. Raises ConfigError where nothing can be
    trained, and for a schedule that levels the two rates.
    """
    trainable, second = [p for p in parameters if p.requires_grad], {id(p) for p in apart}
    if not trainable:
        raise ConfigError("Nothing can be trained: no parameter of the flow map takes a gradient.")
    groups = [[p for p in trainable if (id(p) in second) is chosen] for chosen in (False, True)]
    two = rate != 1 and all(groups)
    built = optimizer([{"params": group} for group in groups] if two else trainable)
    if two:
        built.param_groups[1]["lr"] *= rate
    if scheduler is None:
        return built
    schedule = scheduler(built)
    if two:
        _check_rates(built, type(schedule).__name__, rate)
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _check_rates(optimizer: Optimizer, schedule: str, rate: float) -> None:
    first, second = (group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
    if not math.isclose(second, rate * first, rel_tol=1e-6):
        raise ConfigError(
            f"{schedule} sets the learning rates of both groups, which are to stand {rate:g} to 1, to {second:g} and "
            f"{first:g}: take a schedule that multiplies what there is, such as LinearLR."
        )


def step_generator(module: lightning.LightningModule, seed: int, rows: Sequence[int]) -> BatchGenerator:
    """Return the generator of this step's noise for `rows` of the global batch, a function of seed and batch number.

    The batch number counts accumulated batches too, so that no two of them share noise and a resumed run draws
    what it would have drawn.
    """
    return BatchGenerator(seed, batches_so_far(module), rows, len(rows) * world()[1])


def rows_of(batch: Mapping[str, Any]) -> Sequence[int]:
    """Return the numbers, in the batch of all processes, of the rows that this one holds, as `own_rows` divides them.

    A batch says otherwise under "rows".
    """
    (rank, count), own = world(), len(batch["prompt"])
    return batch["rows"] if "rows" in batch else range(rank, own * count, count)


def batches_so_far(module: lightning.LightningModule) -> int:
    """Return the number of the batch, from 0, accumulated ones counted too; a resumed run goes on with it."""
    return max(module.trainer.fit_loop.epoch_loop.total_batch_idx, 0)


def require_finite(module: lightning.LightningModule, losses: Values, name: str, s: Tensor, t: Tensor) -> None:
    """Have the step skipped (`callbacks.SkipNonFinite`, else TrainingError) where a loss is not finite.

    What is told is the loss, and the interval of the first such row.
    """
    losses = losses.detach()
    bad = ~torch.isfinite(losses)
    if bad.any():
        i = int(bad.nonzero()[0, 0])
        non_finite(
            module,
            f"The loss '{name}' is {float(losses[i])} at step {module.global_step} for the interval "
            f"s = {float(s[i]):.4f}, t = {float(t[i]):.4f} ({int(bad.sum())} of {len(losses)} samples)",
        )


def save_averaged(module: lightning.LightningModule, flow_map: FlowMap, folder: str | os.PathLike[str]) -> Path:
    """Write the module's flow map into `folder`, with EMA weights where its trainer averages; return the folder."""
    with averaged(module) as weights:
        own, flow_map.weights = flow_map.weights, weights
        try:
            return flow_map.save(folder)
        finally:
            flow_map.weights = own


class Guest:
    """Hold a frozen module outside the module tree: not saved, not optimised, yet moved to the device."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval().requires_grad_(False)

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> Any:
        """Return the module, moved to `device`, and to the floating type `dtype` where one is given."""
        return self.module.to(device=device, dtype=dtype)


class Followers:
    """Let the companions among `modules` that follow a map's weights begin, and follow once an optimiser step."""

    def __init__(self, modules: Iterable[nn.Module], flow_map: FlowMap) -> None:
        self.all = [module for module in modules if isinstance(module, Following)]
        self.step = 0  # the optimiser step up to which they have followed
        for follower in self.all:
            follower.begin(flow_map)

    def follow(self, flow_map: FlowMap, step: int) -> None:
        """Look at the weights after `step` optimiser steps; nothing where the batch was accumulated."""
        if step > self.step:
            self.step = step
            for follower in self.all:
                follower.follow(flow_map, step)
