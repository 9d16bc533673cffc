"""Steering on the mixture of MATHS.md section 6: the tilt is met, and known bugs of public code are seen.

Sliced W2 to the exact tilt, 4096 particles, 100 steps; two exact sets of 4096 are 0.097 apart (median; 0.05 to
0.16 in eight of ten pairs), so 0.20 asks for the right distribution and 0.25 is out of its reach.
"""

import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from oracles import MEANS, VARIANCE, distance_to_tilt, mixture, mixture_map, mixture_reward
from torch import Tensor

from steerfm import FlowMapTilting, GaussianMixture, LookAheadGuidance, analytic_flow_map
from steerfm.steering import populations
from steerfm.types import Samples

PARTICLES, STEPS = 4096, 100
MET, MISSED = 0.20, 0.25  # sliced W2
EXACT_WEIGHTS = {0.2: (0.5716, 0.3665, 0.0619)}  # of the components, after the tilt


def tilt_with_weights(sigma: float, seeds: list[int], steps: int = STEPS, **more: Any) -> Samples:
    method = FlowMapTilting(PARTICLES, steps, temperature=1.0, **more)
    return method(mixture_map(), mixture_reward(sigma), seeds=seeds)


@cache
def three_seeds(sigma: float) -> Samples:
    return tilt_with_weights(sigma, [0, 1, 2])


@cache
def guided(sigma: float) -> Samples:
    return LookAheadGuidance(STEPS, temperature=1.0)(mixture_map(), mixture_reward(sigma), seeds=range(PARTICLES))


def distances(out: Samples, sigma: float, log_weights: Callable[[Tensor, Tensor], Tensor] | None = None) -> list[float]:
    """Return the sliced W2 of each population to the exact tilt; log_weights(theirs, particles) replaces theirs."""
    assert out.particles is not None
    assert out.log_weights is not None
    tilt, found = mixture().tilt(mixture_reward(sigma)), []
    for i, seed in enumerate(out.seeds):
        weights = out.log_weights[i] if log_weights is None else log_weights(out.log_weights[i], out.particles[i])
        found.append(distance_to_tilt(out.particles[i], weights, tilt, seed))
    return found


def mode_weights(points: Tensor, weights: Tensor) -> Tensor:
    """Return the weight of the points nearest to each component's tilted mean."""
    return torch.stack([weights[nearest(points) == k].sum() for k in range(3)])


def nearest(points: Tensor) -> Tensor:
    return torch.cdist(points, mixture().means).argmin(1)


def log_evidence(sigma: float) -> float:
    """Return log E exp(r), which is the value at t = 1, where x says nothing of x0."""
    zero, one = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return float(mixture().value(zero, one, mixture_reward(sigma)))


def evidence_error(out: Samples, sigma: float) -> float:
    assert out.log_evidence is not None
    return float(out.log_evidence.mean()) - log_evidence(sigma)


def test_the_fast_oracle_is_the_exact_one() -> None:
    """The solver's look-ahead is within 0.02 (root mean square) of a fine one: a tenth of the threshold, or less."""
    plain = GaussianMixture(MEANS, [VARIANCE] * 3)
    fine, fast = analytic_flow_map(plain, steps=10, order=5), mixture_map()
    x0 = plain.sample(1000, torch.Generator().manual_seed(0))
    x1 = torch.randn(1000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t in (1.0, 0.9, 0.66, 0.4, 0.33, 0.1):
        x = (1 - t) * x0 + t * x1
        assert torch.allclose(fast.velocity(x, t), fine.velocity(x, t), atol=1e-10)
        assert (fast.look_ahead(x, t) - fine.look_ahead(x, t)).square().sum(1).mean().sqrt() < 0.02
        assert (fast.jump(x, t, t - 0.01) - fine.jump(x, t, t - 0.01)).abs().max() < 1e-6


def test_exact_weights_of_the_tilt() -> None:
    tilt = mixture().tilt(mixture_reward(0.2))
    assert torch.allclose(tilt.weights, torch.tensor(EXACT_WEIGHTS[0.2], dtype=torch.float64), atol=5e-5)


@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_trajectory_tilting_meets_the_tilt(sigma: float, record_property: Callable[..., None]) -> None:
    out = three_seeds(sigma)
    found = distances(out, sigma)
    record_property(f"sliced W2 of tilting at sigma = {sigma}", found)
    assert statistics.median(found) <= MET
    assert out.particles is not None
    assert out.log_weights is not None
    assert out.effective_sample_size is not None
    assert (out.effective_sample_size > PARTICLES / 2).all()
    # Mode weights: 12288 particles know 0.57 to 4 * 0.0045 / sqrt(0.75) = 0.021 (effective size 3000 of 4096);
    # modes overlap beyond three standard deviations, which moves 0.001.
    points, weights = out.particles.flatten(0, 1), out.log_weights.exp().flatten() / 3
    exact = mixture().tilt(mixture_reward(sigma)).weights
    record_property(f"mode weights of tilting at sigma = {sigma}", mode_weights(points, weights).tolist())
    assert (mode_weights(points, weights) - exact).abs().max() < 0.03


def test_evidence_comes_with_an_error_of_first_order(record_property: Callable[..., None]) -> None:
    """log of the mean weight against log Z: the steps' error halves with the step, so extrapolating removes it.

    The estimate's own deviation is sqrt(1 / effective size) = 0.02 a run; three runs, extrapolated (2 fine -
    coarse): 0.02 sqrt(5 / 3) = 0.026, of which four are allowed. With the potential's gradient at alpha(s), where
    the weights are no longer, the error at 50 steps is -0.31 in place of -0.22.
    """
    coarse, fine = tilt_with_weights(0.2, [0, 1, 2], steps=50), three_seeds(0.2)
    errors = [evidence_error(out, 0.2) for out in (coarse, fine)]
    record_property("error of the log evidence at sigma = 0.2, 50 and 100 steps", errors)
    assert abs(2 * errors[1] - errors[0]) < 0.11
    assert abs(errors[0]) < 0.27
    assert abs(errors[1]) < 0.7 * abs(errors[0])
    assert abs(evidence_error(three_seeds(1.0), 1.0)) < 0.05


def test_counting_the_reward_twice_is_seen() -> None:
    """Trajectory tilting's weights hold all of r(x0) already: adding it at the end is a known bug."""
    reward = mixture_reward(1.0)
    twice = distances(three_seeds(1.0), 1.0, lambda log_weights, points: (log_weights + reward(points)).log_softmax(0))
    assert statistics.median(twice) > MISSED


@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_weights_that_are_not_returned_are_missed(sigma: float) -> None:
    """The weights since the last resampling are part of the answer: without them the population is biased."""
    even = distances(three_seeds(sigma), sigma, lambda log_weights, points: torch.zeros_like(log_weights))
    assert min(even) > MISSED


@pytest.mark.parametrize(("bug", "sigma"), [("lost", 1.0), ("descending", 0.2), ("constant", 0.2)])
def test_known_bugs_of_tilting_are_seen(bug: str, sigma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(bug, monkeypatch)
    assert distances(tilt_with_weights(sigma, [0]), sigma)[0] > MISSED


def test_resampling_at_every_step_applies_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may be carried or spent at every step; a resampling that ignores them is seen."""
    assert distances(tilt_with_weights(0.2, [1], resample_below=2.0), 0.2)[0] <= MET
    put_in("unapplied", monkeypatch)
    assert distances(tilt_with_weights(0.2, [1], resample_below=2.0), 0.2)[0] > MISSED


def put_in(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a bug of public code into trajectory tilting."""
    resample, move = populations.Population.resample, FlowMapTilting._move
    drawn = populations.draw_ancestors

    def lose_weights(self: Any, *arguments: Any) -> list[Tensor]:
        others = resample(self, *arguments)
        self.log_weights = torch.zeros_like(self.log_weights)  # also where nothing was resampled
        return others

    def descend(self: Any, run: Any, x: Tensor, gradient: Tensor, *times: Any) -> Tensor:
        return move(self, run, x, -gradient, *times)

    def forget_alpha(self: Any, run: Any, x: Tensor, gradient: Tensor, s: float, t: float, step: int) -> Tensor:
        return move(self, run, x, gradient / max(1 - s, 0.01), s, t, step)

    def ignore_weights(log_weights: Tensor, uniform: Tensor) -> Tensor:
        return drawn(torch.zeros_like(log_weights), uniform)

    if bug == "lost":
        monkeypatch.setattr(populations.Population, "resample", lose_weights)
    elif bug == "unapplied":
        monkeypatch.setattr(populations, "draw_ancestors", ignore_weights)
    else:
        monkeypatch.setattr(FlowMapTilting, "_move", {"descending": descend, "constant": forget_alpha}[bug])


@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_guidance_without_weights_is_biased(
    sigma: float, record_property: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The bias is printed: sliced W2, and E r(x0) against the tilt's own; 4096 seeds know the latter to 4 errors."""
    out, reward = guided(sigma), mixture_reward(sigma)
    tilt = mixture().tilt(reward)
    distance = distance_to_tilt(out.x0, torch.zeros(PARTICLES), tilt, 0)
    found = reward(out.x0)
    exact = reward(tilt.sample(200_000, torch.Generator().manual_seed(5))).mean()
    bias, error = float(found.mean() - exact), float(found.std() / PARTICLES**0.5)
    shares = mode_weights(out.x0, torch.full((PARTICLES,), 1 / PARTICLES, dtype=torch.float64))
    with capsys.disabled():
        print(  # noqa: T201
            f"\nlook-ahead guidance, sigma = {sigma}: sliced W2 {distance:.2f}, bias of the mean reward {bias:+.3f} "
            f"(standard error {error:.3f}), mode weights {[round(w, 3) for w in shares.tolist()]} "
            f"against {[round(w, 3) for w in tilt.weights.tolist()]}"
        )
    record_property(f"guidance at sigma = {sigma}", {"sliced W2": distance, "bias": bias, "modes": shares.tolist()})
    assert distance > MISSED
    assert abs(bias) > 4 * error
    assert shares[0] < tilt.weights[0] - 0.03  # too little where the reward is, too much where it is not
    assert shares[2] > tilt.weights[2] + 0.03
