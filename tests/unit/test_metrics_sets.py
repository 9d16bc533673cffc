"""Precision, recall, density, coverage and Vendi score of sets made so that the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from steerfm import metrics
from steerfm.errors import DataError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def line(*places: float) -> Tensor:
    return torch.tensor(places, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("chunk", [2, 1024])
def test_precision_and_recall_by_hand(chunk: int) -> None:
    # data at 0, 1, 3 and 10 with k = 1: radii 1, 1, 2 and 7; samples at 0, 0.5, 20 and 21: radii .5, .5, 1 and 1
    found = metrics.precision_recall(line(0, 0.5, 20, 21), line(0, 1, 3, 10), k=1, chunk=chunk)
    assert found.precision == 0.5  # 20 and 21 lie beyond 17
    assert found.recall == 0.5  # 0 and, at 0.5 from 0.5, 1
    assert found.density == (2 + 2) / 4  # 0 and 0.5 each lie in the balls around 0 and 1
    assert found.coverage == 0.5
    assert (found.k, found.samples, found.reference) == (1, 4, 4)
    narrow = metrics.precision_recall(line(6, 6.5), line(0, 1, 3, 10), k=1, chunk=chunk)
    assert (narrow.precision, narrow.recall) == (1, 0)  # in 10's ball of 7, with balls of 0.5 themselves
    assert (narrow.density, narrow.coverage) == (1, 0.25)


def test_the_chunk_does_not_matter() -> None:
    x, y = normal(30, 3), normal(40, 3, seed=1)
    whole = metrics.precision_recall(x, y)
    assert 0 < whole.recall < 1
    assert all(metrics.precision_recall(x, y, chunk=chunk) == whole for chunk in (1, 7, 39))


def test_k_is_the_number_of_neighbours() -> None:
    data, samples = line(0, 1, 3, 10), line(6.5, 6.6, 6.7, 6.8)
    # radii of the data: 1, 1, 2, 7 at k = 1, so that 10's ball alone reaches; 3, 2, 3, 9 at 2: still; 10, 9, 7, 10 at 3
    densities = [metrics.precision_recall(samples, data, k).density for k in (1, 2, 3)]
    assert densities == [1, 1 / 2, 4 / 3]
    assert [metrics.precision_recall(samples, data, k).coverage for k in (1, 2, 3)] == [0.25, 0.25, 1]


def test_a_set_is_on_itself() -> None:
    """Every point's k-th neighbour lies on its ball's edge: rounding must not push it out."""
    x = normal(200, 30)
    found = metrics.precision_recall(x, x, 4)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert found.density == pytest.approx(5 / 4, abs=1e-12)  # k neighbours and itself


def test_dropped_modes_and_strangers_are_told_apart() -> None:
    modes = torch.eye(4).double() * 100
    data = (modes[:, None] + normal(4, 50, 4)).flatten(0, 1)
    dropped = (modes[:2, None] + normal(2, 100, 4, seed=1)).flatten(0, 1)
    found = metrics.precision_recall(dropped, data)
    assert found.recall <= 0.5 and found.coverage <= 0.5  # two of four modes
    assert found.precision > 0.8
    strange = torch.cat([dropped[:100], normal(100, 4) - 500])
    assert metrics.precision_recall(strange, data).precision <= 0.5


@pytest.mark.parametrize(("n", "m", "k"), [(100, 100, 3), (60, 150, 5)])
def test_density_and_coverage_of_a_perfect_generator(n: int, m: int, k: int) -> None:
    """Their means do not depend on the distribution; 40 figures within four standard errors."""
    found = [metrics.precision_recall(normal(n, 3, seed=i), normal(m, 3, seed=i + 500), k) for i in range(40)]
    for values, expected in (
        ([each.density for each in found], 1.0),
        ([each.coverage for each in found], metrics.expected_coverage(n, m, k)),
    ):
        error = float(np.std(values, ddof=1)) / math.sqrt(40)
        assert error < 0.02
        assert abs(np.mean(values) - expected) < 4 * error
    assert metrics.expected_coverage(1, 2, 1) == 0.5  # of two others, data or sample, either may be the nearer
    assert metrics.expected_coverage(10**9, 10**9, 3) == pytest.approx(1 - 1 / 8)


def test_precision_has_a_ceiling_below_one() -> None:
    data = normal(200, 8)
    ceiling = metrics.floor_of(lambda a, b: metrics.precision_recall(a, b).precision, data, 100, repeats=8)
    assert 0.3 < ceiling.mean < 0.95
    assert ceiling.std > 0


@pytest.mark.parametrize("k", [1, 3, 7])
def test_vendi_of_equal_clusters_is_their_number(k: int) -> None:
    clusters = torch.eye(12).double()[:k].repeat_interleave(4, 0)
    scales = 1 + torch.arange(4 * k).double()[:, None]  # a cosine knows no length
    assert metrics.vendi_score(clusters * scales) == pytest.approx(k, rel=1e-12)
    assert metrics.vendi_score(clusters[:, :, None] * 100, "gaussian", 1.0) == pytest.approx(k, rel=1e-12)
    wide = torch.cat([clusters, clusters.new_zeros(4 * k, 100)], 1)  # fewer rows than columns
    assert metrics.vendi_score(wide) == pytest.approx(k, rel=1e-12)


def test_vendi_of_two_vectors_in_closed_form() -> None:
    # eigenvalues (1 ± c) / 2, c the cosine
    c = 0.6
    entropy = -sum(p * math.log(p) for p in ((1 + c) / 2, (1 - c) / 2))
    assert metrics.vendi_score(torch.tensor([[1.0, 0.0], [0.6, 0.8]]).double()) == pytest.approx(math.exp(entropy))
    h = 1 / math.sqrt(-2 * math.log(c))  # two points at distance 1 are then as alike
    assert metrics.vendi_score(line(0, 1), "gaussian", h) == pytest.approx(math.exp(entropy))
    matrix = torch.tensor([[1.0, c], [c, 1.0]], dtype=torch.float64)
    assert metrics.vendi_score_of(matrix) == pytest.approx(math.exp(entropy))


def test_vendi_of_unequal_clusters_is_the_entropy_of_their_shares() -> None:
    x = torch.eye(3).double()[[0] * 6 + [1] * 3 + [2]]
    entropy = -sum(p * math.log(p) for p in (0.6, 0.3, 0.1))
    assert metrics.vendi_score(x) == pytest.approx(math.exp(entropy), rel=1e-12)


def test_vendi_lies_between_one_and_the_count_and_grows_with_it() -> None:
    data = normal(400, 6)
    assert metrics.vendi_score(torch.full((9, 3), 2.0)) == pytest.approx(1)
    assert metrics.vendi_score(data[:5].repeat(8, 1)) == pytest.approx(metrics.vendi_score(data[:5]), rel=1e-9)
    h = metrics.median_distance(data)
    few, many = (
        metrics.floor_of(lambda a, _: metrics.vendi_score(a, "gaussian", h), data, n, repeats=3).mean for n in (20, 200)
    )
    assert 1 < few < many < 200


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.precision_recall(normal(3, 2), normal(9, 2), 3),
        lambda: metrics.precision_recall(normal(9, 2), normal(3, 2), 3),
        lambda: metrics.precision_recall(normal(9, 2), normal(9, 2), 0),
        lambda: metrics.precision_recall(normal(9, 2), normal(9, 3)),
        lambda: metrics.precision_recall(torch.full((9, 2), math.nan), normal(9, 2)),
        lambda: metrics.vendi_score(torch.zeros(3, 2)),
        lambda: metrics.vendi_score(torch.zeros(0, 2)),
        lambda: metrics.vendi_score(normal(3, 2), "gaussian"),
        lambda: metrics.vendi_score(normal(3, 2), "gaussian", -1.0),
        lambda: metrics.vendi_score(normal(3, 2), "cosine", 1.0),
        lambda: metrics.vendi_score(normal(3, 2), "linear"),  # type: ignore[arg-type]
        lambda: metrics.vendi_score_of(normal(3, 2)),
        lambda: metrics.vendi_score_of(normal(3, 3)),
        lambda: metrics.vendi_score_of(2 * torch.eye(3)),
        lambda: metrics.vendi_score_of(torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
    ],
)
def test_unfit_input_is_one_sentence(call) -> None:
    with pytest.raises(DataError, match=r"got|not finite"):
        call()
