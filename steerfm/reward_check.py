"""What `steerfm reward check` tries on one reward: every test returns findings in words, and none stops the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steerfm.errors import RewardError, SteerfmError
from steerfm.reward import Finding, Reward
from steerfm.types import Values

ALONE = 8  # so many samples of the batch are scored on their own
RELATIVE = 1e-3  # two scores closer than this, or than 1e-4 of the batch's largest, count as equal
OTHER_PROMPT = "something else entirely, number {}"


def check_part(reward: Reward, images: Tensor, prompts: Sequence[str]) -> list[Finding]:
    """Return the findings on a reward that is no sum; a reward that breaks the contract is not tried further."""
    before, prompts = images.detach(), list(prompts)
    images = before.clone()
    try:
        with torch.no_grad():
            values = reward(images, prompts).total
    except Exception as error:
        return [_broken(reward, "contract", error)]
    findings = []
    if not torch.equal(images, before):
        message = "changes its pictures in place: work on a copy (images.clone(), x = x + 1 in place of x += 1)."
        findings.append(Finding(reward.name, "in place", message))
    for test in (_repeatable, _alone, _order, _gradient, _prompts, _spread):
        try:
            findings += test(reward, before.clone(), prompts, values)
        except Exception as error:
            findings.append(_broken(reward, test.__name__.strip("_"), error))
    return findings


def _broken(reward: Reward, subject: str, error: Exception) -> Finding:
    text = str(error) if isinstance(error, RewardError) else f"fails with {type(error).__name__}: {error}"
    return Finding(reward.name, subject, text)


def _score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Values:
    with torch.no_grad():
        return reward(images.clone(), list(prompts)).total


def _differ(a: Values, b: Values, values: Values) -> Tensor:
    """Return the indices at which two scorings differ by more than rounding."""
    tolerance = 1e-4 * values.abs().max() + RELATIVE * torch.maximum(a.abs(), b.abs())
    return torch.nonzero((a - b).abs() > tolerance).flatten()


def _repeatable(reward: Reward, images: Tensor, prompts: Sequence[str], values: Values) -> list[Finding]:
    again = _score(reward, images, prompts)
    changed = _differ(values, again, values)
    if len(changed) == 0:
        return []
    i = int(changed[0])
    message = (
        f"gives sample {i} {values[i]:.6g}, then {again[i]:.6g}: it is random. Turn dropout off, or draw its noise "
        "from a fixed generator."
    )
    return [Finding(reward.name, "repeatable", message)]


def _alone(reward: Reward, images: Tensor, prompts: Sequence[str], values: Values) -> list[Finding]:
    count = min(len(images), ALONE)
    try:
        single = torch.cat([_score(reward, images[i : i + 1], prompts[i : i + 1]) for i in range(count)])
    except Exception as error:
        return [_broken(reward, "batch of one", error)]
    changed = _differ(values[:count], single, values)
    if len(changed) == 0:
        return []
    i = int(changed[0])
    message = (
        f"gives sample {i} {values[i]:.6g} in a batch of {len(images)} and {single[i]:.6g} alone: a score may not "
        "depend on its neighbours. Look for a mean, maximum or normalisation over the batch."
    )
    return [Finding(reward.name, "neighbours", message)]


def _order(reward: Reward, images: Tensor, prompts: Sequence[str], values: Values) -> list[Finding]:
    turned = _score(reward, images.flip(0), prompts[::-1]).flip(0)
    changed = _differ(values, turned, values)
    if len(changed) == 0:
        return []
    i = int(changed[0])
    message = (
        f"gives sample {i} {values[i]:.6g}, and {turned[i]:.6g} with the batch in another order: a score may not "
        "depend on its place."
    )
    return [Finding(reward.name, "order", message)]


def _gradient(reward: Reward, images: Tensor, prompts: Sequence[str], values: Values) -> list[Finding]:
    leaf = images.clone().requires_grad_(True)
    with torch.enable_grad():
        scored = reward(leaf * 1.0, list(prompts)).total  # a reward that works in place may not touch a leaf
    if not reward.differentiable:
        if not scored.requires_grad:
            return []
        return [Finding(reward.name, "gradient", "declares no gradient but has one: set differentiable = True.", False)]
    (first,) = torch.autograd.grad(scored[0], leaf, retain_graph=True, allow_unused=True)
    if first is not None and first[1:].abs().sum() > 1e-6 * first.abs().max():
        message = "sends the gradient of sample 0 to other samples: keep every operation within its sample."
        return [Finding(reward.name, "gradient leak", message)]
    (gradient,) = torch.autograd.grad(scored.sum(), leaf, allow_unused=True)
    message = _fault_of(gradient)
    if message:
        return [Finding(reward.name, "gradient", message)]
    flat = gradient.flatten(1).abs().amax(1)
    if flat.all():
        return []
    i = int(torch.nonzero(flat == 0)[0, 0])
    message = f"has no gradient at sample {i}, where it may be clamped or saturated."
    return [Finding(reward.name, "gradient", message, False)]


def _fault_of(gradient: Tensor | None) -> str:
    declare = "or declare differentiable = False"
    if gradient is None:
        return f"has a gradient, but none that reaches its pictures: do not detach or rebuild them, {declare}."
    if not torch.isfinite(gradient).all():
        return "has a gradient that is not finite: look for sqrt, norm or division at zero."
    if not gradient.any():
        return f"has a gradient of zero everywhere: do not round, threshold or take an argmax, {declare}."
    return ""


def _prompts(reward: Reward, images: Tensor, prompts: Sequence[str], values: Values) -> list[Finding]:
    others = [OTHER_PROMPT.format(i) for i in range(len(prompts))]
    try:
        if len(_differ(values, _score(reward, images, others), values)) > 0:
            return []
    except SteerfmError:  # a reward that refuses a prompt looks at it
        return []
    return [Finding(reward.name, "prompts", "does not look at the prompts.", False)]


def _spread(reward: Reward, images: Tensor, prompts: Sequence[str], values: Values) -> list[Finding]:
    if len(values) < 2 or values.max() > values.min():
        return []
    return [Finding(reward.name, "spread", f"gives every picture the same score, {values[0]:.6g}.", False)]
