"""Bradley and Terry's model and the calibration of judges, on judges that are known exactly."""

import math

import pytest
import torch
from torch import Tensor

from steerfm.errors import ConfigError
from steerfm.preferences import agreement, bradley_terry, calibration_error, centring, log_likelihood, reliability


def draw(count: int, scale: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """Return rewards of pairs, and preferences that were drawn from them."""
    generator = torch.Generator().manual_seed(0)
    a, b = scale * torch.randn(2, count, generator=generator, dtype=torch.float64)
    return a, b, torch.bernoulli(torch.sigmoid(a - b), generator=generator)


def test_the_loss_is_the_cross_entropy_of_the_odds():
    a, b = torch.tensor([2.0, 2.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 1.0, 2.0])
    preferred = torch.tensor([1.0, 0.0, 0.25, 0.5])
    p = 1 / (1 + math.exp(-1))
    expected = [-math.log(p), -math.log(1 - p), -0.25 * math.log(p) - 0.75 * math.log(1 - p), math.log(2)]
    assert bradley_terry(a, b, preferred).tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(log_likelihood(a, b, preferred), -bradley_terry(a, b, preferred))


def test_large_gaps_neither_overflow_nor_lose_their_gradient():
    a = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = bradley_terry(a, torch.zeros(2), torch.ones(2))
    loss.sum().backward()
    assert loss.tolist() == [0.0, 1e4]
    assert a.grad is not None and a.grad.tolist() == [0.0, -1.0]


def test_known_strengths_are_recovered_up_to_a_constant():
    strengths = torch.tensor([-1.2, -0.3, 0.0, 0.4, 1.1], dtype=torch.float64)
    i, j = torch.combinations(torch.arange(5)).T
    preferred = torch.sigmoid(strengths[i] - strengths[j])
    found = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([found], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = bradley_terry(found[i], found[j], preferred).sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    centred = found.detach() - found.detach().mean()
    assert torch.allclose(centred, strengths - strengths.mean(), atol=1e-6)


def test_centring_is_least_for_opposite_rewards():
    a, b = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 1.0])
    assert centring(a, b).tolist() == [0.0, 16.0]


def test_agreement_leaves_ties_out_and_halves_equal_rewards():
    a, b = torch.tensor([2.0, 0.0, 1.0, 5.0, 5.0]), torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    right = agreement(a, b, torch.tensor([1.0, 1.0, 0.0, 0.5, 0.6]))
    assert right[[0, 1, 2, 4]].tolist() == [1.0, 0.0, 0.5, 1.0]
    assert right[3].isnan()
    assert float(right.nanmean()) == 2.5 / 4


def test_a_judge_that_says_its_odds_is_calibrated_within_its_sampling_error():
    """Of one bin with n pairs the gap is about normal with variance mean(c (1 - c)) / n, so E|gap| is known."""
    a, b, preferred = draw(40_000)
    diagram = reliability(a, b, preferred)
    assert diagram.pairs.sum() == 40_000
    assert (diagram.confidence[1:] > diagram.confidence[:-1]).all()
    c = diagram.confidence
    expected = float((diagram.pairs * (2 / math.pi * c * (1 - c) / diagram.pairs).sqrt()).sum() / 40_000)
    assert float(calibration_error(a, b, preferred)) < 2 * expected
    assert float(calibration_error(a, b, preferred, bins=1)) < 3 * 0.5 / math.sqrt(40_000)


def test_an_overconfident_judge_is_off_by_what_one_reckons():
    """Always the gap log 9, so 0.9 sure; right in 6 of 10, of which two are ties: 0.5 + 0.1."""
    gap = torch.full((10,), math.log(9))
    preferred = torch.tensor([1.0] * 5 + [0.5] * 2 + [0.0] * 3)
    diagram = reliability(gap, torch.zeros(10), preferred)
    assert diagram.pairs.nonzero().flatten().tolist() == [8]  # the ninth bin, from 0.9
    assert float(diagram.frequency[8]) == pytest.approx(0.6)
    assert diagram.confidence[:8].isnan().all()
    assert float(calibration_error(gap, torch.zeros(10), preferred)) == pytest.approx(0.9 - 0.6, abs=1e-6)


def test_two_bins_are_weighed_by_their_pairs():
    """0.9 sure three times and once right, 0.6 sure once and right: (3 * (0.9 - 1/3) + (1 - 0.6)) / 4."""
    gap = torch.tensor([math.log(9), -math.log(9), math.log(9), math.log(1.5)], dtype=torch.float64)
    preferred = torch.tensor([1.0, 1.0, 0.0, 1.0])
    error = calibration_error(gap, torch.zeros(4, dtype=torch.float64), preferred, bins=5)
    assert float(error) == pytest.approx((3 * (0.9 - 1 / 3) + 0.4) / 4)


def test_swapping_changes_nothing():
    a, b, preferred = draw(500)
    for measure in (bradley_terry, centring_of, agreement, calibration_error):
        assert torch.allclose(measure(a, b, preferred), measure(b, a, 1 - preferred), atol=1e-12)


def centring_of(a: Tensor, b: Tensor, preferred: Tensor) -> Tensor:
    return centring(a, b)


def test_no_bins_are_refused():
    with pytest.raises(ConfigError, match="at least one bin, got 0"):
        reliability(torch.zeros(1), torch.zeros(1), torch.ones(1), bins=0)
