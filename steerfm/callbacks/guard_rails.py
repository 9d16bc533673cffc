"""Guard rails of fine-tuning: watch samples that stay the same, stop where the reward is hacked, keep the best map."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from steerfm import images
from steerfm.callbacks.course import Course, Measurement, held_out_change, reward_change
from steerfm.callbacks.ema import EMA, averaged
from steerfm.callbacks.live_table import LiveTable
from steerfm.callbacks.sample_grid import keep_picture
from steerfm.errors import ConfigError
from steerfm.features import Features
from steerfm.flow_map import FlowMap
from steerfm.metrics.tuned import Drawn, FixedSamples, opinions
from steerfm.reward import Reward
from steerfm.reward_adapters import means
from steerfm.types import Cost, Samples

log = logging.getLogger(__name__)

FIRST_SEED = 1_000_081  # far from the seeds that results are compared on: the best is chosen on these


class GuardRails(Callback):
    """Measure a tuned map every `every` optimiser steps, at the start and at the end, on samples that stay the same.

    Logged under guard/: the reward and its parts, held-out rewards, divergence D, semigroup defect, the gap between one
    jump and `jumps`, diversity and Vendi score within prompts, the Fréchet distance to data, and what pictures look
    like; see `metrics.tuned`. pictures/guard_STEP.png in the trainer's default_root_dir shows the first `columns`
    samples of the base, and below them the present ones; in W&B these are rows of the table "progress", with their
    rewards.

    prompts, samples: row i has prompt i, over again where there are fewer. data: real samples in model space (M, *dim),
    else the base's. features: of pictures, pixels by default. batch_size: samples at once.

    Stop: where an earlier map had less reward and held-out rewards higher by more than `tolerance` standard errors of
    the paired differences, at `patience` measurements in a row; None never stops. A map that gets worse and better
    again, its reward with it, as while the learning rate is high, goes on. Best: the highest held-out rewards where D
    is at most `largest_divergence` (None: anywhere), with EMA weights where the trainer averages; checkpoints hold
    them. keep: which weights the module ends with, the "last", and then the best are in map_best in default_root_dir,
    or the "best". Several held-out rewards are averaged in units of their standard deviation among the base's samples.

    It belongs after EMA in the list of callbacks. The main process samples alone: figures do not depend on the number
    of processes.
    """

    scores_samples = True  # so that the table "progress" is this one's

    def __init__(
        self,
        every: int = 50,
        samples: int = 64,
        prompts: Sequence[str] = ("",),
        jumps: int = 4,
        *,
        data: Tensor | None = None,
        features: Features | None = None,
        tolerance: float = 2.0,
        patience: int | None = 2,
        largest_divergence: float | None = None,
        keep: Literal["last", "best"] = "last",
        batch_size: int = 64,
        columns: int = 10,
        scale: int = 4,
    ) -> None:
        if every < 1 or (patience is not None and patience < 1):
            raise ConfigError(f"every and patience count from 1, got every={every} and patience={patience}.")
        if keep not in ("last", "best"):
            raise ConfigError(f"keep is 'last' or 'best', got '{keep}'.")
        self.fixed = FixedSamples(list(prompts), samples, FIRST_SEED, jumps, features, batch_size)
        self.course = Course(tolerance, patience, largest_divergence)
        self.every = every
        self.data = data
        self.keep = keep
        self.columns = min(columns, samples)
        self.scale = scale
        self.measured: int | None = None  # the step of the last measurement
        self.weights: dict[str, Tensor] = {}  # of the best, on the CPU
        self.base: Drawn | None = None
        self.real: Tensor | None = None  # features of data
        self.table = LiveTable()

    @property
    def state_key(self) -> str:
        return "GuardRails"

    def state_dict(self) -> dict[str, Any]:
        return {"measured": self.measured, "weights": self.weights, **self.course.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.measured, self.weights = state_dict["measured"], state_dict["weights"]
        self.course.restore(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _watched(pl_module)
        if self.keep == "best" and not module.held_out:
            raise ConfigError(
                "keep='best' needs a held-out reward to choose by, got none: give held_out=[...], a reward that is "
                "not optimised, or keep='last'."
            )
        if trainer.global_step == 0:  # what an earlier fit left is another map's
            self.load_state_dict({"measured": None, "weights": {}, **Course().state()})
        if trainer.is_global_zero:
            self.base = self.fixed.draw(module.reference, None, module.held_out)
            self.real = None if self.data is None else self._embedded(module.flow_map, self.data)
        if self.measured is None:
            self._measure(trainer, pl_module)
        trainer.should_stop = trainer.should_stop or self.course.over  # it was stopped here before it was resumed

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every or trainer.global_step == self.measured:
            return
        now = self._measure(trainer, pl_module)
        if self.course.over:
            trainer.should_stop = True
            log.warning("%s", self._why(now))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self.measured:
            self._measure(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        best, last = self.course.best, trainer.global_step
        if best is None:
            return
        if best.step == last:
            log.info("Held-out rewards were highest at the end: the map has its last weights, of step %d.", last)
        elif self.keep == "best":
            _put(pl_module, self.weights)
            for ema in (each for each in trainer.callbacks if isinstance(each, EMA)):  # type: ignore[attr-defined]
                for name, tensor in self.weights.items():
                    ema.average[name].copy_(tensor)
            log.info("The map has the weights of step %d of %d, whose held-out rewards were highest.", best.step, last)
        else:
            log.info(
                "The map has its last weights, of step %d. Held-out rewards were highest at step %d: %s has those "
                "weights, and keep='best' makes them the map.", last, best.step, self._write_best(trainer, pl_module)
            )  # fmt: skip

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> Measurement:
        """Look at the map as it is, EMA weights where there are any, on every process; log and judge what was found."""
        self.measured = trainer.global_step
        with averaged(pl_module):
            found: Any = self._look(trainer, _watched(pl_module)) if trainer.is_global_zero else None
            now, figures = trainer.strategy.broadcast(found)
            if self.course.take(now):
                self.weights = {name: p.detach().to("cpu", copy=True) for name, p in _tuned(pl_module)}
        figures = {f"guard/{name}": value for name, value in figures.items()}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=now.step)
        return now

    def _look(self, trainer: Trainer, module: Any) -> tuple[Measurement, dict[str, float]]:
        """Return the measurement and all figures by name, and keep the picture."""
        assert self.base is not None
        held_out: list[Reward] = module.held_out
        with evaluating(module.flow_map):
            now = self.fixed.draw(module.flow_map, module.reward, held_out)
            figures = self.fixed.of_map(module.flow_map, module.reference, now, self.base)
        figures |= self.fixed.of_samples(now, self.base, self.real)
        if now.reward is not None:
            figures |= {"reward": float(now.reward.total.mean()), **_named("reward", means(now.reward))}
        for scores in now.held_out:
            figures |= _named("held_out", means(scores))
        if now.images.ndim == 4:
            pictures = torch.cat([self.base.images[: self.columns], now.images[: self.columns]])
            keep_picture(trainer, images.grid(pictures.cpu().float(), self.columns), "guard", "guard", self.scale)
            self.table.add(trainer, self._shown(now), trainer.global_step)
        reward = None if now.reward is None else opinions(now.reward).cpu()
        return Measurement(trainer.global_step, reward, self._in_units(now), figures["divergence"]), figures

    def _shown(self, drawn: Drawn) -> Samples:
        """Return the first `columns` samples as the table shows them, held-out rewards part by part."""
        own, count = self.fixed, self.columns
        return Samples(
            x0=drawn.x0[:count],
            images=drawn.images[:count],
            prompts=[own.prompts[i % len(own.prompts)] for i in range(count)],
            seeds=[own.first + i for i in range(count)],
            cost=Cost(own.jumps),
            rewards=None if drawn.reward is None else opinions(drawn.reward)[:count],
            held_out={name: values[:count] for scores in drawn.held_out for name, values in scores.parts.items()},
        )

    def _in_units(self, drawn: Drawn) -> Tensor:
        """Return held-out rewards (K, N), each in units of its standard deviation among the base's samples."""
        assert self.base is not None
        rows = [
            opinions(scores) / spread(opinions(before))
            for scores, before in zip(drawn.held_out, self.base.held_out, strict=True)
        ]
        return torch.stack(rows).cpu() if rows else torch.empty(0, len(drawn.x0))

    def _embedded(self, flow_map: FlowMap, data: Tensor) -> Tensor:
        batches = data.to(flow_map.device, flow_map.dtype).split(self.fixed.batch_size)
        return torch.cat([self.fixed.embed(flow_map.decode(batch)) for batch in batches])

    def _why(self, now: Measurement) -> str:
        """Return why training stops, in words."""
        rival = self.course.rival
        assert rival is not None
        reward, held_out = reward_change(rival, now), held_out_change(rival, now)
        won = "" if reward is None else f"the reward has risen by {reward.mean:.3g}, and "
        return (
            f"Stopped at step {now.step}: since step {rival.step} {won}the held-out rewards have fallen by "
            f"{-held_out.mean:.2g} ± {held_out.error:.1g} of their spread in the base. The reward is being hacked: "
            "look at pictures/guard_*.png, then ask for less (a higher temperature, a lower learning rate, fewer "
            "steps) or for another reward."
        )

    def _write_best(self, trainer: Trainer, pl_module: LightningModule) -> Path:
        """Write the map with its best weights to map_best, and return the folder; the module stays as it is."""
        folder, flow_map = Path(trainer.default_root_dir) / "map_best", _watched(pl_module).flow_map
        if not trainer.is_global_zero:
            return folder
        with averaged(pl_module) as weights:
            own, label = _put(pl_module, self.weights), flow_map.weights
            flow_map.weights = weights
            try:
                return flow_map.save(folder)
            finally:
                flow_map.weights = label
                _put(pl_module, own)


def spread(values: Tensor) -> Tensor:
    """Return the standard deviation of values (N,) without their NaN; 1 where there is none."""
    known = values[~values.isnan()]
    found = known.std() if len(known) > 1 else torch.zeros(())
    return torch.where(found > 0, found, torch.ones_like(found))


def _watched(pl_module: LightningModule) -> Any:
    missing = [name for name in ("flow_map", "reference", "reward", "held_out") if not hasattr(pl_module, name)]
    if missing:
        raise ConfigError(
            f"GuardRails watches a module's {missing[0]}, as RewardFineTuning has it, and {type(pl_module).__name__} "
            "has none: drop it."
        )
    return pl_module


def _tuned(pl_module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trainable parameters of the flow map, by their names in the module."""
    return ((name, p) for name, p in pl_module.named_parameters() if p.requires_grad and name.startswith("flow_map."))


@torch.no_grad()
def _put(pl_module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put weights in place of the map's, and return those that stood there."""
    before = {name: p.detach().clone() for name, p in _tuned(pl_module)}
    for name, p in _tuned(pl_module):
        p.copy_(weights[name])
    return before


@contextmanager
def evaluating(flow_map: nn.Module) -> Iterator[None]:
    """Put the map into evaluation mode inside the block, and every part back into its own after it."""
    modes = {module: module.training for module in flow_map.modules()}
    flow_map.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _named(group: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{group}/{name}": value for name, value in values.items()}
