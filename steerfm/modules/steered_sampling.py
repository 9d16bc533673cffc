"""Sample, steered or not, through Trainer.predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning
import torch
from torch import Tensor

from steerfm.errors import ConfigError
from steerfm.finetuning import FineTuning
from steerfm.flow_map import FlowMap
from steerfm.images import to_unit
from steerfm.modules.common import Guest
from steerfm.reward import as_reward, parts_of
from steerfm.sampling import Unsteered
from steerfm.steering import Steering, Watch
from steerfm.types import Samples

SHOWN = 8  # samples whose look-aheads are kept
Method = Callable[..., Samples]


class SteeredSampling(lightning.LightningModule):
    """Run a sampler or a steering method on batches {"prompt": list of str, "seed": list of int}.

    method: Unsteered or a method of steerfm.steering. reward: what steers, or for Unsteered what scores.
    held_out: rewards that nothing optimises; their values come in Samples.held_out. watch: budget, news and
    look-aheads of a steering method (those of the first batch's first few samples, as pictures in the trace); a plain
    sampler has none of them. Nothing is trained. Raises ConfigError where a plain sampler is given a budget, and for a
    method of fine-tuning.
    """

    def __init__(
        self,
        flow_map: FlowMap,
        method: Method | None = None,
        reward: Any = None,
        held_out: Sequence[Any] = (),
        watch: Watch | None = None,
    ) -> None:
        super().__init__()
        self.flow_map = flow_map.eval().requires_grad_(False)
        self.method = method or Unsteered()
        if isinstance(self.method, FineTuning):
            raise ConfigError(
                f"{type(method).__name__} tunes a map and draws no samples: run it by 'steerfm finetune', or choose a "
                "method of steerfm.steering."
            )
        self._reward = None if reward is None else Guest(as_reward(reward))
        self._held_out = [Guest(as_reward(r)) for r in held_out]
        self.watch = watch or Watch()
        steers = isinstance(self.method, Steering)
        if not steers and (self.watch.budget.limited or self.watch.look_aheads):
            raise ConfigError(
                f"A budget and a trace are those of steering, and {type(self.method).__name__} does not steer: set its "
                "steps, or choose another method."
            )
        self._watched: dict[str, Any] = {"watch": self.watch} if steers else {}

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Samples:
        with torch.inference_mode(False):  # guidance differentiates, and a reward moved in inference mode could not
            reward = None if self._reward is None else self._reward.on(self.device)
            watched = dict(self._watched)
            if watched and batch_idx:
                watched["watch"] = replace(self.watch, look_aheads=False)
            samples = self.method(self.flow_map, reward, prompts=batch["prompt"], seeds=batch["seed"], **watched)
            return self._judged(self._shown(samples), reward)

    @torch.no_grad()
    def _shown(self, samples: Samples) -> Samples:
        """Return the samples with the first few's look-aheads, where they were kept, as pictures."""
        if "look_ahead" not in samples.trace:
            return samples
        kept = samples.trace["look_ahead"][:SHOWN]
        pictures = self.flow_map.decode(kept.flatten(0, 1))
        return replace(samples, trace={**samples.trace, "look_ahead": pictures.unflatten(0, kept.shape[:2])})

    @torch.no_grad()
    def _judged(self, samples: Samples, reward: Any) -> Samples:
        """Return the samples with held-out values, and the reward of the unclamped pictures where they differ."""
        held_out: dict[str, Tensor] = {}
        for guest in self._held_out:
            held_out |= guest.on(self.device)(samples.images, samples.prompts).parts
        pictures = samples.x0.ndim == 4 and samples.x0.shape == samples.images.shape
        unclamped = to_unit(samples.x0) if pictures else samples.images
        outside = None
        if _scores_beyond(reward) and (unclamped != samples.images).any():
            outside = reward(unclamped, samples.prompts).total
        return replace(samples, held_out=held_out, rewards_unclamped=outside)


def _scores_beyond(reward: Any) -> bool:
    """Say whether a reward scores pictures that leave [0, 1]."""
    return reward is not None and reward.differentiable and not any(part.bounded for part in parts_of(reward))
