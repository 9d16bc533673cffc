"""Metrics against closed forms, against scipy, and at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.stats
import torch
from sklearn.datasets import load_digits

from steerfm import metrics
from steerfm.errors import DataError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_of_gaussians_in_closed_form() -> None:
    # commuting covariances: |m1 - m2|² + Σ (√λ1 - √λ2)²
    first = metrics.Statistics(torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0]).double()), 10)
    second = metrics.Statistics(torch.ones(3).double(), torch.diag(torch.tensor([4.0, 1.0, 0.0]).double()), 10)
    assert metrics.frechet_distance(first, second) == pytest.approx(3 + 1 + 1 + 9, abs=1e-12)


def test_frechet_agrees_with_scipy_sqrtm() -> None:
    a, b = normal(200, 6) @ normal(6, 6, seed=1), normal(300, 6, seed=2) + 0.5
    first, second = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = np.asarray(scipy.linalg.sqrtm(first @ second))
    shift = (a.mean(0) - b.mean(0)).square().sum().item()
    expected = shift + np.trace(first + second - 2 * np.real(root))
    assert metrics.frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert metrics.frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_bias_of_finite_samples() -> None:
    # for N(0, I) in D dimensions against the truth, to first order: D (D + 5) / (4 N)
    truth = metrics.Statistics(torch.zeros(8).double(), torch.eye(8).double(), 0)
    found = [metrics.frechet_distance(normal(1000, 8, seed=i), truth) for i in range(40)]
    assert np.mean(found) == pytest.approx(8 * 13 / 4000, rel=0.1)


def test_frechet_of_a_set_with_itself_and_shifted() -> None:
    x = normal(50, 80)  # fewer rows than columns: a singular covariance
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(x, x + 2) == pytest.approx(80 * 4, rel=1e-6)


def test_frechet_takes_pictures_and_float32() -> None:
    x = normal(40, 1, 4, 4)
    assert metrics.frechet_distance(x.float(), x.flatten(1)) == pytest.approx(0, abs=1e-6)


def test_frechet_floors_of_the_digits() -> None:
    scans = torch.tensor(load_digits(return_X_y=True)[0] / 8 - 1)
    assert metrics.frechet_floor(scans, 2000, repeats=4) == pytest.approx(0.06, abs=0.01)  # MATHS.md section 6
    assert 0.22 < metrics.frechet_between_halves(scans, repeats=4) < 0.30
    assert metrics.frechet_floor(scans, 100, repeats=2) > metrics.frechet_floor(scans, 2000, repeats=2)
    assert metrics.frechet_floor(scans, 500, repeats=2) == metrics.frechet_floor(scans, 500, repeats=2)


def test_mean_pairwise_distance_is_exact_in_any_chunk() -> None:
    x = normal(57, 5)
    expected = scipy.spatial.distance.pdist(x.numpy()).mean()
    for chunk in (1, 10, 57, 1000):
        assert metrics.mean_pairwise_distance(x, chunk=chunk) == pytest.approx(expected, rel=1e-12)
    assert metrics.mean_pairwise_distance(x.reshape(57, 1, 5, 1)) == pytest.approx(expected, rel=1e-12)


def test_pairwise_distance_of_copies_is_zero() -> None:
    assert metrics.mean_pairwise_distance(torch.full((5, 3), 1e3 + 1e-3)) == 0
    assert metrics.mean_pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]])) == 5


def test_pairwise_distance_of_real_sevens() -> None:
    pixels, labels = load_digits(return_X_y=True)
    sevens = torch.tensor(pixels[labels == 7] / 8 - 1)
    assert metrics.mean_pairwise_distance(sevens) == pytest.approx(4.65, abs=0.01)  # MATHS.md section 6


def test_nearest_distance() -> None:
    x, data = normal(30, 4), normal(45, 4, seed=3)
    expected = scipy.spatial.distance.cdist(x.numpy(), data.numpy()).min(1)
    assert metrics.nearest_distance(x, data, chunk=7).numpy() == pytest.approx(expected, rel=1e-12)
    assert metrics.nearest_distance(data[:3], data).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dimension", [2, 5])
def test_sliced_distance_of_a_shift(dimension: int) -> None:
    x = normal(500, dimension)
    shift = torch.arange(1.0, dimension + 1).double()
    found = metrics.sliced_wasserstein(x, x + shift, directions=2000)
    assert found == pytest.approx(float(shift.norm()) / math.sqrt(dimension), rel=0.05)
    if dimension == 2:  # equally spaced directions average cos² exactly
        assert found == pytest.approx(float(shift.norm()) / math.sqrt(2), rel=1e-12)


def test_sliced_distance_of_gaussians_in_closed_form() -> None:
    # W2 of N(0, 1) and N(0, 4) is 1 along every direction
    quantiles = torch.from_numpy(scipy.stats.norm.ppf((np.arange(20000) + 0.5) / 20000))
    line = torch.stack([quantiles, torch.zeros(20000)], 1)
    # projections on angle φ have scale |cos φ|, so the mean square is 1/2
    assert metrics.sliced_wasserstein(line, 2 * line) == pytest.approx(math.sqrt(0.5), rel=1e-3)


def test_sliced_distance_of_sets_of_different_size() -> None:
    x = normal(4000, 2)
    assert metrics.sliced_wasserstein(x, x.repeat(3, 1)) < 0.01
    assert metrics.sliced_wasserstein(x, x.repeat(2, 1) + 3) == pytest.approx(3, rel=0.01)
    few = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert metrics.sliced_wasserstein(few, few[:1]) == pytest.approx(metrics.sliced_wasserstein(few[:1], few))


def test_sliced_distance_in_one_direction_is_scipys() -> None:
    x, y = normal(300, 1), normal(300, 1, seed=5) * 2 + 1
    ordered = (x.sort(0).values - y.sort(0).values).square().mean().sqrt()
    assert metrics.sliced_wasserstein(x, y, directions=3) == pytest.approx(float(ordered), rel=1e-12)
    w1 = scipy.stats.wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy())
    assert metrics.sliced_wasserstein(x, y) >= w1  # W2 is at least W1


def test_sliced_floor_of_the_mixture() -> None:
    # two exact sets of MATHS.md section 6's untilted mixture: the floor falls like 1/√N
    def draw(n: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        centre = torch.randint(3, (n, 1), generator=generator) * 3 - 3
        return centre + math.sqrt(0.5) * normal(n, 2, seed=seed + 100)

    floors = [metrics.sliced_wasserstein(draw(4096, i), draw(4096, i + 50)) for i in range(10)]
    assert 0.02 < float(np.median(floors)) < 0.16


def test_histogram_counts_every_point() -> None:
    points = torch.tensor([[-1.25, -1.25], [1.2499, 1.2499], [1.25, 0.0], [5.0, 5.0], [-1.2, -1.2]])
    counts = metrics.histogram_counts(points)
    assert counts.shape == (1601,)
    assert counts[0] == 2  # the lowest corner's bin, 0.0625 wide
    assert counts[1599] == 1
    assert counts[1600] == 2  # the upper edge lies outside
    assert counts.sum() == len(points)


def test_histogram_kl_in_closed_form() -> None:
    half = torch.rand(200_000, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 2.0]) - 1
    whole = torch.rand(200_000, 2, generator=torch.Generator().manual_seed(2)) * 2 - 1
    # all of the reference lies where the samples have half of their mass: KL = log 2
    floor = metrics.histogram_kl_floor(half, 200_000, bins=10, bounds=(-1, 1))
    assert metrics.histogram_kl(whole, half, bins=10, bounds=(-1, 1)) == pytest.approx(
        math.log(2), abs=3 * floor + 1e-3
    )
    assert metrics.histogram_kl(half, half, bins=10, bounds=(-1, 1)) < 1e-3
    # and the other way round half of it is missing, which must cost much and stay finite
    assert 3 < metrics.histogram_kl(half, whole, bins=10, bounds=(-1, 1)) < 10


def test_histogram_floor_of_the_checkerboard() -> None:
    board = torch.zeros(40, 40)
    for i in range(4):  # eight squares of 8 x 8 bins on [-1, 1], of the 40 x 40 bins on [-1.25, 1.25]
        for j in range(i % 2, 4, 2):
            board[4 + 8 * i : 12 + 8 * i, 4 + 8 * j : 12 + 8 * j] = 1
    points = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (400_000, 2)))
    place = ((points + 1.25) / 2.5 * 40).floor().long()
    points = points[board[place[:, 0], place[:, 1]] > 0][:200_000]
    one_sided = metrics.histogram_kl_floor(board, len(points))
    both = metrics.histogram_kl_floor(points, len(points))
    assert metrics.histogram_kl(points, board) == pytest.approx(one_sided, rel=0.3)
    assert both > one_sided
    assert both < 0.006  # MATHS.md section 6 gives .004


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3)),
        lambda: metrics.frechet_distance(torch.zeros(4, 2), torch.zeros(4, 3)),
        lambda: metrics.frechet_distance(torch.full((4, 3), math.nan), torch.zeros(4, 3)),
        lambda: metrics.frechet_floor(torch.zeros(4, 3), 1),
        lambda: metrics.frechet_between_halves(torch.zeros(3, 3)),
        lambda: metrics.mean_pairwise_distance(torch.zeros(1, 3)),
        lambda: metrics.mean_pairwise_distance(torch.zeros(5)),
        lambda: metrics.nearest_distance(torch.zeros(2, 3), torch.zeros(2, 4)),
        lambda: metrics.nearest_distance(torch.zeros(2, 3), torch.zeros(0, 3)),
        lambda: metrics.sliced_wasserstein(torch.zeros(2, 3), torch.zeros(2, 4)),
        lambda: metrics.sliced_wasserstein(torch.zeros(2, 2), torch.zeros(2, 2), directions=0),
        lambda: metrics.histogram_counts(torch.zeros(3, 3)),
        lambda: metrics.histogram_kl(torch.zeros(3, 2), torch.zeros(40, 40)),
        lambda: metrics.histogram_kl(torch.zeros(3, 2), torch.ones(7, 7)),
    ],
)
def test_unfit_input_is_one_sentence(call) -> None:
    with pytest.raises(DataError, match=r"got|not finite"):
        call()
