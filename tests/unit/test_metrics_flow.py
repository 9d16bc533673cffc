"""Semigroup defect, endpoint agreement and straightness of flow maps known exactly, and of maps broken on purpose."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import MEANS, VARIANCE, gaussian_map
from torch import Tensor, nn
from trainers import digit_map

from steerfm import FlowMap, GaussianMixture, Trigonometric, analytic_flow_map, digits, divergence, metrics
from steerfm.errors import ConfigError
from steerfm.sampling import heun
from steerfm.types import Condition


def normal(n: int, d: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(n: int, s: float, r: float, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return three times as tensors (n,)."""
    one = torch.ones(n, dtype=torch.float64)
    return s * one, r * one, t * one


class Skewed(nn.Module):
    """The exact u of N(0, 1), which is 0, with an error e (s - t) in it: F = x - e (s - t)², and v is untouched."""

    data_shape = (2,)

    def __init__(self, e: float) -> None:
        super().__init__()
        self.e = nn.Parameter(torch.tensor(e, dtype=torch.float64))

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return (self.e * (s - t))[:, None].expand_as(x)


def test_semigroup_defect_has_one_home() -> None:
    assert metrics.semigroup_defect is divergence.semigroup_defect


@pytest.mark.parametrize(("s", "r", "t"), [(1.0, 0.5, 0.0), (0.9, 0.2, 0.1), (0.3, 0.8, 1.0)])
def test_exact_maps_have_no_semigroup_defect(s: float, r: float, t: float) -> None:
    """The mixture's map is solved to about 1e-10 by 16 steps of order 12; both directions of time."""
    mixture = analytic_flow_map(GaussianMixture(MEANS, [VARIANCE] * 3), steps=16, order=6)
    x = normal(64)
    assert metrics.semigroup_defect(gaussian_map((0.3, -0.2), 0.7), x, *at(64, s, r, t)).max() < 1e-12
    assert metrics.semigroup_defect(mixture, x, *at(64, s, r, t)).max() < 1e-9


def test_a_broken_map_has_the_defect_it_was_given() -> None:
    # F = x - e (s - t)² in both dimensions: one jump less two is e (1 - 1/4 - 1/4) √2 from 1 by 1/2 to 0
    broken = FlowMap(Skewed(0.3))
    found = metrics.semigroup_defect(broken, normal(5), *at(5, 1.0, 0.5, 0.0))
    assert found.shape == (5,)
    assert torch.allclose(found, torch.full((5,), 0.3 * 0.5 * math.sqrt(2), dtype=torch.float64), atol=1e-14)


def test_endpoints_of_a_broken_map_differ_by_what_it_was_given() -> None:
    # on the trigonometric path N(0, I) has v = 0: the ODE ends where it starts, and one jump is e √2 off
    x1 = normal(500)
    found = metrics.endpoint_agreement(FlowMap(Skewed(0.3), path=Trigonometric()), x1, steps=4)
    assert found.gap == pytest.approx(0.3 * math.sqrt(2), rel=1e-12)
    pairs = torch.pdist(x1).square().mean().sqrt()
    assert found.relative == pytest.approx(found.gap / float(pairs), rel=1e-9)
    assert found.floor == 0
    assert (found.samples, found.steps, found.jumps) == (500, 4, 1)
    four = metrics.endpoint_agreement(FlowMap(Skewed(0.3), path=Trigonometric()), x1, steps=4, jumps=4)
    assert four.gap == pytest.approx(found.gap / 4, rel=1e-12)  # four jumps of e / 16


def test_endpoints_of_an_exact_map_agree_as_well_as_the_solver_does() -> None:
    """Heun's error falls by four with twice the steps: the floor, one less a quarter over, is three times the gap."""
    exact = gaussian_map((0.3, -0.2), 0.7)
    coarse, fine = (metrics.endpoint_agreement(exact, normal(100), steps=steps) for steps in (64, 128))
    assert coarse.relative < 1e-3
    assert coarse.relative < 0.5 * coarse.floor
    assert fine.gap == pytest.approx(coarse.gap / 4, rel=0.1)
    assert fine.floor == pytest.approx(3 * fine.relative, rel=0.1)


def test_a_map_that_returns_the_mean_scores_half_the_square() -> None:
    class Mean(nn.Module):
        data_shape = (2,)

        def __init__(self) -> None:
            super().__init__()
            self.inner = gaussian_map((0.0, 0.0), 0.7)

        def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
            if bool((s == t).all()):
                return self.inner.velocity(x, s)
            return x / s[:, None]  # to the data's mean, 0

    # 4000 endpoints know their spread to 1%
    found = metrics.endpoint_agreement(FlowMap(Mean()), normal(4000), steps=16)
    assert found.relative == pytest.approx(math.sqrt(0.5), rel=0.03)


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.7])
def test_straightness_of_a_gaussian_in_closed_form(scale: float) -> None:
    """With sigma' = (t - (1-t) c²) / sigma, ∫ (sigma' - (1 - c))² dt = c (2 - π/2), and the noise's length squared."""
    x1 = normal(20)
    expected = scale * (2 - math.pi / 2) * x1.square().sum(1)
    flow_map = gaussian_map((0.3, -0.2), scale)
    errors = [float((metrics.straightness(flow_map, x1, steps) / expected - 1).abs().max()) for steps in (32, 64)]
    assert errors[1] < 5e-3
    assert errors[1] < 0.3 * errors[0]  # second order


def test_a_straight_flow_scores_nothing() -> None:
    class Straight(nn.Module):
        data_shape = (2,)

        def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
            return torch.full_like(x, 1e3)

    assert torch.equal(metrics.straightness(FlowMap(Straight()), normal(3), 7), torch.zeros(3, dtype=torch.float64))


def test_straightness_of_a_mixture_is_the_variance_of_its_velocity() -> None:
    """Against ∫|v|² dt - |x1 - x0|² from the exact map, at the midpoints of 400 equal parts; both are O(1e-4) off."""
    exact = analytic_flow_map(GaussianMixture([[-2.0], [2.0]], [0.25, 0.25]), steps=8, order=3)
    x1 = normal(4, 1)
    t = ((torch.arange(400, dtype=torch.float64) + 0.5) / 400).repeat(4)
    v = exact.velocity(exact.jump(x1.repeat_interleave(400, 0), torch.ones_like(t), t), t)
    expected = v.square().reshape(4, 400).mean(1) - (x1 - exact.jump(x1, 1.0, 0.0)).square().sum(1)
    found = metrics.straightness(exact, x1, 400)
    assert torch.allclose(found, expected, atol=1e-3)


def test_batches_and_conditions_go_together() -> None:
    flow_map = digit_map()
    x1 = torch.randn(7, *flow_map.data_shape)
    condition = flow_map.encode_prompts(digits.CAPTIONS[:7])
    whole, parts = (metrics.straightness(flow_map, x1, 3, condition, batch_size=size) for size in (7, 3))
    assert torch.allclose(whole, parts, rtol=1e-4)
    assert not whole.requires_grad
    whole, parts = (metrics.endpoint_agreement(flow_map, x1, condition, steps=4, batch_size=size) for size in (256, 2))
    assert whole.gap == pytest.approx(parts.gap, rel=1e-4)
    assert whole.floor == pytest.approx(parts.floor, rel=1e-4)
    with torch.no_grad():
        off = flow_map.jump(x1, 1.0, 0.0, condition) - heun(flow_map, x1, 4, condition)
    assert whole.gap == pytest.approx(float(off.square().sum((1, 2, 3)).mean().sqrt()), rel=1e-5)


def test_unfit_input_is_one_sentence() -> None:
    exact = gaussian_map((0.0, 0.0), 1.0)
    with pytest.raises(ConfigError, match="2 samples"):
        metrics.endpoint_agreement(exact, normal(1))
    with pytest.raises(ConfigError, match="got 2 and 1"):
        metrics.endpoint_agreement(exact, normal(2), steps=1)
    with pytest.raises(ConfigError, match="at least one step"):
        metrics.straightness(exact, normal(2), 0)
