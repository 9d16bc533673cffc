"""Distributional distillation: known gradients on Gaussians, where gradients stop, and games that must end well."""

import math
from collections.abc import Callable

import pytest
import torch
from exact import NAMES, PATHS, exact, gaussian, numbers, uniforms
from exact import within_standard_errors as near
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from steerfm.analytic import GaussianMixture
from steerfm.conditions import Labels
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.networks import MLP, Critic, UNet
from steerfm.networks.mlp import randomise
from steerfm.objectives import Adversarial, IntegralKL, Levels, TeacherDenoises, Total
from steerfm.objectives.distributional import Noise, critic_loss, critic_of, generator_loss, integral_kl, steepness
from steerfm.objectives.flow_matching import flow_matching
from steerfm.objectives.teachers import parts_of
from steerfm.paths import Linear, Path, Trigonometric
from steerfm.types import Condition

MEAN, STD = 0.8, 0.6  # of the data and of the teacher, in one dimension
DRAWS = 20_000
SEEN = Levels(0.2, 0.95)
every_path = pytest.mark.parametrize("path", PATHS, ids=NAMES)


class Affine(nn.Module):
    """Jump from noise x1 to shift + scale x1; numbers, or one of each for every row, (B, 1)."""

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.data_shape = (1,)
        self.shift, self.scale = nn.Parameter(shift), nn.Parameter(scale)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return x - self.shift - self.scale * x


class GaussianVelocity(nn.Module):
    """The velocity of N(mean, exp(2 log_std)) on the linear path; numbers, or one of each for every row, (B, 1)."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.data_shape = (1,)
        self.mean, self.log_std = nn.Parameter(mean), nn.Parameter(std.log())

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        alpha, sigma, variance = 1 - s[:, None], s[:, None], (2 * self.log_std).exp()
        rate = (sigma - alpha * variance) / (alpha**2 * variance + sigma**2)
        return rate * (x - alpha * self.mean) - self.mean


class LogRatio(nn.Module):
    """The best critic, log p_real / p_made of N(MEAN, STD^2) and N(shift, scale^2) seen through noise, plus features.

    weights: (B, 3), of 1, x and x^2 for every row; at 0 they change nothing.
    """

    def __init__(self, shift: float, scale: float, sign: float = 1.0, rows: int = DRAWS) -> None:
        super().__init__()
        self.shift, self.scale, self.sign = shift, scale, sign
        self.weights = nn.Parameter(torch.zeros(rows, 3, dtype=torch.float64))

    def forward(self, x: Tensor, tau: Tensor, condition: Condition | None = None) -> Tensor:
        x, alpha = x[:, 0], 1 - tau
        real, made = (
            Normal(alpha * mean, (alpha**2 * std**2 + tau**2).sqrt()).log_prob(x)
            for mean, std in ((MEAN, STD), (self.shift, self.scale))
        )
        features = torch.stack([torch.ones_like(x), x, x**2], 1)
        return self.sign * (real - made) + (self.weights * features).sum(1)


class Quadratic(nn.Module):
    """A critic that is a quadratic of x, its coefficients linear in tau: enough for Gaussians."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1).double()

    def forward(self, x: Tensor, tau: Tensor, condition: Condition | None = None) -> Tensor:
        tau = tau[:, None]
        return self.linear(torch.cat([x, x**2, tau * x, tau * x**2], 1))[:, 0]


def full(value: float, rows: int = DRAWS) -> Tensor:
    return torch.full((rows, 1), value, dtype=torch.float64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def one_dimension(mean: float = MEAN, std: float = STD) -> FlowMap:
    return exact(GaussianMixture([[mean]], [std**2]), Linear())


def batch(rows: int = DRAWS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return real x0, noise x1, and jumps from noise to data."""
    x0, ones = MEAN + STD * numbers(seed, rows, 1), torch.ones(rows, dtype=torch.float64)
    return x0, numbers(seed + 1, rows, 1), ones, torch.zeros_like(ones)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(loss: Tensor, *parameters: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss.sum(), parameters))


# --- the integral KL ------------------------------------------------------------------------------------------


@every_path
def test_samples_that_are_shifted_are_pushed_back_by_the_exact_amount(path: Path):
    delta, c, data = torch.tensor([0.3, -0.7], dtype=torch.float64), 0.36, gaussian()
    teacher, fake = exact(data, path), exact(GaussianMixture(data.means + delta, [c]), path)
    y = (data.sample(16, generator()) + delta).requires_grad_(True)
    tau, z = uniforms(1, 16, 0.1, 0.9), numbers(2, 16, 2)
    alpha, sigma = path.alpha(tau)[:, None], path.sigma(tau)[:, None]
    gap = delta * sigma**2 / (alpha**2 * c + sigma**2)  # of the denoised
    mean = alpha * y + sigma * z - alpha * data.means
    D_teacher = data.means + alpha * c / (alpha**2 * c + sigma**2) * mean
    weights = {"kl": alpha**2 / sigma**2, "dmd": 1 / (y - D_teacher).abs().mean(1, keepdim=True)}
    for name, weight in weights.items():
        losses = integral_kl(y, Noise(tau, z), teacher, fake, weight=name)  # type: ignore[arg-type]
        (gradient,) = gradients(losses, y)
        torch.testing.assert_close(2 * gradient, weight * gap, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(losses, 0.25 * (weight * gap).square().sum(1), rtol=1e-8, atol=1e-10)


class Towards(nn.Module):
    """The velocity of data in one point, which is what every state is denoised to."""

    def __init__(self, point: float) -> None:
        super().__init__()
        self.data_shape, self.point = (1,), point

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return (x - self.point) / s[:, None]


def test_the_teachers_error_divides_down_to_a_smallest_one():
    """y at the teacher's point and near it: w = 1 / max(|y - D|, 1e-3), and the loss is (w (D_fake - D))^2 / 2."""
    y, noise = torch.tensor([[0.5], [0.5004], [0.52]], dtype=torch.float64), Noise(full(0.5, 3)[:, 0], numbers(0, 3, 1))
    losses = integral_kl(y, noise, FlowMap(Towards(0.5)), FlowMap(Towards(0.7)))
    weights = torch.tensor([1e3, 1e3, 50.0], dtype=torch.float64)
    torch.testing.assert_close(losses, (0.2 * weights).square() / 2, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("shift", "scale"), [(MEAN, STD), (1.3, 0.6), (0.8, 1.1), (0.2, 0.4)])
def test_with_the_exact_fake_the_mean_gradient_is_that_of_the_integral_kl(shift: float, scale: float):
    """Of the map's shift and scale; nothing where the map already has the teacher's law."""
    network = Affine(full(shift), full(scale))
    objective = IntegralKL(one_dimension(), one_dimension(shift, scale), "kl", levels=SEEN)
    losses = objective(FlowMap(network), *batch(), generator=generator())
    found = torch.cat(gradients(losses, network.shift, network.scale), 1)
    law = torch.tensor([shift, scale], dtype=torch.float64, requires_grad=True)
    tau = torch.linspace(SEEN.low, SEEN.high, 1001, dtype=torch.float64)
    made, taught = (
        Normal((1 - tau) * mean, ((1 - tau) ** 2 * std**2 + tau**2).sqrt())
        for mean, std in ((law[0], law[1]), (MEAN, STD))
    )
    integral = torch.trapezoid(kl_divergence(made, taught), tau) / (SEEN.high - SEEN.low)
    (expected,) = torch.autograd.grad(integral, law)
    assert near(found, expected)
    assert (expected.abs().max() < 1e-12) == ((shift, scale) == (MEAN, STD))


def test_the_fake_learns_the_law_of_the_samples():
    """Its mean gradient is zero where it has their law, and not where it has the teacher's."""
    for law, learnt in (((1.3, 1.1), True), ((MEAN, STD), False)):
        fake = GaussianVelocity(full(law[0]), full(law[1]))
        objective = IntegralKL(one_dimension(), FlowMap(fake), levels=SEEN)
        losses = objective(FlowMap(Affine(number(1.3), number(1.1))), *batch(), generator=generator())
        assert near(torch.cat(gradients(losses, fake.mean, fake.log_std), 1), 0.0) == learnt


# --- the critic's game ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noised", [True, False])
def test_the_critic_of_the_logistic_game_learns_the_ratio_of_densities(noised: bool):
    for sign, learnt in ((1.0, True), (-1.0, False)):
        critic = LogRatio(1.3, 1.1, sign)
        objective = Adversarial(critic, "logistic", noised, penalty=0.0, levels=SEEN)
        losses = objective(FlowMap(Affine(number(1.3), number(1.1))), *batch(), generator=generator())
        assert near(gradients(losses, critic.weights)[0], 0.0) == learnt


def test_with_the_best_critic_the_map_descends_the_kl_divergence():
    """In the hinge game the map's loss is -log p_real / p_made, whose mean gradient is that of KL(made ‖ real)."""
    network = Affine(full(1.3), full(1.1))
    objective = Adversarial(LogRatio(1.3, 1.1), "hinge", noised=False)
    found = torch.cat(gradients(objective(FlowMap(network), *batch(), generator=generator()), *network.parameters()), 1)
    law = torch.tensor([1.3, 1.1], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(kl_divergence(Normal(law[0], law[1]), Normal(MEAN, STD)), law)
    assert near(found, expected)
    assert expected.min() > 1


def test_the_games_have_their_known_losses():
    real, made = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    torch.testing.assert_close(critic_loss(real, made, "hinge"), torch.tensor([0.0, 2.0]))
    expected = -(torch.sigmoid(real).log() + (1 - torch.sigmoid(made)).log())
    torch.testing.assert_close(critic_loss(real, made, "logistic"), expected)
    torch.testing.assert_close(generator_loss(made, "hinge"), torch.tensor([2.0, -0.5]))
    torch.testing.assert_close(generator_loss(made, "logistic"), -torch.sigmoid(made).log())


def test_steepness_is_the_squared_gradient_on_average():
    x, z, slope = numbers(0, DRAWS, 3), numbers(1, DRAWS, 3), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert near(steepness(x @ slope, (x + 0.01 * z) @ slope, 0.01), slope.square().sum())
    logit, moved = (torch.tensor(values, requires_grad=True) for values in ([0.5, -1.0], [0.7, 1.0]))
    to_logit, to_moved = gradients(steepness(logit, moved, 0.1), logit, moved)  # both are the critic's: none is stopped
    torch.testing.assert_close(to_moved, torch.tensor([40.0, 400.0]))  # 2 (moved - logit) / step^2
    assert torch.equal(to_logit, -to_moved)


def test_the_penalty_is_half_the_steepness_at_data_and_at_samples():
    def losses(penalty: float) -> Tensor:
        objective = Adversarial(critic, noised=False, penalty=penalty)
        return objective(FlowMap(Affine(number(0.0), number(1.0))), *batch(), generator=generator())

    class Sloped(nn.Module):
        def forward(self, x: Tensor, tau: Tensor, condition: Condition | None = None) -> Tensor:
            return 3 * x[:, 0]

    critic = Sloped()
    assert near(losses(0.5) - losses(0.0), 0.5 / 2 * 2 * 9)


def test_the_critic_is_asked_at_the_levels_given_and_at_points_a_step_away():
    """Data, samples, both moved by step z, and the samples seen anew by the map; the losses are those of the logits."""

    class Seeing(nn.Module):
        def forward(self, x: Tensor, tau: Tensor, condition: Condition | None = None) -> Tensor:
            logit = x.square().sum(1)
            seen.append((x, tau, logit))
            return logit

    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    objective = Adversarial(Seeing(), penalty=0.5, step=0.2, levels=Levels(0.3, 0.3))
    losses = objective(plane(0), *flat_batch(), None, generator())
    assert all(torch.allclose(tau, full(0.3, 32)[:, 0]) for _, tau, _ in seen)  # they are drawn in float32
    (real, _, on_real), (made, _, on_made), (near_real, _, a), (near_made, _, b), (_, _, judged) = seen
    for z in ((near_real - real) / 0.2, (near_made - made) / 0.2):
        assert near(z.flatten().square(), 1.0)
    steep = ((a - on_real) / 0.2).square() + ((b - on_made) / 0.2).square()
    torch.testing.assert_close(losses, critic_loss(on_real, on_made) + 0.25 * steep - judged)


def test_teacher_and_fake_are_asked_at_the_levels_given():
    class Asked(Towards):
        def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
            asked.append((s, t))
            return super().forward(x, s, t)

    asked: list[tuple[Tensor, Tensor]] = []
    fake, teacher = FlowMap(Asked(0.7)), FlowMap(Asked(0.5))
    flow_map, inputs = FlowMap(Affine(number(0.0), number(1.0))), batch(8)
    IntegralKL(teacher, fake, levels=Levels(0.3, 0.3))(flow_map, *inputs, None, generator())
    TeacherDenoises(teacher, levels=Levels(0.3, 0.3))(flow_map, *inputs, None, generator())
    assert len(asked) == 4  # the fake by flow matching, both by the integral, the teacher alone
    assert all(torch.allclose(time, full(0.3, 8)[:, 0]) for pair in asked for time in pair)


def test_a_critic_starts_as_the_network_of_a_map():
    flow_map, x, tau = plane(0), numbers(1, 5, 2), uniforms(2, 5)
    torch.testing.assert_close(critic_of(flow_map)(x, tau), flow_map.velocity(x, tau).mean(1))


# --- the teacher's denoising ----------------------------------------------------------------------------------


@every_path
def test_samples_are_drawn_to_where_the_teacher_denoises_them_to(path: Path):
    """|y - sg D|^2 times alpha: nothing comes back through D, which depends on y."""
    data, objective = gaussian(), TeacherDenoises(exact(gaussian(), path), levels=Levels(0.3, 0.3))
    x0, x1, s = data.sample(16, generator()), numbers(1, 16, 2), uniforms(2, 16, 0.1, 0.9)
    flow_map = exact(GaussianMixture([[0.1, 0.2]], [0.5]), path)
    y = flow_map.look_ahead(path.interpolate(x0, x1, s), s)
    tau, z = objective.levels.draw(y, generator(3))
    alpha, sigma = path.alpha(tau)[:, None], path.sigma(tau)[:, None]
    D = data.means + alpha * 0.36 / (alpha**2 * 0.36 + sigma**2) * (alpha * y + sigma * z - alpha * data.means)
    found = objective(flow_map, x0, x1, s, torch.zeros_like(s), generator=generator(3))
    torch.testing.assert_close(found, alpha[:, 0] * (y - D).square().mean(1), rtol=1e-8, atol=1e-10)
    x1 = x1.requires_grad_(True)
    losses = objective(flow_map, x0, x1, s, torch.zeros_like(s), generator=generator(3))
    again = flow_map.look_ahead(path.interpolate(x0, x1, s), s)
    torch.testing.assert_close(gradients(losses, x1), gradients(alpha * (y - D).detach() * again, x1))


# --- where gradients flow -------------------------------------------------------------------------------------


def plane(seed: int) -> FlowMap:
    network = MLP((2,), width=16, depth=1).double()
    randomise(network, 0.3, seed)
    return FlowMap(network)


def apart(found: nn.Module, loss: Tensor) -> None:
    """Check that the gradients which a module was given are those of a loss of its own."""
    given = [parameter.grad for parameter in found.parameters()]
    assert any(gradient is not None and gradient.abs().max() > 1e-6 for gradient in given)
    for gradient, alone in zip(given, gradients(loss / len(loss), *found.parameters()), strict=True):
        torch.testing.assert_close(gradient, alone, rtol=1e-9, atol=1e-12)


def flat_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return numbers(1, 32, 2), numbers(2, 32, 2), uniforms(3, 32, 0.3, 1.0), uniforms(4, 32, 0.0, 0.3)


def test_map_fake_and_teacher_of_the_integral_kl_learn_apart():
    flow_map, teacher, fake = plane(0), plane(1), plane(2)
    x0, x1, s, t = flat_batch()
    objective = IntegralKL(teacher, fake)
    objective(flow_map, x0, x1, s, t, None, generator()).mean().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    draws = generator()
    y = flow_map.look_ahead(flow_map.path.interpolate(x0, x1, s), s)
    tau, noise = objective.levels.draw(y, draws)
    apart(fake, flow_matching(fake, y.detach(), noise, tau))
    apart(flow_map, integral_kl(y, objective.levels.draw(y, draws), teacher, fake))


@pytest.mark.parametrize("game", ["hinge", "logistic"])
def test_map_and_critic_learn_apart(game: str):
    flow_map, critic = plane(0), Critic(plane(1).network)
    x0, x1, s, t = flat_batch()
    objective = Adversarial(critic, game, penalty=0.0)  # type: ignore[arg-type]
    objective(flow_map, x0, x1, s, t, None, generator()).mean().backward()
    draws, path = generator(), flow_map.path
    y = flow_map.look_ahead(path.interpolate(x0, x1, s), s)
    real, made, again = (objective.levels.draw(y, draws) for _ in range(3))
    apart(flow_map, generator_loss(critic(again.on(y, path), again.tau), game))  # type: ignore[arg-type]
    judged = critic(real.on(x0, path), real.tau), critic(made.on(y.detach(), path), made.tau)
    apart(critic, critic_loss(*judged, game))  # type: ignore[arg-type]
    assert all(parameter.requires_grad for parameter in critic.parameters())  # held for a moment only


@pytest.mark.parametrize("of", [IntegralKL, Adversarial])
def test_the_map_learns_at_every_so_many_steps_and_its_companion_at_all(of: Callable[..., Callable[..., Tensor]]):
    companion = plane(1) if of is IntegralKL else Critic(plane(1).network)
    objective = of(plane(2), companion, every=3) if of is IntegralKL else of(companion, every=3)
    for step, learns in ((0, True), (1, False), (2, False), (3, True)):
        flow_map = plane(0)
        companion.zero_grad()
        objective(flow_map, *flat_batch(), None, generator(), step).mean().backward()
        assert all((parameter.grad is not None) == learns for parameter in flow_map.parameters())
        assert all(parameter.grad is not None for parameter in companion.parameters())


def test_between_the_maps_steps_the_companions_loss_stands_alone():
    teacher, fake, critic, flow_map = plane(2), plane(1), Critic(plane(1).network), plane(0)
    x0, x1, s, t = flat_batch()
    kl, game = IntegralKL(teacher, fake, every=2), Adversarial(critic, noised=False, penalty=0.0, every=2)
    y, draws = flow_map.look_ahead(flow_map.path.interpolate(x0, x1, s), s).detach(), generator()
    tau, noise = kl.levels.draw(y, draws)
    clean = torch.zeros_like(s)
    torch.testing.assert_close(
        kl(flow_map, x0, x1, s, t, None, generator(), 1), flow_matching(fake, y, noise, tau), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(
        game(flow_map, x0, x1, s, t, None, generator(), 1),
        critic_loss(critic(x0, clean), critic(y, clean)), rtol=1e-9, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize("step", [0, 1])
def test_samples_start_where_they_are_told_to(step: int):
    x0, x1, s, t = flat_batch()
    makers = {
        "KL": lambda **more: IntegralKL(plane(2), plane(1), every=2, **more),
        "critic": lambda **more: Adversarial(Critic(plane(1).network), every=2, **more),
    }
    for make in makers.values():
        losses = make(start=0.7)(plane(0), x0, x1, s, t, None, generator(), step)
        there = make()(plane(0), x0, x1, torch.full_like(s, 0.7), t, None, generator(), step)
        torch.testing.assert_close(losses, there, rtol=1e-9, atol=0)
        assert not torch.allclose(losses, make()(plane(0), x0, x1, s, t, None, generator(), step), rtol=1e-3)
        from_noise = make(start=1.0)
        losses = [from_noise(plane(0), data, x1, s, t, None, generator(), 0) for data in (x0, 3 * x0)]
        assert isinstance(from_noise, Adversarial) or torch.equal(*losses)


def test_two_time_scales_leave_the_map_out_and_say_so():
    for every, leaves_out in ((1, False), (2, True)):
        kl, game = IntegralKL(plane(0), plane(1), every=every), Adversarial(Critic(plane(2).network), every=every)
        for objective in (kl, game, Total([TeacherDenoises(plane(0)), game])):
            assert parts_of({"objective": objective}).leaves_out == leaves_out


def test_teachers_are_frozen_guests_and_the_others_are_companions():
    teacher, fake, critic = plane(0), plane(1), Critic(plane(2).network)
    parts = parts_of({"objective": Total([IntegralKL(teacher, fake), Adversarial(critic), TeacherDenoises(teacher)])})
    assert parts.teachers == [teacher, teacher]
    assert list(parts.companions.values()) == [fake, critic]


OBJECTIVES: dict[str, Callable[[FlowMap, FlowMap, nn.Module], Callable[..., Tensor]]] = {
    "dmd": lambda teacher, fake, critic: IntegralKL(teacher, fake),
    "kl": lambda teacher, fake, critic: IntegralKL(teacher, fake, "kl"),
    "hinge": lambda teacher, fake, critic: Adversarial(critic),
    "logistic": lambda teacher, fake, critic: Adversarial(critic, "logistic", False),
    "denoises": lambda teacher, fake, critic: TeacherDenoises(teacher),
}
every_objective = pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)


@every_objective
def test_a_sample_has_a_loss_of_its_own(make: Callable[..., Callable[..., Tensor]]):
    objective, (x0, x1, s, t) = make(plane(1), plane(2), Critic(plane(3).network)), flat_batch()
    losses = objective(plane(0), x0, x1, s, t, None, generator())
    x0, x1 = x0.clone(), x1.clone()
    x0[1:], x1[1:] = 5.0, -5.0
    others = objective(plane(0), x0, x1, s, t, None, generator())
    assert losses.shape == (32,)
    torch.testing.assert_close(losses[0], others[0])
    assert (losses[1:] - others[1:]).abs().min() > 1e-6


@every_objective
def test_pictures_and_conditions(make: Callable[..., Callable[..., Tensor]]):
    def picture_map(seed: int) -> FlowMap:
        network = UNet((1, 8, 8), channels=(8, 8), num_classes=3)
        randomise(network, seed=seed)
        return FlowMap(network, conditioner=Labels(["a", "b", "c"]), guidance_scale=2.0)

    objective = make(picture_map(1), picture_map(2), Critic(picture_map(3).network))
    x0, x1, s, t = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.ones(4), torch.zeros(4)
    flow_map = picture_map(0)
    losses = [
        objective(flow_map, x0, x1, s, t, flow_map.encode_prompts(list(prompts)), generator())
        for prompts in ("abca", "bbca")
    ]
    assert losses[0].shape == (4,)
    assert losses[0].isfinite().all()
    assert losses[0][0] != losses[1][0]
    torch.testing.assert_close(losses[0][1:], losses[1][1:])


def test_the_fake_is_not_guided():
    """It has to describe the samples, which are the guided teacher's by the end."""
    network = UNet((1, 8, 8), channels=(8, 8), num_classes=3)
    randomise(network)
    x0, x1, s, t = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.ones(4), torch.zeros(4)

    def losses(fake_scale: float, teacher_scale: float) -> Tensor:
        plain = FlowMap(network, conditioner=Labels(["a", "b", "c"]))
        objective = IntegralKL(plain.with_guidance(teacher_scale), plain.with_guidance(fake_scale))
        return objective(plain, x0, x1, s, t, plain.encode_prompts(list("abca")), generator())

    torch.testing.assert_close(losses(3.0, 2.0), losses(1.0, 2.0))
    assert (losses(1.0, 2.0) - losses(1.0, 1.0)).abs().min() > 1e-6


# --- small games that must end well ---------------------------------------------------------------------------


def trained(objective: Callable[..., Tensor], companion: nn.Module, steps: int) -> tuple[float, float]:
    """Return the mean and the standard deviation of the samples of a map that starts far from the data."""
    network = Affine(number(-1.0), number(2.0))
    flow_map, draws = FlowMap(network), generator()
    optimizer = torch.optim.Adam([*network.parameters(), *companion.parameters()], 0.05, betas=(0.5, 0.99))
    slower = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    ones = torch.ones(256, dtype=torch.float64)
    for step in range(steps):
        x0 = MEAN + STD * torch.randn(256, 1, generator=draws, dtype=torch.float64)
        x1 = torch.randn(256, 1, generator=draws, dtype=torch.float64)
        optimizer.zero_grad()
        objective(flow_map, x0, x1, ones, 0 * ones, None, draws, step).mean().backward()
        optimizer.step()
        slower.step()
    return network.shift.item(), abs(network.scale.item())


@pytest.mark.parametrize(("weight", "every"), [("dmd", 1), ("kl", 1), ("dmd", 2)])
def test_a_map_with_a_fake_that_learns_ends_at_the_teacher(weight: str, every: int):
    fake = FlowMap(GaussianVelocity(number(0.0), number(1.0)))
    mean, std = trained(IntegralKL(one_dimension(), fake, weight, every=every), fake, 100 + 200 * every)  # type: ignore[arg-type]
    assert math.isclose(mean, MEAN, abs_tol=0.03)
    assert math.isclose(std, STD, abs_tol=0.03)


@pytest.mark.parametrize("noised", [True, False])
@pytest.mark.parametrize("game", ["hinge", "logistic"])
def test_a_map_with_a_critic_that_learns_ends_at_the_data(game: str, noised: bool):
    torch.manual_seed(0)
    critic = Quadratic()
    mean, std = trained(Adversarial(critic, game, noised), critic, 500)  # type: ignore[arg-type]
    assert math.isclose(mean, MEAN, abs_tol=0.1)  # twice the worst of three seeds in any of the four games
    assert math.isclose(std, STD, abs_tol=0.1)


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: IntegralKL(plane(0), plane(1), "fisher"), "'dmd' or 'kl', got 'fisher'"),  # type: ignore[arg-type]
        (lambda: (lambda one: IntegralKL(one, one))(plane(0)), "give the fake a copy"),
        (lambda: IntegralKL(plane(0), FlowMap(plane(1).network, path=Trigonometric())), "need one path"),
        (lambda: Adversarial(nn.Identity(), "wasserstein"), "'hinge' or 'logistic', got 'wasserstein'"),  # type: ignore[arg-type]
        (lambda: Adversarial(nn.Identity(), penalty=-1.0), "penalty is 0 or more"),
        (lambda: Adversarial(nn.Identity(), step=0.0), "step above 0"),
        (lambda: Adversarial(nn.Identity(), every=0), "every 1 step or more"),
        (lambda: IntegralKL(plane(0), plane(1), every=0), "every 1 step or more"),
        (lambda: IntegralKL(plane(0), plane(1), start=0.0), r"start lies in \(0, 1\], .* got 0.0"),
        (lambda: Adversarial(nn.Identity(), start=1.5), r"start lies in \(0, 1\], .* got 1.5"),
        (lambda: Levels(0.0, 0.5), "within \\(0, 1\\)"),
        (lambda: Levels(0.5, 0.4), "low to high"),
    ],
)
def test_options_that_make_no_sense_are_refused(make: Callable[[], object], said: str):
    with pytest.raises(ConfigError, match=said):
        make()
