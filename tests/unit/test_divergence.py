"""Divergences between Gaussians, whose KL is known; all of them sum over the dimensions of model space."""

import math

import pytest
import torch
from oracles import gaussian_map
from torch import Tensor
from trainers import digit_map

from steerfm import FlowMap, GaussianMixture, analytic_flow_map
from steerfm.divergence import (
    EARLIEST,
    encode,
    girsanov,
    memoryless,
    monitor,
    noise_shift,
    semigroup_defect,
    squared_norm,
    velocity_divergence,
)
from steerfm.paths import Linear, Path, Trigonometric, VariancePreserving
from steerfm.sampling import few_jumps, reverse_drift

MEAN, SHIFT = (0.3, -0.2), torch.tensor([0.5, -1.1], dtype=torch.float64)


def normal(n: int, d: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def midpoints(n: int) -> Tensor:
    """Return the midpoints of n equal parts of [EARLIEST, 1]."""
    return EARLIEST + (1 - EARLIEST) * (torch.arange(n, dtype=torch.float64) + 0.5) / n


def moved(scale: float) -> tuple[FlowMap, FlowMap]:
    """Return a Gaussian's map and that of the Gaussian moved by SHIFT."""
    return gaussian_map((torch.tensor(MEAN, dtype=torch.float64) + SHIFT).tolist(), scale), gaussian_map(MEAN, scale)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.6])
def test_velocity_divergence_is_the_kl_of_a_shift(scale: float) -> None:
    """KL = |shift|^2 / (2 c^2); leaving out t < 0.02 costs the share 1 - c^2 0.98^2 / sigma_0.02^2, known exactly."""
    tuned, reference = moved(scale)
    n = 2000
    found = velocity_divergence(tuned, reference, normal(n), normal(n, seed=1), midpoints(n)).mean()
    kl = float(SHIFT @ SHIFT) / (2 * scale**2)
    kept = (0.98 * scale) ** 2 / ((0.98 * scale) ** 2 + 0.02**2)
    assert float(found) == pytest.approx(kl * kept, rel=1e-4)
    assert float(found) == pytest.approx(kl, rel=2e-3)


@pytest.mark.parametrize("path", [Linear(), Trigonometric(), VariancePreserving()], ids=lambda p: type(p).__name__)
def test_velocity_divergence_is_the_kl_on_every_path(path: Path) -> None:
    """N(0, 0.36 I) against N(0, I), both dimensions summed; 40000 samples know the mean to four standard errors."""
    tuned, reference = (analytic_flow_map(GaussianMixture([[0.0, 0.0]], [c2]), path) for c2 in (0.36, 1.0))
    n = 40_000
    values = velocity_divergence(tuned, reference, 0.6 * normal(n), normal(n, seed=1), midpoints(n))
    kl = 2 * 0.5 * (0.36 - 1 - math.log(0.36))
    error = float(values.std()) / n**0.5
    assert error < 0.015 * kl
    assert abs(float(values.mean()) - kl) < 4 * error + 0.01 * kl  # and what t < 0.02 would add


@pytest.mark.parametrize("t", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=lambda p: type(p).__name__)
def test_girsanov_is_half_the_drift_gap_over_the_noise(path: Path, t: float) -> None:
    flow_map = FlowMap(gaussian_map(MEAN, 1.0).network, path=path)
    x, v, v_reference = normal(6), normal(6, seed=1), normal(6, seed=2)
    times = torch.full((6,), t, dtype=torch.float64)
    for step in (0.25, 0.01):
        g2, eta = memoryless(flow_map, times, step)
        gap = reverse_drift(path, x, v, times, g2) - reverse_drift(path, x, v_reference, times, g2)
        expected = 0.5 * squared_norm(gap) / g2 * step
        assert torch.allclose(girsanov(v, v_reference, g2, eta, step), expected, rtol=1e-8)
    # memoryless noise: the gap of the drifts is twice that of the velocities, up to the step
    g2, eta = memoryless(flow_map, times, 1e-9)
    if t < 1:
        exact = 0.5 * 4 * squared_norm(v - v_reference) / (2 * eta) * 0.1
        assert torch.allclose(girsanov(v, v_reference, g2, eta, 0.1), exact, rtol=1e-6)


def test_girsanov_along_the_memoryless_path_is_the_kl_of_its_end() -> None:
    """For a shifted Gaussian the gap does not depend on the state: the sum tends to |shift|^2 / 2 c^2 with the step."""
    tuned, reference = moved(0.7)
    kl, errors = float(SHIFT @ SHIFT) / (2 * 0.49), []
    for steps in (50, 100, 200):
        total, x = 0.0, normal(1)
        for i in range(steps):
            t = torch.full((1,), 1 - i / steps, dtype=torch.float64)
            g2, eta = memoryless(tuned, t, 1 / steps)
            total += float(girsanov(tuned.velocity(x, t), reference.velocity(x, t), g2, eta, 1 / steps).detach())
        errors.append(abs(total / kl - 1))
    assert errors[0] < 0.01
    assert errors[1] < errors[0] / 2  # of first order or better
    assert errors[2] < errors[1] / 2


@pytest.mark.parametrize("jumps", [1, 3])
def test_noise_shift_is_what_moves_the_noise(jumps: int) -> None:
    reference = gaussian_map(MEAN, 0.7)
    z = normal(5)
    x0 = few_jumps(reference, z, jumps)
    assert torch.allclose(encode(reference, x0, jumps), z, atol=1e-10)
    assert torch.equal(noise_shift(reference, x0, x0, jumps, None), torch.zeros_like(z))
    assert torch.allclose(noise_shift(reference, x0 + SHIFT, x0, jumps, None), (SHIFT / 0.7).expand(5, 2), atol=1e-10)
    learnt = digit_map()  # cannot be inverted, and still an unchanged sample has no shift
    x = torch.randn(3, 1, 8, 8)
    condition = learnt.encode_prompts(["", "", ""])
    assert torch.equal(noise_shift(learnt, x, x, jumps, condition), torch.zeros_like(x))


def test_semigroup_defect_is_the_gap_of_two_jumps_to_one() -> None:
    one, half, zero = (torch.full((4,), value, dtype=torch.float64) for value in (1.0, 0.5, 0.0))
    x = normal(4)
    exact = gaussian_map(MEAN, 0.7)
    assert semigroup_defect(exact, x, one, half, zero).max() < 1e-12

    class Straight(torch.nn.Module):
        data_shape = (2,)

        def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: object = None) -> Tensor:
            return x

    # F(x, s, t) = (1 + t - s) x: in two x / 4, in one 0
    assert torch.allclose(semigroup_defect(FlowMap(Straight()), x, one, half, zero), x.norm(dim=1) / 4)


def test_monitor_is_zero_for_the_same_map_and_repeats() -> None:
    tuned, reference = moved(0.7)
    x0 = few_jumps(tuned, normal(64), 1).detach()
    same = monitor(reference, reference, x0, generator=torch.Generator().manual_seed(0))
    assert float(same["divergence"]) == 0
    assert float(same["semigroup_defect"]) < 1e-12
    first, second = (monitor(tuned, reference, x0, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first["divergence"], second["divergence"])
    kl = float(SHIFT @ SHIFT) / (2 * 0.49)
    assert float(first["divergence"]) == pytest.approx(
        kl, rel=0.4
    )  # 64 times drawn, each with a relative spread of 0.8
