"""scikit-learn's handwritten digits, 8x8: real data that come with the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steerfm import digits
from steerfm.data.batches import StepDataModule, epoch_indices, own_rows
from steerfm.errors import ConfigError
from steerfm.images import to_unit


class Digits(StepDataModule):
    """Batches {"x0": (B, 1, 8, 8) in [-1, 1], "prompt": captions such as "a handwritten seven"}.

    batch_size: samples a step, over all processes. split: "all", or the halves "reward" and "judge".
    captions: False leaves every prompt empty, for a map without classes. validation_size: scans of the fixed
    validation batch; 0 is none.
    """

    def __init__(
        self,
        batch_size: int = 128,
        split: str = "all",
        captions: bool = True,
        validation_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
        self.batch_size = batch_size
        self.captions = captions
        self.validation_size = validation_size
        self.seed = seed
        self.scans = digits.load(split)

    def batch(self, step: int) -> dict[str, Any]:
        index = epoch_indices(len(self.scans), step, self.batch_size, self.seed)
        return self._rows(index[own_rows(self.batch_size)])

    def validation_batch(self) -> dict[str, Any] | None:
        if self.validation_size == 0:
            return None
        return self._rows(torch.arange(min(self.validation_size, len(self.scans))))

    def _rows(self, index: Tensor) -> dict[str, Any]:
        prompts = [self.scans.captions[i] if self.captions else "" for i in index.tolist()]
        return {"x0": self.scans.x0[index], "prompt": prompts}


def digit_scans(digit: int | None = None, split: str = "all") -> Tensor:
    """Return real scans in model space, (N, 1, 8, 8): of one digit, or of all; what samples are compared with."""
    scans = digits.load(split)
    return scans.x0 if digit is None else scans.x0[scans.labels == digit]


def digit_picture(index: int = 0, split: str = "all") -> Tensor:
    """Return one scan as a picture (1, 8, 8) in [0, 1]: the truth of an inverse problem."""
    return to_unit(digit_scans(split=split)[index])
