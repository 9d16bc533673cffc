"""Pictures, prompts and rewards in the loggers of a run: a sheet, and in W&B a table that grows as training goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lightning import Trainer
from torch import Tensor

from steerfm import images
from steerfm.types import Samples

MOST_PICTURES = 108  # that one call may log, wandb 0.31
COLUMNS = ("step", "prompt", "seed", "picture", "reward")  # and then a column a held-out reward


class LiveTable:
    """Let a W&B table "progress" grow by a row a sample; a log sends its new rows only. Other loggers have no tables.

    A run that is resumed online goes on with its table; one resumed offline, or that had to go on offline, begins
    another of the same name.
    """

    def __init__(self) -> None:
        self.table: Any = None
        self.folder: Any = None  # of the wandb run that the table belongs to

    def add(self, trainer: Trainer, samples: Samples, step: int) -> None:
        """Add the first samples that have pictures, at most 108, with `step` of training; points have none."""
        if samples.images.ndim != 4:
            return
        shown = rows(samples, step)
        for logger in wandb_loggers(trainer.loggers):
            self._log(logger.experiment, shown, step)

    def _log(self, run: Any, shown: list[dict[str, Any]], step: int) -> None:
        """Log rows to a wandb run, and to the one that follows it where it fails just then."""
        for _ in range(2):
            if self.table is None or run.dir != self.folder:
                self.table, self.folder = table(shown, log_mode="INCREMENTAL"), run.dir
            else:
                for row in shown:
                    self.table.add_data(*row.values())
            run.log({"progress": self.table, "trainer/global_step": step})
            if run.dir == self.folder:
                return


def wandb_loggers(loggers: Sequence[Any]) -> list[Any]:
    """Return those of a trainer's loggers that lead to W&B."""
    return [logger for logger in loggers if type(logger).__name__ == "WandbLogger"]


def table(shown: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """Return rows, which have the same keys, as a wandb.Table."""
    import wandb

    heads: list[int | str] = [*shown[0]]
    return wandb.Table(columns=heads, data=[list(row.values()) for row in shown], **options)


def rows(samples: Samples, step: int, most: int = MOST_PICTURES) -> list[dict[str, Any]]:
    """Return a row a sample, of the first ones: step, prompt, seed, picture, reward and held-out values, else None."""
    pixels = images.to_uint8(samples.images[:most].detach().float().cpu())
    held_out = {f"held_out.{name}": values for name, values in samples.held_out.items()}
    return [
        {
            "step": step,
            "prompt": samples.prompts[i] if samples.prompts else "",
            "seed": int(samples.seeds[i]),
            "picture": picture(pixels[i]),
            "reward": None if samples.rewards is None else _number(samples.rewards[i]),
            **{name: _number(values[i]) for name, values in held_out.items()},
        }
        for i in range(len(pixels))
    ]


def picture(pixels: np.ndarray) -> Any:
    """Return uint8 pixels (H, W, C) as a wandb.Image; from floats W&B would make a black one without a word."""
    import wandb

    assert pixels.dtype == np.uint8
    return wandb.Image(np.ascontiguousarray(pixels))


def log_sheet(loggers: Sequence[Any], sheet: Tensor, title: str, step: int) -> None:
    """Log a sheet of pictures (C, H, W) in [0, 1] to W&B and to TensorBoard, where a run logs there."""
    pixels = images.to_uint8(sheet[None])[0]
    for logger in wandb_loggers(loggers):
        logger.experiment.log({title: picture(pixels), "trainer/global_step": step})
    for logger in loggers:
        if type(logger).__name__ == "TensorBoardLogger":
            logger.experiment.add_image(title, pixels, step, dataformats="HWC")


def _number(value: Tensor) -> float | None:
    """Return a number, None for one that is not finite."""
    found = float(value)
    return found if np.isfinite(found) else None
