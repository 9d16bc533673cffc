"""Steering by the initial noise: ascent with a known end, and chains whose law is known."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import distance_to_tilt, gaussian_map, mixture, mixture_map, mixture_reward
from torch import Tensor
from torch.distributions import Chi2

from steerfm import FlowMap
from steerfm.analytic import QuadraticReward
from steerfm.errors import ConfigError, RewardError
from steerfm.reward import Reward
from steerfm.sampling import prepare
from steerfm.steering import BestOfN, Budget, NoiseOptimisation, NoiseSampling, Watch
from steerfm.steering.noise_optimisation import clipped, norm_gradient
from steerfm.steering.noise_sampling import log_acceptance, proposal
from steerfm.types import Samples

A, MEAN, SCALE = (0.8, -0.5), (0.3, -0.2), 0.7


class BlackBox(Reward):
    """-(x_1 - 1)^2, without a gradient."""

    differentiable = False

    def score(self, images: Tensor, prompts: Any, **metadata: Any) -> Tensor:
        assert not images.requires_grad
        return bowl(images.detach(), prompts)


def bowl(points: Tensor, prompts: Any) -> Tensor:
    return -(points[:, 0] - 1).square()


def noise(flow_map: FlowMap, seeds: Any, particles: int = 1) -> Tensor:
    return prepare(flow_map, [""], seeds).noise(particles)


# --- ascent ---


@pytest.mark.parametrize("dimensions", [1, 2, 9])
def test_the_norm_prior_is_the_density_of_the_norm(dimensions: int) -> None:
    z = torch.randn(5, dimensions, dtype=torch.float64, requires_grad=True)
    norm = z.norm(dim=1)
    # chi is the root of chi-squared: its density is that of the square, times 2 |z|
    log_density = Chi2(torch.tensor(float(dimensions))).log_prob(norm.square()) + norm.log()
    (expected,) = torch.autograd.grad(log_density.sum(), z)
    assert torch.allclose(norm_gradient(z.detach()), expected, atol=1e-12)


def test_gradients_are_clipped_sample_by_sample() -> None:
    gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(clipped(gradient, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


@pytest.mark.parametrize("jumps", [1, 3])
def test_ascent_ends_where_reward_and_prior_balance(jumps: int) -> None:
    """On N(m, c^2 I) with r = a . x: c a = w (1 - (d - 1) / |z|^2) z, hence z along a, and with b = c |a| / w

    |z| = (b + sqrt(b^2 + 4 (d - 1))) / 2. Without momentum the reward rises all the way, so the end is the best.
    """
    a, mean = torch.tensor(A, dtype=torch.float64), torch.tensor(MEAN, dtype=torch.float64)
    method = NoiseOptimisation(jumps, 200, rate=0.2, momentum=0.0, clip=100.0, norm_weight=0.5)
    out = method(gaussian_map(MEAN, SCALE), QuadraticReward.linear(A), seeds=range(4))
    b = SCALE * float(a.norm()) / 0.5
    expected = mean + SCALE * a / a.norm() * (b + math.sqrt(b**2 + 4)) / 2
    below = out.trace["reward"][:, 0] < out.trace["reward"][:, -1]  # who began higher keeps the beginning
    assert below.any()
    assert torch.allclose(out.x0[below], expected.expand(int(below.sum()), 2), atol=1e-6)
    assert out.cost.network_calls == 200 * 3 * jumps


def test_ascent_is_nesterovs() -> None:
    """Against the two sequences of Nesterov 1983, y' = z + rate g(z), z' = y' + momentum (y' - y), seed by seed."""
    flow_map, w = gaussian_map(MEAN, SCALE), 0.1
    out = NoiseOptimisation(1, 12, rate=0.4, clip=0.5, norm_weight=w)(flow_map, bowl, seeds=[0, 1])
    for i in range(2):
        z = y = noise(flow_map, [i])
        rewards = []
        for _ in range(12):
            z = z.detach().requires_grad_()
            r = bowl(flow_map.jump(z, 1.0, 0.0), None)
            (g,) = torch.autograd.grad((r - w * (z.square().sum(1) / 2 - z.norm(dim=1).log())).sum(), z)
            rewards.append(r.detach())
            y_next = z + 0.4 * g * min(1.0, 0.5 / float(g.norm()))
            z, y = y_next + 0.9 * (y_next - y), y_next
        assert torch.allclose(out.trace["reward"][i], torch.cat(rewards), atol=1e-9)
        assert out.rewards is not None
        assert float(out.rewards[i]) == pytest.approx(float(torch.cat(rewards).max()))


@pytest.mark.parametrize(("last", "t"), [(1, 0.25), (3, 0.75), (4, 1.0), (None, 1.0)])
def test_ascent_takes_the_jumps_before_the_last_as_the_identity(last: int | None, t: float) -> None:
    """Those that are differentiated begin at t, where dF(x, t, 0)/dx = c / sigma_t; the move of z counts c."""
    flow_map, a = gaussian_map(MEAN, SCALE), torch.tensor(A, dtype=torch.float64)
    slope = SCALE / math.hypot((1 - t) * SCALE, t)
    method = NoiseOptimisation(4, 2, rate=0.1, momentum=0.0, clip=100.0, norm_weight=0.0, last=last)
    out = method(flow_map, QuadraticReward.linear(A), seeds=range(3))
    rise = out.trace["reward"][:, 1] - out.trace["reward"][:, 0]
    assert torch.allclose(rise, (SCALE * 0.1 * slope * a @ a).expand(3))
    assert out.cost.network_calls == 2 * (4 + 2 * (last or 4))


def test_the_climb_begins_at_the_best_candidate() -> None:
    """What it meets first is what the best of as many returns; the judging costs a call and a reward a candidate."""
    flow_map = gaussian_map([0.5, -1.0], 1.0)
    best = BestOfN(8, 1)(flow_map, bowl, seeds=range(5))
    out = NoiseOptimisation(1, 3, rate=0.1, candidates=8)(flow_map, bowl, seeds=range(5))
    assert best.rewards is not None
    assert torch.equal(out.trace["reward"][:, 0], best.rewards)
    assert (out.trace["reward"][:, 2] > best.rewards).all()
    assert (out.cost.network_calls, out.cost.reward_calls, out.cost.reward_gradients) == (8 + 3 * 3, 8 + 3, 3)


def test_the_first_noise_may_be_the_best() -> None:
    """The prior alone moves the noise here, and the reward, which pulls nowhere, falls with it."""
    flow_map = gaussian_map([0.0, 0.0], 1.0)
    method = NoiseOptimisation(1, 8, clip=1e-3)
    out = method(flow_map, lambda points: 1e-9 * points.square().sum(1).neg(), seeds=range(40))
    short = noise(flow_map, range(40)).norm(dim=1) < 1  # below the mode of the norm, sqrt(d - 1)
    assert short.any()
    assert torch.allclose(out.x0[short], noise(flow_map, range(40))[short])
    assert "no temperature" in out.note


# --- chains ---


@pytest.mark.parametrize("h", [0.01, 0.5, 2.0])
@pytest.mark.parametrize("gradient", [True, False])
def test_the_acceptance_is_the_full_metropolis_ratio(h: float, gradient: bool) -> None:
    """log pi(b) q(a | b) / (pi(a) q(b | a)), pi = N(z; 0, I) exp(phi), q the proposal's normal density."""
    a, xi, target = torch.randn(3, 6, 2, 4, dtype=torch.float64)
    step = torch.full((6,), h, dtype=torch.float64)

    def phi(z: Tensor) -> Tensor:
        return 3 * torch.sin(z * target).sum((1, 2))

    def slope(z: Tensor) -> Tensor:
        return 3 * target * torch.cos(z * target) * gradient

    def log_q(source: Tensor, end: Tensor) -> Tensor:
        gap = end - proposal(source, slope(source), torch.zeros_like(source), step)
        return -gap.square().sum((1, 2)) / (2 * 8 * h / (2 + h) ** 2)

    b = proposal(a, slope(a), xi, step)
    full = phi(b) - phi(a) - (b.square() - a.square()).sum((1, 2)) / 2 + log_q(b, a) - log_q(a, b)
    found = log_acceptance(a, b, phi(a), phi(b), slope(a), slope(b), step)
    assert (found - full).abs().max() < 1e-12 * max(1.0, float(full.abs().max()))
    assert (full.abs() > 1e-3).any()


def test_without_a_reward_every_proposal_is_taken() -> None:
    """The proposal keeps N(0, I): its parts' squares sum to 1, and the ratio is 1."""
    out = NoiseSampling(50, warm_up=3, iterations=3)(
        gaussian_map(MEAN, SCALE), lambda points: 0 * points.sum(1), seeds=[0]
    )
    assert torch.equal(out.trace["acceptance"], torch.ones(1, 6, dtype=torch.float64))
    assert (out.trace["step"].diff(dim=1)[:, :2] > 0).all()  # too much is accepted: the step grows, in the warm-up
    assert torch.equal(out.trace["step"][:, 3:], out.trace["step"][:, 2:3].expand(-1, 3))  # and stays
    for h in (0.1, 0.5, 2.0):
        step, zero, one = torch.tensor([h]), torch.zeros(1, 1), torch.ones(1, 1)
        kept, added = proposal(one, zero, zero, step), proposal(zero, zero, one, step)
        assert float(kept**2 + added**2) == pytest.approx(1)


@pytest.mark.parametrize(("kernel", "tempered"), [("pcnl", True), ("pcnl", False), ("pcn", True), ("pcn", False)])
def test_chains_meet_the_tilt_of_a_gaussian(kernel: str, tempered: bool, record_property: Callable[..., None]) -> None:
    """N(m, c^2) with r = -(x - 1)^2 at T = 1/4 tilts to variance v = 1 / (1 / c^2 + 8), mean v (m / c^2 + 8).

    Chains are independent given their start, and 30 moves forget it; the effective size is that of the weights, for
    tempered chains over 1000 of 1500 a seed. Four standard errors: 4 sqrt(v / n) and 4 v sqrt(2 / n).
    """
    method = NoiseSampling(1500, jumps=2, warm_up=15, iterations=20, temperature=0.25, kernel=kernel, tempered=tempered)  # type: ignore[arg-type]
    out = method(gaussian_map(MEAN, SCALE), bowl if kernel == "pcnl" else BlackBox(), seeds=[0, 1, 2])
    assert out.particles is not None
    assert out.log_weights is not None
    assert out.effective_sample_size is not None
    variance = 1 / (1 / SCALE**2 + 8)
    mean = variance * (MEAN[0] / SCALE**2 + 8)
    size = float(out.effective_sample_size.sum())
    assert size > (3000 if tempered else 4499)
    weights, points = out.log_weights.exp().flatten() / 3, out.particles[..., 0].flatten()
    found = float(weights @ points)
    spread = float(weights @ (points - found).square())
    record_property(f"{kernel}, tempered={tempered}", (found - mean, spread - variance, size))
    assert found == pytest.approx(mean, abs=4 * math.sqrt(variance / size))
    assert spread == pytest.approx(variance, abs=4 * variance * math.sqrt(2 / size))
    if not tempered:
        assert out.log_evidence is None
        return
    # log E exp(-4 (x - 1)^2), x ~ N(m, c^2); the weights of 15 rises deviate by less than 0.05 a population
    evidence = -0.5 * math.log(1 + 8 * SCALE**2) - 4 * (MEAN[0] - 1) ** 2 / (1 + 8 * SCALE**2)
    assert out.log_evidence is not None
    assert float(out.log_evidence.mean()) == pytest.approx(evidence, abs=4 * 0.05 / math.sqrt(3))


@pytest.mark.parametrize("bug", ["unweighted", "always"])
def test_bugs_of_chains_would_be_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from steerfm.steering import noise_sampling, populations

    if bug == "always":
        monkeypatch.setattr(noise_sampling, "log_acceptance", lambda a, *rest: torch.zeros(len(a), dtype=torch.float64))
    else:
        monkeypatch.setattr(populations.Population, "weigh", lambda self, factors: None)
    method = NoiseSampling(1500, warm_up=4, iterations=1, temperature=0.25, kernel="pcnl")
    out = method(gaussian_map(MEAN, SCALE), bowl, seeds=[0])
    variance = 1 / (1 / SCALE**2 + 8)
    mean = variance * (MEAN[0] / SCALE**2 + 8)
    assert out.particles is not None
    assert out.log_weights is not None
    weights, points = out.log_weights.exp().flatten(), out.particles[..., 0].flatten()
    found = float(weights @ points)
    spread = float(weights @ (points - found).square())
    assert abs(found - mean) > 8 * math.sqrt(variance / 1000) or abs(spread - variance) > 8 * variance * math.sqrt(
        2 / 1000
    )


def mode_weights(out: Samples) -> Tensor:
    assert out.particles is not None
    assert out.log_weights is not None
    near = torch.cdist(out.particles[0], mixture().means).argmin(1)
    return torch.stack([out.log_weights[0].exp()[near == k].sum() for k in range(3)])


def test_tempered_chains_meet_the_tilt_of_the_mixture(record_property: Callable[..., None]) -> None:
    """As in test_steering_mixture: two exact sets of 4096 are 0.097 apart, and 0.20 asks for the right distribution."""
    method = NoiseSampling(4096, warm_up=12, iterations=4, temperature=1.0, kernel="pcn")
    out = method(mixture_map(), mixture_reward(0.2), seeds=[0])
    assert out.particles is not None
    assert out.log_weights is not None
    found = distance_to_tilt(out.particles[0], out.log_weights[0], mixture().tilt(mixture_reward(0.2)), 0)
    record_property("sliced W2 of tempered pCN at sigma = 0.2, 17 calls a particle", found)
    assert found <= 0.20


def test_chains_that_are_not_tempered_stay_in_the_mode_they_began_in() -> None:
    """The third mode has 0.062 of the tilt; Langevin chains of 24 moves leave most of what began there in it.

    400 chains know the weight to 4 * 0.012 = 0.05, with the effective size (over 200) of the weights 0.07.
    """
    options: dict[str, Any] = {"warm_up": 12, "iterations": 12, "temperature": 1.0}
    exact = float(mixture().tilt(mixture_reward(0.2)).weights[2])
    shares = [
        float(mode_weights(NoiseSampling(400, tempered=tempered, **options)(mixture_map(), mixture_reward(0.2)))[2])
        for tempered in (True, False)
    ]
    assert shares[0] == pytest.approx(exact, abs=0.07)
    assert shares[1] > exact + 0.07


def test_chains_that_stop_early_still_weigh_all_of_the_reward() -> None:
    """A constant reward c: the evidence is c / T however early the budget ends the run."""
    for calls in (10, 40, 1000):
        method = NoiseSampling(4, warm_up=6, iterations=3, temperature=0.2)
        watch = Watch(Budget(network_calls=calls))
        out = method(gaussian_map(MEAN, SCALE), lambda points: 0 * points.sum(1) + 1.7, seeds=[0], watch=watch)
        assert out.log_evidence is not None
        assert torch.allclose(out.log_evidence, torch.tensor([1.7 / 0.2], dtype=torch.float64))


@pytest.mark.parametrize("method", [NoiseSampling(6, warm_up=4, iterations=3), NoiseOptimisation(1, 5)])
def test_a_seed_finds_the_same_alone_and_in_company(method: Any) -> None:
    flow_map, pairs = gaussian_map(MEAN, SCALE), [("a", 3), ("b", 3), ("a", 8)]

    def reward(points: Tensor, prompts: Any) -> Tensor:
        return torch.tensor([1.0 if prompt == "a" else -1.0 for prompt in prompts]).to(points) * points[:, 0]

    together = method(flow_map, reward, prompts=[p for p, _ in pairs], seeds=[s for _, s in pairs])
    for i, (prompt, seed) in enumerate(pairs):
        alone = method(flow_map, reward, prompts=[prompt], seeds=[seed])
        assert torch.allclose(alone.x0[0], together.x0[i], atol=1e-12)
        for name, values in alone.trace.items():
            assert torch.allclose(values[0], together.trace[name][i], atol=1e-10)
    assert together.x0[0, 0] > together.x0[1, 0]


def test_no_number_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noises, acceptances, resamplings and the final choice: no two draws share (seed, stream, step)."""
    from steerfm import seeds

    asked: list[tuple[int, str, int]] = []
    original = seeds.generator

    def recorded(seed: int, stream: str = "initial", step: int = 0) -> Any:
        asked.append((seed, stream, step))
        return original(seed, stream, step)

    monkeypatch.setattr(seeds, "generator", recorded)
    method = NoiseSampling(8, warm_up=3, iterations=2, resample_below=2.0)
    method(gaussian_map(MEAN, SCALE), bowl, seeds=[3, 4])
    assert len(asked) == len(set(asked)) == 2 * (1 + 5 + 5 + 5 + 1)


def test_wrong_arguments_are_said() -> None:
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: NoiseOptimisation(jumps=0), "jumps must be at least 1, got 0"),
        (lambda: NoiseOptimisation(jumps=2, last=3), "last must lie between 1 and jumps, got last=3 and jumps=2"),
        (lambda: NoiseOptimisation(last=0), "got last=0 and jumps=1"),
        (lambda: NoiseOptimisation(iterations=0), "iterations must be at least 1, got 0"),
        (lambda: NoiseOptimisation(candidates=0), "candidates must be at least 1, got 0"),
        (lambda: NoiseOptimisation(rate=0), "rate must be positive, got 0"),
        (lambda: NoiseOptimisation(clip=math.nan), "clip must be positive, got nan"),
        (lambda: NoiseOptimisation(momentum=1.0), r"momentum must lie in \[0, 1\), got 1"),
        (lambda: NoiseOptimisation(norm_weight=-1.0), "norm_weight must be at least 0, got -1"),
        (lambda: NoiseSampling(0), "particles must be at least 1, got 0"),
        (lambda: NoiseSampling(temperature=0.0), "temperature must be positive"),
        (lambda: NoiseSampling(warm_up=0), "warm_up must be at least 1, or 0 with tempered=false; got 0"),
        (lambda: NoiseSampling(warm_up=-1, tempered=False), "got -1"),
        (lambda: NoiseSampling(kernel="mala"), "'pcnl' or 'pcn', got 'mala'"),  # type: ignore[arg-type]
        (lambda: NoiseSampling(step=2.1), r"step must lie in \(0, 2\], got 2\.1"),
    ]
    for make, message in cases:
        with pytest.raises(ConfigError, match=message):
            make()
    for method in (NoiseOptimisation(), NoiseSampling(2)):
        with pytest.raises(RewardError, match=r"'black_box' has no gradient, and \w+ needs one\. Use .*BeamSearch"):
            method(gaussian_map(MEAN, SCALE), BlackBox(), seeds=[0])
