"""Samplers: the laws of those that draw noise, the SDE's shared step, costs, and what a sample depends on."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import pytest
import torch
from exact import NAMES, PATHS, exact, gaussian, mixture, numbers, slope, uniforms, within_standard_errors
from torch import Tensor
from torch.distributions import Normal

from steerfm.analytic import GaussianMixture, analytic_flow_map
from steerfm.conditions import Labels
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.networks import MLP, UNet
from steerfm.networks.mlp import randomise
from steerfm.paths import Linear, Path, VariancePreserving
from steerfm.reward import Reward, as_reward
from steerfm.sampling import (
    Noise,
    SamplerName,
    Unsteered,
    few_jumps,
    gaussian_log_prob,
    measure,
    prepare,
    renoised,
    reverse_drift,
    sde,
    sde_step,
    squared_noise,
)
from steerfm.solvers import ancestral, shares
from steerfm.times import karras_grid, time_grid
from steerfm.types import Condition

Sampler = Callable[..., Tensor]

every_path = pytest.mark.parametrize("path", PATHS, ids=NAMES)
every_noise = pytest.mark.parametrize("noise", ["memoryless", "gentle"])
every_sampler = pytest.mark.parametrize("sampler", get_args(SamplerName))


# --- jumps ----------------------------------------------------------------------------------------------------


@every_path
def test_jumps_of_the_exact_map_are_exact_in_any_number(path: Path):
    flow_map, x1 = exact(mixture(), path), numbers(0, 16, 2)
    once = few_jumps(flow_map, x1, 1)
    assert torch.equal(once, flow_map.jump(x1, 1.0, 0.0))
    for jumps in (2, 5):
        assert (few_jumps(flow_map, x1, jumps) - once).abs().max() < 1e-9


def test_jumps_between_given_times_end_where_one_does():
    flow_map, x1 = exact(mixture(), Linear()), numbers(1, 16, 2)
    assert (few_jumps(flow_map, x1, [1.0, 0.7, 0.1, 0.0]) - flow_map.look_ahead(x1, 1.0)).abs().max() < 1e-9
    halfway = few_jumps(flow_map, x1, [1.0, 0.8, 0.5])
    assert (halfway - flow_map.jump(x1, 1.0, 0.5)).abs().max() < 1e-9


# --- samplers that draw noise ---------------------------------------------------------------------------------


def response(sampler: Sampler, path: Path, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return c (), a () and b (steps,) of x0 = c + a x1 + sum of b_i noise_i for data N(0.7, 0.49); no sampling.

    Everything is affine then: row 0 is run without noise, row 1 with a start of one more, and row i + 2 with one
    unit of noise at step i.
    """
    x1 = torch.zeros(steps + 2, 1, dtype=torch.float64)
    x1[1] = 1.0

    def draw(step: int) -> Tensor:
        unit = torch.zeros_like(x1)
        unit[step + 2] = 1.0
        return unit

    flow_map = analytic_flow_map(GaussianMixture([[0.7]], [0.49]), path)
    end = sampler(flow_map, x1, steps, draw=draw)[:, 0]
    a, b = end[1] - end[0], end[2:] - end[0]
    assert b[-1] == 0  # the last step ends on data and adds no noise
    assert (b[:-1] > 0).all()
    return end[0], a, b


def law(sampler: Sampler, path: Path, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and correlation with the start of what a sampler makes of x1 ~ N(0, 1)."""
    c, a, b = response(sampler, path, steps)
    variance = a**2 + b.square().sum()
    return c, variance, a / variance.sqrt()


@every_path
@pytest.mark.parametrize("gamma", [0.3, 1.0])
@pytest.mark.parametrize("jumps", [2, 5])
def test_noise_anew_keeps_the_marginals_in_any_number_of_jumps(path: Path, gamma: float, jumps: int):
    """From the path's own law at t = 1, which is N(0, 1) where alpha(1) = 0; the exact map is good to 1e-10."""
    c, a, b = response(partial(renoised, gamma=gamma), path, jumps)
    alpha, sigma = shares(path, 1.0)
    assert abs(c + a * alpha * 0.7 - 0.7) < 1e-9
    assert abs(a**2 * (alpha**2 * 0.49 + sigma**2) + b.square().sum() - 0.49) < 1e-9


def test_noise_anew_keeps_the_mixture():
    """Mean and second moments of 10 000 samples within four standard errors after three jumps."""
    data, n = mixture(), 10_000
    flow_map = analytic_flow_map(data, steps=3, order=4)  # good to 1e-4, a hundredth of a standard error
    x0 = renoised(flow_map, numbers(3, n, 2), 3, draw=lambda step: numbers(40 + step, n, 2), gamma=0.5)
    second = torch.einsum("k,kij->ij", data.weights, data.covariances + torch.einsum("ki,kj->kij", *[data.means] * 2))
    assert within_standard_errors(x0, data.weights @ data.means)
    assert within_standard_errors(torch.einsum("ni,nj->nij", x0, x0), second)


@every_path
def test_how_far_a_jump_overshoots_is_a_share(path: Path):
    """0 is few jumps, to the bit; 1 looks ahead and mixes with noise for the next time."""
    flow_map, x1, z = exact(gaussian(), path), numbers(1, 8, 2), numbers(2, 8, 2)

    def never(step: int) -> Tensor:
        raise AssertionError(f"Noise was drawn for jump {step}.")

    assert torch.equal(renoised(flow_map, x1, 3, draw=never, gamma=0.0), few_jumps(flow_map, x1, 3))
    assert torch.equal(renoised(flow_map, x1, 1, draw=never), flow_map.look_ahead(x1, 1.0))
    time = torch.full((8,), 0.6, dtype=torch.float64)
    mixed = path.interpolate(flow_map.look_ahead(x1, 1.0), z, time)
    assert torch.allclose(renoised(flow_map, x1, [1.0, 0.6], draw=lambda step: z), mixed, atol=1e-12)
    for gamma in (-0.1, 1.5):
        with pytest.raises(ConfigError, match=rf"gamma is the share .* in \[0, 1\], got {gamma}"):
            renoised(flow_map, x1, 2, draw=never, gamma=gamma)


@every_path
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_sampling_keeps_a_mean_and_meets_a_variance_to_first_order(path: Path, eta: float):
    """From the path's own law at t = 1; the mean of a Gaussian moves along its posterior mean, which is constant."""
    alpha, sigma = shares(path, 1.0)

    def miss(steps: int) -> float:
        c, a, b = response(partial(ancestral, eta=eta), path, steps)
        assert abs(c + a * alpha * 0.7 - 0.7) < 1e-9
        return abs(float(a**2 * (alpha**2 * 0.49 + sigma**2) + b.square().sum() - 0.49))

    assert slope(miss, 200) == pytest.approx(1, abs=0.1)


@every_noise
@every_path
def test_the_sde_ends_on_the_data_to_first_order(path: Path, noise: Noise):
    """Mean 0.7 and variance 0.49; noise at t = 1 is N(0, I), off by alpha(1) = 0.0066 on one path."""
    offset = 0.006 if isinstance(path, VariancePreserving) else 0.0

    def misses(steps: int) -> tuple[float, float]:
        mean, variance, _ = law(partial(sde, noise=noise), path, steps)
        return abs(float(mean) - 0.7), abs(float(variance) - 0.49)

    coarse, fine = misses(100), misses(400)
    assert fine[0] < 0.005 + offset
    assert fine[1] < 0.01
    for rough, smooth in zip(coarse, fine, strict=True):
        assert smooth < 0.3 * rough + offset or smooth < 1e-4


@every_path
def test_memoryless_noise_forgets_the_start_and_gentle_noise_does_not(path: Path):
    """Down to alpha(1), which is 0.0066 on the variance-preserving path and 0 on the others."""
    for steps in (100, 400):
        correlation = float(law(partial(sde, noise="memoryless"), path, steps)[2])
        assert abs(correlation) < float(path.alpha(torch.ones(1))) + 1e-4
    assert abs(float(law(partial(sde, noise="gentle"), path, 400)[2])) > 0.1


@every_noise
def test_the_sde_keeps_the_mixture(noise: Noise):
    """Mean and second moments of 10 000 samples within four standard errors, and 0.01 for 200 steps."""
    data, n = mixture(), 10_000
    x1, generator = numbers(3, n, 2), torch.Generator().manual_seed(4)

    def draw(step: int) -> Tensor:
        return torch.randn(n, 2, generator=generator, dtype=torch.float64)

    x0 = sde(exact(data, Linear()), x1, 200, draw=draw, noise=noise)
    second = torch.einsum("k,kij->ij", data.weights, data.covariances + torch.einsum("ki,kj->kij", *[data.means] * 2))
    for draws, expected in (
        (x0, data.weights @ data.means),
        (torch.einsum("ni,nj->nij", x0, x0), second),
    ):
        error = draws.std(0) / n**0.5
        assert ((draws.mean(0) - expected).abs() < 4 * error + 0.01).all()
    if noise == "memoryless":
        centred = (x0 - x0.mean(0)) / x0.std(0)
        assert within_standard_errors(centred[:, :, None] * x1[:, None], 0.0, errors=5.0)


def test_one_step_and_its_density_are_those_of_a_normal():
    x, drift, noise, g2 = numbers(5, 6, 1, 2, 2), numbers(6, 6, 1, 2, 2), numbers(7, 6, 1, 2, 2), uniforms(8, 6, 0.1, 2)
    g2[0] = 0.0
    step = sde_step(x, drift, g2, 0.05, noise)
    assert torch.allclose(step.mean, x + 0.05 * drift)
    assert torch.allclose(step.std, (0.05 * g2).sqrt())
    std = step.std[1:, None, None, None]
    assert torch.allclose(step.x_next[1:], step.mean[1:] + std * noise[1:])
    expected = Normal(step.mean[1:], std).log_prob(step.x_next[1:]).flatten(1).sum(1)
    assert (step.log_prob[1:] - expected).abs().max() < 1e-12
    assert torch.equal(step.x_next[0], step.mean[0])
    assert step.log_prob[0] == 0


def test_a_density_has_gradients_by_the_mean():
    x, mean = numbers(9, 3, 2), numbers(10, 3, 2).requires_grad_()
    std = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(gaussian_log_prob(x, mean, std).sum(), mean)
    expected = (x - mean.detach()) / std[:, None] ** 2
    assert torch.allclose(gradient[[0, 2]], expected[[0, 2]])
    assert torch.equal(gradient[1], torch.zeros(2, dtype=torch.float64))


def test_the_drift_and_the_noise_are_their_formulas():
    x, v, t = numbers(11, 5, 2), numbers(12, 5, 2), uniforms(13, 5, 0.1, 0.9)
    path = Linear()
    memoryless = squared_noise(path, t, 0.01, "memoryless")
    assert torch.allclose(memoryless, 2 * t / (1 - t + 0.01))
    assert torch.allclose(squared_noise(path, t, 0.01, "gentle"), 2 * t)
    exactly = 2 * t / (1 - t)
    expected = -2 * v - x / (1 - t)[:, None]  # MATHS.md, section 1
    assert torch.allclose(reverse_drift(path, x, v, t, exactly), expected)
    with pytest.raises(ConfigError, match="'memoryless' or 'gentle', got 'loud'"):
        squared_noise(path, t, 0.01, "loud")  # type: ignore[arg-type]


# --- what a sample depends on ---------------------------------------------------------------------------------


def conditional(guidance_scale: float = 1.0) -> FlowMap:
    network = MLP((2,), width=16, depth=1, num_classes=2)
    randomise(network)
    return FlowMap(network, conditioner=Labels(["one", "two"]), guidance_scale=guidance_scale).double()


@every_sampler
def test_a_sample_depends_on_its_seed_and_prompt_alone(sampler: SamplerName):
    flow_map, method = conditional(), Unsteered(sampler, steps=3)
    prompts, seeds = ["one", "two", "", "two", "one"], [5, 6, 7, 5, 2**40]
    together = method(flow_map, prompts=prompts, seeds=seeds)
    assert (together.prompts, together.seeds) == (prompts, seeds)
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = method(flow_map, prompts=[prompt], seeds=[seed])
        assert (alone.x0[0] - together.x0[i]).abs().max() < 1e-12
    backwards = method(flow_map, prompts=prompts[::-1], seeds=seeds[::-1])
    assert torch.allclose(backwards.x0.flip(0), together.x0, atol=1e-12)
    assert (together.x0[1] - together.x0[3]).norm() > 1e-3  # one prompt, two seeds
    assert (together.x0[0] - together.x0[3]).norm() > 1e-3  # one seed, two prompts


def test_prompts_and_seeds_are_paired_or_shared():
    flow_map = conditional()
    assert prepare(flow_map, ["one"], [1, 2, 3]).prompts == ["one"] * 3
    assert prepare(flow_map, ["one", "two"], [4]).seeds == [4, 4]
    condition = Condition({"label": torch.tensor([1, 0])})
    task = prepare(flow_map, ["", ""], [1, 2], condition)
    assert task.condition is condition
    assert torch.equal(task.noise()[:1], prepare(flow_map, [""], [1]).noise())
    assert torch.equal(task.noise(3)[::3], task.noise())
    assert torch.equal(task.step_noise(4)[1:], prepare(flow_map, [""], [2]).step_noise(4))
    assert not torch.equal(task.step_noise(4), task.step_noise(5))
    assert task.noise().dtype == task.step_noise(0).dtype == torch.float64


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [
        (["one", "two"], [1, 2, 3], "paired one to one: got 2 prompts, 3 seeds"),
        ([], [1], "got 0 prompts, 1 seeds"),
        (["one"], [], "got 1 prompts, 0 seeds"),
        ("one", [1], r"got the string 'one': write \['one'\]"),
        (["one"], [-1], "whole number of at least 0, got -1"),
        (["one"], [0.5], "whole number of at least 0, got 0.5"),
        (["three"], [1], "No class is called 'three'"),
    ],
)
def test_what_does_not_pair_is_refused(prompts: Sequence[str], seeds: Sequence[int], message: str):
    with pytest.raises(ConfigError, match=message):
        prepare(conditional(), prompts, seeds)


def test_a_condition_of_another_length_is_refused():
    with pytest.raises(ConfigError, match=r"one row a \(prompt, seed\) pair, 2, got 3"):
        prepare(conditional(), [""], [1, 2], Condition({"label": torch.zeros(3, dtype=torch.long)}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "rk4"}, "'jumps', .*'ancestral', 'sde'; got 'rk4'"),
        ({"steps": 0}, "at least one step, got 0"),
        ({"steps": [1.0, 0.2, 0.5, 0.0]}, "two or more that fall"),
        ({"steps": [0.9, 0.5, 0.0]}, r"from noise, 1, to data, 0; got \[0.9, 0.5, 0.0\]"),
        ({"steps": [1.0, 0.5, 0.1]}, "from noise, 1, to data, 0"),
        ({"gamma": 1.5}, r"gamma .* in \[0, 1\], got 1.5"),
        ({"eta": -1.0}, r"eta .* in \[0, 1\], got -1.0"),
    ],
)
def test_what_a_sampler_cannot_do_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Unsteered(**options)


@every_sampler
def test_a_sampler_runs_at_given_times(sampler: SamplerName):
    flow_map = conditional()
    equal, given = (Unsteered(sampler, steps)(flow_map, seeds=[3]).x0 for steps in (3, time_grid(3)))
    assert torch.equal(equal, given)
    assert (Unsteered(sampler, karras_grid(3))(flow_map, seeds=[3]).x0 - equal).abs().max() > 1e-4


def test_the_shares_of_fresh_noise_reach_their_samplers():
    flow_map = conditional()

    def x0(sampler: SamplerName, **options: float) -> Tensor:
        return Unsteered(sampler, 3, **options)(flow_map, seeds=[3]).x0

    assert torch.equal(x0("renoised", gamma=0.0), x0("jumps"))
    assert torch.equal(x0("ancestral", eta=0.0), x0("ddim"))
    assert (x0("renoised", gamma=0.5) - x0("renoised")).abs().max() > 1e-3
    assert (x0("ancestral", eta=0.5) - x0("ancestral")).abs().max() > 1e-3


# --- costs ----------------------------------------------------------------------------------------------------


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1).mean(1)


@every_sampler
def test_a_sampler_counts_its_network_calls_per_sample(sampler: SamplerName):
    """One a step; two a step for Heun's method, whose last is Euler's."""
    method, calls = Unsteered(sampler, steps=5), 9 if sampler == "heun" else 5
    for n in (1, 4):
        cost = method(conditional(), brightness, prompts=["one"], seeds=range(n)).cost
        assert (cost.network_calls, cost.reward_calls, cost.reward_gradients) == (calls, 0, 0)
        assert cost.seconds > 0
    guided = method(conditional(guidance_scale=2.0), prompts=["one"], seeds=[0, 1]).cost
    assert guided.network_calls == 2 * calls
    assert method(analytic_flow_map(gaussian()), seeds=[0]).cost.network_calls == calls


def test_a_forward_counts_one_and_a_backward_two():
    """Two samples of three particles each: 6 rows forward, 6 back, and every scored row."""
    network = UNet((1, 4, 4), channels=(8,))
    randomise(network)
    flow_map, reward = FlowMap(network).requires_grad_(False), as_reward(brightness)
    assert isinstance(reward, Reward)
    x = torch.randn(6, 1, 4, 4, requires_grad=True)
    with measure(flow_map, reward, returned=2) as cost:
        x0 = flow_map.look_ahead(x, 1.0)
        scores = reward(flow_map.decode(x0), [""] * 6)
        with torch.no_grad():
            reward(flow_map.decode(x0), [""] * 6)
        before = cost()
        torch.autograd.grad(scores.total.sum(), x)
        flow_map.velocity(x.detach()[:4], 0.5)
        after = cost()
    assert (before.network_calls, before.reward_calls, before.reward_gradients) == (3, 6, 0)
    assert (after.network_calls, after.reward_calls, after.reward_gradients) == (3 + 6 + 2, 6, 3)
    flow_map.velocity(x.detach(), 0.5)
    assert cost().network_calls == after.network_calls  # nothing is counted behind the block
    assert not network._forward_hooks


def test_hooks_are_removed_after_an_error():
    flow_map, reward = conditional(), as_reward(brightness)
    with pytest.raises(ZeroDivisionError), measure(flow_map, reward, 1):
        raise ZeroDivisionError
    assert not flow_map.network._forward_hooks
    assert not reward._forward_hooks


def test_rewards_are_given_by_part_and_of_the_decoded_pictures():
    network = UNet((1, 4, 4), channels=(8,))
    randomise(network)
    reward = 2.0 * as_reward(brightness) + as_reward(lambda images: images.flatten(1).amax(1), "peak")
    samples = Unsteered(steps=1)(FlowMap(network), reward, seeds=[0, 1, 2])
    assert len(samples) == 3
    assert samples.images.min() >= 0
    assert samples.images.max() <= 1
    assert samples.rewards is not None
    assert set(samples.parts) == {"brightness", "peak"}
    assert torch.allclose(samples.parts["brightness"], samples.images.flatten(1).mean(1))
    assert torch.allclose(samples.rewards, 2 * samples.parts["brightness"] + samples.parts["peak"])
    assert not samples.x0.requires_grad
    assert Unsteered()(FlowMap(network)).rewards is None
