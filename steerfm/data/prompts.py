"""Prompts: for fine-tuning, by step; for sampling, paired with seeds."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from steerfm.data.batches import StepBatches, StepDataModule, epoch_indices, own_rows
from steerfm.distributed import of_rank_zero, shard
from steerfm.errors import ConfigError, DataError


def read_prompts(prompts: str | os.PathLike[str] | Sequence[str]) -> list[str]:
    """Return a list of prompts as it is, or the lines of a text file, without empty ones.

    Raises DataError for a missing or empty file, and for an empty list.
    """
    if isinstance(prompts, (str, os.PathLike)):
        path = Path(prompts)
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise DataError(f"The prompts in {path} cannot be read ({error}): give a text file, one a line.") from error
        prompts = [line for line in lines if line]
    if not prompts:
        raise DataError("There are no prompts: give at least one; [''] samples without a prompt.")
    return list(prompts)


class Prompts(StepDataModule):
    """Batches {"prompt": B prompts, "rows": their numbers in the batch of all processes} for fine-tuning.

    prompts: a list, or a text file with one a line. prompts_per_step: how many prompts a step sees, over all
    processes; samples_per_prompt: how often each is sampled, neighbours in the batch.
    """

    def __init__(
        self,
        prompts: str | os.PathLike[str] | Sequence[str] = ("",),
        prompts_per_step: int = 64,
        samples_per_prompt: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.prompts = read_prompts(prompts)
        if prompts_per_step < 1 or samples_per_prompt < 1:
            raise ConfigError(
                f"A step needs at least one prompt and one sample of it, "
                f"got prompts_per_step={prompts_per_step} and samples_per_prompt={samples_per_prompt}."
            )
        self.prompts_per_step = prompts_per_step
        self.samples_per_prompt = samples_per_prompt
        self.seed = seed

    def batch(self, step: int) -> dict[str, Any]:
        index = epoch_indices(len(self.prompts), step, self.prompts_per_step, self.seed)
        own = range(self.prompts_per_step)[own_rows(self.prompts_per_step, "prompts_per_step")]
        rows = [(place, sample) for place in own for sample in range(self.samples_per_prompt)]
        return {
            "prompt": [self.prompts[index[place]] for place, _ in rows],
            "rows": [place * self.samples_per_prompt + sample for place, sample in rows],
        }


class PromptSeeds(lightning.LightningDataModule):
    """Batches {"prompt", "seed"} for Trainer.predict: every prompt with every seed, divided over the processes.

    seeds: a list, or a number n for 0 .. n-1. batch_size: pairs a batch; it changes nothing but memory. "index" holds
    the numbers of a batch's pairs; those of `done()`, asked on rank zero, are left out.
    """

    def __init__(
        self,
        prompts: str | os.PathLike[str] | Sequence[str] = ("",),
        seeds: int | Sequence[int] = 16,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        numbers = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
        if not numbers:
            raise ConfigError(f"Sampling needs at least one seed, got {seeds}.")
        self.pairs = [(prompt, seed) for prompt in read_prompts(prompts) for seed in numbers]
        self.batch_size = batch_size
        self.done: Callable[[], Collection[int]] = tuple

    def predict_dataloader(self) -> DataLoader:
        done = set(of_rank_zero(sorted(self.done()), self._device()))
        own = shard([number for number in range(len(self.pairs)) if number not in done])
        batches = [own[i : i + self.batch_size] for i in range(0, len(own), self.batch_size)]

        def make(step: int) -> dict[str, Any]:
            pairs = [self.pairs[number] for number in batches[step]]
            return {"prompt": [p for p, _ in pairs], "seed": [s for _, s in pairs], "index": batches[step]}

        return DataLoader(StepBatches(make, len(batches)), batch_size=None)

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
