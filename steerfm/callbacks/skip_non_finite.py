"""What is done about a loss or a gradient that is not finite: the step is skipped, and counted, on all processes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from steerfm.callbacks.checkpoints import checkpoints_of, end_after_saving, newest_first
from steerfm.errors import ConfigError, TrainingError

log = logging.getLogger(__name__)

LARGEST = 1e18  # of an entry of a gradient: float32, in which Adam keeps squares of them, ends at 3e38
ADVICE = "lower the learning rate, clip gradients (trainer.gradient_clip_val=1), or look at the data"


class SkipNonFinite(Callback):
    """Skip the steps whose loss or gradient is not finite, and stop after `limit` of them in a row.

    All processes skip a step as soon as one of them has to. A skipped step takes the gradients away, so that weights
    and the optimiser's state stay as they are, bit by bit; data and learning rate go on. Each is told in a warning,
    `skipped_steps` in the log is their number so far, and checkpoints hold both counts, so that a resumed run skips
    and stops where it would have. To stop is to raise TrainingError, with the state of before in a checkpoint; whoever
    goes on from it has as many chances again.

    No checkpoint is written whose weights, averages or optimiser state are not finite: TrainingError then names the
    last good one. Under 16-bit precision with a scaled loss, gradients that overflow are the scaler's to skip. Without
    this callback the modules raise at the first loss that is not finite.
    """

    def __init__(self, limit: int = 5) -> None:
        if limit < 1:
            raise ConfigError(f"limit is a number of skipped steps in a row, at least 1, got {limit}.")
        self.limit = limit
        self.in_a_row = 0
        self.total = 0
        self._found = ("", "")  # what is not finite in this step, and what to do about it
        self._step = 0  # the optimiser step that was looked at last

    @property
    def state_key(self) -> str:
        return "SkipNonFinite"

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.in_a_row, self.total = state_dict["in_a_row"], state_dict["total"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._found, self._step = ("", ""), trainer.global_step

    def note(self, trainer: Trainer, fact: str, advice: str = ADVICE) -> None:
        """Skip the step that is being made. Outside of one, as in validation, the fact is told and nothing else."""
        if trainer.training:
            self._found = (fact, advice)
        else:
            log.warning("%s.", fact)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not self._found[0] and not _scaled(trainer) and not _usable(p.grad for p in parameters):
            self._found = (f"A gradient is not finite at step {trainer.global_step}", ADVICE)
        if not _on_any(trainer, self._found[0]):
            self.in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        fact = self._found[0] or f"Another process has a loss that is not finite at step {trainer.global_step}"
        log.warning("%s. The step is skipped, %d in a row and %d in all.", fact, self.in_a_row, self.total)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.total:
            pl_module.log("skipped_steps", float(self.total))
        if trainer.global_step == self._step:  # the batch was accumulated
            return
        self._step = trainer.global_step
        (fact, advice), self._found = self._found, ("", "")
        if not self.in_a_row:
            return
        broken = next(_not_finite(_trained(pl_module)), "")
        if _on_any(trainer, broken):
            raise TrainingError(
                f"The weights '{broken}' are not finite at step {trainer.global_step}, where a step before went too "
                f"far: {ADVICE}.{_last_good(trainer)}"
            )
        if self.in_a_row >= self.limit:
            self.in_a_row = 0
            message = f"{fact or 'Another process has a loss that is not finite'}, and {self.limit} steps in a row "
            end_after_saving(trainer, lambda path: _stop(f"{message}were skipped: {advice or ADVICE}.", path))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        broken = next(_not_finite(_kept(pl_module, checkpoint)), "")
        if _on_any(trainer, broken):
            raise TrainingError(
                f"A checkpoint at step {trainer.global_step} would hold {broken or 'values of another process'} that "
                f"are not finite, and is not written: {ADVICE}.{_last_good(trainer)}"
            )


def non_finite(module: LightningModule, fact: str, advice: str = ADVICE) -> None:
    """Have the present step skipped where the module's trainer has a SkipNonFinite, else raise TrainingError."""
    trainer: Trainer | None = getattr(module, "_trainer", None)
    for callback in trainer.callbacks if trainer else ():  # type: ignore[attr-defined]
        if isinstance(callback, SkipNonFinite):
            return callback.note(trainer, fact, advice)  # type: ignore[arg-type]
    raise TrainingError(f"{fact}: {advice}.")


def _on_any(trainer: Trainer, finding: str) -> bool:
    """Say whether any process has found something; every process must call it."""
    return trainer.strategy.reduce_boolean_decision(bool(finding), all=False)


def _usable(gradients: Iterable[Tensor | None]) -> bool:
    """Say whether all gradients are finite, and their squares are in float32."""
    there = [_local(gradient) for gradient in gradients if gradient is not None]
    return not there or float(get_total_norm(there, math.inf)) < LARGEST


def _not_finite(named: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Yield the names of tensors that are not finite everywhere."""
    for name, value in named:
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(_local(value)).all():
            yield name


def _local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor that is shared out (DTensor, whose import takes a second)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def _trained(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _kept(module: nn.Module, checkpoint: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what a checkpoint holds of trained weights, of their average and of the optimiser's state, by name."""
    weights = checkpoint["state_dict"]
    yield from ((f"weights '{name}'", weights.get(name)) for name, _ in _trained(module))
    average = checkpoint.get("callbacks", {}).get("EMA", {}).get("average", {})
    yield from ((f"averages of '{name}'", value) for name, value in average.items())
    for states in checkpoint.get("optimizer_states", []):
        for state in states.get("state", {}).values():
            yield from ((f"values '{name}' of the optimiser", value) for name, value in state.items())


def _scaled(trainer: Trainer) -> bool:
    """Say whether a gradient scaler looks after gradients that are not finite."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _stop(message: str, path: Path | None) -> None:
    kept = "" if path is None else f" The state before them is in {path}."
    raise TrainingError(message + kept)


def _last_good(trainer: Trainer) -> str:
    callback = checkpoints_of(trainer)
    found = newest_first(callback.folder) if callback else []
    return f" The last good checkpoint is {found[0]}." if found else ""
