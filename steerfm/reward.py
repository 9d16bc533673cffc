"""Rewards: the contract, weighted sums, loading, and a check that names what is wrong with one.

A reward is any callable `(images (B, C, H, W) in [0, 1], prompts, **metadata) -> (B,)`; it scores clean pictures
(or points (B, d) of two-dimensional data), each on its own, and higher is better. Temperature is no part of it.
What else can be made of rewards is in reward_algebra; torchmetrics and TRL in reward_adapters.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from steerfm.building import resolve
from steerfm.conditions.pictures import captions_of
from steerfm.errors import ConfigError, RewardError
from steerfm.reward_plugins import import_typed, plugged_in
from steerfm.types import Values

BOTH = ("images", "prompts")


class Scores(NamedTuple):
    """Hold what a reward says of a batch: `total` (B,), finite, and `parts`, each part's own values (B,) by its name.

    Parts are as their reward gave them: unweighted, not clipped, of their own sign, NaN where they abstained.
    """

    total: Values
    parts: dict[str, Values]


class Reward(nn.Module):
    """Score pictures: override `score`, and declare what differs from the defaults.

    differentiable: has a gradient to the pictures. higher_is_better: if not, totals are the negated values.
    needs_prompt: an empty prompt is refused. native_range: the least and greatest value on pictures in [0, 1],
    None where there is none; `steerfm reward check` holds a reward to it. abstains: NaN says "no opinion" (an error
    otherwise), which adds nothing to a sum. bounded: refuses pictures outside [0, 1], as servers do. frozen: modules
    and parameters take no gradients and are in evaluation mode as they are assigned; gradients flow to the pictures
    only. `a + b`, `0.3 * a` and `-a` make sums.
    """

    name: str = ""
    differentiable: bool = True
    higher_is_better: bool = True
    needs_prompt: bool = False
    native_range: tuple[float, float] | None = None
    abstains: bool = False
    bounded: bool = False
    frozen: bool = True

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = name or type(self).name or _snake(type(self).__name__)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Values:
        """Return one value a sample, (B,); images are (B, C, H, W) in [0, 1], prompts B strings."""
        raise NotImplementedError(f"{type(self).__name__} needs a method score(self, images, prompts, **metadata).")

    @property
    def members(self) -> list[Reward]:
        """The rewards that this one is made of and whose parts it hands on; none for most."""
        return []

    def forward(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Scores:
        """Score a batch and check the result. Raises RewardError that names the reward and the sample.

        Of a prompt "caption @ picture.png", which tells the map what to look at, only the caption is scored.
        Where every part abstains the total is zero.
        """
        _check_prompts(self.name, images, prompts)
        total, parts = self.evaluate(_full(images), captions_of(prompts), **metadata)
        return Scores(silent_as_zero(total), parts)

    def evaluate(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Scores:
        """Score as `forward` does inside a larger reward: the total is NaN where nothing has an opinion."""
        self._check_needed(prompts)
        values = checked(self.score(images, prompts, **metadata), self.name, len(images), self.abstains)
        values = values.to(images.device)
        wants_gradient = self.differentiable and images.requires_grad and torch.is_grad_enabled()
        if wants_gradient and not values.requires_grad:
            raise RewardError(
                f"'{self.name}' gave values without a gradient: it detaches or rounds its pictures. Keep to "
                "differentiable tensor code, or declare differentiable = False and use a method that needs none."
            )
        return Scores(values if self.higher_is_better else -values, {self.name: values})

    def clip(self, low: float | None = None, high: float | None = None) -> Reward:
        """Return this reward held within [low, high], without gradient beyond: nothing is gained there any more."""
        from steerfm.reward_algebra import Clipped

        return Clipped(self, low, high)

    def normalised(self, mean: float, std: float) -> Reward:
        """Return (reward - mean) / std, as `steerfm reward calibrate` prints it, so that parts can be weighed."""
        from steerfm.reward_algebra import Normalised

        return Normalised(self, mean, std)

    def train(self, mode: bool = True) -> Reward:
        """Stay in evaluation mode while frozen, whoever calls."""
        return super().train(mode and not self.frozen)

    def _check_needed(self, prompts: Sequence[str]) -> None:
        empty = [i for i in range(len(prompts)) if not prompts[i].strip()] if self.needs_prompt else []
        if empty:
            raise RewardError(
                f"'{self.name}' compares pictures with their prompts, and that of sample {empty[0]} is empty: give "
                "prompts, or fix one for the reward where it has such an option."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if self.frozen and isinstance(value, (nn.Module, nn.Parameter)):
            freeze(value)
        super().__setattr__(name, value)

    def __mul__(self, weight: float) -> WeightedSum:
        return WeightedSum([(weight * w, part) for w, part in _terms(self)])

    __rmul__ = __mul__

    def __neg__(self) -> WeightedSum:
        return self * -1.0

    def __add__(self, other: Reward | Callable[..., Any] | int) -> Reward:
        if isinstance(other, int) and other == 0:  # where sum([...]) starts
            return self
        return WeightedSum([*_terms(self), *_terms(as_reward(other))])

    __radd__ = __add__

    def __sub__(self, other: Reward | Callable[..., Any]) -> Reward:
        return self + -as_reward(other)


DECLARED = ("differentiable", "higher_is_better", "needs_prompt", "native_range", "abstains")


class FunctionReward(Reward):
    """Wrap any callable or nn.Module; it is given the pictures, the prompts and the metadata that it takes.

    What it takes is decided once, from its signature: arguments called `images` and `prompts` by name, in any
    order, else the first two that have no default, by place; a callable of one argument gets the pictures alone.
    Lists and arrays are made tensors. Attributes of its own, such as `differentiable`, declare what a class would.
    """

    def __init__(
        self, function: Callable[..., Any], name: str | None = None, differentiable: bool | None = None
    ) -> None:
        super().__init__(name or _name_of(function))
        self.function = function
        for declared in DECLARED:
            setattr(self, declared, getattr(function, declared, getattr(Reward, declared)))
        if differentiable is not None:
            self.differentiable = differentiable
        self._takes = _Takes.of(function, self.name)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Values:
        """Call the function; metadata that it does not take are left out."""
        missing = [name for name in self._takes.required if name not in metadata]
        if missing:
            raise RewardError(f"'{self.name}' needs '{missing[0]}' beside pictures and prompts, which was not given.")
        values = self._takes.call(self.function, {"images": images, "prompts": prompts}, metadata)
        if isinstance(values, (list, tuple, np.ndarray)):
            values = torch.as_tensor(np.asarray(values, dtype=np.float32), device=images.device)
        return values


class WeightedSum(Reward):
    """Add rewards with weights; `parts` keep each part's own, unweighted values.

    Differentiable if all parts of a weight other than zero are. A reward that appears twice has its weights
    added; two different rewards of one name are refused, since they could not be told apart in the logs.
    A part that abstains adds zero, as in TRL: normalise it, so that zero is its mean.
    """

    frozen = False  # every part looks after itself

    def __init__(self, terms: Iterable[tuple[float, Reward]]) -> None:
        weights: dict[Reward, float] = {}
        for weight, part in terms:
            weights[part] = weights.get(part, 0.0) + _checked_weight(weight, part.name)
        if not weights:
            raise ConfigError("A sum of rewards needs at least one of them.")
        super().__init__(" + ".join(f"{weight:g} * {part.name}" for part, weight in weights.items()))
        self.parts = nn.ModuleList(weights)
        self.weights = tuple(weights.values())
        self.differentiable = all(part.differentiable for part, weight in weights.items() if weight != 0)
        self.needs_prompt = any(part.needs_prompt for part in weights)
        refuse_twins(self)

    def evaluate(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Scores:
        """Score a batch with every part; each part's result is checked on its own."""
        scores = [part.evaluate(images, prompts, **metadata) for part in self.members]
        weighted = [w * silent_as_zero(each.total) for w, each in zip(self.weights, scores, strict=True)]
        silent = torch.stack([each.total.isnan() for each in scores]).all(0)
        total = checked(sum(weighted), self.name, len(images))
        parts = {name: values for each in scores for name, values in each.parts.items()}
        return Scores(total.masked_fill(silent, torch.nan) if silent.any() else total, parts)

    @property
    def members(self) -> list[Reward]:
        """The rewards that are added."""
        return [part for part in self.parts if isinstance(part, Reward)]

    @property
    def names(self) -> list[str]:
        """The names of what is added, in order."""
        return [part.name for part in self.members]


def freeze(module: nn.Module | nn.Parameter) -> None:
    """Turn parameter gradients off and evaluation mode on; leave rewards inside alone that say frozen = False."""
    if isinstance(module, nn.Parameter):
        module.requires_grad_(False)
    elif getattr(module, "frozen", True) is not False:
        module.training = False
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        for child in module.children():
            freeze(child)


def as_reward(obj: Any, name: str | None = None) -> Reward:
    """Return `obj` if it is a Reward, else wrap it: any nn.Module (which is frozen), torchmetrics metric or callable.

    Raises ConfigError for anything that cannot be called, or a class that was not made an instance.
    """
    if isinstance(obj, Reward):
        return obj
    if any(cls.__module__.startswith("torchmetrics.") for cls in type(obj).__mro__):
        from steerfm.reward_adapters import TorchMetric

        return TorchMetric(obj, name=name)
    if inspect.isclass(obj) or not callable(obj):
        fix = f"write {obj.__name__}(...)" if inspect.isclass(obj) else "pass a function (images, prompts) -> (B,)"
        raise ConfigError(f"A reward is a callable, got {obj!r}: {fix}.")
    return FunctionReward(obj, name)


def load_reward(spec: str, trusted: Sequence[str] = ()) -> Reward:
    """Return the reward that `spec` names: "module:function", a dotted path such as "steerfm.rewards.clip.CLIPScore",
    or the name under which an installed package offers one (`reward_plugins.plugins`).

    A module before a colon was typed by the user and is trusted by that; the current directory is importable. So
    is the name of a plug-in. Dotted paths follow the trust rule of `building.resolve`. Classes are made without
    arguments. Raises ConfigError (nothing of that name, a class that needs arguments) or TrustError.
    """
    if ":" in spec:
        found = import_typed(*spec.split(":", 1))
    else:
        found = resolve(spec, trusted) if "." in spec else plugged_in(spec)
    if not inspect.isclass(found):
        return as_reward(found)
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise ConfigError(
            f"'{spec}' cannot be made without arguments ({error}): name it in a recipe instead."
        ) from error
    return as_reward(found())


@dataclass(frozen=True)
class Finding:
    """Hold one thing that `check` found: a fault to mend or (fault = False) a remark, in one sentence."""

    part: str
    subject: str
    message: str
    fault: bool = True


def check(reward: Any, images: Tensor, prompts: Sequence[str]) -> list[Finding]:
    """Return what is wrong with each part of a reward, tried on `images` (B, C, H, W) in [0, 1]; empty means sound.

    Give at least four different pictures with different prompts. See `steerfm.reward_check` for what is tried.
    """
    from steerfm.reward_check import check_part

    return [finding for part in parts_of(as_reward(reward)) for finding in check_part(part, images, prompts)]


def parts_of(reward: Reward) -> list[Reward]:
    """Return the rewards that score: those inside sums, ensembles and wrappers, each once; else the reward alone."""
    if not reward.members:
        return [reward]
    return list(dict.fromkeys(part for member in reward.members for part in parts_of(member)))


def refuse_twins(reward: Reward) -> None:
    """Raise ConfigError where two different parts of a reward have one name: logs could not tell them apart."""
    names = [part.name for part in parts_of(reward)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"Two rewards of a sum are called '{twice[0]}': give one of them another name=.")


def silent_as_zero(values: Values) -> Values:
    """Return the values with zero, and a gradient of zero, where they are NaN."""
    silent = values.isnan()
    return torch.where(silent, 0.0, values) if silent.any() else values


def _terms(reward: Reward) -> list[tuple[float, Reward]]:
    if not isinstance(reward, WeightedSum):
        return [(1.0, reward)]
    return list(zip(reward.weights, reward.members, strict=True))


@dataclass(frozen=True)
class _Takes:
    """Which arguments a callable takes: pictures and prompts by place or name, and the names of its metadata."""

    by_place: tuple[str, ...]
    by_name: tuple[str, ...] = ()
    metadata: tuple[str, ...] | None = ()  # None: whatever there is
    required: tuple[str, ...] = ()

    @staticmethod
    def of(function: Callable[..., Any], owner: str) -> _Takes:
        """Read the signature of `function`, of its forward for a module. Raises ConfigError if it takes no pictures."""
        try:
            parameters = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
        except (TypeError, ValueError):  # some built-in callables have no signature
            return _Takes(BOTH)
        kinds = {p.kind for p in parameters.values()}
        places = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = [p.name for p in parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        needed = [p.name for p in places if p.default is p.empty]
        by_place, by_name = BOTH[: len(needed) or 1], ()
        if set(BOTH) <= set(named) or ("images" in named and not places):
            by_place, by_name = (), tuple(name for name in BOTH if name in named)
        elif inspect.Parameter.VAR_POSITIONAL in kinds:
            by_place = BOTH
        elif not places or places[0].name == "prompts":
            fix = "write it as (images, prompts) -> (B,) values"
            if "completions" in parameters:
                fix = "it is a reward function of TRL, so wrap it in steerfm.reward_adapters.FromTRL"
            raise ConfigError(f"'{owner}' takes no pictures: {fix}.")
        used = {*by_name, *(p.name for p in places[: len(by_place)])}
        metadata = tuple(name for name in named if name not in used)
        required = tuple(name for name in metadata if parameters[name].default is inspect.Parameter.empty)
        return _Takes(by_place, by_name, None if inspect.Parameter.VAR_KEYWORD in kinds else metadata, required)

    def call(self, function: Callable[..., Any], given: dict[str, Any], metadata: dict[str, Any]) -> Any:
        """Call `function` with those of `given` (pictures, prompts) and of the metadata that it takes."""
        chosen = {key: value for key, value in metadata.items() if self.metadata is None or key in self.metadata}
        return function(*(given[key] for key in self.by_place), **{key: given[key] for key in self.by_name}, **chosen)


def _check_prompts(name: str, images: Tensor, prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise RewardError(f"'{name}' got one string for its prompts: pass a list with one prompt a picture.")
    if len(prompts) != len(images):
        raise RewardError(f"'{name}' got {len(images)} pictures and {len(prompts)} prompts: pass one prompt a picture.")


def checked(values: Any, name: str, count: int, may_abstain: bool = False) -> Tensor:
    """Return the values in at least float32. Raises RewardError for a wrong type or shape, or a value not finite."""
    if not isinstance(values, Tensor):
        raise RewardError(f"'{name}' must return a tensor of shape ({count},), got {type(values).__name__}.")
    if tuple(values.shape) != (count,):
        fix = "give one value a picture"
        if count == 1 and values.ndim == 0:
            fix = "squeeze() drops a batch of one; name the dimension, as in squeeze(1)"
        elif values.numel() == count:
            fix = "add .flatten()"
        raise RewardError(f"'{name}' must return the shape ({count},), got {tuple(values.shape)}: {fix}.")
    if not values.is_floating_point():
        raise RewardError(f"'{name}' must return floating-point values, got {values.dtype}: add .float().")
    wrong = values.isinf() if may_abstain else ~values.isfinite()
    if wrong.any():
        index = int(torch.nonzero(wrong)[0, 0])
        raise RewardError(
            f"'{name}' gave {values[index].item()} for sample {index}: a reward must be finite for every picture; "
            "look for a division by zero, a logarithm of zero or an overflow in it (NaN for no opinion is declared "
            "with abstains = True)."
        )
    return _full(values)


def _full(values: Tensor) -> Tensor:
    """Return half-precision values in float32, in which rewards are computed, and others as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _checked_weight(weight: float, name: str) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ConfigError(f"The weight of '{name}' must be a finite number, got {weight!r}.")
    return float(weight)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _name_of(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", None) or _snake(type(function).__name__)
