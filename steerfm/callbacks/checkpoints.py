"""Checkpoints from which a run goes on as if it had never stopped: whole, in time, and with the random state."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from steerfm import files
from steerfm.distributed import gather, world
from steerfm.errors import CheckpointError, ConfigError, causes

log = logging.getLogger(__name__)

KEY = "steerfm_random_state"


class Checkpoints(Checkpoint):
    """Write FOLDER/step=00000200.ckpt every `every` optimiser steps and keep the newest `keep`; last.ckpt is a link.

    Which is the newest is told by the step in the name, never by a clock. An older one goes once the newer one is whole
    and on the disk. Where a validation follows a step, the checkpoint is written after it: Lightning does not make up
    for a validation that a resumed run had before it, and what that kept (the best reward of PreferenceTraining) would
    be lost. It belongs with DurableCheckpoints, and Lightning calls it after all other callbacks.
    """

    def __init__(self, folder: str | Path, every: int, keep: int = 2) -> None:
        if every < 1 or keep < 1:
            raise ConfigError(f"Checkpoints are every so many steps, at least 1, got every={every} and keep={keep}.")
        self.folder = Path(folder)
        self.every = every
        self.keep = keep
        self.saved = 0  # the step of the newest; none is needed of step 0
        self.ending: Callable[[Path], None] | None = None

    def end_with(self, ending: Callable[[Path], None]) -> None:
        """Write a checkpoint at the end of this step, whichever it is, and then call ending(path), which raises."""
        self.ending = ending

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved, self.ending = trainer.global_step, None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not _validates_now(trainer):
            self._step_is_over(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._step_is_over(trainer)

    def save(self, trainer: Trainer) -> Path:
        """Write a checkpoint of the present step, which every process must do together, and return its path."""
        step = trainer.global_step
        path = self.folder / f"step={step:08d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)  # with the state of the optimiser
        self.saved = step
        if trainer.is_global_zero:
            _point(self.folder / "last.ckpt", path)
            for old in newest_first(self.folder)[self.keep :]:
                if _step(old) is not None:  # what somebody put there under another name is not ours to delete
                    old.unlink(missing_ok=True)
        return path

    def _step_is_over(self, trainer: Trainer) -> None:
        due = trainer.global_step % self.every == 0 and trainer.global_step != self.saved
        if due or self.ending is not None:
            path = self.save(trainer)
            if self.ending is not None:
                self.ending(path)


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, those of the later steps first, other names last; links are left out."""
    found = (path for path in folder.glob("*.ckpt") if not path.is_symlink())
    return sorted(found, key=lambda path: _step(path) or (-1, 0), reverse=True)


def _step(path: Path) -> tuple[int, int] | None:
    """Return the step in a checkpoint's name, and the version that Lightning's own may have; None for other names."""
    found = re.fullmatch(r"step=(\d+)(?:-v(\d+))?", path.stem)
    return (int(found[1]), int(found[2] or 0)) if found else None


def end_after_saving(trainer: Trainer, ending: Callable[[Path | None], None]) -> None:
    """Call ending(path), which raises, once this step's checkpoint is written; at once where nothing writes any."""
    callback = checkpoints_of(trainer)
    if callback is None:
        ending(None)
    else:
        callback.end_with(ending)


def checkpoints_of(trainer: Trainer) -> Checkpoints | None:
    """Return the callback that writes a trainer's checkpoints; None where it is none of ours."""
    return next((callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints)), None)


def _validates_now(trainer: Trainer) -> bool:
    """Say whether Lightning validates between this step and the next."""
    if not sum(trainer.num_val_batches):  # type: ignore[arg-type]
        return False
    return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


def _point(link: Path, path: Path) -> None:
    """Let `link` lead to a file beside it, in one step; nothing needs the link, so that a disk without any will do."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        temporary.symlink_to(path.name)
        temporary.replace(link)


class DurableCheckpoints(TorchCheckpointIO):
    """Write checkpoints so that a killed process or a power failure leaves the old one or the new one, never half.

    Trainer(plugins=[DurableCheckpoints()]). The bytes go to a file beside the checkpoint, to the disk, and take its
    place in one step (Lightning's own go through another folder and are not flushed). Raises RunError where the disk
    is full; what was saved before is untouched.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint to a local path."""
        if storage_options is not None:
            raise TypeError("DurableCheckpoints writes local files and takes no storage_options.")
        with files.replacing(Path(path)) as stream:
            try:
                torch.save(checkpoint, stream)
            except RuntimeError as error:  # what torch makes of a stream that cannot be written
                raise next((each for each in causes(error) if isinstance(each, OSError)), error) from None


class RandomState(Callback):
    """Keep the state of Python's, NumPy's and PyTorch's generators, of every process, in checkpoints.

    A resumed run then draws what it would have drawn: dropout in a network of your own, say. steerfm's own noise needs
    none of it, since it is a function of seed and step. It is for runs of one long epoch, which steerfm's data make:
    between epochs Lightning and a DataLoader draw themselves. With another number of processes the states do not fit:
    CheckpointError where it is `strict`, else a warning, and each process begins anew.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self._waiting: list[dict[str, Tensor]] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = gathered_states(pl_module.device)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        found = checkpoint.get(KEY)
        if found and len(found) != world()[1] and self.strict:
            raise CheckpointError(
                f"The checkpoint was written by {len(found)} processes and is read by {world()[1]}: use as many again, "
                "or RandomState(strict=False), with which random layers go on with other numbers."
            )
        if found and len(found) != world()[1]:
            log.warning(
                "The checkpoint was written by %d processes and is read by %d: what steerfm draws and learns stays the "
                "same up to rounding, what draws from PyTorch's, NumPy's or Python's own generators does not.",
                len(found), world()[1],
            )  # fmt: skip
        self._waiting = found if found and len(found) == world()[1] else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._waiting is not None:  # only now, since what is set up before the first batch draws too
            restore(self._waiting[world()[0]])
            self._waiting = None


def gathered_states(device: torch.device) -> list[dict[str, Tensor]]:
    """Return the state of the generators of every process, in rank order, as plain data and tensors."""
    mine = _state()
    if world()[1] == 1:
        return [mine]
    names = [name for name, value in mine.items() if isinstance(value, Tensor)]
    columns = {name: gather(mine[name][None].to(device)).cpu() for name in names}
    return [{name: columns[name][rank] for name in names} for rank in range(world()[1])]


def restore(state: dict[str, Tensor]) -> None:
    """Set this process's generators to a state of `gathered_states`."""
    torch.set_rng_state(state["torch"].to(torch.uint8).clone())  # a row of a tensor ends the process (SIGSEGV)
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].to(torch.uint8).clone())
    kept, spare, numpy_kept, numpy_spare = state["spare"].tolist()
    version, *words = state["python"].tolist()
    random.setstate((version, tuple(words), spare if kept else None))
    *key, place = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), place, int(numpy_kept), numpy_spare))  # noqa: NPY002


def _state() -> dict[str, Tensor]:
    """Return the states as numbers; `spare` are the second Gaussians that Python and NumPy keep back."""
    version, words, spare = random.getstate()
    _, key, place, numpy_kept, numpy_spare = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())  # noqa: NPY002
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "numpy": torch.tensor([*key.tolist(), place], dtype=torch.int64),
        "spare": torch.tensor([spare is not None, spare or 0.0, numpy_kept, numpy_spare], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
