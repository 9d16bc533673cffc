"""Sequential Monte Carlo on a Gaussian, whose tilt and evidence are known: every option is consistent, bugs are not.

The kernel "renoised" keeps the exact map's marginals for any number of steps, so the mean of exp(log evidence) is Z
itself for any number of particles, and a few thousand small populations test all weights at once.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from exact import within_standard_errors
from oracles import gaussian_map
from torch import Tensor

from steerfm import FlowMap
from steerfm.analytic import GaussianMixture, analytic_flow_map
from steerfm.errors import ConfigError, RewardError
from steerfm.paths import Trigonometric
from steerfm.reward import Reward
from steerfm.steering import SequentialMonteCarlo, monte_carlo
from steerfm.types import Samples

A, MEAN, SCALE, T = (0.8, -0.5), (0.3, -0.2), 0.7, 0.5
VECTOR, CENTRE = torch.tensor(A, dtype=torch.float64), torch.tensor(MEAN, dtype=torch.float64)
LOG_Z = float(VECTOR @ CENTRE / T + SCALE**2 * (VECTOR @ VECTOR) / (2 * T**2))
POPULATIONS = 1500

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "constant": {"strength": "constant"},
    "geometric": {"strength": "geometric"},
    "max": {"potential": "max"},
    "sum": {"potential": "sum", "every": 2},
    "posterior mean": {"clean": "posterior_mean", "strength": "constant"},
    "half renoised": {"gamma": 0.5},
    "every second": {"every": 2, "strength": "constant"},
    "twisted": {"twisted": True},
    "twisted by the mean": {"twisted": True, "clean": "posterior_mean", "gamma": 0.6},
    "stratified": {"resampling": "stratified"},
    "never resampled": {"resample_below": 0.0},
    "always resampled": {"resample_below": 2.0, "strength": "constant"},
}


class Linearly(Reward):
    """r(x) = a . x."""

    def score(self, images: Tensor, prompts: Any, **metadata: Any) -> Tensor:
        return images @ VECTOR.to(images)


def run(particles: int = 8, steps: int = 4, populations: int = POPULATIONS, **more: Any) -> Samples:
    method = SequentialMonteCarlo(particles, steps, T, **more)
    return method(gaussian_map(MEAN, SCALE), Linearly(), seeds=range(populations))


def evidence(out: Samples) -> Tensor:
    assert out.log_evidence is not None
    return (out.log_evidence - LOG_Z).exp()


@pytest.mark.parametrize("name", OPTIONS)
def test_the_evidence_is_unbiased_for_any_number_of_particles(name: str) -> None:
    assert within_standard_errors(evidence(run(**OPTIONS[name])), torch.tensor(1.0))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_weighted_particles_have_the_mean_and_variance_of_the_tilt(name: str) -> None:
    """Sums over populations, each weighted by its evidence, are unbiased: E[Z f] = Z E_tilt[f]."""
    out = run(**OPTIONS[name])
    assert out.particles is not None
    assert out.log_weights is not None
    along = out.particles @ VECTOR - (CENTRE + SCALE**2 * VECTOR / T) @ VECTOR
    for power, exact in ((1, 0.0), (2, SCALE**2 * float(VECTOR @ VECTOR))):
        found = evidence(out) * (out.log_weights.exp() * along**power).sum(1)
        assert within_standard_errors(found, torch.tensor(exact))


@pytest.mark.parametrize("more", [{}, {"twisted": True}, {"noise": "memoryless", "clean": "posterior_mean"}])
def test_steps_of_the_sde_are_consistent_as_they_shrink(more: dict[str, Any]) -> None:
    """The base sampler's own error is of first order: at 40 steps below 1 / 40 of the evidence's logarithm's scale."""
    errors = [
        float(evidence(run(64, steps, 200, kernel="sde", strength="constant", **more)).mean()) - 1 for steps in (10, 40)
    ]
    assert abs(errors[1]) < 0.06  # 4 standard errors of 200 populations of 64, 0.04, and the steps' own 0.02


def test_adaptive_strengths_are_consistent() -> None:
    """Chosen from the particles, they bias the evidence by O(1 / particles): 256 of them are tested."""
    found = evidence(run(256, 6, 200, strength="adaptive", keep=0.95))
    assert within_standard_errors(found, torch.tensor(1.0))


def test_adaptive_strengths_never_collapse_a_population_in_one_step() -> None:
    """At a hundredth of the temperature a constant strength leaves a tenth of 256 particles, the adaptive half."""
    flow_map, sizes = gaussian_map(MEAN, SCALE), {}
    for strength in ("constant", "adaptive"):
        method = SequentialMonteCarlo(
            256,
            24,
            T / 100,
            strength=strength,  # type: ignore[arg-type]
            keep=0.8,
            gamma=0.3,
            resample_below=0.9,
        )
        out = method(flow_map, Linearly(), seeds=range(8))
        sizes[strength] = out.trace["effective_sample_size"][:, :-1].min(1).values
    assert (sizes["constant"] < 0.1 * 256).all()
    assert (sizes["adaptive"] > 0.5 * 256).all()


def test_a_constant_reward_gives_equal_weights() -> None:
    """Every option telescopes: the log-weights are r / T, the evidence too, whatever lies between."""
    for more in OPTIONS.values():
        method = SequentialMonteCarlo(6, 5, 0.2, **more)
        out = method(gaussian_map(MEAN, SCALE), lambda points: 0 * points.sum(1) + 1.7, seeds=[0, 1])
        assert out.log_evidence is not None
        assert torch.allclose(out.log_evidence, torch.full((2,), 1.7 / 0.2, dtype=torch.float64))
        assert out.effective_sample_size is not None
        assert torch.allclose(out.effective_sample_size, torch.full((2,), 6.0, dtype=torch.float64))


def test_other_paths_have_their_own_kernels() -> None:
    flow_map = analytic_flow_map(GaussianMixture([MEAN], [SCALE**2]), Trigonometric(), steps=6)
    options: list[dict[str, Any]] = [{"gamma": 0.5}, {"twisted": True}]
    for more in options:
        out = SequentialMonteCarlo(8, 4, T, **more)(flow_map, Linearly(), seeds=range(600))
        assert within_standard_errors(evidence(out), torch.tensor(1.0))


# --- bugs of public code, each of which is seen ---


def biased(**more: Any) -> bool:
    """Return whether evidence or mean of the tilt are beyond four standard errors."""
    out = run(populations=3000, **more)
    assert out.particles is not None
    assert out.log_weights is not None
    along = (out.log_weights.exp() * (out.particles @ VECTOR)).sum(1) - (CENTRE + SCALE**2 * VECTOR / T) @ VECTOR
    sound = within_standard_errors(evidence(out), torch.tensor(1.0))
    return not (sound and within_standard_errors(evidence(out) * along, torch.tensor(0.0)))


@pytest.mark.parametrize(
    ("bug", "more"),
    [
        ("no last term", {"potential": "max"}),
        ("ratio forgotten", {"twisted": True}),
        ("ratio of the other sign", {"twisted": True}),
        ("totals not resampled", {"strength": "constant", "resample_below": 2.0}),
        ("weights lost", {"strength": "constant"}),
    ],
)
def test_known_bugs_are_seen(bug: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not biased(**more)
    propose, weigh = SequentialMonteCarlo._propose, monte_carlo.Population.weigh
    resample = monte_carlo.Population.resample

    def forget(self: Any, *arguments: Any) -> Any:
        states, ratio = propose(self, *arguments)
        return states, 0 * ratio

    def turn(self: Any, *arguments: Any) -> Any:
        states, ratio = propose(self, *arguments)
        return states, -ratio

    def stay(self: Any, seeds: Any, step: int, clean: Tensor, push: Tensor, total: Tensor, tracked: Tensor) -> Any:
        moved = resample(self, seeds, step, clean, push)
        return [*moved, total, tracked]

    def lose(self: Any, *arguments: Any) -> Any:
        others = resample(self, *arguments)
        self.log_weights = torch.zeros_like(self.log_weights)
        return others

    calls = itertools.count(1)

    def all_but_last(self: Any, factors: Tensor) -> None:
        if next(calls) % 7:  # a factor and a ratio in each of three steps, and the last term
            weigh(self, factors)

    patches = {
        "no last term": (monte_carlo.Population, "weigh", all_but_last),
        "ratio forgotten": (SequentialMonteCarlo, "_propose", forget),
        "ratio of the other sign": (SequentialMonteCarlo, "_propose", turn),
        "totals not resampled": (monte_carlo.Population, "resample", stay),
        "weights lost": (monte_carlo.Population, "resample", lose),
    }
    monkeypatch.setattr(*patches[bug])
    assert biased(**more)


# --- cost and arguments ---


def test_what_a_step_costs() -> None:
    def cost(flow_map: FlowMap, **more: Any) -> tuple[float, float, float]:
        found = SequentialMonteCarlo(5, 4, T, **more)(flow_map, Linearly(), seeds=[0, 1]).cost
        return found.network_calls / 5, found.reward_calls / 5, found.reward_gradients / 5

    flow_map = gaussian_map(MEAN, SCALE)
    assert cost(flow_map) == (4, 4, 0)  # the look-ahead is the step
    assert cost(flow_map, gamma=0.5) == (3 * 2 + 1, 4, 0)
    assert cost(flow_map, every=2) == (4, 3, 0)
    assert cost(flow_map, kernel="sde") == (3 * 3 + 1, 4, 0)
    assert cost(flow_map, twisted=True) == (3 * 3 + 1, 4, 3)


def test_black_boxes_need_no_gradient_and_twisted_proposals_do() -> None:
    class BlackBox(Linearly):
        differentiable = False

    flow_map = gaussian_map(MEAN, SCALE)
    assert len(SequentialMonteCarlo(4, 3)(flow_map, BlackBox(), seeds=[0, 1])) == 2
    with pytest.raises(RewardError, match=r"needs one\. Use .*BestOfN.*SequentialMonteCarlo.*, which do not"):
        SequentialMonteCarlo(4, 3, twisted=True)(flow_map, BlackBox(), seeds=[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 0}, "particles must be at least 1, got 0"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be positive, got -1.0"),
        ({"clean": "mean"}, "clean is one of 'look_ahead', 'posterior_mean'; got 'mean'"),
        ({"potential": "product"}, "potential is one of 'difference', 'max', 'sum'; got 'product'"),
        ({"strength": "linear"}, "strength is one of 'path', 'constant', 'geometric', 'adaptive'; got 'linear'"),
        ({"kernel": "ode"}, "kernel is one of 'renoised', 'sde'; got 'ode'"),
        ({"noise": "loud"}, "noise is one of 'memoryless', 'gentle'; got 'loud'"),
        ({"gamma": 1.5}, "gamma"),
        ({"gamma": 0.0}, "gamma=0 adds no noise"),
        ({"keep": 1.0}, r"in \(0, 1\); got 1.0"),
        ({"strength": "adaptive", "potential": "sum"}, "goes with potential='difference'"),
        ({"twisted": True, "every": 2}, "every=1, got 2"),
    ],
)
def test_wrong_options_are_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SequentialMonteCarlo(**options)


def test_one_step_is_importance_sampling() -> None:
    out = run(64, 1, 3)
    assert out.particles is not None
    assert out.log_weights is not None
    logits = out.particles @ VECTOR / T
    assert torch.allclose(out.log_weights, logits.log_softmax(1))
    assert out.log_evidence is not None
    assert torch.allclose(out.log_evidence, logits.logsumexp(1) - math.log(64))
