"""Paired changes, what pictures look like, and Fréchet distances of few rows, by hand."""

import math

import pytest
import torch
from torch import Tensor

from steerfm import metrics
from steerfm.errors import DataError
from steerfm.metrics.looks import looks
from steerfm.metrics.paired import Change, fallen, paired_change

NAN = math.nan


def test_a_change_is_the_mean_of_differences_with_their_error() -> None:
    before, after = torch.tensor([1.0, 5.0, 2.0, 0.0]), torch.tensor([2.0, 8.0, 4.0, 2.0])
    change = paired_change(before, after)  # differences 1, 3, 2, 2: variance 2/3
    assert change == Change(2.0, pytest.approx(math.sqrt(2 / 3 / 4), rel=1e-12), 4)  # type: ignore[arg-type]


def test_silence_is_left_out_on_either_side() -> None:
    before, after = torch.tensor([1.0, NAN, 3.0, 7.0, NAN]), torch.tensor([2.0, 9.0, 6.0, NAN, NAN])
    change = paired_change(before, after)
    assert change == Change(2.0, pytest.approx(1.0, rel=1e-12), 2)  # type: ignore[arg-type]


def test_several_values_a_sample_are_averaged_where_they_speak() -> None:
    before, after = torch.zeros(2, 3), torch.tensor([[1.0, 4.0, NAN], [3.0, NAN, NAN]])
    change = paired_change(before, after)  # 2 and 4; the third sample is silent
    assert (change.mean, change.error, change.samples) == (3.0, pytest.approx(1.0), 2)


def test_too_few_samples_say_nothing() -> None:
    for change in (paired_change(torch.zeros(1), -torch.ones(1)), paired_change(torch.zeros(0, 4), torch.zeros(0, 4))):
        assert not fallen(change, 0.0)
    assert paired_change(torch.tensor([NAN]), torch.ones(1)).samples == 0


def test_a_fall_beyond_its_error_counts() -> None:
    low, high = Change(-0.3, 0.1, 9), Change(0.3, 0.1, 9)
    assert fallen(low, 2.9) and not fallen(low, 3.1) and not fallen(high, 0.0)
    assert fallen(Change(-1e-9, 0.0, 9), 2.0) and not fallen(Change(0.0, 0.0, 9), 2.0)


def test_looks_of_two_pictures_by_hand() -> None:
    grey = torch.full((3, 1, 2), 0.5)
    red_and_black = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    found = looks(torch.stack([grey, red_and_black]))
    assert found == pytest.approx({"mean": 4 / 12, "contrast": (0 + 1 / 6) / 2, "clamped": 6 / 12, "saturation": 1 / 4})
    assert "saturation" not in looks(torch.rand(2, 1, 4, 4))
    with pytest.raises(DataError, match=r"Looks need pictures \(N, C, H, W\), got the shape \(2, 3\)"):
        looks(torch.zeros(2, 3))


def rows(seed: int, n: int, d: int) -> Tensor:
    numbers = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers * torch.linspace(0.2, 2, d)


@pytest.mark.parametrize(("n", "m"), [(5, 9), (5, 40), (40, 5)])
def test_frechet_distance_of_few_rows_is_that_of_their_covariances(n: int, m: int) -> None:
    a, b = rows(0, n, 12), rows(1, m, 12) + 0.3
    expected = metrics.frechet_distance(metrics.statistics(a), metrics.statistics(b))
    # the eigenvalues' way takes roots of rounding errors of rank-deficient covariances: about sqrt(1e-16)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet_distance(a, a + 1) == pytest.approx(12, rel=1e-9)
