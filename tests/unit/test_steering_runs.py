"""What all steering methods share: micro-batches, budgets, news of every step, what a black box is told."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import gaussian_map
from torch import Tensor, nn
from trainers import digit_map

from steerfm import BestOfN, FlowMap, FlowMapTilting, LookAheadGuidance
from steerfm.errors import ConfigError
from steerfm.images import to_model, to_unit
from steerfm.steering import (
    BeamSearch,
    Budget,
    FlowMapControl,
    Glass,
    NoiseOptimisation,
    NoiseSampling,
    PathSearch,
    PosteriorDrawGuidance,
    Progress,
    Steering,
    SuccessiveHalving,
    Watch,
    ZeroOrderSearch,
)
from steerfm.types import Samples

PROMPTS, SEEDS = ["a handwritten two", "", "a handwritten six"], [5, 1, 5]
METHODS = [BestOfN, FlowMapTilting, LookAheadGuidance]
METHODS += [BeamSearch, NoiseOptimisation, NoiseSampling, PathSearch, SuccessiveHalving, ZeroOrderSearch]
METHODS += [FlowMapControl, PosteriorDrawGuidance]
SMALL: dict[type, dict[str, Any]] = {
    BestOfN: {"n": 6, "jumps": 2},
    FlowMapTilting: {"particles": 5, "jumps": 6},
    LookAheadGuidance: {"steps": 6},
    FlowMapControl: {"steps": 6},
    PosteriorDrawGuidance: {"steps": 6, "count": 4, "draws": Glass(2)},
    BeamSearch: {"beams": 2, "children": 2, "steps": 6},
    NoiseOptimisation: {"iterations": 6},
    NoiseSampling: {"particles": 3, "warm_up": 2, "iterations": 3},
    PathSearch: {"beams": 2, "children": 2, "up": 0.15, "down": 0.3},
    SuccessiveHalving: {"n": 32},
    ZeroOrderSearch: {"rounds": 6, "neighbours": 3},
}


def left(images: Tensor, prompts: Any) -> Tensor:
    return images[..., :4].mean((1, 2, 3))


def small(kind: type[Steering], **more: Any) -> Steering:
    return kind(**SMALL[kind], **more)


class Rows(nn.Module):
    """A reward that keeps the largest batch it was given."""

    largest = 0

    def forward(self, images: Tensor, prompts: Any) -> Tensor:
        assert len(images) == len(prompts)
        self.largest = max(self.largest, len(images))
        marks = torch.tensor([float(len(prompt)) for prompt in prompts])
        return left(images, prompts) * marks.to(images)


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("kind", METHODS)
def test_micro_batches_bound_the_rows_and_change_nothing(kind: type[Steering], size: int) -> None:
    flow_map, whole, parts = digit_map().double(), Rows(), Rows()
    expected = small(kind)(flow_map, whole, prompts=PROMPTS, seeds=SEEDS)
    found = small(kind, micro_batch=size)(flow_map, parts, prompts=PROMPTS, seeds=SEEDS)
    assert torch.allclose(found.x0, expected.x0, atol=1e-9)
    assert found.cost.network_calls == expected.cost.network_calls
    for name, values in expected.trace.items():
        assert torch.allclose(found.trace[name], values, atol=1e-9)
    one_row = kind in (LookAheadGuidance, NoiseOptimisation, FlowMapControl)  # a pair; and the end is scored whole
    assert parts.largest <= max(size, len(SEEDS)) < whole.largest or one_row


@pytest.mark.parametrize("kind", METHODS)
def test_a_budget_bounds_the_cost_and_ends_at_data(kind: type[Steering]) -> None:
    free = small(kind)(gaussian_map([0.3, -0.2], 0.7), first, seeds=[0, 1])
    for share in (0.4, 0.7, 0.9):
        limit = share * free.cost.network_calls
        watch = Watch(Budget(network_calls=limit))
        out = small(kind)(gaussian_map([0.3, -0.2], 0.7), first, seeds=[0, 1], watch=watch)
        assert out.cost.network_calls <= limit
        assert out.cost.network_calls > limit - 2 * free.cost.network_calls / 6  # it stops no more than two steps early
        assert kind is BestOfN or out.trace["reward"].shape[1] < free.trace["reward"].shape[1]
    ample = Watch(Budget(network_calls=1e6, reward_calls=1e6, seconds=1e6))
    again = small(kind)(gaussian_map([0.3, -0.2], 0.7), first, seeds=[0, 1], watch=ample)
    assert torch.allclose(again.x0, free.x0)


def first(points: Tensor, prompts: Any) -> Tensor:
    return points[:, 0]


def test_a_population_that_stops_early_still_weighs_all_of_the_reward() -> None:
    """A constant reward c: log-weights and evidence are c / T however early the budget ends the run."""
    for calls in (25, 60, 90, 1000):
        watch = Watch(Budget(network_calls=calls))
        method = FlowMapTilting(4, 9, temperature=0.2)
        out = method(gaussian_map([0.3, -0.2], 0.7), lambda points: 0 * points.sum(1) + 1.7, seeds=[0], watch=watch)
        assert out.log_evidence is not None
        assert torch.allclose(out.log_evidence, torch.tensor([1.7 / 0.2], dtype=torch.float64))


def test_seconds_and_reward_calls_are_budgets_too() -> None:
    flow_map = gaussian_map([0.3, -0.2], 0.7)
    out = BestOfN(50, 1)(flow_map, first, seeds=[0, 1], watch=Watch(Budget(reward_calls=7)))
    assert out.cost.reward_calls == 7
    assert out.particles is not None
    assert out.particles.shape[1] == 7
    expected = BestOfN(7, 1)(flow_map, first, seeds=[0, 1])
    assert expected.particles is not None
    assert torch.equal(out.particles, expected.particles)
    out = BestOfN(1000, 1)(flow_map, first, seeds=[0, 1], watch=Watch(Budget(seconds=1e-6)))
    assert out.cost.reward_calls == 1


@pytest.mark.parametrize("name", ["network_calls", "reward_calls", "seconds"])
@pytest.mark.parametrize("limit", [0, -1.0, math.nan])
def test_budgets_must_be_positive(name: str, limit: float) -> None:
    with pytest.raises(ConfigError, match=f"A budget of {name} must be positive, got {limit}; null is no limit"):
        Budget(**{name: limit})


@pytest.mark.parametrize("kind", METHODS)
def test_every_step_is_told(kind: type[Steering]) -> None:
    told: list[Progress] = []
    out = small(kind)(gaussian_map([0.3, -0.2], 0.7), first, seeds=[0, 1], watch=Watch(on_step=told.append))
    assert [each.done for each in told] == list(range(1, len(told) + 1)) or kind is BestOfN
    assert told[-1].done == told[-1].of
    assert told[-1].t == 0
    assert [each.t for each in told] == sorted((each.t for each in told), reverse=True)
    assert told[-1].cost.network_calls == out.cost.network_calls
    assert torch.equal(torch.stack([each.values["reward"] for each in told], 1), out.trace["reward"])


@pytest.mark.parametrize("kind", [FlowMapTilting, LookAheadGuidance])
def test_look_aheads_are_kept_if_asked_for(kind: type[Steering]) -> None:
    flow_map = digit_map()
    plain = small(kind)(flow_map, left, prompts=PROMPTS, seeds=SEEDS)
    watched = small(kind)(flow_map, left, prompts=PROMPTS, seeds=SEEDS, watch=Watch(look_aheads=True))
    assert "look_ahead" not in plain.trace
    assert watched.trace["look_ahead"].shape == (3, 6, 1, 8, 8)
    assert torch.equal(watched.x0, plain.x0)
    shown = flow_map.decode(watched.trace["look_ahead"][:, 0])
    if kind is LookAheadGuidance:  # the first look-ahead is one jump from the seed's own noise
        assert torch.allclose(left(shown, None), watched.trace["reward"][:, 0], atol=1e-6)


def test_the_reward_seen_rises_under_guidance() -> None:
    out = LookAheadGuidance(20, temperature=0.3)(gaussian_map([0.3, -0.2], 0.7), first, seeds=range(10))
    assert (out.trace["reward"][:, -1] > out.trace["reward"][:, 0]).all()


class Doubler(nn.Module):
    """A codec with a weight: pictures are twice the state; it counts its calls."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def encode(self, pictures: Tensor) -> Tensor:
        return to_model(pictures) / self.scale

    def decode(self, x: Tensor) -> Tensor:
        self.calls += 1
        return to_unit(self.scale * x)


def test_a_network_that_decodes_is_not_kept_for_the_backward_pass() -> None:
    flow_map = digit_map().double()
    latent = FlowMap(flow_map.network, conditioner=flow_map.conditioner, codec=Doubler())

    def twice(images: Tensor, prompts: Any) -> Tensor:
        return left(to_unit(2 * to_model(images)), prompts)

    found = small(LookAheadGuidance)(latent, left, prompts=PROMPTS, seeds=SEEDS)
    assert torch.allclose(found.x0, small(LookAheadGuidance)(flow_map, twice, prompts=PROMPTS, seeds=SEEDS).x0)
    assert latent.codec.calls == 6 * 2 + 1  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", METHODS)
def test_wrong_micro_batches_are_said(kind: type[Steering]) -> None:
    with pytest.raises(ConfigError, match="micro_batch must be at least 1, got 0"):
        kind(micro_batch=0)


def test_wrong_options_of_populations_are_said() -> None:
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: FlowMapTilting(resample_below=-0.1), "resample_below is a share of the particles, .* got -0.1"),
        (lambda: FlowMapTilting(resample_below=math.nan), "got nan"),
        (lambda: FlowMapTilting(resampling="residual"), "'systematic' or 'stratified', got 'residual'"),  # type: ignore[arg-type]
    ]
    for make, message in cases:
        with pytest.raises(ConfigError, match=message):
            make()


def test_stratified_resampling_meets_the_tilt_too() -> None:
    """N(m, c^2) with r = x_1 at T = 1/2: mean m + 2 c^2; 3 x 2048 particles know it to 4 * 0.7 / sqrt(4000)."""
    means = []
    for resampling in ("systematic", "stratified"):
        method = FlowMapTilting(2048, 40, temperature=0.5, resampling=resampling, resample_below=2.0)  # type: ignore[arg-type]
        out: Samples = method(gaussian_map([0.3, -0.2], 0.7), first, seeds=[0, 1, 2])
        assert out.particles is not None
        means.append(float(out.particles[..., 0].mean()))
        assert means[-1] == pytest.approx(0.3 + 0.49 / 0.5, abs=0.045 + 1 / 40)
    assert means[0] != means[1]
