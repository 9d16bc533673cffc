"""Preferences (Diffusion-DPO): make the pictures that people chose likelier than the others, with no reward at all.

L = -log sigmoid(T (l(winner) - l(loser))),   l(x0) = E over t, x1 of lambda(t) (|v_ref - w|^2 - |v_theta - w|^2)

lambda = alpha / (sigma d), (1 - t) / t on the linear path, over t uniform on [0.02, 1], with sums over the dimensions,
is the weight with which l estimates log p_theta(x0) / p_ref(x0) (see `steerfm.divergence.velocity_divergence`). So T is
the temperature of every other method: the choices are taken for those of a reward r = T log p*/p_ref, by the law of
Bradley and Terry. Winner and loser share x1 and t. Reference: Wallace et al. 2023, arXiv 2311.12908, eq. (14).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from steerfm.divergence import EARLIEST, squared_norm
from steerfm.errors import ConfigError
from steerfm.finetuning.common import Batch, FineTuning, Tuned
from steerfm.steering.common import check_counts
from steerfm.types import State, Times, Values


@dataclass(frozen=True)
class DirectPreference(FineTuning):
    """Learn from pairs {"image_a", "image_b" in [0, 1], "preferred": (B,)}, as `PreferencePairs` hands them out.

    preferred: 1 where a was chosen, 0 where b was, between for ties and shares of votes. repeats: noisy states of each
    pair, whose mean is inside the sigmoid: more of them, less bias. No reward is needed; one that is given is only
    logged.
    """

    needs_reward: ClassVar[bool] = False

    repeats: int = 4

    def __post_init__(self) -> None:
        check_counts(repeats=self.repeats)

    def __call__(self, batch: Batch) -> Tuned:
        a, b, preferred = pairs_of(batch)
        x1, t = batch.normal(self.repeats), EARLIEST + (1 - EARLIEST) * batch.uniform(self.repeats)
        margin = batch.temperature * (self._log_ratio(batch, a, x1, t) - self._log_ratio(batch, b, x1, t))
        loss = functional.binary_cross_entropy_with_logits(margin, preferred, reduction="none")
        right = ((margin > 0) == (preferred > 0.5)).to(margin)
        return Tuned(loss, figures={"margin": margin.detach(), "accuracy": right})

    def _log_ratio(self, batch: Batch, x0: State, x1: State, t: Times) -> Values:
        """Return estimates of log p_theta(x0) / p_ref(x0), (B,)."""
        path, condition = batch.flow_map.path, batch.times(self.repeats)
        x0 = x0.repeat_interleave(self.repeats, 0)
        x_t, w = path.interpolate(x0, x1, t), path.tangent(x0, x1, t)
        with torch.no_grad():
            before = squared_norm(batch.reference.velocity(x_t, t, condition) - w)
        gain = before - squared_norm(batch.flow_map.velocity(x_t, t, condition) - w)
        weight = (1 - EARLIEST) * path.alpha(t) / path.sigma_determinant(t)
        return (weight * gain).unflatten(0, (-1, self.repeats)).mean(1)


def pairs_of(batch: Batch) -> tuple[State, State, Tensor]:
    """Return both pictures of each pair in model space, and which was preferred, (B,). Raises ConfigError for none."""
    data: Mapping[str, Any] = batch.data
    missing = {"image_a", "image_b", "preferred"} - data.keys()
    if missing:
        raise ConfigError(
            f"Preferences are learnt from pairs, and the batch has no {', '.join(sorted(missing))}: set data to "
            "steerfm.data.PreferencePairs (recipe=shapes_dpo shows how) in place of prompts."
        )
    encode = batch.flow_map.encode
    with torch.no_grad():
        a, b = (
            encode(data[name].to(batch.flow_map.device)).to(batch.flow_map.dtype) for name in ("image_a", "image_b")
        )
    return a, b, data["preferred"].to(a)
