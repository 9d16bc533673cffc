"""MMD and kernel distance between Gaussians, whose kernel means are known; and floors of all metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.spatial.distance
import torch
from torch import Tensor

from steerfm import metrics
from steerfm.errors import DataError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(kernel: Tensor, n: int) -> float:
    """Return the unbiased MMD² from the kernel of the pooled set, whose first n rows are the samples."""
    xx, yy, xy = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
    m = len(yy)
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def gaussian_mean(gap: Tensor, variance: float, h: float) -> float:
    """Return E exp(-|z|² / (2 h²)) for z ~ N(gap, variance I)."""
    total = h * h + variance
    return (h * h / total) ** (len(gap) / 2) * math.exp(-float(gap @ gap) / (2 * total))


def absolute_mean(gap: float, variance: float) -> float:
    """Return E |z| for z ~ N(gap, variance) on the line: the folded normal's mean."""
    std = math.sqrt(variance)
    return std * math.sqrt(2 / math.pi) * math.exp(-(gap**2) / (2 * variance)) + gap * math.erf(
        gap / math.sqrt(2 * variance)
    )


def cubic_of_shift(q: float, d: int) -> float:
    """Return the population MMD² of N(m, I) and N(0, I) in d dimensions under (x·y / d + 1)³, with q = |m|².

    From E x·y, E (x·y)² and E (x·y)³ of independent Gaussians, given that x·y | y ~ N(a·y, |y|²) for x ~ N(a, I).
    """
    return 3 * q / d + 3 * q**2 / d**2 + (q**3 + 6 * q**2 + 3 * q * (d + 2)) / d**3


@pytest.mark.parametrize("chunk", [7, 1024])
def test_mmd_is_its_definition(chunk: int) -> None:
    x, y = normal(30, 3), 2 * normal(41, 3, seed=1) + 1e4  # far from the origin: nothing may cancel
    x = x + 1e4
    distance = torch.from_numpy(scipy.spatial.distance.cdist(torch.cat([x, y]), torch.cat([x, y])))
    gaussian = by_hand((-(distance**2) / (2 * 1.3**2)).exp(), 30)
    assert metrics.squared_mmd(x, y, bandwidth=1.3, chunk=chunk) == pytest.approx(gaussian, rel=1e-9)
    assert metrics.squared_mmd(x, y, "energy", chunk=chunk) == pytest.approx(by_hand(-distance, 30), rel=1e-9)
    own = metrics.squared_mmd(x, y, bandwidth=metrics.median_distance(y))
    assert metrics.squared_mmd(x, y, chunk=chunk) == pytest.approx(own, rel=1e-12)  # the data's, not the samples'


def test_gaussian_mmd_of_gaussians_in_closed_form() -> None:
    """N(a, I) against N(0, 0.25 I): the mean of 60 figures within four standard errors, which are 3% of it."""
    gap, h = torch.tensor([0.5, -0.3]).double(), 0.8
    zero = torch.zeros(2).double()
    exact = gaussian_mean(zero, 2, h) + gaussian_mean(zero, 0.5, h) - 2 * gaussian_mean(gap, 1.25, h)
    found = [
        metrics.squared_mmd(normal(100, 2, seed=i) + gap, 0.5 * normal(150, 2, seed=i + 1000), bandwidth=h)
        for i in range(60)
    ]
    error = float(np.std(found, ddof=1)) / math.sqrt(60)
    assert error < 0.04 * exact
    assert abs(np.mean(found) - exact) < 4 * error


def test_energy_distance_of_gaussians_in_closed_form() -> None:
    exact = 2 * absolute_mean(0.7, 1 + 0.25) - absolute_mean(0, 2) - absolute_mean(0, 0.5)
    found = [
        metrics.squared_mmd(normal(100, 1, seed=i) + 0.7, 0.5 * normal(150, 1, seed=i + 1000), "energy")
        for i in range(60)
    ]
    error = float(np.std(found, ddof=1)) / math.sqrt(60)
    assert error < 0.06 * exact
    assert abs(np.mean(found) - exact) < 4 * error


def test_mmd_has_no_bias_and_its_floor_is_a_spread() -> None:
    # at 20 samples the biased estimate would be 2/20 too high, six standard errors
    found = [metrics.squared_mmd(normal(20, 2, seed=i), normal(20, 2, seed=i + 1000), bandwidth=1.0) for i in range(80)]
    error = float(np.std(found, ddof=1)) / math.sqrt(80)
    assert abs(np.mean(found)) < 4 * error < 0.025
    floor = metrics.floor_of(metrics.squared_mmd, normal(80, 2), 20, repeats=32)
    assert abs(floor.mean) < floor.std


def test_median_distance() -> None:
    x = normal(60, 3)
    assert metrics.median_distance(x) == pytest.approx(sorted(scipy.spatial.distance.pdist(x))[(60 * 59 // 2 - 1) // 2])
    assert metrics.median_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]])) == 5
    # thinned above 2000 rows: the median |z| √2 of a normal, 0.6745 √2, to the sampling error of 2000 rows
    assert metrics.median_distance(normal(5000, 1)) == pytest.approx(0.6745 * math.sqrt(2), rel=0.05)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kernel_distance_is_torchmetrics_own() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = normal(24, 6, seed=1), 1.2 * normal(24, 6, seed=2) + 0.3
    ours = metrics.kernel_distance(x, y, subset_size=24, subsets=1)
    theirs = KernelInceptionDistance(feature=torch.nn.Flatten(), subsets=1, subset_size=24).set_dtype(torch.float64)
    theirs.update(y, real=True)
    theirs.update(x, real=False)
    assert ours.mean == pytest.approx(float(theirs.compute()[0]), rel=1e-6)  # which takes its features in float32
    pooled = torch.cat([x, y])
    assert ours.mean == pytest.approx(by_hand((pooled @ pooled.T / 6 + 1) ** 3, 24), rel=1e-12)
    assert math.isnan(ours.error)


@pytest.mark.parametrize(("size", "shift"), [(40, 0.4), (200, 0.4), (200, 0.0)])
def test_kernel_distance_of_a_shift_and_its_error(size: int, shift: float) -> None:
    """30 pairs of sets: no bias within four standard errors, and the error that each states is the true one.

    A standard deviation of 30 figures is known to 13%, the jackknife's mean to less: 40% is three of its errors.
    At no shift the error is known to be too large by √3.
    """
    d = 20
    found = [
        metrics.kernel_distance(
            normal(400, d, seed=i) + shift, normal(400, d, seed=i + 1000), subset_size=size, subsets=40
        )
        for i in range(30)
    ]
    means = [each.mean for each in found]
    true_error = float(np.std(means, ddof=1))
    assert abs(np.mean(means) - cubic_of_shift(d * shift**2, d)) < 4 * true_error / math.sqrt(30)
    expected = true_error * (1 if shift else math.sqrt(3))
    assert np.mean([each.error for each in found]) == pytest.approx(expected, rel=0.4)


def test_kernel_distance_says_its_sizes_and_repeats() -> None:
    x, y = normal(50, 3), normal(30, 3, seed=1)
    first, again = (metrics.kernel_distance(x, y, subsets=3, seed=7) for _ in range(2))
    assert first == again
    assert (first.samples, first.subset_size, first.subsets) == (30, 15, 3)
    assert first != metrics.kernel_distance(x, y, subsets=3, seed=8)
    assert metrics.kernel_distance(x.reshape(50, 3, 1, 1).float(), y.float(), subsets=3, seed=7).mean == pytest.approx(
        first.mean, rel=1e-4
    )


def test_floor_splits_or_redraws() -> None:
    data = torch.arange(10.0)[:, None]
    seen: list[tuple[list[float], list[float]]] = []

    def note(a: Tensor, b: Tensor) -> float:
        seen.append((a[:, 0].tolist(), b[:, 0].tolist()))
        return float(len(seen))

    floor = metrics.floor_of(note, data, 3, repeats=4)
    assert (floor.mean, floor.samples, floor.repeats) == (2.5, 3, 4)
    assert floor.std == pytest.approx(math.sqrt(5 / 3))
    assert all(len(a) == 3 and sorted(a + b) == list(range(10)) for a, b in seen)
    assert len({tuple(a) for a, _ in seen}) == 4
    seen.clear()
    metrics.floor_of(note, data, 30, with_replacement=True, repeats=2)
    assert all(len(a) == 30 and b == list(range(10)) for a, b in seen)
    assert metrics.floor_of(note, data).samples == 5
    assert metrics.floor_of(note, data, with_replacement=True).samples == 10
    assert math.isnan(metrics.floor_of(note, data, repeats=1).std)


def test_floors_of_frechet_and_sliced_distances_fall_with_n() -> None:
    data = normal(4000, 4)
    # D (D + 5) / 4 (1/n + 1/m) to first order, for n samples against m others
    floor = metrics.floor_of(metrics.frechet_distance, data, 1000)
    assert floor.mean == pytest.approx(4 * 9 / 4 * (1 / 1000 + 1 / 3000), rel=0.15)
    few, many = (metrics.floor_of(metrics.sliced_wasserstein, data, n, repeats=8).mean for n in (100, 1600))
    assert many < few / 2.5  # 1/√(1/100 + 1/3900) over 1/√(1/1600 + 1/2400) is 3.1


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.squared_mmd(torch.zeros(1, 2), torch.zeros(4, 2)),
        lambda: metrics.squared_mmd(torch.zeros(3, 2), torch.zeros(4, 3)),
        lambda: metrics.squared_mmd(torch.zeros(3, 2), torch.zeros(4, 2)),  # copies only: no median
        lambda: metrics.squared_mmd(normal(3, 2), normal(4, 2), bandwidth=0.0),
        lambda: metrics.squared_mmd(normal(3, 2), normal(4, 2), "energy", 1.0),
        lambda: metrics.squared_mmd(normal(3, 2), normal(4, 2), "cubic"),  # type: ignore[arg-type]
        lambda: metrics.kernel_distance(torch.zeros(3, 2), torch.zeros(9, 2)),
        lambda: metrics.kernel_distance(torch.zeros(5, 2), torch.zeros(9, 3)),
        lambda: metrics.kernel_distance(normal(5, 2), normal(9, 2), subset_size=6),
        lambda: metrics.kernel_distance(normal(5, 2), normal(9, 2), subsets=0),
        lambda: metrics.kernel_distance(torch.full((5, 2), math.inf), normal(9, 2)),
        lambda: metrics.floor_of(metrics.squared_mmd, normal(5, 2), 5),
        lambda: metrics.floor_of(metrics.squared_mmd, normal(5, 2), repeats=0),
        lambda: metrics.floor_of(metrics.squared_mmd, normal(1, 2)),
    ],
)
def test_unfit_input_is_one_sentence(call) -> None:
    with pytest.raises(DataError, match=r"got|not finite"):
        call()
