"""Fit a module and save what it learnt: what `train` and `finetune` share."""

from __future__ import annotations

import argparse
import logging
import zipfile
from pathlib import Path
from typing import Any

from lightning import seed_everything

from steerfm.callbacks import Checkpoints, DurableCheckpoints, RandomState, SkipNonFinite, StopOnSignal
from steerfm.callbacks.checkpoints import newest_first
from steerfm.commands import common, loggers
from steerfm.commands.submitting import carried_out
from steerfm.config import Composed
from steerfm.errors import CheckpointError
from steerfm.names import checked_name
from steerfm.runs import Run
from steerfm.saving import read_checkpoint

log = logging.getLogger(__name__)


def run(arguments: argparse.Namespace, command: str) -> int:
    """Fit what the recipe describes (each point of a sweep, in turn); return the exit code."""
    for folder in carried_out(fit, list(common.each(arguments, command))):
        common.say(f"Saved {folder}")
    return 0


def fit(recipe: Composed) -> Path:
    """Fit a composed recipe in its run folder and return the folder of what was saved.

    An unfinished run continues from its last good checkpoint. An interrupted one raises KeyboardInterrupt,
    whose text says how to continue.
    """
    values = recipe.values
    save_as = checked_name(values["save_as"], "name for what is saved")
    with common.running(recipe) as run, loggers.opened(recipe, run) as logger:
        seed_everything(values["seed"], workers=True, verbose=False)
        module, data = recipe.build("module"), recipe.build("data")
        trainer = _trainer(recipe, run, logger)
        with common.interruptible(run):
            trainer.fit(module, data, ckpt_path=last_good(run), weights_only=True)
        saved = run.folder / save_as
        if trainer.is_global_zero:
            module.save(saved)
        run.finish({name: float(value) for name, value in trainer.callback_metrics.items()})
    return saved


def last_good(run: Run) -> Path | None:
    """Return the checkpoint of a run's latest step that is whole, None where it has none yet; a clock has no say in it.

    Raises CheckpointError if there are checkpoints and every one is damaged.
    """
    found, damage = newest_first(_folder(run)), list[CheckpointError]()
    for path in found:
        try:
            check_whole(path)
        except CheckpointError as error:
            damage.append(error)
            continue
        if damage:
            log.warning("%s Going on from the one before it, %s.", damage[0], path.name)
        return path
    if damage:
        raise CheckpointError(
            f"{found[0]} is damaged, and the run has no earlier checkpoint: delete {_folder(run)} to train again "
            "from the start, or restore the file."
        )
    return None


def check_whole(path: Path) -> None:
    """Raise CheckpointError if a checkpoint is cut off, is none, or holds other bytes than were written."""
    read_checkpoint(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes check sums and does not look at them
            broken = archive.testzip()
    except Exception as error:  # as in read_checkpoint
        raise CheckpointError(f"{path} is damaged ({error}): use an earlier one.") from error
    if broken is not None:
        raise CheckpointError(f"{path} is damaged (the check sum of {broken} is another): use an earlier one.")


def _trainer(recipe: Composed, run: Run, logger: Any) -> Any:
    callbacks = common.callbacks(recipe, recipe.values["trainer"].get("max_steps", -1))
    callbacks += [] if any(isinstance(callback, SkipNonFinite) for callback in callbacks) else [SkipNonFinite()]
    callbacks += [RandomState(), StopOnSignal(), Checkpoints(_folder(run), recipe.values["checkpoint_every"])]
    return common.trainer(recipe, run, callbacks=callbacks, logger=logger, plugins=[DurableCheckpoints()])


def _folder(run: Run) -> Path:
    return run.folder / "checkpoints"
