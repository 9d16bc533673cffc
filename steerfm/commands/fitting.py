"""Fit a module and save what it learnt: what `train` and `finetune` share."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from lightning import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from steerfm.callbacks import DurableCheckpoints, RandomState
from steerfm.commands import common, loggers
from steerfm.config import Composed
from steerfm.errors import CheckpointError
from steerfm.runs import Run
from steerfm.saving import read_checkpoint

log = logging.getLogger(__name__)


def run(arguments: argparse.Namespace, command: str) -> int:
    """Fit what the recipe describes (each point of a sweep, in turn); return the exit code."""
    for recipe in common.each(arguments, command):
        common.say(f"Saved {fit(recipe)}")
    return 0


def fit(recipe: Composed) -> Path:
    """Fit a composed recipe in its run folder and return the folder of what was saved.

    An unfinished run continues from its last good checkpoint. An interrupted one raises KeyboardInterrupt,
    whose text says how to continue.
    """
    values = recipe.values
    with common.running(recipe) as run, loggers.opened(recipe, run) as logger:
        seed_everything(values["seed"], workers=True, verbose=False)
        module, data = recipe.build("module"), recipe.build("data")
        trainer = _trainer(recipe, run, logger)
        with common.interruptible(run):
            trainer.fit(module, data, ckpt_path=last_good(run), weights_only=True)
        saved = run.folder / values["save_as"]
        if trainer.is_global_zero:
            module.save(saved)
        run.finish({name: float(value) for name, value in trainer.callback_metrics.items()})
    return saved


def last_good(run: Run) -> Path | None:
    """Return the newest checkpoint of a run that can be read, None where it has none yet.

    Raises CheckpointError if there are checkpoints and every one is damaged.
    """
    folder = run.folder / "checkpoints"
    found = sorted(folder.glob("*.ckpt"), key=lambda path: (path.stat().st_mtime_ns, path.is_symlink()), reverse=True)
    damage: list[CheckpointError] = []
    for path in found:
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            damage.append(error)
            continue
        if damage:
            log.warning("%s Going on from the one before it, %s.", damage[0], path.name)
        return path
    if damage:
        raise CheckpointError(
            f"{found[0]} is damaged, and the run has no earlier checkpoint: delete {folder} to train again from "
            "the start, or restore the file."
        )
    return None


def _trainer(recipe: Composed, run: Run, logger: Any) -> Any:
    callbacks = common.callbacks(recipe, recipe.values["trainer"].get("max_steps", -1))
    callbacks += [_checkpoints(run, recipe.values["checkpoint_every"]), RandomState()]
    return common.trainer(recipe, run, callbacks=callbacks, logger=logger, plugins=[DurableCheckpoints()])


def _checkpoints(run: Run, every: int) -> ModelCheckpoint:
    """Return the callback that keeps the two newest checkpoints; last.ckpt points to the newer."""
    return ModelCheckpoint(
        dirpath=run.folder / "checkpoints",
        filename="{step:08d}",
        monitor="step",
        mode="max",
        save_top_k=2,
        save_last="link",
        every_n_train_steps=every,
    )
