"""Draws of x0 given x_t and what is steered by them; guidance's options; guidance as control."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from exact import (
    NAMES,
    PATHS,
    exact,
    gaussian,
    line,
    mixture,
    numbers,
    posterior_draws,
    rewards,
    within_standard_errors,
)
from oracles import VARIANCE, distance_to_tilt, gaussian_map, mixture_map, mixture_reward
from oracles import mixture as three_balls
from torch import Tensor

from steerfm import FlowMap, GaussianMixture, LookAheadGuidance, Unsteered, analytic_flow_map
from steerfm.analytic import QuadraticReward
from steerfm.errors import ConfigError
from steerfm.flow_map import as_times
from steerfm.paths import Linear, Path
from steerfm.reward import Reward
from steerfm.solvers import shares
from steerfm.steering import Watch
from steerfm.steering.control import FlowMapControl
from steerfm.steering.guidance import Guidance, Push
from steerfm.steering.posterior import (
    Draws,
    Glass,
    Renoised,
    glass,
    gradient_free_drift,
    posterior_value,
    renoised_draws,
    renoised_log_weights,
    time_of_ratio,
    value_gradient,
)
from steerfm.steering.posterior_guidance import PosteriorDrawGuidance
from steerfm.times import time_grid

A, MEAN = (0.8, -0.5), (0.3, -0.2)
N = 4000
on_every_path = pytest.mark.parametrize("path", PATHS, ids=NAMES)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def first(points: Tensor, prompts: Any) -> Tensor:
    return points[:, 0]


def distance(a: Tensor, b: Tensor) -> float:
    """Return the W2 distance of two sets of as many numbers."""
    return float((a.flatten().sort().values - b.flatten().sort().values).square().mean().sqrt())


def floor(draw: Callable[[int], Tensor]) -> float:
    """Return the largest distance of twenty pairs of exact sets: passed by chance once in twenty."""
    return max(distance(draw(2 * i), draw(2 * i + 1)) for i in range(20))


# --- draws of x0 given x_t ---


@on_every_path
@pytest.mark.parametrize("t", [1.0, 0.6, 0.3])
def test_glass_draws_have_the_posterior_law(path: Path, t: float) -> None:
    """Heun's 16 inner steps are as near to exact draws as these are to one another."""
    x = tensor(0.2)
    flow_map = analytic_flow_map(line(), path)
    found = glass(flow_map, x.expand(N, 1), t, numbers(7, N, 1), steps=16)
    assert distance(found, posterior_draws(line(), path, x, t, N, 100).x0) < floor(
        lambda seed: posterior_draws(line(), path, x, t, N, seed).x0
    )


@on_every_path
@pytest.mark.parametrize("rho", [None, 0.0, 0.9])
def test_glass_transitions_have_their_law(path: Path, rho: float | None) -> None:
    """x_s = alpha x0 + sigma (rho x1 + sqrt(1 - rho^2) noise) of the pair behind x_t; rho None is the Markov one."""
    x, t, s = tensor(0.2), 0.6, 0.3
    (alpha_t, sigma_t), (alpha_s, sigma_s) = shares(path, t), shares(path, s)
    kept = alpha_t * sigma_s / (alpha_s * sigma_t) if rho is None else rho

    def draw(seed: int) -> Tensor:
        x0, x1 = posterior_draws(line(), path, x, t, N, seed)
        return alpha_s * x0 + sigma_s * (kept * x1 + (1 - kept**2) ** 0.5 * numbers(1000 + seed, N, 1))

    found = glass(analytic_flow_map(line(), path), x.expand(N, 1), t, numbers(7, N, 1), s=s, rho=rho, steps=16)
    assert distance(found, draw(100)) < floor(draw)


def test_few_inner_steps_make_draws_too_narrow() -> None:
    """One Euler step is the posterior mean for any noise; the spread then grows with the steps."""
    x, t = tensor(0.2).expand(N, 1), 0.6
    flow_map, noise = analytic_flow_map(line(), Linear()), numbers(7, N, 1)
    assert torch.allclose(glass(flow_map, x, t, noise, steps=1, solver="euler"), flow_map.denoise(x, t))
    spread = [float(glass(flow_map, x, t, noise, steps=n, solver="euler").std()) for n in (2, 4, 16, 64)]
    assert spread == sorted(spread)
    assert spread[0] < 0.6 * float(posterior_draws(line(), Linear(), x[0], t, N, 1).x0.std())


@on_every_path
def test_times_are_found_by_their_ratio(path: Path) -> None:
    t = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    assert torch.allclose(time_of_ratio(path, path.alpha(t) / path.sigma(t)), t, atol=1e-12)
    assert torch.allclose(time_of_ratio(path, tensor(torch.inf, 0.0)), tensor(0.0, 1.0), atol=1e-12)


@on_every_path
@pytest.mark.parametrize("t", [1.0, 0.6, 0.2])
def test_weights_of_renoised_draws_are_exact_on_gaussians(path: Path, t: float) -> None:
    """log p(x0) + log N(x; alpha x0, sigma^2) + |noise|^2 / 2, but for a constant: the map's determinant is one."""
    data = gaussian()
    flow_map, x, noise = exact(data, path), tensor(0.4, -0.7).expand(200, 2), numbers(3, 200, 2)
    alpha, sigma = shares(path, t)
    for ratio in (2.0, 5.0):
        x0 = renoised_draws(flow_map, x, t, noise, ratio=ratio)
        found = renoised_log_weights(flow_map, x, t, noise, x0, ratio=ratio)
        expected = data.log_prob(x0) - (x - alpha * x0).square().sum(1) / (2 * sigma**2) + noise.square().sum(1) / 2
        assert torch.allclose(found - found.mean(), expected - expected.mean(), atol=1e-7)


def test_weights_bring_renoised_draws_nearer_to_the_posterior() -> None:
    """On a mixture the trapezoid leaves an error; without weights it is several times larger."""
    flow_map, x, noise = analytic_flow_map(line(), Linear(), steps=4), tensor(0.3).expand(N, 1), numbers(3, N, 1)
    for t in (1.0, 0.6):
        x0 = renoised_draws(flow_map, x, t, noise, ratio=5.0)
        weights = renoised_log_weights(flow_map, x, t, noise, x0, ratio=5.0).softmax(0)
        mean = posterior_draws(line(), Linear(), x[0], t, 100_000, 1).x0.mean()
        assert abs(weights @ x0[:, 0] - mean) < 0.03  # 4 * 1.2 / sqrt(4000) is 0.08 for all but shared noise
        assert abs(x0.mean() - mean) > 0.06


# --- what draws say of the value ---


@on_every_path
@pytest.mark.parametrize("kind", ["linear", "distance", "rank one"])
def test_the_gradient_free_drift_is_that_of_the_tilt(path: Path, kind: str) -> None:
    """v - v* of the tilt, exactly known; its sign, its factor and its weights each matter."""
    data, reward, t = mixture(), rewards()[kind], tensor(0.55)
    x = tensor(0.4, 0.7)
    draws = posterior_draws(data, path, x, 0.55, 200_000, 4).x0.reshape(50, 4000, 2)
    r = reward(draws.flatten(0, 1)).reshape(50, 4000)
    expected = (data.velocity(x[None], t, path) - data.tilt(reward).velocity(x[None], t, path))[0]
    found = gradient_free_drift(path, t.expand(50), draws, r, torch.zeros_like(r))
    assert within_standard_errors(found, expected)
    assert not within_standard_errors(-found, expected)
    assert not within_standard_errors(found * path.sigma(t) / path.determinant(t), expected)
    assert not within_standard_errors(gradient_free_drift(path, t.expand(50), draws, r, r), expected)
    assert torch.equal(gradient_free_drift(path, t, draws[:1, :1], r[:1, :1], r[:1, :1]), torch.zeros(1, 2).double())


@on_every_path
def test_draws_give_the_value_from_below(path: Path) -> None:
    data, reward, x = mixture(), rewards()["distance"], tensor(0.4, 0.7)
    draws = posterior_draws(data, path, x, 0.55, 200_000, 4).x0
    exact = data.value(x[None], tensor(0.55), reward, path)
    r = reward(draws)
    assert within_standard_errors(posterior_value(r.reshape(50, -1), torch.zeros(50, 4000)), exact)
    assert posterior_value(r.reshape(-1, 4), torch.zeros(50_000, 4)).mean() < exact - 0.01
    weighted = torch.stack([r, r], 1).reshape(50, -1)  # every draw twice, the second time without weight
    none = torch.stack([torch.zeros_like(r), torch.full_like(r, -torch.inf)], 1).reshape(50, -1)
    assert torch.allclose(posterior_value(weighted, none), posterior_value(r.reshape(50, -1), torch.zeros(50, 4000)))


def test_the_gradient_by_draws_is_the_values() -> None:
    """On a Gaussian x0 = E[x0 | x] + S noise: the mean of grad r by softmax(r) is grad V, known for a quadratic r."""
    data, reward, t, x = gaussian(), rewards()["distance"], 0.55, tensor(0.4, 0.7)
    draws = posterior_draws(data, Linear(), x, t, 200_000, 4).x0
    slope = (1 - t) * 0.36 / ((1 - t) ** 2 * 0.36 + t**2)  # of E[x0 | x]
    gradients = slope * (reward.b - draws @ reward.A)
    r = reward(draws)
    point = x[None].requires_grad_(True)
    (expected,) = torch.autograd.grad(data.value(point, tensor(t), reward).sum(), point)
    found = value_gradient(r.reshape(50, -1), gradients.reshape(50, -1, 2))
    assert within_standard_errors(found, expected[0])
    assert not within_standard_errors(value_gradient(0 * r.reshape(50, -1), gradients.reshape(50, -1, 2)), expected[0])


# --- guidance by draws ---


class ExactDraws(Draws):
    """Draws of the mixture of MATHS.md section 6, from a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, flow_map: FlowMap, x: Tensor, t: float, noise: Tensor, condition: Any) -> Tensor:
        means, alpha = three_balls().means, 1 - t
        variance = alpha**2 * VARIANCE + t**2
        shares = (-torch.cdist(x, alpha * means).square() / (2 * variance)).softmax(1)
        mean = means[torch.multinomial(shares, 1, generator=self.generator)[:, 0]]
        return mean + alpha * VARIANCE / variance * (x - alpha * mean) + t * (VARIANCE / variance) ** 0.5 * noise


def linear_shift(method: Any, scale: float = 0.7, path: Path | None = None) -> Tensor:
    """Return how far a method moved each of four samples of N(MEAN, scale^2 I) under r = A . x."""
    flow_map = (
        analytic_flow_map(GaussianMixture([MEAN], [scale**2]), path, steps=4) if path else gaussian_map(MEAN, scale)
    )
    reward = QuadraticReward.linear(A)
    return method(flow_map, reward, seeds=range(4)).x0 - Unsteered("jumps", 1)(flow_map, seeds=range(4)).x0


@pytest.mark.parametrize("draws", [Glass(16), Renoised()])
def test_draws_move_a_gaussian_to_its_tilt(draws: Any) -> None:
    """N(m, c^2 I) with r = a . x / T has its mean moved by c^2 a / T and no more: 400 seeds of 64 draws."""
    reward, expected = QuadraticReward.linear(A), tensor(*MEAN) + 0.49 * tensor(*A) / 0.5
    out = PosteriorDrawGuidance(20, 0.5, 64, draws=draws)(gaussian_map(MEAN, 0.7), reward, seeds=range(400))
    # 4 standard errors are 4 * 0.7 / sqrt(400) = 0.14; 64 draws and 20 steps are each off by less than a tenth
    assert (out.x0.mean(0) - expected).abs().max() < 0.14 + 0.2 * 0.49 * 1.6
    assert (out.trace["effective_draws"] <= 64 + 1e-9).all()
    assert (out.x0.std(0) - 0.7).abs().max() < 0.15


def test_the_gradient_through_draws_is_exact_for_linear_rewards() -> None:
    """dx0/dx is the same in all draws of a Gaussian: any number of them ends where the tilt's mean is."""
    exact = 0.49 * tensor(*A) / 0.5
    for count in (1, 3):
        errors = []
        for steps in (30, 60):
            method = PosteriorDrawGuidance(steps, 0.5, count, draws=Glass(8), gradient="raw")
            errors.append(float((linear_shift(method) / exact - 1).abs().max()))
        assert errors[1] < 0.75 * errors[0] < 0.01


@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_more_draws_come_nearer_to_the_tilt(sigma: float, record_property: Callable[..., None]) -> None:
    """Gradient-free with exact draws on the mixture of MATHS.md section 6, where 16 have sliced W2 0.26 and 0.22."""
    reward, found = mixture_reward(sigma), []
    for count in (2, 16):
        method = PosteriorDrawGuidance(25, 1.0, count, draws=ExactDraws())
        out = method(mixture_map(), reward, seeds=range(1024))
        found.append(distance_to_tilt(out.x0, torch.zeros(1024), three_balls().tilt(reward), 0))
    record_property(f"sliced W2 of 2 and 16 draws at sigma = {sigma}", found)
    assert found[1] < 0.6 * found[0]
    assert found[1] < 0.3


def test_draws_that_say_nothing_are_refused() -> None:
    for make, message in (
        (lambda: PosteriorDrawGuidance(count=1), "one draw is its own: count must be 2 or more, got 1"),
        (lambda: PosteriorDrawGuidance(count=0, gradient="raw"), "count must be at least 1, got 0"),
        (lambda: PosteriorDrawGuidance(draws=Renoised(), gradient="raw"), r"or Renoised\(weighted=False\)"),
        (lambda: PosteriorDrawGuidance(gradient="some"), "'none' or 'raw' or 'normalised', got 'some'"),  # type: ignore[arg-type]
        (lambda: Glass(1), "returns the posterior mean, not a draw: steps must be 2 or more"),
        (lambda: Glass(0), "steps must be at least 1, got 0"),
        (lambda: Glass(solver="rk4"), "solver is 'heun' or 'euler', got 'rk4'"),  # type: ignore[arg-type]
        (lambda: Renoised(1.0), "must be above 1, got 1.0"),
        (lambda: glass(gaussian_map(MEAN, 1.0), numbers(0, 1, 2), 0.3, numbers(1, 1, 2), s=0.5), "s = 0.5 and t = 0.3"),
        (lambda: glass(gaussian_map(MEAN, 1.0), numbers(0, 1, 2), 0.3, numbers(1, 1, 2), rho=1.0), "got 1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


def test_a_black_box_is_enough_for_draws() -> None:
    class BlackBox(Reward):
        differentiable = False

        def score(self, images: Tensor, prompts: Any, **metadata: Any) -> Tensor:
            return (images[:, 0] > 0).double()

    out = PosteriorDrawGuidance(8, 0.2, 16)(gaussian_map(MEAN, 1.0), BlackBox(), seeds=range(60))
    assert out.rewards is not None
    assert out.rewards.mean() > 0.85  # 0.62 without a push
    assert out.cost.reward_gradients == 0
    assert out.cost.network_calls == 8 * (16 * 15 + 1)


# --- guidance's options ---


@dataclass(frozen=True, kw_only=True)
class ExactValue(Guidance):
    """Guidance by the exact value V of a mixture: eta grad V is v - v* of the tilt, finite also at t = 1."""

    data: GaussianMixture
    reward: QuadraticReward

    def push(self, run: Any, x: Tensor, t: float, step: float, draw: int) -> Push:
        time, path, tilt = as_times(t, x), run.flow_map.path, self.data.tilt(self.reward / self.temperature)
        return Push(self.data.velocity(x, time, path) - tilt.velocity(x, time, path), {})


@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_the_exact_value_meets_the_tilt(sigma: float, record_property: Callable[..., None]) -> None:
    """Sliced W2 0.13-0.15 and 0.11-0.13 in MATHS.md section 6; two exact sets of 4096 are 0.05 to 0.16 apart."""
    reward = mixture_reward(sigma)
    method = ExactValue(100, 1.0, data=three_balls(), reward=reward)
    out = method(mixture_map(1, 3), reward, seeds=range(4096))
    found = distance_to_tilt(out.x0, torch.zeros(len(out)), three_balls().tilt(reward), 0)
    record_property(f"sliced W2 of the exact value at sigma = {sigma}", found)
    assert found < 0.2


@on_every_path
@pytest.mark.parametrize("noise", ["gentle", "memoryless"])
def test_the_sde_moves_a_gaussian_to_its_tilt(path: Path, noise: Literal["gentle", "memoryless"]) -> None:
    """The posterior mean is exact for linear rewards on Gaussians, in the SDE as in the ODE: mean and variance."""
    flow_map = analytic_flow_map(GaussianMixture([MEAN], [0.49]), path, steps=1, order=3)
    method = LookAheadGuidance(40, 0.5, "posterior_mean", noise=noise)
    out = method(flow_map, QuadraticReward.linear(A), seeds=range(500))
    assert (out.x0.mean(0) - tensor(*MEAN) - 0.49 * tensor(*A) / 0.5).abs().max() < 4 * 0.7 / 500**0.5 + 0.08
    assert (out.x0.var(0) - 0.49).abs().max() < 4 * 0.49 * (2 / 500) ** 0.5 + 0.03


def test_guidance_asks_for_nothing_outside_its_window() -> None:
    flow_map = gaussian_map(MEAN, 0.7)
    out = LookAheadGuidance(10, 0.5, window=(0.35, 0.75))(flow_map, first, seeds=[0, 1])
    assert (out.cost.network_calls, out.cost.reward_calls) == (10 + 4 * 3, 4)  # at 0.7, 0.6, 0.5, 0.4
    assert out.trace["reward"].shape == (2, 4)
    reward, whole = QuadraticReward.linear(A), linear_shift(LookAheadGuidance(10, 0.5))
    parts = [linear_shift(LookAheadGuidance(10, 0.5, window=each)) for each in ((0.0, 0.35), (0.35, 0.75), (0.75, 1))]
    assert torch.allclose(sum(parts, torch.zeros_like(whole)), whole)  # the map is linear here, and so is the push
    assert reward.c == 0


def test_power_multiplies_the_push() -> None:
    """t^-1 makes the look-ahead's factor constant: as much as control by 1 / T."""
    constant = linear_shift(LookAheadGuidance(10, 0.5, power=-1.0))
    assert torch.allclose(constant, linear_shift(FlowMapControl(10, 2.0)))
    assert not torch.allclose(constant, linear_shift(LookAheadGuidance(10, 0.5)), atol=0.1)


def test_normalised_gradients_are_scaled_sample_by_sample() -> None:
    """A thousand times the reward changes nothing, nor does the company of a sample with a large gradient."""

    def square(points: Tensor, prompts: Any) -> Tensor:
        return points.square().sum(1)

    flow_map, method = gaussian_map(MEAN, 0.7), LookAheadGuidance(6, 0.5, gradient="normalised")
    out = method(flow_map, square, seeds=[0, 1, 2])
    assert torch.allclose(out.x0, method(flow_map, lambda points: 1000 * square(points, None), seeds=[0, 1, 2]).x0)
    assert torch.allclose(out.x0[1:2], method(flow_map, square, seeds=[1]).x0)
    for kind in (LookAheadGuidance, FlowMapControl):  # one step: sigma d / T or strength, at t = 1
        moved = linear_shift(kind(1, 1.0, gradient="normalised"))
        assert torch.allclose(moved, (2**0.5 * tensor(*A) / tensor(*A).norm()).expand(4, 2))
    still = method(flow_map, lambda points: 0 * points.sum(1), seeds=[0])
    assert torch.allclose(still.x0, Unsteered("jumps", 6)(flow_map, seeds=[0]).x0)


@on_every_path
@pytest.mark.parametrize("clean", ["look_ahead", "posterior_mean"])
def test_a_constant_network_leaves_the_known_factor(path: Path, clean: Literal["look_ahead", "posterior_mean"]) -> None:
    """At t = 1 dF/dx is 1 and dE[x0 | x]/dx is sigma' / d: the push of one step; no backward pass is paid."""
    flow_map, reward = analytic_flow_map(GaussianMixture([MEAN], [0.49]), path, steps=2), QuadraticReward.linear(A)
    out = LookAheadGuidance(1, 0.5, clean, through="identity")(flow_map, reward, seeds=range(4))
    moved, one = out.x0 - Unsteered("jumps", 1)(flow_map, seeds=range(4)).x0, tensor(1.0)
    factor = path.sigma(one) * path.determinant(one) if clean == "look_ahead" else path.memoryless_noise(one, 1.0) / 2
    slope = 1.0 if clean == "look_ahead" else path.sigma_dot(one) / path.determinant(one)
    assert torch.allclose(moved, factor * slope * tensor(*A).expand(4, 2) / 0.5)
    assert (out.cost.network_calls, out.cost.reward_gradients) == (2, 1)


def test_time_travel_keeps_the_law_and_its_price() -> None:
    """Without a push, repeats redraw the marginal; with one, each costs a step, and the reward rises with them."""
    flow_map = gaussian_map(MEAN, 0.7)
    still = LookAheadGuidance(8, 0.5, repeats=3)(flow_map, lambda points: 0 * points.sum(1), seeds=range(2000))
    assert within_standard_errors(still.x0, tensor(*MEAN))
    assert within_standard_errors((still.x0 - tensor(*MEAN)).square(), 0.49)
    rewards = []
    for repeats in (1, 3):
        out = LookAheadGuidance(8, 0.5, "posterior_mean", repeats=repeats)(flow_map, first, seeds=range(50))
        assert out.cost.network_calls == 8 * 4 * repeats
        assert out.trace["reward"].shape == (50, 8)
        rewards.append(float(out.rewards.mean()))  # type: ignore[union-attr]
    assert rewards[1] > rewards[0] + 0.1


@on_every_path
def test_backward_steps_move_the_mean_at_a_given_state(path: Path) -> None:
    """For a linear reward two steps climb 2 rate a / T. Were the mean so much further, one step would end there:

    from s to t it adds (s - t) d / sigma(s) of it, and what is there at t arrives dF(x, t, 0)/dx times as large. The
    push through the mean comes on top, as it would alone, since the flow is linear.
    """
    flow_map, reward = analytic_flow_map(GaussianMixture([MEAN], [0.49]), path, steps=2), QuadraticReward.linear(A)

    alone, both = (
        LookAheadGuidance(5, 0.5, "posterior_mean", rate=0.3, backward=n)(flow_map, reward, seeds=range(3))
        for n in (0, 2)
    )
    assert both.cost.network_calls == alone.cost.network_calls == 5 * 4
    assert (both.cost.reward_gradients, alone.cost.reward_gradients) == (5 * 3, 5)
    grid, climb = time_grid(5), 2 * 0.3 * tensor(*A) / 0.5
    spread = [float(torch.hypot(0.7 * path.alpha(tensor(t)), path.sigma(tensor(t)))) for t in grid]
    share = sum(
        (s - t) * float(path.determinant(tensor(s)) / path.sigma(tensor(s))) * spread[-1] / spread[i + 1]
        for i, (s, t) in enumerate(itertools.pairwise(grid))
    )
    assert torch.allclose(both.x0 - alone.x0, (share * climb).expand(3, 2), atol=1e-6)


def test_backward_steps_of_the_right_size_end_at_the_best_there_is() -> None:
    """The linear path's last step leads to the mean and its climb: with 1 / curvature, rate / T, to the bowl's y.

    What is left is the push through the mean, and the gap of that step between the mean and the jump.
    """
    flow_map, reward, y = gaussian_map(MEAN, 0.7), QuadraticReward.distance([1.5, -0.7], 4.0), tensor(1.5, -0.7)
    options: dict[str, Any] = {"window": (0.0, 0.25), "clean": "posterior_mean"}
    watch = Watch(look_aheads=True)
    alone = LookAheadGuidance(4, 0.5, **options)(flow_map, reward, seeds=range(3), watch=watch)
    both = LookAheadGuidance(4, 0.5, **options, backward=1, rate=0.5 / 4)(flow_map, reward, seeds=range(3))
    assert torch.allclose(both.x0 - alone.x0, y - alone.trace["look_ahead"][:, -1])


def test_wrong_options_of_guidance_are_said() -> None:
    for make, message in (
        (lambda: LookAheadGuidance(window=(0.5, 0.5)), r"lowest and the highest, within \[0, 1\]; got \[0.5, 0.5\]"),
        (lambda: FlowMapControl(window=(0.0, 2.0)), r"got \[0.0, 2.0\]"),
        (lambda: LookAheadGuidance(gradient="unit"), "gradient is 'raw' or 'normalised', got 'unit'"),  # type: ignore[arg-type]
        (lambda: LookAheadGuidance(through="map"), "through is 'network' or 'identity', got 'map'"),  # type: ignore[arg-type]
        (lambda: LookAheadGuidance(noise="much"), "noise is 'memoryless' or 'gentle', got 'much'"),  # type: ignore[arg-type]
        (lambda: LookAheadGuidance(clean="posterior_mean", backward=-1), "at least 0, .*; got -1 and 1"),
        (lambda: LookAheadGuidance(clean="posterior_mean", rate=0.0), "above 0; got 0 and 0"),
        (lambda: LookAheadGuidance(backward=1), "moves the posterior mean: add clean='posterior_mean'"),
        (lambda: LookAheadGuidance(repeats=0), "repeats must be at least 1, got 0"),
        (lambda: FlowMapControl(variant="both"), "variant is 'jacobian' or 'endpoint', got 'both'"),  # type: ignore[arg-type]
        (lambda: FlowMapControl(strength=0.0), "strength must be positive, got 0.0"),
        (lambda: FlowMapControl(inner=0), "inner must be at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


# --- guidance as control ---


@pytest.mark.parametrize("inner", [1, 3])
def test_control_moves_a_gaussian_as_far_as_its_sum_says(inner: int) -> None:
    """With dF(x, t, 0)/dx = c / sigma_t a push at t arrives c / sigma_t times as large."""
    a, c, K = tensor(*A), 0.7, 12
    grid = [1 - i / K for i in range(K + 1)]
    share = [c / ((1 - t) ** 2 * c**2 + t**2) ** 0.5 for t in grid]
    jacobian = sum(share[i] * share[i + 1] / K for i in range(K))
    endpoint = sum(grid[i] * (1 - grid[i + 1]) * share[i + 1] for i in range(K))
    moved = linear_shift(FlowMapControl(K, 0.3, inner=inner))
    assert torch.allclose(moved, (0.3 * inner * jacobian * a).expand(4, 2))
    moved = linear_shift(FlowMapControl(K, 0.3, "endpoint", inner=inner))
    assert torch.allclose(moved, (0.3 * inner * endpoint * a).expand(4, 2))


def test_control_overshoots_where_the_reward_bends() -> None:
    """For r = -2 (x - y)^2 and N(0.5, c^2) control is the best to first order, and goes too far beyond it.

    A push at t moves the look-ahead L by G = c / sigma_t. With I the integral of G^2, c pi / 2, the best end x solves
    x = L + strength I r'(x); what re-optimises at every instant ends where dL = strength r'(L) dI leads.
    """
    flow_map, y, total = gaussian_map([0.5], 0.7), 1.6, 0.7 * torch.pi / 2
    free = float(Unsteered("jumps", 1)(flow_map, seeds=[3]).x0)
    for strength in (0.05, 0.3, 1.0):
        best = (free + 4 * strength * total * y) / (1 + 4 * strength * total)
        greedy = y + (free - y) * math.exp(-4 * strength * total)
        method = FlowMapControl(100, strength)
        found = float(method(flow_map, QuadraticReward.distance([y], 4.0), seeds=[3]).x0)
        assert found == pytest.approx(greedy, abs=0.02 * abs(free - y))
        assert abs(found - free) > abs(best - free)


@pytest.mark.parametrize(("inner", "steps"), [(1, 1), (5, 1), (5, 16)])
def test_climbs_at_the_end_diverge_above_twice_the_inverse_curvature(inner: int, steps: int) -> None:
    """One step of control leads from L to y + (1 - strength curvature)^inner (L - y); many steps repeat that."""
    flow_map, y = gaussian_map([0.5], 0.7), 1.6
    free = float(Unsteered("jumps", 1)(flow_map, seeds=[3]).x0) - y
    for share in (0.5, 1.5, 3.0):
        method = FlowMapControl(steps, share / 4.0, "endpoint", inner=inner)
        gap = float(method(flow_map, QuadraticReward.distance([y], 4.0), seeds=[3]).x0) - y
        if steps == 1:
            assert gap == pytest.approx((1 - share) ** inner * free)
        assert (abs(gap) > abs(free)) == (share > 2)


def test_control_pays_for_what_it_calls() -> None:
    def cost(method: FlowMapControl) -> tuple[float, float, float]:
        out = method(gaussian_map(MEAN, 0.7), first, seeds=[0, 1])
        assert "strength is no temperature" in out.note
        return out.cost.network_calls, out.cost.reward_calls, out.cost.reward_gradients

    assert cost(FlowMapControl(6)) == (6 * 4, 6, 6)
    assert cost(FlowMapControl(6, inner=3)) == (6 * 10, 18, 18)
    assert cost(FlowMapControl(6, variant="endpoint", inner=3)) == (6 * 2, 18, 18)
    assert cost(FlowMapControl(8, window=(0.5, 1.0))) == (8 + 5 * 3, 5, 5)
