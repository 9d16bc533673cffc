"""Objectives: what the exact map gives (MATHS.md, section 3), and where their gradients flow."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import NAMES, PATHS, column, exact, gaussian, jvp, mixture, numbers, posterior_draws, uniforms
from exact import within_standard_errors as near
from torch import Tensor, nn

from steerfm.analytic import GaussianMixture, analytic_flow_map
from steerfm.conditions import Labels
from steerfm.conditions.guidance import with_scale
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.networks import MLP, Critic, DiT, UNet
from steerfm.networks.mlp import randomise
from steerfm.objectives import (
    Adaptive,
    Adversarial,
    Compositional,
    Consistency,
    Eulerian,
    FlowMapMatching,
    FlowMatching,
    IntegralKL,
    Lagrangian,
    Reflow,
    SourceTime,
    TeacherDenoises,
    Total,
    Uniform,
)
from steerfm.objectives.compositional import compositional
from steerfm.objectives.eulerian import eulerian
from steerfm.objectives.flow_map_matching import flow_map_matching
from steerfm.objectives.flow_matching import flow_matching
from steerfm.objectives.lagrangian import lagrangian
from steerfm.objectives.weights import mean_square
from steerfm.paths import Linear, Path
from steerfm.types import Condition

every_path = pytest.mark.parametrize("path", PATHS, ids=NAMES)
DRAWS = 2_000


def batch(data: GaussianMixture, n: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x0, x1 and times in both directions."""
    x0 = data.sample(n, torch.Generator().manual_seed(0))
    return x0, numbers(1, *x0.shape), uniforms(2, n, 0.1, 1.0), uniforms(3, n, 0.05, 1.0)


# --- terms whose target is a velocity: zero on the exact map --------------------------------------------------


@every_path
def test_the_compositional_residual_is_zero(path: Path):
    flow_map, (x0, x1, s, t) = exact(mixture(), path), batch(mixture())
    for gamma in (torch.full_like(s, 0.5), uniforms(4, len(s))):
        assert compositional(flow_map, x0, x1, s, t, gamma).sqrt().max() < 1e-9
    wrong = torch.full_like(s, 0.3)
    u, v = (flow_map.average_velocity(path.interpolate(x0, x1, s), s, end) for end in (t, torch.lerp(s, t, wrong)))
    assert (u - v).abs().max() > 1e-3  # the two halves differ, so that swapping their weights would show


@pytest.mark.parametrize(
    ("data", "path"),
    [(gaussian(), path) for path in PATHS] + [(mixture(), Linear())],
    ids=[*(f"gaussian {name}" for name in NAMES), "mixture"],
)
def test_the_lagrangian_residual_is_zero(data: GaussianMixture, path: Path):
    x0, x1, s, t = batch(data)
    steps = 8 if len(data.means) == 1 else 12
    flow_map = analytic_flow_map(data, path, steps=steps, order=6)
    assert lagrangian(flow_map, x0, x1, s, t).sqrt().max() < 1e-9


def test_every_variant_with_a_velocity_has_no_residual():
    flow_map, (x0, x1, s, t) = exact(gaussian(), Linear()), batch(gaussian())
    for stop in ("velocity", "target", "nothing"):
        assert lagrangian(flow_map, x0, x1, s, t, teacher=flow_map, stop=stop).sqrt().max() < 1e-9  # type: ignore[arg-type]
    for stop in ("target", "spatial", "nothing"):
        for velocity in ("self", "teacher"):
            losses = eulerian(flow_map, x0, x1, s, t, velocity=velocity, teacher=flow_map, stop=stop)  # type: ignore[arg-type]
            assert losses.sqrt().max() < 1e-9


def test_a_lagrangian_term_of_the_wrong_sign_is_not_zero():
    """(s - t) for (t - s) in u = v(F, t) - (t - s) du/dt."""
    x0, x1, s, t = batch(gaussian())
    flow_map = exact(gaussian(), Linear())
    x_s = flow_map.path.interpolate(x0, x1, s)
    u = flow_map.average_velocity(x_s, s, t)
    du = jvp(lambda time: flow_map.average_velocity(x_s, s, time), (t,), (torch.ones_like(t),))
    end = flow_map.velocity(flow_map.jump(x_s, s, t), t)
    assert (u - end + column(t - s) * du).abs().max() < 1e-9
    assert (u - end + column(s - t) * du).abs().max() > 1e-2


@pytest.mark.parametrize("objective", [lagrangian, eulerian])
def test_a_central_difference_misses_by_a_quarter_when_its_step_is_halved(objective: Callable[..., Tensor]):
    flow_map, (x0, x1, s, t) = exact(mixture(), Linear()), batch(mixture())
    s, t = s.clamp(0.3, 0.9), t.clamp(0.2, 0.9)
    if objective is eulerian:  # E[x0 | x_s] and E[x1 | x_s] for the pair put the velocity for w
        x0, x1 = means(flow_map, flow_map.path.interpolate(x0, x1, s), s)
    misses = [objective(flow_map, x0, x1, s, t, derivative="central", step=step).mean().sqrt() for step in (0.02, 0.01)]
    assert float(misses[0] / misses[1]) == pytest.approx(4, rel=0.05)


# --- terms with w for the velocity: zero on average -----------------------------------------------------------


class Nudged(nn.Module):
    """The exact network plus weights (B, d, k) times features of (x, s, t), a set of weights for each row.

    At weights of zero the gradient of row i's loss is 2 / d times its residual times its features, whatever
    the objective stops: the residual and the gradient of every sample, read off the objective itself.
    """

    def __init__(self, network: nn.Module, rows: int) -> None:
        super().__init__()
        self.network = network
        self.data_shape = network.data_shape
        self.weights = nn.Parameter(torch.zeros(rows, 2, 5, dtype=torch.float64))

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        features = torch.cat([torch.ones_like(column(s)), x, column(s), column(t - s)], 1)
        return self.network(x, s, t) + torch.einsum("ndk,nk->nd", self.weights, features)


def nudged(path: Path) -> FlowMap:
    """Return a map for DRAWS rows; its solver is good to 1e-5, far below the sampling error of 1e-2."""
    return FlowMap(Nudged(analytic_flow_map(mixture(), path, steps=4, order=4).network, DRAWS), path=path)


def gradients(flow_map: FlowMap, losses: Tensor) -> Tensor:
    """Return each row's gradient, (DRAWS, d, 5); those of the constant feature are the residual."""
    assert isinstance(flow_map.network, Nudged)
    (gradient,) = torch.autograd.grad(losses.sum(), flow_map.network.weights)
    return gradient


@every_path
def test_mean_residuals_vanish_at_a_fixed_point(path: Path):
    """Over draws of (x0, x1) that meet in x_s: within four standard errors of zero."""
    flow_map, x_s = nudged(path), torch.tensor([0.5, 0.3], dtype=torch.float64)
    for s, t in ((0.7, 0.2), (0.4, 0.9)):
        x0, x1 = posterior_draws(mixture(), path, x_s, s, DRAWS, seed=5)
        source, target = (torch.full((DRAWS,), time, dtype=torch.float64) for time in (s, t))
        losses = flow_matching(flow_map, x0, x1, source)
        assert losses.mean() > 0.1  # the conditional variance of w stays
        assert near(gradients(flow_map, losses)[:, :, 0], 0.0)
        for along in ("velocity", "self"):
            losses = eulerian(flow_map, x0, x1, source, target, along=along)  # type: ignore[arg-type]
            assert near(gradients(flow_map, losses)[:, :, 0], 0.0)

        assert not near(mean_flow_residual(flow_map, x0, x1, source, target, sign=-1.0), 0.0)
        w = path.tangent(x0, x1, source)
        assert not near(flow_map.velocity(x_s.expand(DRAWS, 2), s) + w, 0.0)  # a velocity of the wrong sign


@every_path
def test_mean_gradients_vanish_over_the_data(path: Path):
    """Over draws of (x0, x1, s, t): each of ten gradients within four standard errors of zero."""
    flow_map = nudged(path)
    x0 = mixture().sample(DRAWS, torch.Generator().manual_seed(6))
    x1, s = numbers(7, DRAWS, 2), uniforms(8, DRAWS, 0.1, 1.0)
    t = s * uniforms(9, DRAWS)
    assert near(gradients(flow_map, flow_matching(flow_map, x0, x1, s)), 0.0)
    assert near(gradients(flow_map, eulerian(flow_map, x0, x1, s, t)), 0.0)

    x_s = path.interpolate(x0, x1, s)
    nudge = (flow_map.average_velocity(x_s, s, t) - flow_map.velocity(x_s, s)).detach()
    right, wrong = (mean_flow_residual(flow_map, x0, x1, s, t, sign) for sign in (1.0, -1.0))
    assert near((right * nudge).sum(1), 0.0)
    assert not near((wrong * nudge).sum(1), 0.0)


def test_the_residual_in_these_tests_is_that_of_the_objective():
    flow_map, (x0, x1, s, t) = analytic_flow_map(mixture(), steps=2), batch(mixture())
    mine = mean_square(mean_flow_residual(flow_map, x0, x1, s, t))
    assert torch.allclose(eulerian(flow_map, x0, x1, s, t), mine, rtol=1e-10)


@pytest.mark.parametrize(
    ("data", "path"),
    [(gaussian(), path) for path in PATHS] + [(mixture(), Linear())],
    ids=[*(f"gaussian {name}" for name in NAMES), "mixture"],
)
def test_with_the_velocity_for_w_the_residuals_are_zero(data: GaussianMixture, path: Path):
    """The pair (E[x0 | x_s], E[x1 | x_s]) has x_s for its point and v for its tangent."""
    flow_map = analytic_flow_map(data, path, steps=8 if len(data.means) == 1 else 12, order=6)
    x0, x1, s, t = batch(data)
    x0, x1 = means(flow_map, path.interpolate(x0, x1, s), s)
    assert flow_matching(flow_map, x0, x1, s).sqrt().max() < 1e-9
    assert eulerian(flow_map, x0, x1, s, t).sqrt().max() < 1e-9


def means(flow_map: FlowMap, x_s: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return E[x0 | x_s] and E[x1 | x_s]."""
    v = flow_map.velocity(x_s, s)
    return flow_map.path.denoised(x_s, v, s), flow_map.path.noise(x_s, v, s)


def mean_flow_residual(flow_map: FlowMap, x0: Tensor, x1: Tensor, s: Tensor, t: Tensor, sign: float = 1.0) -> Tensor:
    """Return u - w - sign (t - s)(du/ds + grad u . w), written out anew; sign -1 is the mistake to be found."""
    x_s, w = flow_map.path.interpolate(x0, x1, s), flow_map.path.tangent(x0, x1, s)
    with torch.no_grad():
        u = flow_map.average_velocity(x_s, s, t)
        du = jvp(lambda x, source: flow_map.average_velocity(x, source, t), (x_s, s), (w, torch.ones_like(s)))
    return u - w - sign * column(t - s) * du


# --- where the gradients flow ---------------------------------------------------------------------------------


def tiny() -> tuple[FlowMap, tuple[Tensor, Tensor, Tensor, Tensor]]:
    network = MLP((2,), width=8, depth=1)
    randomise(network)
    return FlowMap(network).double(), (numbers(10, 6, 2), numbers(11, 6, 2), uniforms(12, 6), uniforms(13, 6))


def other() -> FlowMap:
    network = MLP((2,), width=8, depth=1)
    randomise(network, seed=1)
    return FlowMap(network).double()


def parameter_gradient(flow_map: FlowMap, losses: Tensor) -> Tensor:
    parts = torch.autograd.grad(losses.sum(), list(flow_map.parameters()), allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() < 1e-9 * b.norm())


def speed(flow_map: FlowMap, x_s: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Return dF/dt by reverse mode, differentiable once more."""
    time = t.clone().requires_grad_()
    F = flow_map.jump(x_s, s, time)
    return torch.stack([torch.autograd.grad(F[:, i].sum(), time, create_graph=True)[0] for i in range(2)], 1)


def test_the_lagrangian_teaches_the_speed_and_stops_the_velocity():
    flow_map, (x0, x1, s, t) = tiny()
    teacher = copy.deepcopy(flow_map).requires_grad_(False)
    x_s = flow_map.path.interpolate(x0, x1, s)
    target = teacher.velocity(teacher.jump(x_s, s, t), t)
    found = parameter_gradient(flow_map, lagrangian(flow_map, x0, x1, s, t))
    assert same(found, parameter_gradient(flow_map, mean_square(speed(flow_map, x_s, s, t) - target)))
    moving = flow_map.velocity(flow_map.jump(x_s, s, t), t)
    assert not same(found, parameter_gradient(flow_map, mean_square(speed(flow_map, x_s, s, t) - moving)))


def test_the_compositional_rule_teaches_the_jump_and_stops_the_halves():
    flow_map, (x0, x1, s, t) = tiny()
    teacher = copy.deepcopy(flow_map).requires_grad_(False)
    x_s, gamma = flow_map.path.interpolate(x0, x1, s), uniforms(14, 6)
    r = s + gamma * (t - s)
    x_r = teacher.jump(x_s, s, r)
    target = column(gamma) * teacher.average_velocity(x_s, s, r)
    target = target + column(1 - gamma) * teacher.average_velocity(x_r, r, t)
    expected = mean_square(flow_map.average_velocity(x_s, s, t) - target)
    losses = compositional(flow_map, x0, x1, s, t, gamma)
    assert torch.allclose(losses, expected)
    assert same(parameter_gradient(flow_map, losses), parameter_gradient(flow_map, expected))


@pytest.mark.parametrize("derivative", ["forward", "central"])
def test_meanflow_teaches_the_value_and_stops_the_rest(derivative: str):
    flow_map, (x0, x1, s, t) = tiny()
    teacher = copy.deepcopy(flow_map).requires_grad_(False)
    x_s, w = flow_map.path.interpolate(x0, x1, s), flow_map.path.tangent(x0, x1, s)
    step = 1e-5
    du = teacher.average_velocity(x_s + step * w, s + step, t) - teacher.average_velocity(x_s - step * w, s - step, t)
    target = w + column(t - s) * du / (2 * step)
    expected = parameter_gradient(flow_map, mean_square(flow_map.average_velocity(x_s, s, t) - target))
    found = parameter_gradient(
        flow_map,
        eulerian(flow_map, x0, x1, s, t, derivative=derivative, step=step),  # type: ignore[arg-type]
    )
    assert (found - expected).norm() < 1e-6 * expected.norm()  # the step's own error


def test_the_lagrangian_with_a_teacher_stops_what_it_says():
    flow_map, (x0, x1, s, t) = tiny()
    teacher = other().requires_grad_(False)
    still = copy.deepcopy(flow_map).requires_grad_(False)
    x_s = flow_map.path.interpolate(x0, x1, s)
    end = still.jump(x_s, s, t)

    def gap(stop: str) -> Tensor:
        if stop == "target":
            du = (speed(still, x_s, s, t) - still.average_velocity(x_s, s, t)) / column(t - s)
            return flow_map.average_velocity(x_s, s, t) - (teacher.velocity(end, t) - column(t - s) * du).detach()
        moving = flow_map.jump(x_s, s, t) if stop == "nothing" else end
        return speed(flow_map, x_s, s, t) - teacher.velocity(moving, t)

    found = {}
    for stop in ("velocity", "target", "nothing"):
        losses = lagrangian(flow_map, x0, x1, s, t, teacher=teacher, stop=stop)  # type: ignore[arg-type]
        assert torch.allclose(losses, mean_square(gap("velocity")))  # one residual, three gradients
        found[stop] = parameter_gradient(flow_map, losses)
        assert same(found[stop], parameter_gradient(flow_map, mean_square(gap(stop))))
    assert not any(same(found[a], found[b]) for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize("warmth", [1.0, 0.4])
def test_a_normalised_gap_has_the_length_that_it_should(warmth: float):
    """g / (|g| + c), and its gradient that of a stopped target: the length is a number to it."""
    flow_map, (x0, x1, s, t) = tiny()
    still = copy.deepcopy(flow_map).requires_grad_(False)
    x_s, w = flow_map.path.interpolate(x0, x1, s), flow_map.path.tangent(x0, x1, s)
    du = jvp(lambda x, source: still.average_velocity(x, source, t), (x_s, s), (w, torch.ones_like(s)))
    gap = still.average_velocity(x_s, s, t) - w - warmth * column(t - s) * du
    plain = eulerian(flow_map, x0, x1, s, t, warmth=warmth)
    assert torch.allclose(plain, mean_square(gap))
    for c in (0.1, 3.0):
        u = flow_map.average_velocity(x_s, s, t)
        normal = gap / ((gap**2).sum(1, keepdim=True).sqrt() + c)
        losses = eulerian(flow_map, x0, x1, s, t, warmth=warmth, normalise=c)
        assert torch.allclose(losses, mean_square(normal))
        expected = parameter_gradient(flow_map, mean_square(u - (u - normal).detach()))
        assert same(parameter_gradient(flow_map, losses), expected)


def test_along_itself_is_along_the_maps_own_velocity_beside_a_teacher():
    """v is the teacher's, d the map's own."""
    flow_map, (x0, x1, s, t) = tiny()
    teacher, x_s = other(), flow_map.path.interpolate(x0, x1, s)
    v, d = (each.velocity(x_s, s).detach() for each in (teacher, flow_map))
    for along, direction in (("velocity", v), ("self", d)):
        du = jvp(lambda x, at: flow_map.average_velocity(x, at, t), (x_s, s), (direction, torch.ones_like(s)))
        gap = flow_map.average_velocity(x_s, s, t) - v - column(t - s) * du
        losses = eulerian(flow_map, x0, x1, s, t, velocity="teacher", teacher=teacher, along=along)  # type: ignore[arg-type]
        assert torch.allclose(losses, mean_square(gap))


def test_the_eulerian_variants_stop_what_they_say():
    flow_map, (x0, x1, s, t) = tiny()
    x_s, w = flow_map.path.interpolate(x0, x1, s), flow_map.path.tangent(x0, x1, s)
    still = copy.deepcopy(flow_map).requires_grad_(False)
    v = still.velocity(x_s, s)

    def along(model: FlowMap, function: str, direction: Tensor, times: float) -> Tensor:
        """Return the derivative along (direction, times) by reverse mode, differentiable once more."""
        x, at = x_s.clone().requires_grad_(), s.clone().requires_grad_()
        value = getattr(model, function)(x, at, t)
        columns = []
        for i in range(2):
            in_x, in_s = torch.autograd.grad(value[:, i].sum(), (x, at), create_graph=True)
            columns.append((in_x * direction).sum(1) + times * in_s)
        return torch.stack(columns, 1)

    def u() -> Tensor:
        return flow_map.average_velocity(x_s, s, t)

    interval = column(t - s)
    zero = torch.zeros_like(v)
    expected = {
        "improved": lambda: u() - (w + interval * along(still, "average_velocity", v, 1.0)).detach(),
        "stopped": lambda: u() - (v + interval * along(still, "average_velocity", v, 1.0)).detach(),
        "spatial": lambda: along(flow_map, "jump", zero, 1.0) + along(still, "jump", v, 0.0).detach(),
        "nothing": lambda: u() - v - interval * along(flow_map, "average_velocity", v, 1.0),
    }
    options = {
        "improved": {"along": "self"},
        "stopped": {"velocity": "self"},
        "spatial": {"velocity": "self", "stop": "spatial"},
        "nothing": {"velocity": "self", "stop": "nothing"},
    }
    found = {}
    for name, gap in expected.items():
        losses = eulerian(flow_map, x0, x1, s, t, **options[name])  # type: ignore[arg-type]
        assert torch.allclose(losses, mean_square(gap()))
        found[name] = parameter_gradient(flow_map, losses)
        assert same(found[name], parameter_gradient(flow_map, mean_square(gap()))), name
    assert not any(same(found[a], found[b]) for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Lagrangian(stop="nothing"), "needs a teacher of its own"),
        (lambda: Lagrangian(stop="all"), "stop is 'velocity'"),  # type: ignore[arg-type]
        (lambda: Eulerian(velocity="teacher"), "go together"),
        (lambda: Eulerian(velocity="own"), "velocity is one of"),  # type: ignore[arg-type]
        (lambda: Eulerian(stop="spatial"), "needs the velocity of a map"),
        (lambda: Eulerian(velocity="self", along="self", stop="nothing"), "is for stop='target'"),
    ],
)
def test_combinations_that_teach_nothing_are_refused(make: Callable[[], object], said: str):
    with pytest.raises(ConfigError, match=said):
        make()


def test_flow_matching_teaches_the_velocity():
    flow_map, (x0, x1, s, t) = tiny()
    x_s, teacher = flow_map.path.interpolate(x0, x1, s), other()
    for losses in (flow_matching(flow_map, x0, x1, s), FlowMatching()(flow_map, x0, x1, s, t)):  # t plays no part
        expected = (flow_map.velocity(x_s, s) - (x1 - x0)).square().mean(1)
        assert torch.allclose(losses, expected)
        assert same(parameter_gradient(flow_map, losses), parameter_gradient(flow_map, expected))
    expected = mean_square(flow_map.velocity(x_s, s) - teacher.velocity(x_s, s))
    assert torch.allclose(FlowMatching(teacher)(flow_map, x0, x1, s, t), expected)
    reflow = Reflow(teacher, 2)
    assert torch.equal(reflow(flow_map, x0, x1, s, t), reflow(flow_map, x0, x1, s, s))


class Table(nn.Module):
    """One velocity a class, the same everywhere: what flow matching to data of one point a class has as optimum."""

    data_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(3, 2)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        assert condition is not None
        return self.rows(condition["label"])


def test_learnt_guidance_ends_where_guidance_at_sampling_does():
    """Gradient descent on the objective ends at v_null + g (v - v_null), and leaves the null velocity alone."""
    table = Table()
    flow_map = FlowMap(table, conditioner=Labels(["a", "b"])).double()
    centres = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    x0, x1, t = centres[labels], torch.zeros(4, 2, dtype=torch.float64), uniforms(4, 4)
    optimizer = torch.optim.SGD(flow_map.parameters(), lr=0.5)
    for _ in range(400):
        condition = Condition({"label": torch.tensor([0, 2, 1, 2])})  # one row in two is dropped
        optimizer.zero_grad()
        flow_matching(flow_map, x0, x1, t, condition, guidance=2.5).sum().backward()
        optimizer.step()
    velocity, null = -centres, -centres.mean(0)
    torch.testing.assert_close(table.rows.weight[:2].detach(), null + 2.5 * (velocity - null))
    torch.testing.assert_close(table.rows.weight[2].detach(), null)


def test_guidance_of_one_and_the_null_condition_are_plain_flow_matching():
    flow_map = FlowMap(MLP((2,), width=8, depth=1, num_classes=2), conditioner=Labels(["a", "b"])).double()
    randomise(flow_map.network)
    x0, x1, t = numbers(10, 6, 2), numbers(11, 6, 2), uniforms(12, 6)
    asked, null = flow_map.encode_prompts(["a", "b"] * 3), flow_map.conditioner.null(6)  # type: ignore[union-attr,operator]
    assert torch.equal(flow_matching(flow_map, x0, x1, t, asked), flow_matching(flow_map, x0, x1, t, asked, 1.0))
    assert not torch.equal(flow_matching(flow_map, x0, x1, t, asked), flow_matching(flow_map, x0, x1, t, asked, 2.0))
    assert torch.equal(flow_matching(flow_map, x0, x1, t, null), flow_matching(flow_map, x0, x1, t, null, 2.0))


@pytest.mark.parametrize("told", [False, True], ids=["given", "in the condition"])
def test_learnt_guidance_stops_what_it_adds(told: bool):
    """u against w + (1 - 1/g) sg[u - u_null], with one scale a row; descent ends at the same place without the sg."""
    network = MLP((2,), width=8, depth=1, num_classes=2, guidance_input=told)
    randomise(network)
    flow_map = FlowMap(network, conditioner=Labels(["a", "b"])).double()
    still = copy.deepcopy(flow_map).requires_grad_(False)
    x0, x1, t, g = numbers(10, 6, 2), numbers(11, 6, 2), uniforms(12, 6), uniforms(13, 6, 1.5, 5.0)
    asked, null = (flow_map.encode_prompts(prompts) for prompts in (["a", "b", ""] * 2, [""] * 6))
    assert asked is not None
    asked = with_scale(asked, g) if told else asked
    x_t = flow_map.path.interpolate(x0, x1, t)
    extra = still.velocity(x_t, t, asked) - still.velocity(x_t, t, null)
    expected = mean_square(flow_map.velocity(x_t, t, asked) - (x1 - x0) - column(1 - 1 / g) * extra)
    losses = flow_matching(flow_map, x0, x1, t, asked, 1.0 if told else g)
    assert torch.allclose(losses, expected)
    assert same(parameter_gradient(flow_map, losses), parameter_gradient(flow_map, expected))


# --- the objects ----------------------------------------------------------------------------------------------

OBJECTIVES = [
    FlowMatching(),
    Lagrangian(),
    Lagrangian("central"),
    Eulerian(),
    Eulerian("central"),
    Eulerian(along="self"),
    Eulerian(velocity="self", stop="spatial"),
    Eulerian(normalise=10.0),
    Compositional(),
    Compositional("uniform"),
    Consistency(),
    Consistency(0.1, True, velocity="self", compare="data"),
    FlowMapMatching(),
]
NETWORKS = {
    "unet": lambda: UNet((1, 4, 4), channels=(8, 16), attention_heads=2, num_classes=2),
    "dit": lambda: DiT((1, 4, 4), patch=2, width=16, depth=2, heads=2, num_classes=2),
}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_every_objective_takes_pictures_and_conditions(objective: Callable[..., Tensor], autocast: bool, kind: str):
    """Losses are per sample: those of half a batch are half of the losses."""
    network = NETWORKS[kind]()
    randomise(network)
    flow_map = FlowMap(network, conditioner=Labels(["one", "two"]))
    condition = flow_map.encode_prompts(["one", "two", "", "two"])
    assert condition is not None
    x0, x1 = numbers(15, 4, 1, 4, 4).float(), numbers(16, 4, 1, 4, 4).float()
    s, t = uniforms(17, 4, 0.5, 1.0).float(), uniforms(18, 4, 0.0, 0.5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        losses = objective(flow_map, x0, x1, s, t, condition, torch.Generator().manual_seed(0))
        half = objective(
            flow_map, x0[:2], x1[:2], s[:2], t[:2], condition.select(slice(2)), torch.Generator().manual_seed(0)
        )
    assert losses.shape == (4,)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses[:2], half, rtol=0.05 if autocast else 1e-4)
    other = objective(flow_map, x0, x1, s, t, flow_map.encode_prompts([""] * 4), torch.Generator().manual_seed(0))
    assert not torch.allclose(losses[:2], other[:2], rtol=1e-3)
    losses.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


Make = Callable[[FlowMap], Callable[..., Tensor]]
HANDED_ON: dict[str, tuple[Make, Callable[..., Tensor], dict[str, Any]]] = {
    "LSD, central": (lambda _: Lagrangian("central", 0.03), lagrangian, {"derivative": "central", "step": 0.03}),
    "LMD": (lambda teacher: Lagrangian(teacher=teacher), lagrangian, {"teacher": True}),
    "LSD, target": (lambda _: Lagrangian(stop="target"), lagrangian, {"stop": "target"}),
    "MeanFlow, central": (lambda _: Eulerian("central", 0.03), eulerian, {"derivative": "central", "step": 0.03}),
    "ESD, target": (lambda _: Eulerian(velocity="self"), eulerian, {"velocity": "self"}),
    "ESD": (lambda _: Eulerian(velocity="self", stop="spatial"), eulerian, {"velocity": "self", "stop": "spatial"}),
    "AYF-EMD": (
        lambda teacher: Eulerian(velocity="teacher", teacher=teacher), eulerian,
        {"velocity": "teacher", "teacher": True},
    ),
    "improved MeanFlow": (lambda _: Eulerian(along="self"), eulerian, {"along": "self"}),
    "sCM": (lambda _: Eulerian(normalise=0.5), eulerian, {"normalise": 0.5}),
    "PSD": (lambda _: Compositional(), compositional, {}),
    "SplitMeanFlow": (lambda teacher: Compositional(teacher=teacher), compositional, {"teacher": True}),
    "shortcut": (lambda _: Compositional(euler_below=0.4), compositional, {"euler_below": 0.4}),
    "FMM, central": (
        lambda _: FlowMapMatching("central", 0.03), flow_map_matching, {"derivative": "central", "step": 0.03},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HANDED_ON)
def test_an_object_hands_each_of_its_options_on(name: str):
    """The gradient too is that of the function with them, and not that of the function alone."""
    (make, function, options), (flow_map, inputs), teacher = HANDED_ON[name], tiny(), other()
    options = {key: teacher if value is True else value for key, value in options.items()}
    if function is compositional:
        inputs = (*inputs, torch.full_like(inputs[2], 0.5))  # type: ignore[assignment]
    found, expected, plain = (
        parameter_gradient(flow_map, losses)
        for losses in (
            make(teacher)(flow_map, *inputs[:4]), function(flow_map, *inputs, **options), function(flow_map, *inputs)
        )
    )  # fmt: skip
    assert torch.equal(found, expected)
    assert torch.equal(found, plain) == (not options)


def test_the_derivative_warms_up_from_nothing_to_the_whole():
    flow_map, inputs = tiny()
    warming = Eulerian(warm_up=10)
    for step, warmth in ((0, 0.0), (4, 0.4), (10, 1.0), (25, 1.0)):
        assert torch.equal(warming(flow_map, *inputs, step=step), eulerian(flow_map, *inputs, warmth=warmth))
    assert torch.equal(Eulerian()(flow_map, *inputs), eulerian(flow_map, *inputs, warmth=1.0))


class Told(nn.Module):
    """A network that has to be told the classes of its rows whenever it is asked."""

    data_shape = (2,)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.network = MLP((2,), width=8, depth=1, num_classes=2)
        randomise(self.network, seed=seed)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        assert condition is not None
        return self.network(x, s, t, condition)


def told(seed: int = 0) -> FlowMap:
    return FlowMap(Told(seed), conditioner=Labels(["a", "b"])).double()


ASKING: dict[str, Make] = {
    "LSD": lambda teacher: Lagrangian(),
    "LMD": lambda teacher: Lagrangian(teacher=teacher, stop="nothing"),
    "AYF-LMD": lambda teacher: Lagrangian(teacher=teacher, stop="target"),
    "MeanFlow": lambda teacher: Eulerian(along="self"),
    "ESD": lambda teacher: Eulerian(velocity="self", stop="spatial"),
    "EMD": lambda teacher: Eulerian(velocity="teacher", teacher=teacher, stop="nothing"),
    "PSD": lambda teacher: Compositional(),
    "SplitMeanFlow": lambda teacher: Compositional(teacher=teacher),
    "CT": lambda teacher: Consistency(),
    "CTM": lambda teacher: Consistency(velocity="teacher", teacher=teacher, compare="data"),
    "FMM": lambda teacher: FlowMapMatching(),
    "flow matching": lambda teacher: FlowMatching(),
    "distillation": lambda teacher: FlowMatching(teacher),
    "reflow": lambda teacher: Reflow(teacher, 2),
    "total": lambda teacher: Total([Compositional(), FlowMatching()]),
    "ADD": lambda teacher: Total([Adversarial(Critic(Told(2)).double()), TeacherDenoises(teacher)]),
    "DMD": lambda teacher: IntegralKL(teacher, told(2)),
}


@pytest.mark.parametrize("name", ASKING)
def test_every_call_has_the_condition_and_a_teacher_takes_no_gradient(name: str):
    """Map, teacher and companion are never asked without it. The teacher's weights are free to take a gradient."""
    flow_map, teacher, (_, inputs) = told(), told(1), tiny()
    condition = flow_map.encode_prompts(["a", "b", ""] * 2)
    ASKING[name](teacher)(flow_map, *inputs, condition, torch.Generator().manual_seed(0)).sum().backward()
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in flow_map.parameters())


def test_gamma_is_drawn_from_the_generator_or_is_a_half():
    flow_map, (x0, x1, s, t) = tiny()
    midpoint = compositional(flow_map, x0, x1, s, t, torch.full_like(s, 0.5))
    assert torch.equal(Compositional()(flow_map, x0, x1, s, t), midpoint)
    first, again, other = (
        Compositional("uniform")(flow_map, x0, x1, s, t, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    gamma = torch.rand(6, generator=torch.Generator().manual_seed(1)).double()  # one a row
    assert torch.equal(first, compositional(flow_map, x0, x1, s, t, gamma))
    with pytest.raises(ConfigError, match="'uniform' or 'midpoint', got 'third'"):
        Compositional("third")  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", [Lagrangian, Eulerian])
def test_wrong_derivatives_are_refused_when_the_objective_is_made(objective: type[Lagrangian] | type[Eulerian]):
    with pytest.raises(ConfigError, match="'forward' or 'central', got 'reverse'"):
        objective(derivative="reverse")  # type: ignore[arg-type]
    for step in (0.0, 0.1):  # times may leave [0, 1] by 0.05, not more
        with pytest.raises(ConfigError, match=rf"must lie in \(0, 0.05\], got {step}"):
            objective(derivative="central", step=step)


def test_the_source_time_makes_the_velocity_error_that_of_the_denoised_picture():
    """u = (x - D) / s, so that s^2 |u - w|^2 = |D - x0|^2 where w = (x_s - x0) / s."""
    s = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    x0, x1, denoised = torch.randn(3, 3, 4, dtype=torch.float64).unbind(0)
    x_s = torch.lerp(x0, x1, s[:, None])
    losses = ((x_s - denoised) / s[:, None] - (x1 - x0)).square().mean(1)
    weighted = SourceTime(power=2.0)(losses, s, 0 * s)
    assert torch.allclose(weighted, (denoised - x0).square().mean(1), rtol=1e-10)
    assert torch.equal(SourceTime(power=0.0)(losses, s, s), losses)


def test_weights_take_no_gradient():
    losses = torch.tensor([0.5, 2.0], requires_grad=True)
    s = t = torch.zeros(2)
    assert torch.equal(Uniform()(losses, s, t), losses)
    weighted = Adaptive(power=0.5, offset=0.25)(losses, s, t)
    assert weighted.tolist() == pytest.approx([0.5 * 0.75**-0.5, 2 * 2.25**-0.5])
    (gradient,) = torch.autograd.grad(weighted.sum(), losses)
    assert gradient.tolist() == pytest.approx([0.75**-0.5, 2.25**-0.5])
    assert torch.equal(mean_square(torch.tensor([[1.0, 3.0], [0.0, 2.0]])), torch.tensor([5.0, 2.0]))
