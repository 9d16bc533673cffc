"""Batches by step number: what every data module of steerfm hands to Lightning.

A batch is a function of (seed, step) alone and `batch_size` is the global one, divided over the processes. So a
resumed run sees what it would have seen, and the number of processes changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from steerfm.distributed import world
from steerfm.errors import ConfigError
from steerfm.seeds import torch_generator


class StepBatches(IterableDataset):
    """Yield make(step) for the steps from `start()` to `steps`; make returns this process's share of a batch."""

    def __init__(self, make: Callable[[int], Any], steps: int, start: Callable[[], int] = lambda: 0) -> None:
        self.make = make
        self.steps = steps
        self.start = start

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        return (self.make(step) for step in range(self.start(), self.steps))


def own_rows(batch_size: int, name: str = "batch_size") -> slice:
    """Return this process's rows of a global batch, every n-th for n processes.

    So each holds its share of the rows that come first, which learn the velocity. Raises ConfigError where the batch
    cannot be divided evenly.
    """
    rank, count = world()
    if batch_size % count:
        raise ConfigError(
            f"{name} counts over all processes and must be divisible by their number: got {batch_size} for {count}."
        )
    return slice(rank, batch_size, count)


def epoch_indices(size: int, step: int, batch_size: int, seed: int) -> Tensor:
    """Return the global batch's indices at `step` of an endless stream of shuffled epochs, (batch_size,)."""
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // size, (last - 1) // size + 1)
    orders = ((epoch * size, _permutation(size, seed, epoch)) for epoch in epochs)
    return torch.cat([order[max(0, first - start) : last - start] for start, order in orders])


@functools.lru_cache(maxsize=4)  # a large set is permuted once an epoch, not at every step
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=torch_generator(seed, "data", epoch))


class StepDataModule(lightning.LightningDataModule):
    """Hand out training batches by step, and one fixed validation batch; subclasses give `batch(step)`."""

    def batch(self, step: int) -> Any:
        """Return this process's share of the training batch at `step`."""
        raise NotImplementedError

    def validation_batch(self) -> Any | None:
        """Return the batch of fixed samples for validation; None for none."""
        return None

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        if trainer is None or trainer.max_steps < 1:
            raise ConfigError("Training is counted in steps: set trainer.max_steps, for example 1000.")
        accumulate = trainer.accumulate_grad_batches
        batches = StepBatches(self.batch, trainer.max_steps * accumulate, lambda: trainer.global_step * accumulate)
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self) -> DataLoader | list:
        batch = self.validation_batch()
        return [] if batch is None else DataLoader(StepBatches(lambda step: batch, 1), batch_size=None)
