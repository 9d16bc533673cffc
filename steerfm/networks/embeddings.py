"""How a network is told the two times, the class and the scale of guidance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from steerfm.errors import ConfigError
from steerfm.types import Condition, Times

DEEPEST = 1000  # layers


class TimeEmbedding(nn.Module):
    """Embed source time s, target time t and the signed interval t - s; (B,), (B,) -> (B, width).

    Each of the three becomes sines and cosines of `frequencies` log-spaced rates up to `max_rate` radians a
    unit of time. Rates stay low: training differentiates through them, and a rate w multiplies a tangent by w.
    """

    def __init__(self, width: int, frequencies: int = 16, max_rate: float = 32.0) -> None:
        super().__init__()
        self.rates: Tensor
        rates = torch.logspace(math.log10(0.5), math.log10(max_rate), frequencies)
        self.register_buffer("rates", rates, persistent=False)
        self.layers = nn.Sequential(nn.Linear(6 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, s: Times, t: Times) -> Tensor:
        times = torch.stack([s, t, t - s], 1)  # (B, 3)
        angles = (times[:, :, None] * self.rates).flatten(1)
        return self.layers(torch.cat([angles.cos(), angles.sin()], 1))


class ClassEmbedding(nn.Module):
    """Embed class labels, (B,) long -> (B, width); label `num_classes` is the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, condition: Condition | None, like: Tensor) -> Tensor:
        """Return the embedding of condition["label"], or of the null class where there is no condition."""
        if condition is None:
            label = torch.full((len(like),), self.num_classes, device=like.device)
        else:
            label = condition["label"]
        return self.table(label)


class GuidanceEmbedding(nn.Module):
    """Embed the scale of classifier-free guidance, condition["guidance"] (B,) -> (B, width); 1 where none is given.

    asinh(scale), about log(2 scale) where it is large, becomes sines and cosines of `frequencies` log-spaced rates.
    The last layer starts at zero, and the network as one that is not told. Reference: Meng et al. 2022, arXiv
    2210.03142 (one network for a range of scales).
    """

    def __init__(self, width: int, frequencies: int = 8, max_rate: float = 8.0) -> None:
        super().__init__()
        self.rates: Tensor
        rates = torch.logspace(math.log10(0.5), math.log10(max_rate), frequencies)
        self.register_buffer("rates", rates, persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        start_at_zero(self.layers[-1])

    def forward(self, condition: Condition | None, like: Tensor) -> Tensor:
        """Return the embedding, in the type of `like` (B, ...)."""
        scale = None if condition is None else condition.tensors.get("guidance")
        scale = like.new_ones(len(like)) if scale is None else scale.to(like)
        angles = scale.asinh()[:, None] * self.rates
        return self.layers(torch.cat([angles.cos(), angles.sin()], 1))


def conditioning(
    time: TimeEmbedding,
    classes: ClassEmbedding | None,
    s: Times,
    t: Times,
    condition: Condition | None,
    *,
    guidance: GuidanceEmbedding | None = None,
    other: bool = False,
) -> Tensor:
    """Return the sum of the embeddings of times, class and guidance scale, (B, width).

    other: whether the network takes something else from conditions. Raises ConfigError for a condition it ignores.
    """
    embedding = time(s, t)
    if guidance is not None:
        embedding = embedding + guidance(condition, embedding)
    if classes is not None:
        return embedding + classes(condition, embedding)
    if condition is not None and not other:
        raise ConfigError(
            f"This network takes no condition, got one with {list(condition.tensors)}: give it num_classes, or a text."
        )
    return embedding


def check_depth(**counts: int) -> None:
    """Raise ConfigError for more layers than anyone trains: making billions would not end for hours."""
    for name, count in counts.items():
        if count > DEEPEST:
            raise ConfigError(f"{name} is at most {DEEPEST}, got {count}.")


def start_at_zero(layer: nn.Module) -> None:
    """Set all parameters of a layer to zero, so that what it adds starts at nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
