"""An exponential moving average of the trainable parameters; the raw weights stay where they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from steerfm.distributed import like, whole
from steerfm.errors import ConfigError


class EMA(Callback):
    """Average the trainable parameters after every optimiser step, and validate with the average.

    decay: of the average, in [0, 1); it warms up as (1 + n) / (10 + n) after n steps. The average is kept in
    float32 at least: steps of one in a thousand are lost in bfloat16. Checkpoints hold both: the raw weights as
    always, and the average in this callback's state, which FlowMap.load takes by default.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"decay must lie in [0, 1), got {decay}.")
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self.raw: dict[str, Tensor] = {}  # the module's own weights, while the average stands in their place

    @property
    def state_key(self) -> str:
        return "EMA"

    def state_dict(self) -> dict[str, Any]:
        return {"average": {name: whole(tensor) for name, tensor in self.average.items()}, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average, self.updates = state_dict["average"], state_dict["updates"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainable = dict(_trainable(pl_module))
        afresh = trainer.ckpt_path is None and trainer.global_step == 0  # what an earlier fit left is another map's
        if afresh or set(self.average) != set(trainable):
            self.average = {name: _precise(p.detach().clone()) for name, p in trainable.items()}
            self.updates = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainable = dict(_trainable(pl_module))
        self.average = {name: like(tensor, trainable[name]) for name, tensor in self.average.items()}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.average = {name: whole(tensor) for name, tensor in self.average.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.updates:  # the batch was accumulated, the weights have not moved
            return
        self.updates = trainer.global_step
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in _trainable(pl_module):
            self.average[name].lerp_(_precise(parameter.detach()), 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_average(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_raw(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the raw weights back where an error or Ctrl-C ended validation early."""
        self._put_raw(pl_module)

    @contextmanager
    def applied(self, pl_module: LightningModule) -> Iterator[None]:
        """Put the average in place of the weights inside the block, and the weights back after it."""
        if self.raw:  # it stands there already
            yield
            return
        self._put_average(pl_module)
        try:
            yield
        finally:
            self._put_raw(pl_module)

    @torch.no_grad()
    def _put_average(self, pl_module: LightningModule) -> None:
        for name, parameter in _trainable(pl_module):
            if name in self.average:
                self.raw[name] = parameter.detach().clone()
                parameter.copy_(self.average[name])

    @torch.no_grad()
    def _put_raw(self, pl_module: LightningModule) -> None:
        for name, parameter in _trainable(pl_module):
            if name in self.raw:
                parameter.copy_(self.raw.pop(name))


@contextmanager
def averaged(pl_module: LightningModule) -> Iterator[str]:
    """Put the trainer's EMA in place inside the block, if it has one; yield which weights these are."""
    trainer = getattr(pl_module, "_trainer", None)
    ema = next((c for c in trainer.callbacks if isinstance(c, EMA) and c.average), None) if trainer else None
    if ema is None:
        yield "raw"
        return
    with ema.applied(pl_module):
        yield "ema"


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
