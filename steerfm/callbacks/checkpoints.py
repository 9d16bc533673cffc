"""Checkpoints from which a run goes on as if it had never stopped: written whole, and with the random state."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from steerfm import files
from steerfm.distributed import gather, world
from steerfm.errors import CheckpointError

KEY = "steerfm_random_state"


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
                raise _cause(error) from error


class RandomState(Callback):
    """Keep the state of Python's, NumPy's and PyTorch's generators, of every process, in checkpoints.

    A resumed run then draws what it would have drawn: dropout in a network of your own, say. steerfm's own noise needs
    none of it, since it is a function of seed and step. It is for runs of one long epoch, which steerfm's data make:
    between epochs Lightning and a DataLoader draw themselves. With another number of processes the states do not fit,
    and CheckpointError says so where it is `strict`; else each process begins anew.
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
    torch.set_rng_state(state["torch"].to(torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].to(torch.uint8))
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


def _cause(error: BaseException) -> OSError:
    """Return the error of the operating system behind an error, a full disk where none is told."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError):
            return found
        found = found.__cause__ or found.__context__
    return OSError(errno.ENOSPC, str(error).splitlines()[0])
