"""What `steerfm reward check` tries on one reward: every test returns findings in words, and none stops the next."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steerfm.errors import RewardError, SteerfmError
from steerfm.reward import Finding, Reward
from steerfm.types import Values

ALONE = 8  # so many samples of the batch are scored on their own
RELATIVE = 1e-3  # two scores closer than this, or than 1e-4 of the batch's largest, count as equal
OTHER_PROMPT = "something else entirely, number {}"
STEPS = (0.03, 0.01, 0.003, 0.001)  # of finite differences, in the pixel that moves most
MISMATCH = 0.05  # by which the best of them may differ from the gradient
WORDS = (8, 16, 32, 64, 128, 256)  # lengths of the prompts on which truncation is tried
SHORTEST = 0.2  # seconds for which throughput is measured at least


@dataclass(frozen=True)
class Measured:
    """Hold what scoring costs: pictures a second, and the most memory in use beyond the reward's own, in bytes a
    batch; without and, for a differentiable reward, with the gradient to the pictures.

    Memory is that of all tensors alive at once (of PyTorch's allocator on CUDA); a black box that works outside
    PyTorch is not seen. words: see `words_read`.
    """

    rate: float
    memory: int
    words: int | None
    gradient_rate: float | None = None
    gradient_memory: int | None = None


def check_part(reward: Reward, images: Tensor, prompts: Sequence[str]) -> list[Finding]:
    """Return the findings on a reward that is no sum; a reward that breaks the contract is not tried further."""
    before, prompts = images.detach(), list(prompts)
    images = before.clone()
    try:
        with torch.no_grad():
            values = _own(reward, images, prompts)
    except Exception as error:
        return [_broken(reward, "contract", error)]
    findings = []
    if not torch.equal(images, before):
        message = "changes its pictures in place: work on a copy (images.clone(), x = x + 1 in place of x += 1)."
        findings.append(Finding(reward.name, "in place", message))
    for test in (
        _range,
        _repeatable,
        _alone,
        _order,
        _doubled,
        _gradient,
        _finite_difference,
        _flat_pictures,
        _prompts,
        _spread,
    ):
        if test in (_finite_difference, _flat_pictures) and any(finding.fault for finding in findings):
            continue  # they would say the same again
        try:
            findings += test(reward, before.clone(), prompts, values)
        except Exception as error:
            findings.append(_broken(reward, test.__name__.strip("_"), error))
    return findings


def measure(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Measured:
    """Return what scoring a batch costs, on the device on which the pictures are."""

    def score() -> None:
        with torch.no_grad():
            reward(images.detach(), list(prompts))

    def differentiate() -> None:
        leaf = images.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            torch.autograd.grad(reward(leaf, list(prompts)).total.sum(), leaf)

    measured = Measured(_rate(score, images), peak_memory(score, images.device), words_read(reward, images))
    if not reward.differentiable:
        return measured
    rate, memory = _rate(differentiate, images), peak_memory(differentiate, images.device)
    return replace(measured, gradient_rate=rate, gradient_memory=memory)


def _rate(work: Callable[[], None], images: Tensor) -> float:
    """Return the pictures a second of `work`, run until it has taken a while, after one run to warm up."""
    work()
    runs, start = 0, time.perf_counter()
    while runs == 0 or time.perf_counter() - start < SHORTEST:
        work()
        runs += 1
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
    return runs * len(images) / (time.perf_counter() - start)


def peak_memory(work: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that `work` has in use at once beyond what was in use before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _Tally() as tally:
        work()
    return tally.peak


class _Tally(TorchDispatchMode):
    """Count the bytes of tensors made inside that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [each.untyped_storage() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage(), given)
        return made

    def _count(self, storage: Any, given: list[Any]) -> None:
        if storage in self.known or any(storage is each for each in given):
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.alive -= size


def _broken(reward: Reward, subject: str, error: Exception) -> Finding:
    text = str(error) if isinstance(error, RewardError) else f"fails with {type(error).__name__}: {error}"
    return Finding(reward.name, subject, text)


def _own(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Values:
    """Return the reward's values as it gives them: not negated, and NaN where it abstains."""
    return reward(images, list(prompts)).parts[reward.name]


def _score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Values:
    with torch.no_grad():
        return _own(reward, images.clone(), prompts)


def _differ(a: Values, b: Values, values: Values) -> Tensor:
    """Return the indices at which two scorings differ by more than rounding, or one of them alone abstains."""
    largest = values.nan_to_num().abs().max()
    tolerance = 1e-4 * largest + RELATIVE * torch.maximum(a.abs(), b.abs())
    return torch.nonzero(((a - b).abs() > tolerance) | (a.isnan() != b.isnan())).flatten()


def _range(reward: Reward, images: Tensor, prompts: Sequence[str], values: Values) -> list[Finding]:
    if reward.native_range is None:
        return []
    low, high = reward.native_range
    slack = 1e-5 * (high - low) if high - low < float("inf") else 0.0
    outside = torch.nonzero((values < low - slack) | (values > high + slack)).flatten()
    if len(outside) == 0:
        return []
    i = int(outside[0])
    message = f"declares the range [{low:g}, {high:g}] and gives sample {i} {values[i]:.6g}: correct native_range."
    return [Finding(reward.name, "range", message)]


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


def _doubled(reward: Reward, images: Tensor, prompts: Sequence[str], values: Values) -> list[Finding]:
    count = len(images)
    try:
        doubled = _score(reward, torch.cat([images, images]), [*prompts, *prompts])
    except Exception as error:
        return [_broken(reward, "larger batch", error)]
    changed = _differ(values.repeat(2), doubled, values)
    if len(changed) == 0:
        return []
    i = int(changed[0])
    message = (
        f"gives sample {i % count} {values[i % count]:.6g} in a batch of {count} and {doubled[i]:.6g} as number {i} of "
        f"a batch of {2 * count}: a score may not depend on how many there are."
    )
    return [Finding(reward.name, "larger batch", message)]


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


def _finite_difference(reward: Reward, images: Tensor, prompts: Sequence[str], values: Values) -> list[Finding]:
    """Compare the gradient with central differences along it, at half contrast, away from clamps at 0 and 1."""
    if not reward.differentiable:
        return []
    middle = (0.25 + 0.5 * images).requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(reward(middle, list(prompts)).total.sum(), middle)
    largest = gradient.abs().amax(tuple(range(1, gradient.ndim)), keepdim=True)
    direction = torch.where(largest > 0, gradient / largest, 0.0)
    told = float((gradient * direction).sum())
    if not told > 0:
        return []
    found = [_difference(reward, middle.detach(), prompts, direction, step) for step in STEPS]
    best = min(found, key=lambda slope: abs(slope - told))
    if abs(best - told) <= MISMATCH * told:
        return []
    message = (
        f"has a gradient that its values do not follow: along it they should rise by {told:.4g} a unit and rise by "
        f"{best:.4g} (finite differences). Look for detach(), rounding passed straight through, or a backward of its "
        "own."
    )
    return [Finding(reward.name, "finite difference", message)]


def _difference(reward: Reward, images: Tensor, prompts: Sequence[str], direction: Tensor, step: float) -> float:
    with torch.no_grad():
        ahead, behind = (reward(images + sign * step * direction, list(prompts)).total.double() for sign in (1, -1))
    return float((ahead - behind).sum() / (2 * step))


def _flat_pictures(reward: Reward, images: Tensor, prompts: Sequence[str], values: Values) -> list[Finding]:
    """Score pictures of one brightness, on which divisions by a spread or a norm fail."""
    if images.ndim != 4:
        return []
    for colour, level in (("black", 0.0), ("white", 1.0)):
        leaf = torch.full_like(images, level).requires_grad_(True)
        try:
            with torch.set_grad_enabled(reward.differentiable):
                total = reward(leaf * 1.0, list(prompts)).total
            if total.requires_grad:
                (gradient,) = torch.autograd.grad(total.sum(), leaf, allow_unused=True)
                if gradient is not None and not torch.isfinite(gradient).all():
                    message = f"has a gradient that is not finite at {colour} pictures: add 1e-12 under a sqrt or norm."
                    return [Finding(reward.name, "flat pictures", message)]
        except Exception as error:
            return [Finding(reward.name, "flat pictures", f"fails at {colour} pictures: {error}")]
    return []


def _prompts(reward: Reward, images: Tensor, prompts: Sequence[str], values: Values) -> list[Finding]:
    others = [OTHER_PROMPT.format(i) for i in range(len(prompts))]
    if _hears(reward, images, prompts, others):
        return []
    if reward.needs_prompt:
        message = "declares needs_prompt and gives the same scores for other prompts: read them, or declare nothing."
        return [Finding(reward.name, "prompts", message)]
    return [Finding(reward.name, "prompts", "does not look at the prompts.", False)]


def words_read(reward: Reward, images: Tensor) -> int | None:
    """Return the length of a prompt in words, a power of two, at which its last word no longer changes the score.

    None where it always does, up to 256 words, or where the reward does not look at prompts at all.
    """
    one, other = ["red"] * len(images), ["blue"] * len(images)
    for count in (1, *WORDS):
        start = "a " * (count - 1)
        if not _hears(reward, images, [start + word for word in one], [start + word for word in other]):
            return None if count == 1 else count
    return None


def _hears(reward: Reward, images: Tensor, one: Sequence[str], other: Sequence[str]) -> bool:
    """Say whether two sets of prompts give different scores; a reward that refuses a prompt looks at it."""
    try:
        first, second = _score(reward, images, one), _score(reward, images, other)
    except SteerfmError:
        return True
    return len(_differ(first, second, first)) > 0


def _spread(reward: Reward, images: Tensor, prompts: Sequence[str], values: Values) -> list[Finding]:
    heard = values[~values.isnan()]
    if len(heard) == 0:
        return [Finding(reward.name, "spread", "abstains on every picture.", False)]
    if len(heard) < 2 or heard.max() > heard.min():
        return []
    return [Finding(reward.name, "spread", f"gives every picture the same score, {heard[0]:.6g}.", False)]
