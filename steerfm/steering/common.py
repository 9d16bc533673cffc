"""What the steering methods share: a reward's value and gradient at a look-ahead, and checks of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steerfm.errors import ConfigError, RewardError
from steerfm.reward import Reward, as_reward
from steerfm.types import State, Values


def ready_reward(reward: Any, method: str, needs_gradient: bool) -> Reward:
    """Return `reward` as a Reward. Raises RewardError where there is none, or the method needs its gradient."""
    if reward is None:
        raise RewardError(f"{method} needs a reward, got None: pass any callable (images, prompts) -> (B,) numbers.")
    reward = as_reward(reward)
    if needs_gradient and not reward.differentiable:
        raise RewardError(
            f"'{reward.name}' has no gradient, and {method} needs one. Use BestOfN, which does not; "
            "or a differentiable stand-in."
        )
    return reward


def value_and_gradient(
    function: Callable[[State], State],
    reward: Reward,
    decode: Callable[[State], Tensor],
    x: State,
    prompts: Sequence[str],
) -> tuple[State, Values, State]:
    """Return (clean, r(decode(clean)), gradient of r with respect to x) for clean = function(x).

    Samples are independent, so the gradient of the sum holds each sample's own. Raises RewardError where the
    reward is not connected to its pictures or its gradient is not finite.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        clean = function(x)
        values = reward(decode(clean), prompts).total
        if not values.requires_grad:
            raise RewardError(f"'{reward.name}' gave values without a gradient: it may detach or round its pictures.")
        (gradient,) = torch.autograd.grad(values.sum(), x)
    if not torch.isfinite(gradient).all():
        raise RewardError(f"The gradient of '{reward.name}' is not finite: check it with 'steerfm reward check'.")
    return clean.detach(), values.detach(), gradient


def check_counts(**counts: int) -> None:
    """Raise ConfigError unless every count is at least 1."""
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} must be at least 1, got {count}.")


def check_temperature(temperature: float | None, allow_none: bool = False) -> None:
    """Raise ConfigError unless the temperature is positive (or None, where that is allowed)."""
    if temperature is None and allow_none:
        return
    if temperature is None or not temperature > 0:
        raise ConfigError(f"temperature must be positive, got {temperature}: it divides the reward.")
