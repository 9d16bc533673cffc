"""Objectives without a derivative, flow map matching, teachers that follow, weightings, and laws of intervals."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from exact import column, exact, gaussian, mixture, numbers, uniforms
from torch import Tensor, nn
from torch.optim import SGD
from trainers import equal, point_map, trainer

from steerfm.analytic import analytic_flow_map
from steerfm.data import Points
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.modules import FlowMapTraining
from steerfm.networks import MLP, ApartDiagonal, VelocityNetwork
from steerfm.networks.mlp import randomise
from steerfm.objectives import (
    Adaptive,
    Cauchy,
    Compositional,
    Consistency,
    FlowMapMatching,
    FlowMatching,
    IntegralKL,
    Lagrangian,
    Learnt,
    PseudoHuber,
    Reflow,
    Rounds,
    SelfAverage,
    Shrinking,
    Total,
)
from steerfm.objectives.compositional import compositional
from steerfm.objectives.consistency import consistency
from steerfm.objectives.eulerian import eulerian
from steerfm.objectives.flow_map_matching import flow_map_matching
from steerfm.objectives.flow_matching import flow_matching
from steerfm.objectives.teachers import held, parts_of
from steerfm.objectives.weights import mean_square
from steerfm.paths import Linear
from steerfm.sampling import heun
from steerfm.times import Anchored, Dyadic, Limited, Triangle
from steerfm.types import Condition


def tiny(seed: int = 0) -> FlowMap:
    network = MLP((2,), width=8, depth=1)
    randomise(network, seed=seed)
    return FlowMap(network).double()


def batch(n: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x0, x1, s and t < s."""
    s = uniforms(2, n, 0.4, 1.0)
    return numbers(0, n, 2), numbers(1, n, 2), s, s * uniforms(3, n, 0.0, 0.7)


def gradient(flow_map: FlowMap, losses: Tensor) -> Tensor:
    parts = torch.autograd.grad(losses.sum(), list(flow_map.parameters()), allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return bool((a - b).norm() < tolerance * b.norm())


# --- the Eulerian rule over a finite step ---------------------------------------------------------------------


@pytest.mark.parametrize("compare", ["target", "data"])
def test_halving_the_step_quarters_what_the_exact_map_misses(compare: str):
    """The step along v misses the path by its square, and so does where it ends."""
    data = mixture()
    flow_map, (x0, x1, s, t) = exact(data, Linear()), batch()
    x0 = data.sample(len(s), torch.Generator().manual_seed(0))
    misses = []
    for share in (0.02, 0.01):
        shares = torch.full_like(s, share)
        losses = consistency(flow_map, x0, x1, s, t, shares, velocity="self", compare=compare)  # type: ignore[arg-type]
        misses.append((losses * share).mean().sqrt())
    assert float(misses[0] / misses[1]) == pytest.approx(4, rel=0.05)
    assert misses[1] < 1e-2


@pytest.mark.parametrize("velocity", ["tangent", "self", "teacher"])
def test_as_the_step_shrinks_the_gradient_becomes_that_of_the_eulerian_rule(velocity: str):
    flow_map, (x0, x1, s, t) = tiny(), batch()
    teacher = tiny(1) if velocity == "teacher" else None
    options = {"velocity": velocity, "teacher": teacher}
    limit = gradient(flow_map, eulerian(flow_map, x0, x1, s, t, **options))  # type: ignore[arg-type]
    gaps = []
    for share in (0.02, 0.01):
        losses = consistency(flow_map, x0, x1, s, t, torch.full_like(s, share), **options)  # type: ignore[arg-type]
        gaps.append((gradient(flow_map, losses) - limit).norm() / limit.norm())
    assert float(gaps[0] / gaps[1]) == pytest.approx(2, rel=0.1)  # first order in the step
    assert gaps[1] < 0.1


def test_a_whole_step_to_data_is_flow_matching_and_its_parts_are_where_they_should_be():
    flow_map, (x0, x1, s, t) = tiny(), batch()
    still, x_s = copy.deepcopy(flow_map).requires_grad_(False), torch.lerp(x0, x1, column(s))
    whole = consistency(flow_map, x0, x1, s, t, torch.ones_like(s))
    assert close(whole, (flow_map.average_velocity(x_s, s, t) - (x1 - x0)).square().mean(1))

    share, other = uniforms(5, len(s), 0.1, 0.9), tiny(1)
    r = s + share * (t - s)
    x_r = torch.lerp(x0, x1, column(r))  # on the linear path the tangent leads to the sample's own point
    for target in (None, other):
        later = target or still
        gap = flow_map.jump(x_s, s, t) - later.jump(x_r, r, t).detach()
        expected = mean_square(gap) / ((s - r) * (s - t))
        losses = consistency(flow_map, x0, x1, s, t, share, target=target)
        assert close(losses, expected)
        assert close(gradient(flow_map, losses), gradient(flow_map, expected))


def test_compared_at_data_the_gradient_passes_the_second_jump_but_not_its_weights():
    flow_map, teacher, (x0, x1, s, t) = tiny(), tiny(1), batch()
    still, x_s = copy.deepcopy(flow_map).requires_grad_(False), torch.lerp(x0, x1, column(s))
    share = uniforms(5, len(s), 0.1, 0.9)
    r = s + share * (t - s)
    x_r = x_s + column(r - s) * teacher.velocity(x_s, s).detach()
    wanted = still.look_ahead(still.jump(x_r, r, t), t)
    expected = mean_square(still.look_ahead(flow_map.jump(x_s, s, t), t) - wanted) / share
    losses = consistency(flow_map, x0, x1, s, t, share, velocity="teacher", teacher=teacher, compare="data")
    assert close(losses, expected)
    found = gradient(flow_map, losses)
    assert close(found, gradient(flow_map, expected))
    loose = mean_square(flow_map.look_ahead(flow_map.jump(x_s, s, t), t) - wanted) / share
    assert not close(found, gradient(flow_map, loose), 1e-3)
    assert all(p.requires_grad for p in flow_map.parameters())


def test_steps_are_times_or_shares_of_the_interval():
    flow_map, (x0, x1, s, t) = tiny(), batch()
    half = Consistency(0.5, relative=True)(flow_map, x0, x1, s, t)
    assert torch.equal(half, consistency(flow_map, x0, x1, s, t, torch.full_like(s, 0.5)))
    absolute = Consistency(0.2)(flow_map, x0, x1, s, t)
    assert close(absolute, consistency(flow_map, x0, x1, s, t, (0.2 / (s - t)).clamp_max(1.0)))
    assert torch.isfinite(Consistency(0.2)(flow_map, x0, x1, s, s)).all()
    near, whole = s - 0.1, torch.ones_like(s)  # a step longer than the interval is the interval
    assert close(Consistency(0.2)(flow_map, x0, x1, s, near), consistency(flow_map, x0, x1, s, near, whole))
    back = Consistency(0.2)(flow_map, x0, x1, t, s)  # toward noise steps are as long
    assert close(back, consistency(flow_map, x0, x1, t, s, (0.2 / (s - t)).clamp_max(1.0)))


def test_a_consistency_objective_hands_each_of_its_options_on():
    """The gradient too is that of the function with them; the average makes both later jumps."""
    flow_map, teacher, average, (x0, x1, s, t) = tiny(), tiny(1), SelfAverage(), batch()
    average.begin(tiny(2))
    share = torch.full_like(s, 0.3)
    plain = gradient(flow_map, consistency(flow_map, x0, x1, s, t, share))
    for given, options in (
        ({"velocity": "self"}, {"velocity": "self"}),
        ({"velocity": "teacher", "teacher": teacher}, {"velocity": "teacher", "teacher": teacher}),
        ({"compare": "data"}, {"compare": "data"}),
        ({"average": average}, {"target": average.map}),
        ({"average": average, "compare": "data"}, {"target": average.map, "compare": "data"}),
    ):
        found = gradient(flow_map, Consistency(0.3, relative=True, **given)(flow_map, x0, x1, s, t))  # type: ignore[arg-type]
        expected = gradient(flow_map, consistency(flow_map, x0, x1, s, t, share, **options))  # type: ignore[arg-type]
        assert torch.equal(found, expected)
        assert not close(found, plain, 1e-3)


def test_compared_at_data_both_later_jumps_are_those_of_the_target():
    flow_map, target, (x0, x1, s, t) = tiny(), tiny(1), batch()
    x_s, share = torch.lerp(x0, x1, column(s)), uniforms(5, 6, 0.1, 0.9)
    r = s + share * (t - s)
    wanted = target.look_ahead(target.jump(torch.lerp(x0, x1, column(r)), r, t), t)
    expected = mean_square(target.look_ahead(flow_map.jump(x_s, s, t), t) - wanted.detach()) / share
    losses = consistency(flow_map, x0, x1, s, t, share, target=target, compare="data")
    assert close(losses, expected)
    losses.sum().backward()
    assert all(p.grad is None for p in target.parameters())


def test_a_step_shrinks_by_equal_factors_or_by_halves():
    smooth = Shrinking(0.1, 0.001, 100)
    assert [smooth(step) for step in (0, 50, 100, 300)] == pytest.approx([0.1, 0.01, 0.001, 0.001])
    halves = Shrinking(1.0, 0.125, 80, halving=True)
    assert [halves(step) for step in (0, 19, 20, 45, 60, 80, 999)] == [1, 1, 0.5, 0.25, 0.125, 0.125, 0.125]
    flow_map, (x0, x1, s, t) = tiny(), batch()
    early, late = (Consistency(smooth, True)(flow_map, x0, x1, s, t, step=step) for step in (0, 100))
    assert torch.equal(early, Consistency(0.1, True)(flow_map, x0, x1, s, t))
    assert torch.equal(late, Consistency(0.001, True)(flow_map, x0, x1, s, t))


# --- flow map matching ----------------------------------------------------------------------------------------


def test_there_and_back_is_exact_on_the_exact_map():
    data = gaussian()
    flow_map = exact(data, Linear())
    x0, x1 = data.sample(8, torch.Generator().manual_seed(0)), numbers(1, 8, 2)
    s, t = uniforms(2, 8, 0.1, 1.0), uniforms(3, 8, 0.05, 1.0)
    v = flow_map.velocity(torch.lerp(x0, x1, column(s)), s)
    x_s = torch.lerp(x0, x1, column(s))
    means = x_s - column(s) * v, x_s + column(1 - s) * v  # E[x0 | x_s], E[x1 | x_s]: v in the place of w
    assert flow_map_matching(flow_map, *means, s, t).sqrt().max() < 1e-8
    assert flow_map_matching(flow_map, x0, x1, s, t).mean() > 0.1  # the variance of w stays
    noisy = mean_square(v - (x1 - x0))
    assert torch.allclose(flow_map_matching(flow_map, x0, x1, s, t), noisy, rtol=1e-7)


def test_flow_map_matching_stops_nothing_and_holds_y_in_the_derivative():
    flow_map, (x0, x1, s, t) = tiny(), batch()
    x_s = torch.lerp(x0, x1, column(s))
    y = flow_map.jump(x_s, s, t)
    q = s.clone().requires_grad_()
    back = flow_map.jump(y, t, q)
    speed = torch.stack([torch.autograd.grad(back[:, i].sum(), q, create_graph=True)[0] for i in range(2)], 1)
    terms = mean_square(speed - (x1 - x0)), mean_square(back - x_s)
    losses = FlowMapMatching()(flow_map, x0, x1, s, t)
    assert close(losses, terms[0] + terms[1])
    assert close(gradient(flow_map, losses), gradient(flow_map, terms[0] + terms[1]))
    central = FlowMapMatching("central", 1e-4)(flow_map, x0, x1, s, t)
    assert close(central, losses, 1e-6)


# --- teachers -------------------------------------------------------------------------------------------------


def test_a_teacher_makes_the_two_jumps_and_short_ones_are_euler_steps():
    flow_map, teacher, (x0, x1, s, t) = tiny(), tiny(1), batch()
    x_s, gamma = torch.lerp(x0, x1, column(s)), torch.full_like(s, 0.5)
    r = (s + t) / 2
    target = teacher.jump(teacher.jump(x_s, s, r), r, t)
    expected = (flow_map.jump(x_s, s, t) - target).square().mean(1) / (s - t) ** 2
    assert close(compositional(flow_map, x0, x1, s, t, gamma, teacher=teacher), expected, 1e-8)

    short = s - t < 0.4
    assert 0 < int(short.sum()) < len(s)
    x_r = x_s + column(r - s) * teacher.velocity(x_s, s)
    euler = x_r + column(t - r) * teacher.velocity(x_r, r)
    expected = torch.where(short, (flow_map.jump(x_s, s, t) - euler).square().mean(1) / (s - t) ** 2, expected)
    assert close(compositional(flow_map, x0, x1, s, t, gamma, teacher=teacher, euler_below=0.4), expected, 1e-8)


def test_flow_matching_learns_a_teachers_velocity_guided_or_not():
    flow_map, teacher, (x0, x1, s, _) = tiny(), tiny(1), batch()
    x_s = torch.lerp(x0, x1, column(s))
    losses = FlowMatching(teacher)(flow_map, x0, x1, s, s)
    assert close(losses, mean_square(flow_map.velocity(x_s, s) - teacher.velocity(x_s, s)))
    assert all(p.grad is None for p in teacher.parameters())


def test_reflow_pairs_noise_with_where_the_teacher_leads_it():
    teacher = analytic_flow_map(gaussian(), steps=2)
    flow_map, (x0, x1, s, _) = tiny(), batch()
    losses = Reflow(teacher, steps=8)(flow_map, x0, x1, s, s)
    ends = heun(teacher, x1, 8)
    assert torch.equal(losses, flow_matching(flow_map, ends, x1, s))
    assert torch.equal(losses, Reflow(teacher, steps=8)(flow_map, 0 * x0, x1, s, s))  # the data take no part
    # A Gaussian's flow is linear in x1, so that the pairs' velocity at s is exact: x1 - F(x1, 1, 0).
    assert torch.allclose(ends, teacher.look_ahead(x1, 1.0), atol=2e-2)


def test_averages_and_rounds_follow_the_map():
    flow_map = tiny()
    average, rounds = SelfAverage(0.9), Rounds(start=4, every=3)
    with pytest.raises(ConfigError, match="holds no map yet"):
        average.map  # noqa: B018
    average.begin(flow_map)
    rounds.begin(flow_map)
    old = copy.deepcopy(flow_map)
    weights = []
    for step in range(1, 9):
        with torch.no_grad():
            for p in flow_map.parameters():
                p.add_(1.0)
        average.follow(flow_map, step)
        rounds.follow(flow_map, step)
        first = next(iter(rounds.map.parameters()))
        weights.append(round(float((first - next(iter(old.parameters())).detach()).mean())))
    assert weights == [0, 0, 0, 4, 4, 4, 7, 7]
    behind = next(iter(average.map.parameters())) - next(iter(old.parameters()))
    expected = sum(0.1 * 0.9 ** (8 - k) * k for k in range(1, 9))
    assert torch.allclose(behind, torch.full_like(behind, expected))
    assert not any(p.requires_grad for p in average.parameters())
    flow_map.guidance_scale = 3.0  # for sampling
    average.begin(flow_map)
    assert average.map.guidance_scale == 1.0


def test_held_modules_take_no_gradient_and_pass_it_on():
    flow_map, x = tiny(), numbers(1, 3, 2).requires_grad_()
    next(iter(flow_map.parameters())).requires_grad_(False)
    before = [p.requires_grad for p in flow_map.parameters()]
    with held(flow_map):
        flow_map.look_ahead(x, 0.5).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in flow_map.parameters())
    assert [p.requires_grad for p in flow_map.parameters()] == before
    with pytest.raises(TypeError), held(flow_map):
        flow_map.look_ahead(None, 0.5)  # type: ignore[arg-type]
    assert [p.requires_grad for p in flow_map.parameters()] == before


def test_the_parts_of_an_objective_are_found():
    teacher, average, weighting = tiny(), SelfAverage(), nn.Linear(1, 1)
    total = Total([Consistency(velocity="teacher", teacher=teacher, average=average), Lagrangian(teacher=teacher)])
    parts = parts_of({"objective": total, "diagonal": FlowMatching(teacher), "other": weighting, "none": None})
    assert parts.teachers == [teacher] * 3
    assert list(parts.companions.values()) == [average, weighting]


def test_a_total_adds_its_objectives():
    flow_map, (x0, x1, s, t) = tiny(), batch()
    a, b = Lagrangian(), Compositional("uniform")
    total = Total([a, b], [1.0, 0.5])(flow_map, x0, x1, s, t, None, torch.Generator().manual_seed(0))
    parts = a(flow_map, x0, x1, s, t), b(flow_map, x0, x1, s, t, None, torch.Generator().manual_seed(0))
    assert torch.allclose(total, parts[0] + 0.5 * parts[1])
    assert close(gradient(flow_map, total), gradient(flow_map, parts[0]) + 0.5 * gradient(flow_map, parts[1]))
    with pytest.raises(ConfigError, match="one weight for each"):
        Total([a, b], [1.0])


def test_a_total_tells_its_objectives_the_step_and_the_condition():
    told = []

    def telling(flow_map, x0, x1, s, t, condition=None, generator=None, step=0):
        told.append((condition, step))
        return s

    condition = Condition({"label": torch.zeros(6, dtype=torch.long)})
    assert torch.equal(Total([telling, telling])(tiny(), *batch(), condition, None, 7), 2 * batch()[2])
    assert told == [(condition, 7)] * 2


# --- networks around networks ---------------------------------------------------------------------------------


class Velocity(nn.Module):
    data_shape = (2,)

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return column(t) * x


def test_a_network_of_the_velocity_is_a_map_whose_jumps_are_euler_steps():
    flow_map = FlowMap(VelocityNetwork(Velocity()))
    x = torch.ones(2, 2)
    assert torch.equal(flow_map.velocity(x, 0.5), 0.5 * x)
    assert torch.allclose(flow_map.jump(x, 0.8, 0.3), x - 0.5 * 0.8 * x)


def test_the_diagonal_apart_is_told_other_times():
    asked = []

    class Spy(Velocity):
        def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:  # type: ignore[override]
            asked.append((s, t))
            return x

    s, t = torch.tensor([0.75, 0.5, 1.0]), torch.tensor([0.25, 0.5, 1.0])
    FlowMap(ApartDiagonal(Spy())).average_velocity(torch.ones(3, 2), s, t)
    assert torch.equal(asked[0][0], torch.tensor([0.75, 1.5, 1.0])) and torch.equal(
        asked[0][1], torch.tensor([0.25, 1.0, 1.0])
    )


# --- weightings -----------------------------------------------------------------------------------------------


def test_robust_losses_have_the_gradients_that_their_weights_say():
    losses, times = torch.tensor([1e-6, 0.01, 4.0], dtype=torch.float64, requires_grad=True), torch.zeros(3)

    def slopes(weighting: Callable[..., Tensor]) -> Tensor:
        return torch.autograd.grad(weighting(losses, times, times).sum(), losses)[0]

    c = 0.1
    assert torch.allclose(2 * slopes(PseudoHuber(c)), slopes(Adaptive(0.5, c**2)))
    assert torch.allclose(slopes(Cauchy(c)), c**2 * slopes(Adaptive(1.0, c**2)))
    assert torch.allclose(PseudoHuber(c)(losses, times, times)[2], torch.tensor(4.0).double().sqrt() - c, atol=3e-3)
    for robust in (PseudoHuber, Cauchy):
        with pytest.raises(ConfigError, match="above 0"):
            robust(0.0)


def test_learnt_weights_end_at_the_log_of_the_mean_loss():
    weighting = Learnt(frequencies=2)
    s, t = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0])
    losses = torch.tensor([0.01, 3.0])
    assert torch.equal(weighting(losses, s, t), losses)  # at first all count as they are
    optimizer = torch.optim.LBFGS(weighting.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weighting(losses, s, t).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    weighted = weighting(losses, s, t).detach()
    assert torch.allclose(weighted, 1 + losses.log(), atol=1e-3)


def test_learnt_weights_read_both_times():
    """exp(-w) loss + w, with w = a . (cos(pi k s), cos(pi k t), sin(pi k s), sin(pi k t)) + b, k from 0."""
    weighting, losses = Learnt(frequencies=3).double(), uniforms(0, 5, 0.1, 2.0)
    s, t = uniforms(1, 5), uniforms(2, 5)
    with torch.no_grad():
        weighting.leave.weight.copy_(numbers(3, 1, 12))
        weighting.leave.bias.fill_(0.3)
    angles = (
        torch.pi * torch.outer(s, torch.arange(3.0).double()),
        torch.pi * torch.outer(t, torch.arange(3.0).double()),
    )
    features = torch.cat([angles[0].cos(), angles[1].cos(), angles[0].sin(), angles[1].sin()], 1)
    w = features @ numbers(3, 12) + 0.3
    losses.requires_grad_()
    weighted = weighting(losses, s, t)
    torch.testing.assert_close(weighted, losses / w.exp() + w, rtol=1e-6, atol=0)  # rates are float32
    (slopes,) = torch.autograd.grad(weighted.sum(), losses)
    torch.testing.assert_close(slopes, (-w).exp(), rtol=1e-6, atol=0)  # the map learns through them


# --- laws of intervals ----------------------------------------------------------------------------------------


def test_dyadic_intervals_lie_on_their_grid():
    law, generator = Dyadic(levels=3, diagonal=0.25), torch.Generator().manual_seed(0)
    s, t = law(4000, generator)
    assert law.diagonal_rows(4000) == 1000 and torch.equal(s[:1000], t[:1000])
    interval = (s - t)[1000:]
    assert sorted(set(interval.tolist())) == [0.125, 0.25, 0.5, 1.0]
    assert torch.equal(t[1000:] / interval, (t[1000:] / interval).round())
    shares = [float((interval == size).float().mean()) for size in (0.125, 0.25, 0.5, 1.0)]
    assert shares == pytest.approx([0.25] * 4, abs=4 * (0.25 * 0.75 / 3000) ** 0.5)
    assert float(s.max()) == 1.0 and float(t.min()) == 0.0


def test_rounds_go_from_short_intervals_to_the_whole():
    law = Dyadic(levels=2, diagonal=0.0, rounds=10, start=5)
    pairs = [law(50, step=step) for step in (0, 5, 14, 15, 25, 99)]
    assert [set((s - t).tolist()) for s, t in pairs] == [{0.25}, {0.25}, {0.25}, {0.5}, {1.0}, {1.0}]


def test_intervals_are_limited_and_may_grow():
    generator = partial(torch.Generator().manual_seed, 0)
    s, t = Triangle(0.5, both=True)(100, generator())
    for law, step, factor in ((Limited(Triangle(0.5, both=True), 0.5), 0, 0.5),
                              (Limited(Triangle(0.5, both=True), 0.5, growing=10), 4, 0.2),
                              (Limited(Triangle(0.5, both=True), 0.5, growing=10), 40, 0.5)):  # fmt: skip
        a, b = law(100, generator(), step)
        assert torch.equal(a, s) and torch.allclose(b - a, factor * (t - s), atol=1e-7)
    with pytest.raises(ConfigError, match="reach lies in"):
        Limited(Triangle(), 0.0)


@pytest.mark.parametrize("law", [Limited, partial(Anchored, start=0.0, end=0.0)])
def test_laws_made_of_another_tell_it_the_training_step(law: Callable[..., Any]) -> None:
    for step, interval in ((0, 1 / 4), (7, 1 / 2), (99, 1.0)):
        s, t = law(Dyadic(2, diagonal=0.0, rounds=5))(4, None, step)
        assert (s - t).tolist() == [interval] * 4


# --- in training ----------------------------------------------------------------------------------------------


def training(teacher: FlowMap) -> FlowMapTraining:
    objective = Consistency(velocity="teacher", teacher=teacher, average=SelfAverage(0.5))
    return FlowMapTraining(
        point_map(), objective, Anchored(Triangle(0.5), end=1.0), weighting=Learnt(),
        optimizer=partial(torch.optim.Adam, lr=1e-2), prompt_dropout=0.0, diagonal=FlowMatching(teacher),
    )  # fmt: skip


def test_teachers_stay_out_and_companions_are_trained_kept_and_followed(tmp_path):
    teacher = point_map()
    module = training(teacher)
    before, first = copy.deepcopy(teacher.state_dict()), copy.deepcopy(module.state_dict())
    fit = trainer(tmp_path, steps=3)
    fit.fit(module, Points("moons", batch_size=32))
    after = module.state_dict()
    assert equal(teacher.state_dict(), before)
    assert len(after) == 2 * len(module.flow_map.state_dict()) + 2  # the map, its average, and two of Learnt
    moved = [name for name in after if not torch.equal(first[name], after[name])]
    assert any(name.startswith("companions") for name in moved) and "weighting.leave.weight" in moved
    assert (
        isinstance(module.objective, Consistency) and module.objective.average and isinstance(module.weighting, Learnt)
    )
    average = module.objective.average.map
    raw, followed = (dict(m.named_parameters())["network.leave.weight"] for m in (module.flow_map, average))
    assert not torch.equal(raw, followed) and (raw - followed).abs().max() < raw.abs().max()
    trained = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in (*module.flow_map.parameters(), *module.weighting.parameters())}


def test_a_fake_moves_at_a_multiple_of_the_maps_rate():
    """With plain gradient descent a step is the rate times the gradient, exactly; the schedule halves both rates."""
    half = partial(torch.optim.lr_scheduler.ConstantLR, factor=0.5, total_iters=10)
    module = FlowMapTraining(
        point_map(), IntegralKL(point_map(), point_map()), optimizer=partial(SGD, lr=0.5), scheduler=half,
        companion_rate=4.0,
    )  # fmt: skip
    before = copy.deepcopy(module.state_dict())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    configured = module.configure_optimizers()
    configured["optimizer"].step()
    for part, rate in ((module.flow_map, 0.25), (module.companions, 1.0)):
        own = {id(parameter) for parameter in part.parameters()}
        steps = [before[name] - p.detach() for name, p in module.named_parameters() if id(p) in own]
        assert len(steps) >= 4
        for step in steps:
            torch.testing.assert_close(step, torch.full_like(step, rate))


def test_a_rate_that_a_schedule_would_level_is_refused():
    once = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=10, cycle_momentum=False)
    module = FlowMapTraining(
        point_map(), IntegralKL(point_map(), point_map()), scheduler=once, companion_rate=3.0, prompt_dropout=0.0
    )
    with pytest.raises(ConfigError, match="OneCycleLR sets the learning rates of both groups, which are to stand 3 to"):
        module.configure_optimizers()
    module.scheduler = partial(once, max_lr=[0.1, 0.3])
    module.configure_optimizers()
    with pytest.raises(ConfigError, match="companion_rate is a positive multiple"):
        FlowMapTraining(point_map(), companion_rate=0.0)
    with pytest.raises(ConfigError, match="companion_rate=2 is the rate of what learns beside the map, and with Lagr"):
        FlowMapTraining(point_map(), companion_rate=2.0)


def test_an_optimiser_may_make_groups_of_its_own():
    def two(parameters: list[nn.Parameter]) -> SGD:
        return SGD([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.7}])

    falling = partial(torch.optim.lr_scheduler.ConstantLR, factor=0.5)
    configured = FlowMapTraining(point_map(), optimizer=two, scheduler=falling).configure_optimizers()
    assert [group["lr"] for group in configured["optimizer"].param_groups] == [0.05, 0.35]


def test_a_round_begins_with_the_weights_after_its_step(tmp_path):
    rounds = Rounds(0, 2)
    module = FlowMapTraining(point_map(), Compositional(teacher=rounds), optimizer=partial(SGD, lr=0.1))
    trainer(tmp_path, steps=2).fit(module, Points("moons", batch_size=32))
    assert equal(rounds.map.state_dict(), module.flow_map.state_dict())


def test_resuming_with_a_following_teacher_is_never_having_stopped(tmp_path):
    teacher = point_map()
    randomise(teacher.network, seed=3)
    whole, part, rest = training(teacher), training(teacher), training(teacher)
    trainer(tmp_path / "whole", steps=4).fit(whole, Points("moons", batch_size=32))
    half = trainer(tmp_path / "part", steps=2)
    half.fit(part, Points("moons", batch_size=32))
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path / "rest", steps=4).fit(
        rest, Points("moons", batch_size=32), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert equal(whole.state_dict(), rest.state_dict())


def test_a_diagonal_of_ones_own_and_learnt_guidance_exclude_each_other():
    from steerfm.conditions import Labels

    flow_map = FlowMap(MLP((2,), width=8, depth=1, num_classes=2), conditioner=Labels(["a", "b"]))
    with pytest.raises(ConfigError, match="guide its teacher"):
        FlowMapTraining(flow_map, guidance=2.0, diagonal=FlowMatching())
