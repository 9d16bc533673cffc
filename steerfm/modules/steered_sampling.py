"""Sample, steered or not, through Trainer.predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning
import torch
from torch import Tensor

from steerfm.flow_map import FlowMap
from steerfm.images import to_unit
from steerfm.modules.common import Guest
from steerfm.reward import as_reward
from steerfm.sampling import Unsteered
from steerfm.types import Samples

Method = Callable[..., Samples]


class SteeredSampling(lightning.LightningModule):
    """Run a sampler or a steering method on batches {"prompt": list of str, "seed": list of int}.

    method: Unsteered or a method of steerfm.steering. reward: what steers, or for Unsteered what scores.
    held_out: rewards that nothing optimises; their values come in Samples.held_out. Nothing is trained.
    """

    def __init__(
        self, flow_map: FlowMap, method: Method | None = None, reward: Any = None, held_out: Sequence[Any] = ()
    ) -> None:
        super().__init__()
        self.flow_map = flow_map.eval().requires_grad_(False)
        self.method = method or Unsteered()
        self._reward = None if reward is None else Guest(as_reward(reward))
        self._held_out = [Guest(as_reward(r)) for r in held_out]

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Samples:
        with torch.inference_mode(False):  # guidance differentiates, and a reward moved in inference mode could not
            reward = None if self._reward is None else self._reward.on(self.device)
            samples = self.method(self.flow_map, reward, prompts=batch["prompt"], seeds=batch["seed"])
            return self._judged(samples, reward)

    @torch.no_grad()
    def _judged(self, samples: Samples, reward: Any) -> Samples:
        """Return the samples with held-out values, and the reward of the unclamped pictures where they differ."""
        held_out: dict[str, Tensor] = {}
        for guest in self._held_out:
            held_out |= guest.on(self.device)(samples.images, samples.prompts).parts
        pictures = samples.x0.ndim == 4 and samples.x0.shape == samples.images.shape
        unclamped = to_unit(samples.x0) if pictures else samples.images
        outside = None
        if reward is not None and reward.differentiable and (unclamped != samples.images).any():
            outside = reward(unclamped, samples.prompts).total
        return replace(samples, held_out=held_out, rewards_unclamped=outside)
