"""Steering on Gaussians, where every method has a right answer or a known bias."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from oracles import gaussian_map
from scipy import integrate, stats
from torch import Tensor
from trainers import digit_map

from steerfm import (
    BestOfN,
    FlowMap,
    FlowMapTilting,
    GaussianMixture,
    LookAheadGuidance,
    Unsteered,
    analytic_flow_map,
    seeds,
)
from steerfm.analytic import QuadraticReward
from steerfm.distributed import draw_ancestors, effective_sample_size
from steerfm.errors import ConfigError, RewardError
from steerfm.paths import Linear, Path, Trigonometric, VariancePreserving
from steerfm.reward import Reward
from steerfm.sampling import prepare
from steerfm.steering import (
    BeamSearch,
    FlowMapControl,
    Glass,
    NoiseOptimisation,
    NoiseSampling,
    PathSearch,
    PosteriorDrawGuidance,
    SuccessiveHalving,
    Watch,
    ZeroOrderSearch,
    guidance,
)
from steerfm.steering.common import Run
from steerfm.steering.populations import draw_by_weight
from steerfm.types import Cost, Samples

PATHS: list[Path] = [Linear(), Trigonometric(), VariancePreserving()]
A, MEAN = (0.8, -0.5), (0.3, -0.2)


def first(points: Tensor, prompts: Any) -> Tensor:
    return points[:, 0]


def constant(points: Tensor, prompts: Any) -> Tensor:
    return 0 * points.sum(1) + 1.7


def evidence_of(out: Samples) -> Tensor:
    assert out.log_evidence is not None
    return out.log_evidence


class BlackBox(Reward):
    """Counts, and has no gradient."""

    differentiable = False

    def score(self, images: Tensor, prompts: Any, **metadata: Any) -> Tensor:
        return (images.detach() > 0).flatten(1).double().mean(1)


# --- best of n ---


def test_argmax_has_the_distribution_of_the_maximum() -> None:
    out = BestOfN(n=5, jumps=1)(gaussian_map([0.0], 1.0), first, seeds=range(3000))
    kept = out.x0[:, 0].numpy()
    # Kolmogorov-Smirnov: 1.95 / sqrt(N) is exceeded once in a thousand; the maximum of 4 would be 0.08 off
    assert stats.kstest(kept, lambda x: stats.norm.cdf(x) ** 5).statistic < 1.95 / 3000**0.5
    assert stats.kstest(kept, lambda x: stats.norm.cdf(x) ** 4).statistic > 1.95 / 3000**0.5
    assert out.rewards is not None
    assert out.particles is not None
    assert torch.equal(out.rewards, out.particles[:, :, 0].max(1).values)
    assert out.effective_sample_size is not None
    assert torch.equal(out.effective_sample_size, torch.ones(3000))
    assert "no temperature" in out.note


def test_softmax_approaches_the_tilt_as_n_grows() -> None:
    """N(0, 1) with r = x and T = 1/2 tilts to N(2, 1); the mean of 2000 seeds is known to 4 / sqrt(2000) = 0.09."""
    errors = {}
    for n in (1, 4, 64, 512):
        out = BestOfN(n, jumps=1, temperature=0.5)(gaussian_map([0.0], 1.0), first, seeds=range(2000))
        errors[n] = float(out.x0.mean()) - 2.0
    assert errors[1] == pytest.approx(-2, abs=0.09)
    assert errors[4] < errors[64] < -0.09  # always short of the tilt
    assert abs(errors[512]) < 0.09 + 0.1  # its own bias is of order 1 / n times var exp(r / T), 54 / 512
    assert stats.kstest(out.x0[:, 0].numpy(), stats.norm(2, 1).cdf).statistic < 0.1


# --- guidance ---


def mean_shift(clean: str, scale: float, steps: int, temperature: float) -> Tensor:
    """Return how far guidance moved the mean of N(MEAN, scale^2 I) under r = A . x: equal for every seed."""
    flow_map, reward = gaussian_map(MEAN, scale), QuadraticReward.linear(A)
    method = LookAheadGuidance(steps, temperature, clean)  # type: ignore[arg-type]
    shift = method(flow_map, reward, seeds=range(4)).x0 - Unsteered("jumps", 1)(flow_map, seeds=range(4)).x0
    assert (shift - shift[0]).abs().max() < 1e-10
    return shift[0]


@pytest.mark.parametrize("t", [0.1, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.6])
def test_guidance_is_the_closed_form_gradient(scale: float, t: float) -> None:
    """Through the look-ahead t (c / sigma_t) a / T; through the mean t / (1-t) c^2 (1-t) / sigma_t^2 a / T, 0 at 1."""
    sigma = ((1 - t) ** 2 * scale**2 + t**2) ** 0.5
    a, h, x = torch.tensor(A, dtype=torch.float64), 0.02, torch.randn(5, 2, dtype=torch.float64)
    expected = {
        "look_ahead": t * scale / sigma * a / 0.4,
        "posterior_mean": (t / (1 - t) if t < 1 else 1 / h) * scale**2 * (1 - t) / sigma**2 * a / 0.4,
    }
    exact = analytic_flow_map(GaussianMixture([MEAN], [scale**2]), steps=12)
    for flow_map in (gaussian_map(MEAN, scale), exact):
        for clean, drift in expected.items():
            method = LookAheadGuidance(50, 0.4, clean)  # type: ignore[arg-type]
            reward = Linearly(A)
            run = Run(flow_map, reward, prepare(flow_map, [""] * 5, range(5)), Cost, Watch())
            push = method.push(run, x, t, h, 0)
            assert (push.drift - drift).abs().max() < 1e-8
            predict = flow_map.look_ahead if clean == "look_ahead" else flow_map.denoise
            assert torch.allclose(push.seen["reward"], predict(x, t) @ a)


class Linearly(Reward):
    """r(x) = a . x."""

    def __init__(self, a: Sequence[float]) -> None:
        super().__init__()
        self.a = torch.tensor(a, dtype=torch.float64)

    def score(self, images: Tensor, prompts: Any, **metadata: Any) -> Tensor:
        return images @ self.a.to(images)


def look_ahead_share(scale: float) -> float:
    """Return guided over exact shift of the mean: the integral of t / sigma_t^2, since dF/dx = c / sigma_t."""
    return integrate.quad(lambda t: t / ((1 - t) ** 2 * scale**2 + t**2), 0, 1)[0]


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.6])
def test_guidance_ends_where_its_integral_says(scale: float, record_property: Callable[..., None]) -> None:
    """The posterior mean is exact for linear rewards on Gaussians; the look-ahead keeps pi / 4 of the shift at c = 1.

    Left ends of steps h, of which the first adds nothing, miss at most h times the integrand's rise and its largest
    value, c or below 1.6: 0.032. It nearly halves with the step.
    """
    exact = scale**2 * torch.tensor(A, dtype=torch.float64) / 0.4
    for clean, share in (("posterior_mean", 1.0), ("look_ahead", look_ahead_share(scale))):
        errors = [float(((mean_shift(clean, scale, steps, 0.4) / exact) - share).abs().max()) for steps in (100, 200)]
        assert errors[0] < 0.032
        assert errors[0] / errors[1] == pytest.approx(2, abs=0.4)  # an Euler step's error, halved with the step
    record_property(f"look-ahead share of the exact shift at c = {scale}", look_ahead_share(scale))
    assert look_ahead_share(1.0) == pytest.approx(math.pi / 4)


@pytest.mark.parametrize("bug", ["descending", "constant"])
def test_known_bugs_of_guidance_would_be_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = guidance.guidance_strength
    wrong = {"descending": lambda *a: -original(*a), "constant": lambda path, t, step, clean: torch.ones_like(t)}
    monkeypatch.setattr(guidance, "guidance_strength", wrong[bug])
    for clean, share in (("posterior_mean", 1.0), ("look_ahead", look_ahead_share(0.7))):
        exact = 0.49 * torch.tensor(A, dtype=torch.float64) / 0.4
        assert float((mean_shift(clean, 0.7, 100, 0.4) / exact - share).abs().max()) > 0.1  # ten times the error above


# --- trajectory tilting ---


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_one_jump_of_tilting_is_importance_sampling(path: Path) -> None:
    """With one step there is no drift: the weights are exp(r(x0) / T), all of it, on every path."""
    flow_map = analytic_flow_map(GaussianMixture([MEAN], [0.4]), path, steps=4)
    out = FlowMapTilting(64, jumps=1, temperature=0.3)(flow_map, Linearly(A), seeds=[0, 1])
    assert out.particles is not None
    assert out.log_weights is not None
    logits = out.particles @ torch.tensor(A, dtype=torch.float64) / 0.3
    assert torch.allclose(out.log_weights, logits.log_softmax(1))
    assert torch.allclose(evidence_of(out), logits.logsumexp(1) - math.log(64))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_log_weights_telescope_to_the_reward(path: Path) -> None:
    """A constant reward has no gradient: every trajectory's log-weight is r / T, whatever the steps."""
    flow_map = analytic_flow_map(GaussianMixture([MEAN], [0.4]), path, steps=2, order=3)
    out = FlowMapTilting(8, jumps=7, temperature=0.2)(flow_map, constant, seeds=[0])
    assert torch.allclose(evidence_of(out), torch.tensor([1.7 / 0.2], dtype=torch.float64))
    assert out.effective_sample_size is not None
    assert torch.allclose(out.effective_sample_size, torch.tensor([8.0], dtype=torch.float64))


def tilted_gaussian(jumps: int, particles: int = 4096, **more: Any) -> Samples:
    method = FlowMapTilting(particles, jumps, temperature=0.5, **more)
    return method(gaussian_map(MEAN, 0.7), Linearly(A), seeds=[0, 1, 2])


def test_tilting_a_gaussian_gives_mean_variance_and_evidence() -> None:
    """N(m, c^2 I) with r = a . x tilts to N(m + c^2 a / T, c^2 I), log Z = a . m / T + c^2 |a|^2 / (2 T^2).

    12288 particles of effective size above 9000 know a mean to 4 * 0.7 / sqrt(9000) = 0.03 and a variance to
    4 * 0.49 sqrt(2 / 9000) = 0.03. The steps' error is of first order: at 50 steps it is below 0.02, and halves.
    """
    a, mean = torch.tensor(A, dtype=torch.float64), torch.tensor(MEAN, dtype=torch.float64)
    evidence = float(a @ mean / 0.5 + 0.49 * (a @ a) / (2 * 0.25))
    errors = []
    for jumps in (25, 50, 100):
        out = tilted_gaussian(jumps)
        assert out.log_weights is not None
        assert out.particles is not None
        assert float(out.effective_sample_size.sum()) > 9000  # type: ignore[union-attr]
        weights = out.log_weights.exp().flatten() / 3
        points = out.particles.flatten(0, 1)
        found = weights @ points
        covariance = torch.einsum("n,ni,nj->ij", weights, points - found, points - found)
        assert (found - (mean + 0.49 * a / 0.5)).abs().max() < 0.03 + 1 / jumps
        assert (covariance - 0.49 * torch.eye(2, dtype=torch.float64)).abs().max() < 0.03 + 1 / jumps
        errors.append(abs(float(evidence_of(out).mean()) - evidence))
    assert errors[0] < 0.06
    assert errors[2] < 0.03


def test_a_population_never_mixes_and_does_not_know_its_batch() -> None:
    """Each (prompt, seed) alone gives what it gives in company, resampling at every step."""
    flow_map, pairs = gaussian_map(MEAN, 0.7), [("a", 3), ("b", 3), ("a", 8)]

    def reward(points: Tensor, prompts: Sequence[str]) -> Tensor:
        sign = torch.tensor([1.0 if prompt == "a" else -1.0 for prompt in prompts]).to(points)
        return sign * points[:, 0]

    method = FlowMapTilting(32, 10, temperature=0.2, resample_below=2.0)
    together = method(flow_map, reward, prompts=[p for p, _ in pairs], seeds=[s for _, s in pairs])
    assert together.particles is not None
    assert together.log_weights is not None
    for i, (prompt, seed) in enumerate(pairs):
        alone = method(flow_map, reward, prompts=[prompt], seeds=[seed])
        assert alone.particles is not None
        assert torch.allclose(alone.particles[0], together.particles[i], atol=1e-12)
        assert torch.allclose(alone.log_weights, together.log_weights[i : i + 1], atol=1e-10)  # type: ignore[arg-type]
        assert torch.allclose(alone.x0[0], together.x0[i], atol=1e-12)
        assert torch.allclose(evidence_of(alone)[0], evidence_of(together)[i])
    assert together.x0[0, 0] > 0 > together.x0[1, 0]  # drawn to opposite sides by their own prompts


@pytest.mark.parametrize(
    "method",
    [
        Unsteered("sde", 6),
        BestOfN(3, 2, 0.1),
        LookAheadGuidance(6),
        FlowMapControl(6),
        PosteriorDrawGuidance(6, count=2, draws=Glass(2)),
        FlowMapTilting(4, 6),
        BeamSearch(2, 2, 3),
        NoiseOptimisation(1, 4),
        NoiseSampling(3, warm_up=2, iterations=2),
        PathSearch(2, 2),
        SuccessiveHalving(4),
        ZeroOrderSearch(3, 3),
    ],
)
def test_samples_depend_on_their_own_seed_alone(method: Any) -> None:
    flow_map = digit_map()

    def left(images: Tensor, prompts: Any) -> Tensor:
        return images[..., :4].mean((1, 2, 3))

    prompts = ["a handwritten two", "", "a handwritten six", "a handwritten two"]
    whole = method(flow_map, left, prompts=prompts, seeds=[5, 1, 5, 2])
    half = method(flow_map, left, prompts=prompts[1:3], seeds=[1, 5])
    assert torch.allclose(whole.x0[1:3], half.x0, atol=1e-4)  # float32: matrix products round by batch size
    assert not torch.allclose(whole.x0[0], whole.x0[2], atol=1e-3)  # one seed, two prompts
    given = method(flow_map, left, seeds=[1, 5], condition=flow_map.encode_prompts(prompts[1:3]))
    assert torch.allclose(given.x0, half.x0, atol=1e-4)


def test_every_draw_has_its_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Initial noise, steps, resampling and the final choice: no two draws of a run share (seed, stream, step)."""
    asked: list[tuple[int, str, int]] = []
    original = seeds.generator

    def recorded(seed: int, stream: str = "initial", step: int = 0) -> Any:
        asked.append((seed, stream, step))
        return original(seed, stream, step)

    monkeypatch.setattr(seeds, "generator", recorded)
    FlowMapTilting(8, 5, temperature=0.2, resample_below=2.0)(gaussian_map(MEAN, 1.0), first, seeds=[3, 4])
    assert len(asked) == len(set(asked)) == 2 * (1 + 4 + 4 + 1)


def test_effective_sample_size() -> None:
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]])
    expected = 1 / weights.square().sum(1)
    for offset in (0.0, 300.0):  # unnormalised, and large
        assert torch.allclose(effective_sample_size(weights.log() + offset), expected)


def test_samples_are_drawn_by_weight() -> None:
    weights = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    n = 4000
    drawn = draw_by_weight(weights.log().expand(n, 4), range(n)).bincount(minlength=4) / n
    assert drawn[1] == 0
    assert ((drawn - weights).abs() <= 4 * (weights * (1 - weights) / n).sqrt()).all()  # four standard errors


@pytest.mark.parametrize(("scheme", "away"), [("systematic", 1), ("stratified", 2)])
def test_resampling_keeps_counts_close_to_their_mean(scheme: str, away: int) -> None:
    """Systematic counts stay within 1 of P w, stratified ones within 2 (each interval's end may take or lose one)."""
    columns = 1 if scheme == "systematic" else 50
    log_weights = 2 * torch.randn(20, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    uniform = torch.rand(20, columns, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = 50 * log_weights.softmax(1)
    counts = torch.stack([row.bincount(minlength=50) for row in draw_ancestors(log_weights, uniform)])
    assert (counts - expected).abs().max() < away
    assert scheme == "systematic" or (counts - expected).abs().max() > 1
    many = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1, None].expand(-1, columns)  # each alone is uniform
    mean = torch.stack([draw_ancestors(log_weights[:1], u[None])[0].bincount(minlength=50) for u in many])
    assert torch.allclose(mean.double().mean(0), expected[0], atol=1e-3)  # unbiased over the uniform numbers


# --- cost, errors ---


def test_cost_counts_forward_backward_and_rewards() -> None:
    flow_map, seeds = digit_map(), [0, 1, 2]

    def mean(images: Tensor, prompts: Any) -> Tensor:
        return images.mean((1, 2, 3))

    def cost(method: Any, which: FlowMap = flow_map) -> tuple[float, float, float]:
        found = method(which, mean, prompts=["a handwritten two"], seeds=seeds).cost
        assert found.seconds > 0
        return found.network_calls, found.reward_calls, found.reward_gradients

    assert cost(Unsteered("jumps", 4)) == (4, 0, 0)
    assert cost(Unsteered("euler", 4)) == (4, 0, 0)
    assert cost(Unsteered("heun", 4)) == (7, 0, 0)
    assert cost(Unsteered("sde", 4)) == (4, 0, 0)
    assert cost(BestOfN(5, 2)) == (10, 5, 0)
    assert cost(LookAheadGuidance(6)) == (6 * (1 + 2 + 1), 6, 6)  # look-ahead, its backward pass, jump
    assert cost(FlowMapTilting(4, 6)) == (4 * (5 * (1 + 2 + 2) + 3), 24, 24)  # and the score; the last is a look-ahead
    assert cost(Unsteered("jumps", 4), flow_map.with_guidance(2.0)) == (8, 0, 0)


@pytest.mark.parametrize(
    "method",
    [
        LookAheadGuidance(2),
        FlowMapControl(2),
        PosteriorDrawGuidance(2, count=2, draws=Glass(2), gradient="raw"),
        FlowMapTilting(2, 2),
        NoiseOptimisation(),
        NoiseSampling(),
    ],
)
def test_gradient_methods_say_what_would_do_for_a_black_box(method: Any) -> None:
    with pytest.raises(RewardError, match=r"'black_box' has no gradient, and \w+ needs one\. Use .*BestOfN"):
        method(gaussian_map(MEAN, 1.0), BlackBox(), seeds=[0])
    with pytest.raises(RewardError, match="'detached' gave values without a gradient"):
        method(gaussian_map(MEAN, 1.0), detached, seeds=[0])
    with pytest.raises(RewardError, match=r"gradient of 'kinked' is not finite: .*steerfm reward check"):
        method(gaussian_map(MEAN, 1.0), kinked, seeds=[0])
    assert len(BestOfN(2, 1)(gaussian_map(MEAN, 1.0), BlackBox(), seeds=[0, 1])) == 2


def detached(points: Tensor, prompts: Any) -> Tensor:
    return points.detach().sum(1)


def kinked(points: Tensor, prompts: Any) -> Tensor:
    return (points - points.detach()).abs().sum(1).sqrt()


@pytest.mark.parametrize(
    "method",
    [
        BestOfN(3, 1),
        LookAheadGuidance(2),
        FlowMapControl(2),
        FlowMapTilting(3, 2),
        BeamSearch(1, 3),
        NoiseOptimisation(),
        NoiseSampling(3),
    ],
)
def test_broken_rewards_are_named(method: Any) -> None:
    def broken(points: Tensor, prompts: Any) -> Tensor:
        return points[:, 0] / (torch.arange(len(points)) != 1)

    with pytest.raises(RewardError, match=r"'broken' gave -?inf for sample 1"):
        method(gaussian_map(MEAN, 1.0), first_reward() + broken, seeds=[0, 1, 2])
    with pytest.raises(RewardError, match=r"'short' must return the shape \(\d,\), got \(1,\)"):
        method(gaussian_map(MEAN, 1.0), lambda_named("short", lambda points, prompts: points[:1, 0]), seeds=[0, 1, 2])
    with pytest.raises(RewardError, match=rf"{type(method).__name__} needs a reward, got None: pass any callable"):
        method(gaussian_map(MEAN, 1.0), seeds=[0])


def first_reward() -> Reward:
    return lambda_named("first", first)


def lambda_named(name: str, function: Callable[..., Tensor]) -> Reward:
    from steerfm.reward import FunctionReward

    return FunctionReward(function, name)


@pytest.mark.parametrize("kind", [BestOfN, LookAheadGuidance, FlowMapTilting, NoiseSampling, PosteriorDrawGuidance])
@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_temperatures_must_be_positive(kind: Any, temperature: float) -> None:
    with pytest.raises(ConfigError, match=f"temperature must be positive, got {temperature}: it divides the reward"):
        kind(temperature=temperature)


def test_wrong_arguments_are_said() -> None:
    flow_map = gaussian_map(MEAN, 1.0)
    for make, message in (
        (lambda: BestOfN(0), "n must be at least 1, got 0"),
        (lambda: FlowMapTilting(0), "particles must be at least 1, got 0"),
        (lambda: LookAheadGuidance(0), "steps must be at least 1, got 0"),
        (lambda: LookAheadGuidance(clean="mean"), "'look_ahead' or 'posterior_mean', got 'mean'"),  # type: ignore[arg-type]
        (lambda: Unsteered("rk4"), "'ancestral', 'sde'; got 'rk4'"),  # type: ignore[arg-type]
        (lambda: BestOfN(2)(flow_map, first, prompts="seven", seeds=[0]), r"write \['seven'\]"),
        (lambda: BestOfN(2)(flow_map, first, prompts=["a", "b"], seeds=[0, 1, 2]), "got 2 prompts, 3 seeds"),
        (lambda: BestOfN(2)(flow_map, first, seeds=[]), "got 1 prompts, 0 seeds"),
        (lambda: BestOfN(2)(flow_map, first, seeds=[-1]), "at least 0, got -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


def test_notes_say_what_is_biased() -> None:
    flow_map = gaussian_map(MEAN, 1.0)
    assert "nominal" in LookAheadGuidance(2)(flow_map, first, seeds=[0]).note
    assert FlowMapTilting(2, 2)(flow_map, first, seeds=[0]).note == ""
    guided = digit_map().with_guidance(2.0)
    out = FlowMapTilting(2, 2)(guided, lambda images: images.mean((1, 2, 3)), prompts=["a handwritten two"], seeds=[0])
    assert "approximate" in out.note
