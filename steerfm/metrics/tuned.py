"""A tuned map beside its base, on the same prompts and seeds: scores, spread, distance to data, looks, divergence.

A hacked reward shows in one of these, and never in itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerfm.divergence import monitor, squared_norm
from steerfm.errors import ConfigError
from steerfm.features import Features, extract
from steerfm.flow_map import FlowMap
from steerfm.images import resize
from steerfm.metrics.diversity import mean_pairwise_distance
from steerfm.metrics.frechet import frechet_distance
from steerfm.metrics.looks import looks
from steerfm.metrics.vendi import vendi_score
from steerfm.reward import Reward, Scores
from steerfm.sampling import Unsteered
from steerfm.seeds import torch_generator

SIDE = 32  # pixels of pictures that are no larger are their features


@dataclass(frozen=True)
class Drawn:
    """Hold samples x0 (N, *dim), what rewards see of them, its features (N, D), and the scores they were given."""

    x0: Tensor
    images: Tensor
    features: Tensor
    reward: Scores | None
    held_out: list[Scores]


@dataclass(frozen=True)
class FixedSamples:
    """Draw the same N samples of any map: row i has prompt i, over again where there are fewer, and seed first + i.

    jumps: from noise to data. features: of pictures (or points) for diversity and distances; pixels by default, of
    pictures shrunk to 32 a side. batch_size: rows at once, which decides memory and the last bit. Raises ConfigError
    for fewer than two samples of a prompt, between which there is no distance.
    """

    prompts: Sequence[str]
    samples: int
    first: int = 0
    jumps: int = 4
    features: Features | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not 1 <= len(self.prompts) <= self.samples // 2:
            raise ConfigError(
                f"Diversity needs two samples or more of every prompt, got {self.samples} samples of "
                f"{len(self.prompts)} prompts: ask for more samples, or fewer prompts."
            )

    @torch.no_grad()
    def draw(self, flow_map: FlowMap, reward: Reward | None = None, held_out: Sequence[Reward] = ()) -> Drawn:
        """Return the samples of a map with their scores."""
        drawn = [self._few(flow_map, reward, held_out, *batch) for batch in self._batches()]
        return Drawn(
            torch.cat([each.x0 for each in drawn]),
            torch.cat([each.images for each in drawn]),
            torch.cat([each.features for each in drawn]),
            _joined([each.reward for each in drawn if each.reward is not None]) if reward is not None else None,
            [_joined([each.held_out[i] for each in drawn]) for i in range(len(held_out))],
        )

    @torch.no_grad()
    def of_map(self, flow_map: FlowMap, reference: FlowMap, drawn: Drawn, base: Drawn) -> dict[str, float]:
        """Return the divergence D from the reference, the semigroup defect, and the gap of one jump from `jumps`.

        The noise of the first two is the same every time. jump_gap, left out where jumps is 1: the mean distance of
        the two endpoints, over that of two samples of the base.
        """
        found: dict[str, float] = {}
        generator, done = torch_generator(self.first, "validation"), 0
        for prompts, seeds in self._batches():
            x0 = drawn.x0[done : done + len(seeds)]
            condition = flow_map.encode_prompts(prompts)
            few = {name: float(mean) for name, mean in monitor(flow_map, reference, x0, condition, generator).items()}
            if self.jumps > 1:
                once = Unsteered("jumps", 1)(flow_map, prompts=prompts, seeds=seeds, condition=condition).x0
                few["jump_gap"] = _ratio(float(squared_norm(once - x0).sqrt().mean()), mean_pairwise_distance(base.x0))
            for name, mean in few.items():
                found[name] = found.get(name, 0.0) + mean * len(seeds) / self.samples
            done += len(seeds)
        return found

    def of_samples(self, drawn: Drawn, base: Drawn, data: Tensor | None = None) -> dict[str, float]:
        """Return how diverse samples are, how far from data (M, D), and what they look like.

        diversity: the mean distance between samples of one prompt, over that of the base's. vendi: the effective number
        of different samples of one prompt (Gaussian, the base's mean distance its bandwidth). frechet: to the features
        of data, or to the base's samples; the bias upward is that of the base's own figure.
        """
        spread = self._within(base, mean_pairwise_distance)
        found = {"diversity": _ratio(self._within(drawn, mean_pairwise_distance), spread)}
        if spread > 0:
            found["vendi"] = self._within(drawn, lambda rows: vendi_score(rows, "gaussian", spread))
        found["frechet"] = frechet_distance(drawn.features, base.features if data is None else data)
        return found | (looks(drawn.images) if drawn.images.ndim == 4 else {})

    def embed(self, images: Tensor) -> Tensor:
        """Return the features (N, D) of what rewards see, in float64 on the CPU."""
        seen = images.detach().float().clamp(0, 1) if images.ndim == 4 else images
        return extract(self.features or small_pixels, seen, self.batch_size)

    def _few(
        self, flow_map: FlowMap, reward: Reward | None, held_out: Sequence[Reward], prompts: list[str], seeds: list[int]
    ) -> Drawn:
        out = Unsteered("jumps", self.jumps)(flow_map, reward, prompts=prompts, seeds=seeds)
        scores = None if out.rewards is None else Scores(out.rewards, out.parts)
        return Drawn(out.x0, out.images, self.embed(out.images), scores, [r(out.images, prompts) for r in held_out])

    def _batches(self) -> Iterator[tuple[list[str], list[int]]]:
        """Yield the prompts and seeds of each batch."""
        for start in range(0, self.samples, self.batch_size):
            rows = range(start, min(start + self.batch_size, self.samples))
            yield [self.prompts[i % len(self.prompts)] for i in rows], [self.first + i for i in rows]

    def _within(self, drawn: Drawn, metric: Callable[[Tensor], float]) -> float:
        """Return a metric of the features of one prompt's samples, averaged over prompts."""
        count = len(self.prompts)
        return sum(metric(drawn.features[i::count]) for i in range(count)) / count


def opinions(scores: Scores) -> Tensor:
    """Return the totals (N,), NaN where every part abstained."""
    silent = torch.stack([values.isnan() for values in scores.parts.values()]).all(0)
    return scores.total.detach().double().masked_fill(silent, torch.nan)


def small_pixels(images: Tensor) -> Tensor:
    """Return pictures shrunk to at most 32 a side, or points, as vectors (N, D)."""
    if images.ndim == 4 and max(images.shape[-2:]) > SIDE:
        share = SIDE / max(images.shape[-2:])
        height, width = (max(1, round(side * share)) for side in images.shape[-2:])
        images = resize(images, (height, width), "bilinear")
    return images.flatten(1)


def _joined(scores: Sequence[Scores]) -> Scores:
    parts = {name: torch.cat([each.parts[name] for each in scores]) for name in scores[0].parts}
    return Scores(torch.cat([each.total for each in scores]), parts)


def _ratio(value: float, yardstick: float) -> float:
    return value / yardstick if yardstick > 0 else math.nan
