"""Fine-tuning methods on a Gaussian: N(0, 1) under r = -3 x^2 / 2 at temperature 1, whose tilt has variance 1 / 4.

A method's fixed point among Gaussians of scale c is where the mean gradient of its loss is 0. It is found between two
scales by a line through what the gradients are there, and compared with where theory has it: 1/2 for what is exact, and
for what is biased, the scale that fits the velocity it is known to aim at.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import GaussianNetwork, gaussian_map
from torch import Tensor, nn
from tuning import batch, draws, normal

from steerfm import (
    AdjointMatching,
    DirectBackprop,
    DirectPreference,
    LeapAlign,
    NegativeAware,
    PolicyGradient,
    RewardAdaptive,
    RewardDistillation,
    RewardFeedback,
    TiltMatching,
    ValueMatching,
    WeightedRegression,
)
from steerfm.analytic import QuadraticReward
from steerfm.divergence import squared_norm
from steerfm.errors import ConfigError
from steerfm.finetuning import FineTuning
from steerfm.finetuning.common import exponential_weights
from steerfm.finetuning.policy_gradient import Taken, clipped
from steerfm.flow_map import FlowMap
from steerfm.networks import VelocityNetwork
from steerfm.objectives import FlowMatching
from steerfm.steering import Glass
from steerfm.times import Triangle
from steerfm.types import Condition

STRENGTH = 3.0
REWARD = QuadraticReward.distance([0.0], STRENGTH)


def scale_of(flow_map: FlowMap) -> Tensor:
    assert isinstance(flow_map.network, GaussianNetwork)
    return flow_map.network.scale


def gradients(method: FineTuning, scale: float, n: int, batches: int) -> Tensor:
    """Return the gradients of the mean loss with respect to the scale, (batches,)."""
    reference, found = gaussian_map([0.0], 1.0).frozen_copy(), []
    for seed in range(batches):
        flow_map = gaussian_map([0.0], scale)
        companion = getattr(method, "old", None)
        if companion is not None:
            companion.begin(gaussian_map([0.0], 1.0) if isinstance(method, NegativeAware) else flow_map)
        work = batch(flow_map, REWARD, n, reference=reference, seed=seed)
        found.append(torch.autograd.grad(method(work).loss.mean(), scale_of(flow_map))[0])
    return torch.stack(found)


def fixed_point(method: FineTuning, low: float, high: float, n: int = 512, batches: int = 8) -> tuple[float, float]:
    """Return the scale where the mean gradient is 0, and the standard error of that."""
    a, b = (gradients(method, scale, n, batches) for scale in (low, high))
    slope = float(b.mean() - a.mean()) / (high - low)
    assert a.mean() < 0 < b.mean()  # it is stable, and lies between
    errors = [float(each.std()) / len(each) ** 0.5 for each in (a, b)]
    return low - float(a.mean()) / slope, (errors[0] ** 2 + errors[1] ** 2) ** 0.5 / slope


EXACT = {
    "direct": (DirectBackprop(48), 512, 8),
    "adjoint_matching": (AdjointMatching(48), 512, 8),
    "adjoint_matching_some": (AdjointMatching(48, matched=12), 512, 8),
    "weighted_regression": (WeightedRegression(1), 4096, 8),
    "weighted_regression_pool": (WeightedRegression(1, pool=4096), 2048, 8),
    "tilt_matching": (TiltMatching(1), 4096, 8),
    "value_matching": (ValueMatching(64, Glass(16), jumps=1), 128, 12),
    "policy_gradient": (PolicyGradient(32), 2048, 8),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_stop_at_the_tilt(name: str, record_property: Callable[..., None]) -> None:
    """Within four standard errors, and the 3% that 48 steps, 64 draws or a line between scales 8% apart are off by."""
    method, n, batches = EXACT[name]
    found, error = fixed_point(method, 0.46, 0.54, n, batches)
    record_property("scale", (found, error))
    assert error < 0.01
    assert abs(found - 0.5) < 0.015 + 4 * error


def biased_scale(slope: Callable[[Tensor, float], Tensor], on_policy: bool) -> float:
    """Return the scale c of the Gaussian velocity k_c(t) x nearest to slope(t, c) x, noisy states of scale c or 1.

    k_c = (t - (1 - t) c^2) / sigma_t^2. Root of the integral over t of (k_c - slope) dk_c/dc E[x_t^2], by bisection.
    """
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000

    def gap(c: float) -> float:
        scale = torch.tensor(c, dtype=torch.float64, requires_grad=True)
        k = (t - (1 - t) * scale**2) / ((1 - t) ** 2 * scale**2 + t**2)
        weight = (1 - t) ** 2 * (c if on_policy else 1.0) ** 2 + t**2
        (gradient,) = torch.autograd.grad((k * ((k - slope(t, c)).detach() * weight)).mean(), scale)
        return float(gradient)

    low, high = 0.05, 1.5
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gap(middle) < 0 else (low, middle)
    return low


def base_slope(t: Tensor) -> Tensor:
    return (2 * t - 1) / ((1 - t) ** 2 + t**2)


def covariance_slope(t: Tensor, c: float) -> Tensor:
    """Return Cov(r, w | x) / x on N(0, c^2): w = (x - x0) / t, Cov(x0^2, x0) = 2 m S."""
    variance = (1 - t) ** 2 * c**2 + t**2
    m, S = (1 - t) * c**2 / variance, c**2 * t**2 / variance
    return STRENGTH * m * S / t


def test_reward_adaptive_matching_stops_where_the_covariance_has_it() -> None:
    """v_ref + Cov(r, w | x) of its own samples: too narrow or too wide, and exactly by how much."""
    expected = biased_scale(lambda t, c: base_slope(t) + covariance_slope(t, c), on_policy=True)
    assert abs(expected - 0.5) > 0.03  # biased
    found, error = fixed_point(RewardAdaptive(1), expected - 0.04, expected + 0.04, 4096)
    assert error < 0.02
    assert abs(found - expected) < 0.01 + 4 * error


def test_a_round_of_negative_aware_tuning_moves_by_the_covariance() -> None:
    """From N(0, 1): v_old + (2 / b) Cov(rho, w | x) with b = 2 n T / divisor, where nothing is cut."""
    method = NegativeAware(center=-1.5, divisor=400.0, rounds=10, jumps=1)
    expected = biased_scale(lambda t, c: base_slope(t) + covariance_slope(t, 1.0) / 10, on_policy=False)
    assert 0.8 < expected < 0.98
    found, error = fixed_point(method, expected - 0.05, expected + 0.05, 4096)
    assert error < 0.02
    assert abs(found - expected) < 0.01 + 4 * error


def test_negative_aware_tuning_counts_its_rounds_and_what_is_cut() -> None:
    method = NegativeAware(center=0.0, divisor=1e-3, rounds=7, every=3)
    assert method.steps == 21
    flow_map = gaussian_map([0.0], 1.0)
    method.old.begin(flow_map)
    cut = method(batch(flow_map, REWARD, 64)).figures["cut"]
    assert cut.mean() > 0.9
    with pytest.raises(ConfigError, match="divisor brings rewards to"):
        NegativeAware(0.0, 0.0)


def test_tilt_matching_has_less_variance_than_weighted_regression() -> None:
    """At a high temperature weights are near 1, and the control variate leaves little."""
    reference = gaussian_map([0.0], 1.0).frozen_copy()

    def spread(method: FineTuning) -> float:
        found = []
        for seed in range(12):
            flow_map = gaussian_map([0.0], 1.0)
            work = batch(flow_map, REWARD, 256, 20.0, reference=reference, seed=seed)
            found.append(torch.autograd.grad(method(work).loss.mean(), scale_of(flow_map))[0])
        return float(torch.stack(found).std())

    assert spread(TiltMatching(1)) < 0.4 * spread(WeightedRegression(1))


def test_weights_are_normalised_by_prompt() -> None:
    rewards = torch.tensor([1.0, 1000.0, 2.0, 1001.0, -5000.0, -5000.0], dtype=torch.float64)
    weights = exponential_weights(rewards, 0.5, ["a", "b", "a", "b", "c", "c"])
    e = torch.tensor([-2.0, 0.0], dtype=torch.float64).exp()
    two = e / e.mean()
    assert torch.allclose(weights, torch.tensor([two[0], two[0], two[1], two[1], 1.0, 1.0], dtype=torch.float64))


# --- policy gradients ---


@pytest.mark.parametrize(
    "method",
    [PolicyGradient(2), WeightedRegression(1), TiltMatching(1), RewardAdaptive(1)],
    ids=lambda m: type(m).__name__,
)
def test_group_of_one_is_refused(method: FineTuning) -> None:
    work = batch(gaussian_map([0.0], 1.0), REWARD, prompts=["a", "a", "b"])
    with pytest.raises(ConfigError, match=r"A prompt with one sample has no other to be compared with.*samples_per"):
        method(work)


@pytest.mark.parametrize("noise", ["memoryless", "flow", "jumps"])
def test_policy_gradient_is_that_of_the_objective(noise: Any) -> None:
    """Against the gradient of E[r] - T KL through the chain's states themselves, the same noise in both.

    The last step adds no noise, so that policy gradients know nothing of it: its map is held.
    """
    method, reference = PolicyGradient(3, noise), gaussian_map([0.0], 1.0).frozen_copy()

    def one(seed: int) -> tuple[Tensor, Tensor]:
        flow_map = gaussian_map([0.3], 1.2)
        parameters = list(flow_map.parameters())
        scored = method(batch(flow_map, REWARD, 2048, 0.7, reference=reference, seed=seed)).loss.mean()
        held, numbers = flow_map.frozen_copy(), draws(2048, seed=seed)
        x, divergence = normal(numbers, flow_map), torch.zeros(2048, dtype=torch.float64)
        for s, t in [(1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)]:
            std = method._std(flow_map, torch.full((2048,), s, dtype=torch.float64), s, t)
            step = Taken(x, s, t, x, std, std)
            mean = method._policy(flow_map if t else held, step, None)
            if t:
                divergence = divergence + squared_norm(mean - method._policy(reference, step, None)) / (2 * std**2)
            x = mean + std[:, None] * normal(numbers, flow_map)
        through = (-REWARD(x) + 0.7 * divergence).mean()
        pair = [
            torch.stack([g.flatten()[0] for g in torch.autograd.grad(each, parameters)]) for each in (scored, through)
        ]
        return pair[0], pair[1]

    scored, through = (torch.stack(each) for each in zip(*(one(seed) for seed in range(16)), strict=True))
    gap = scored - through
    error = gap.std(0) / 4
    assert (gap.mean(0).abs() < 4 * error).all()
    assert (through.mean(0).abs() > 8 * error).all()  # so that a wrong sign or a lost term shows


def test_older_samples_are_the_older_maps_and_weigh_by_their_ratio() -> None:
    """With every > 1 the chain is the companion's; where that is the map itself, nothing differs from every=1."""
    method, reference = PolicyGradient(3, every=4), gaussian_map([0.0], 1.0).frozen_copy()
    assert method.old is not None
    flow_map = gaussian_map([0.0], 0.7)
    method.old.begin(flow_map)
    same, own = (m(batch(flow_map, REWARD, 64, reference=reference)) for m in (method, PolicyGradient(3)))
    assert_same(flow_map, same.loss.mean(), own.loss.mean())
    method.old.begin(gaussian_map([0.0], 1.0))
    older, of_old = (
        m(batch(f, REWARD, 64, reference=reference))
        for m, f in ((method, flow_map), (PolicyGradient(3), gaussian_map([0.0], 1.0)))
    )
    assert torch.equal(older.x0, of_old.x0)  # type: ignore[arg-type]
    assert not torch.allclose(older.loss, of_old.loss)


def test_clipping_takes_the_lesser() -> None:
    ratio = torch.tensor([0.5, 0.5, 1.0, 1.5, 1.5])
    advantage = torch.tensor([1.0, -1.0, 2.0, 1.0, -1.0])
    assert torch.allclose(clipped(ratio, advantage, 0.2), torch.tensor([0.5, -0.8, 2.0, 1.2, -1.5]))


def test_dividing_by_the_groups_deviation_is_an_option() -> None:
    values, prompts = torch.tensor([1.0, 3.0, 10.0, 30.0]), ["a", "a", "b", "b"]
    assert torch.allclose(PolicyGradient()._advantage(values, prompts), torch.tensor([-2.0, 2.0, -20.0, 20.0]))
    even = PolicyGradient(by_std=True)._advantage(values, prompts)
    assert torch.allclose(even, torch.tensor([-2.0, 2.0, -2.0, 2.0]))


def test_wrong_options_are_said() -> None:
    for make, text in (
        (lambda: PolicyGradient(1), "one step has no policy"),
        (lambda: PolicyGradient(noise="loud"), "noise is 'memoryless', 'flow' or 'jumps', got 'loud'"),  # type: ignore[arg-type]
        (lambda: PolicyGradient(level=0.0), "level lies in"),
        (lambda: AdjointMatching(4, matched=5), "at most 4, got 5"),
        (lambda: ValueMatching(1), "count must be 2 or more"),
        (lambda: LeapAlign(1), "Two leaps lie between three times"),
        (lambda: RewardDistillation(share=-1.0), "share weighs the reward"),
        (lambda: TiltMatching(repeats=0), "repeats must be at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            make()


@pytest.mark.parametrize("kind", [AdjointMatching, PolicyGradient])
def test_checkpointing_changes_no_gradient(kind: type) -> None:
    flow_map, reference = gaussian_map([0.2], 0.8), gaussian_map([0.0], 1.0).frozen_copy()
    losses = [
        kind(3, checkpointing=c)(batch(flow_map, REWARD, 8, reference=reference)).loss.mean() for c in (False, True)
    ]
    assert_same(flow_map, *losses)


# --- look-aheads, leaps, distillation, preferences ---


def test_reward_feedback_is_one_look_ahead_from_each_time() -> None:
    """By hand, at every number of jumps that may be walked."""
    flow_map, reference = gaussian_map([0.2], 0.8), gaussian_map([0.0], 1.0).frozen_copy()
    walked = set()
    for step in range(16):
        tuned = RewardFeedback(3)(batch(flow_map, REWARD, 5, 0.5, reference=reference, step=step))
        numbers = draws(5, step)
        count = int(3 * numbers.common()[0])
        walked.add(count)
        x = normal(numbers, flow_map)
        for i in range(count):
            x = flow_map.jump(x, 1 - i / 3, 1 - (i + 1) / 3).detach()
        t = 1 - count / 3
        x0, x0_reference = flow_map.look_ahead(x, t), reference.look_ahead(x, t)
        loss = (-REWARD(x0) + 0.25 * squared_norm(x0 - x0_reference)).mean()
        assert_same(flow_map, tuned.loss.mean(), loss)
    assert walked == {0, 1, 2}


def test_leaps_discount_the_gradient_through_both() -> None:
    flow_map, reference = gaussian_map([0.2], 0.8), gaussian_map([0.0], 1.0).frozen_copy()
    pairs = set()
    for step in range(24):
        tuned = LeapAlign(3, 0.25)(batch(flow_map, REWARD, 5, 0.5, reference=reference, step=step))
        numbers = draws(5, step)
        first, second = numbers.common(2)
        i = int(2 * first)
        j = i + 1 + int((2 - i) * second)
        pairs.add((i, j))
        x = normal(numbers, flow_map)
        for k in range(i):
            x = flow_map.jump(x, 1 - k / 3, 1 - (k + 1) / 3).detach()
        ends = []
        for each in (flow_map, reference):
            middle = each.jump(x, 1 - i / 3, 1 - j / 3)
            ends.append(each.look_ahead(0.25 * middle + 0.75 * middle.detach(), 1 - j / 3))
        loss = (-REWARD(ends[0]) + 0.25 * squared_norm(ends[0] - ends[1])).mean()
        assert_same(flow_map, tuned.loss.mean(), loss)
    assert pairs == {(0, 1), (0, 2), (1, 2)}


def test_distillation_learns_its_objective_and_the_reward_at_once() -> None:
    flow_map, teacher = gaussian_map([0.2], 0.8), gaussian_map([0.0], 1.0).frozen_copy()
    x0 = torch.randn(6, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    method = RewardDistillation(FlowMatching(teacher), FlowMatching(teacher), Triangle(0.5), share=0.3)
    tuned = method(batch(flow_map, REWARD, 6, 0.5, data={"x0": x0}))
    x1 = normal(draws(6), flow_map)
    s, t = Triangle(0.5)(6, torch.Generator().manual_seed(0))
    s, t = s.double(), t.double()
    x_s = flow_map.path.interpolate(x0, x1, s)
    gap = squared_norm(flow_map.velocity(x_s, s) - teacher.velocity(x_s, s))
    loss = 0.5 * gap - 0.3 * REWARD(flow_map.look_ahead(x_s, s))
    assert_same(flow_map, tuned.loss.mean(), loss.mean())


def test_distillation_holds_the_jumps_that_the_reward_pulls() -> None:
    """Where long jumps to data are wrong and all others right, the objective sees it by default."""

    class Displaced(GaussianNetwork):
        def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
            return super().forward(x, s, t, condition) - ((t == 0) & (s > 0.5))[:, None].double()

    flow_map = FlowMap(Displaced([0.0], 1.0))
    x0 = torch.randn(256, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def objective(method: RewardDistillation) -> float:
        tuned = method(batch(flow_map, REWARD, 256, data={"x0": x0}))
        s, t = method.times(256, torch.Generator().manual_seed(0))
        return float(tuned.figures["objective"][s > t].mean())

    assert objective(RewardDistillation(times=Triangle(0.5))) < 1e-6
    assert objective(RewardDistillation()) > 0.1


def test_distillation_refuses_a_network_that_cannot_jump() -> None:
    flow_map = FlowMap(VelocityNetwork(nn.Identity(), (1,)))
    with pytest.raises(ConfigError, match=r"cannot learn them: begin with steerfm.backbones.two_times"):
        RewardDistillation()(batch(flow_map, REWARD, 4))


def test_preferences_pull_toward_what_was_chosen() -> None:
    """Choices for the greater of two points move the mean up, against them down; ties leave an unmoved map alone."""
    a, b = torch.randn(2, 64, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def pull(preferred: Tensor) -> float:
        flow_map = gaussian_map([0.0], 1.0)
        data = {"image_a": a, "image_b": b, "preferred": preferred}
        loss = DirectPreference(8)(batch(flow_map, None, 64, 0.5, data=data)).loss.mean()
        assert torch.allclose(loss, torch.tensor(2.0, dtype=loss.dtype).log())  # nothing has moved yet
        network: Any = flow_map.network
        return -float(torch.autograd.grad(loss, network.mean)[0])

    greater = (a > b).double()[:, 0]
    assert pull(greater) > 0.05
    assert pull(1 - greater) == pytest.approx(-pull(greater), rel=1e-9)
    assert abs(pull(torch.full((64,), 0.5))) < 1e-12


def test_preferences_margin_estimates_the_log_ratio() -> None:
    """T (l(a) - l(b)) has the mean T (log p/p_ref (a) - log p/p_ref (b)) over data from p, but for times below 0.02."""
    flow_map, reference = gaussian_map([0.5], 1.0), gaussian_map([0.0], 1.0).frozen_copy()
    x0 = 0.5 + torch.randn(4096, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    work = batch(flow_map, None, 4096, 1.0, reference=reference, data={})
    x1, t = work.normal(4), 0.02 + 0.98 * work.uniform(4)
    found = DirectPreference(4)._log_ratio(work, x0, x1, t).detach()
    exact = (x0**2 - (x0 - 0.5) ** 2)[:, 0] / 2
    error = float((found - exact).std()) / 64
    assert abs(float((found - exact).mean())) < 4 * error + 0.02 * float(exact.mean())
    assert float(exact.mean()) > 8 * error


def test_batches_without_pairs_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"has no image_a, image_b, preferred: set data to steerfm\.data\.Pref"):
        DirectPreference()(batch(gaussian_map([0.0], 1.0), None, 2))


def assert_same(flow_map: FlowMap, found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-9)
    parameters = list(flow_map.parameters())
    for a, b in zip(*(torch.autograd.grad(each, parameters) for each in (found, expected)), strict=True):
        assert torch.allclose(a, b, rtol=1e-9)
