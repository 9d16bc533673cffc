"""Direct back-propagation on Gaussians: where each penalty's optimum lies, and where gradients are cut."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import GaussianNetwork, gaussian_map
from torch import Tensor
from torch.optim import SGD
from trainers import digit_map, trainer
from tuning import batch, draws, normal

from steerfm import DirectBackprop, FlowMap, Prompts, RewardFineTuning
from steerfm.analytic import QuadraticReward
from steerfm.divergence import girsanov, memoryless, noise_shift, squared_norm
from steerfm.errors import ConfigError, RewardError
from steerfm.finetuning import Tuned
from steerfm.reward import Reward, as_reward
from steerfm.sampling import few_jumps, reverse_drift, sde_step

MEAN, SCALE, A, TEMPERATURE = (0.3, -0.2), 0.7, (0.8, -0.5), 0.4


def network(flow_map: FlowMap) -> GaussianNetwork:
    assert isinstance(flow_map.network, GaussianNetwork)
    return flow_map.network


def tune(
    method: DirectBackprop, flow_map: FlowMap, reference: FlowMap, reward: Any, temperature: float, n: int = 4
) -> Tuned:
    """Return one step's result, with the same noise every time."""
    return method(batch(flow_map, reward, n, temperature, reference=reference))


def penalty_of(tuned: Tuned) -> Tensor:
    return tuned.figures["penalty"]


def optimal_mean(method: DirectBackprop, scale: float, temperature: float) -> Tensor:
    """Return the shift of the mean that the method is after, for r = A . x.

    The loss is quadratic in the shift and its gradient does not depend on the noise: two gradients give its root.
    """
    reference, gradients = gaussian_map(MEAN, scale).frozen_copy(), []
    for shift in (0.0, 1.0):
        flow_map = gaussian_map([m + shift for m in MEAN], scale)
        tune(method, flow_map, reference, QuadraticReward.linear(A), temperature).loss.mean().backward()
        gradients.append(network(flow_map).mean.grad)
    return -gradients[0] / (gradients[1] - gradients[0])


@pytest.mark.parametrize("jumps", [1, 2, 4])
def test_noise_penalty_ends_at_the_known_shift(jumps: int) -> None:
    """F(z) = m + c z and r = a . x: the shift in noise is c a / T, hence c^2 a / T of the mean."""
    shift = optimal_mean(DirectBackprop(jumps, penalty="noise"), SCALE, TEMPERATURE) / SCALE
    assert torch.allclose(shift, SCALE * torch.tensor(A, dtype=torch.float64) / TEMPERATURE, rtol=1e-6)


@pytest.mark.parametrize("jumps", [1, 2, 4])
def test_sample_penalty_ends_at_the_known_shift(jumps: int) -> None:
    """The penalty is half the squared shift of every sample: its optimum for r = a . x is a / T, whatever the map."""
    shift = optimal_mean(DirectBackprop(jumps, penalty="sample"), SCALE, TEMPERATURE)
    assert torch.allclose(shift, torch.tensor(A, dtype=torch.float64) / TEMPERATURE, rtol=1e-6)


def test_fine_tuning_with_the_noise_penalty_gets_there(tmp_path: Path) -> None:
    """The same through Lightning; each step halves the rest of the way, so sixteen leave less than 1%."""
    flow_map = gaussian_map(MEAN, SCALE)
    rate = 0.5 * SCALE**2 / TEMPERATURE
    module = RewardFineTuning(
        flow_map,
        QuadraticReward.linear(A),
        DirectBackprop(1, penalty="noise"),
        TEMPERATURE,
        optimizer=partial(SGD, lr=rate),
    )
    network(flow_map).scale.requires_grad_(False)
    trainer(tmp_path, 16).fit(module, Prompts([""], 4))
    x1 = normal(draws(4), flow_map)
    x0 = flow_map.look_ahead(x1, 1.0).detach()
    reference: Any = module._reference.module
    shift = noise_shift(reference, x0, few_jumps(reference, x1, 1), 1, None)
    expected = SCALE * torch.tensor(A, dtype=torch.float64) / TEMPERATURE
    assert torch.allclose(shift, expected.expand(4, 2), rtol=0.01)


def optimal_scale(method: DirectBackprop, n: int) -> float:
    """Return the scale that the method is after from N(0, 1), for r = -3 |x|^2 / 2 at temperature 1."""
    flow_map, reference = gaussian_map([0.0], 1.0), gaussian_map([0.0], 1.0).frozen_copy()
    network(flow_map).mean.requires_grad_(False)
    optimizer = torch.optim.LBFGS([network(flow_map).scale], max_iter=12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = tune(method, flow_map, reference, QuadraticReward.distance([0.0], 3.0), 1.0, n).loss.mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(network(flow_map).scale.detach())


def test_only_the_path_penalty_has_the_tilt_as_its_optimum() -> None:
    """N(0, 1) tilted by exp(-3 x^2 / 2) has variance 1 / 4. Noise: x / (1 + 3) for every sample, 1 / 16.

    Path: 4000 trajectories know a variance to 4 sqrt(2 / 4000) = 9%; the error of 64 steps is of the order of
    a step times the curvature, 3 / 64 or 5%.
    """
    assert optimal_scale(DirectBackprop(1, penalty="noise"), 8) ** 2 == pytest.approx(0.0625, rel=1e-4)
    assert optimal_scale(DirectBackprop(64, penalty="path"), 4000) ** 2 == pytest.approx(0.25, rel=0.14)


def test_path_penalty_moves_the_mean_as_the_tilt_does(record_property: Callable[..., None]) -> None:
    """The mean moves by c^2 a / T, with an error of 0.2% at 25 steps that at least halves with the step."""
    exact = SCALE**2 * torch.tensor(A, dtype=torch.float64) / TEMPERATURE
    methods = [DirectBackprop(steps, penalty="path") for steps in (8, 25, 50, 100)]
    shares = [float((optimal_mean(method, SCALE, TEMPERATURE) / exact).mean()) for method in methods]
    record_property("share of the exact shift at 8, 25, 50, 100 steps", shares)
    errors = [abs(share - 1) for share in shares]
    assert errors[0] < 0.02  # the default number of steps
    assert errors[1] < 0.003
    assert errors[2] < errors[1] / 2
    assert errors[3] < errors[2] / 2


# --- where gradients are cut ---


def gradients(flow_map: FlowMap, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(flow_map.parameters())))


def pair() -> tuple[FlowMap, FlowMap]:
    """Return a digit map and a reference that differs from it."""
    return digit_map(classes=False), digit_map(classes=False, seed=7).frozen_copy()


def brightness(images: Tensor, prompts: Any) -> Tensor:
    return images.square().mean((1, 2, 3))


def assert_same_gradients(flow_map: FlowMap, found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-4)
    for a, b in zip(gradients(flow_map, found), gradients(flow_map, expected), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("last", [1, 2, 3, None])
def test_noise_penalty_is_cut_where_asked(last: int | None, checkpointing: bool) -> None:
    flow_map, reference = pair()
    method = DirectBackprop(3, last, penalty="noise", checkpointing=checkpointing)
    tuned = method(batch(flow_map, brightness, 3, 0.3, reference=reference))
    times = [1.0, 2 / 3, 1 / 3, 0.0]
    x1 = x = normal(draws(3), flow_map)
    for i in range(3):  # the same graph by hand: detached after every jump that takes no gradient
        x = flow_map.jump(x, times[i], times[i + 1])
        if i < 3 - (last or 3):
            x = x.detach()
    unchanged = few_jumps(reference, x1, 3)
    penalty = squared_norm(noise_shift(reference, x, unchanged, 3, None)) / 2
    loss = (-brightness(flow_map.decode(x), None) + 0.3 * penalty).mean()
    assert_same_gradients(flow_map, tuned.loss.mean(), loss)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("last", [1, 2, 3, None])
def test_path_penalty_is_cut_where_asked(last: int | None, checkpointing: bool) -> None:
    flow_map, reference = pair()
    method = DirectBackprop(3, last, penalty="path", checkpointing=checkpointing)
    tuned = method(batch(flow_map, brightness, 3, 0.3, reference=reference))
    numbers = draws(3)
    x, penalty = normal(numbers, flow_map), torch.zeros(3)
    for i, (t, t_next) in enumerate([(1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)]):
        time, h = torch.full((3,), t), t - t_next
        g2, eta = memoryless(flow_map, time, h)
        v = flow_map.velocity(x, t)
        if i < 3 - (last or 3):
            v, x = v.detach(), x.detach()
        penalty = penalty + girsanov(v, reference.velocity(x, t), g2, eta, h)
        step = sde_step(x, reverse_drift(flow_map.path, x, v, time, g2), g2, h, normal(numbers, flow_map))
        x = step.x_next if t_next > 0 else step.mean
    loss = (-brightness(flow_map.decode(x), None) + 0.3 * penalty).mean()
    assert torch.allclose(penalty_of(tuned), penalty, rtol=1e-4)
    assert_same_gradients(flow_map, tuned.loss.mean(), loss)


def test_a_random_number_of_last_jumps_is_drawn_for_all_rows() -> None:
    """AlignProp: over many steps each number of jumps from 1 to 3 comes up, and gradients are those of that number."""
    flow_map, reference = pair()
    found = set()
    for step in range(12):
        last = 1 + int(3 * draws(3, step).common()[0])
        found.add(last)
        random, fixed = (
            DirectBackprop(3, last, penalty="sample")(  # type: ignore[arg-type]
                batch(flow_map, brightness, 3, 0.3, reference=reference, step=step)
            ).loss.mean()
            for last in ("random", last)
        )
        assert_same_gradients(flow_map, random, fixed)
    assert found == {1, 2, 3}


def test_renoised_samples_repeat_the_last_jump() -> None:
    """DRaFT-LV, by hand: x0 noised back to the last jump's start twice, each jump rewarded, all three averaged."""
    flow_map, reference = pair()
    tuned = DirectBackprop(2, 1, penalty="sample", renoised=2)(batch(flow_map, brightness, 3, 0.3, reference=reference))
    numbers = draws(3)
    x1 = normal(numbers, flow_map)
    x_half = flow_map.jump(x1, 1.0, 0.5).detach()
    x0, x0_reference = flow_map.look_ahead(x_half, 0.5), few_jumps(reference, x1, 2)
    rows = [(x0, x0_reference)]
    for noise in normal(numbers, flow_map, 2).unflatten(0, (3, 2)).unbind(1):
        x_half = (x0.detach() + noise) / 2
        rows.append((flow_map.look_ahead(x_half, 0.5), reference.look_ahead(x_half, 0.5)))
    losses = [-brightness(flow_map.decode(a), None) + 0.15 * squared_norm(a - b) for a, b in rows]
    assert tuned.x0 is not None
    assert tuned.x0.shape == (9, 1, 8, 8)
    assert_same_gradients(flow_map, tuned.loss.mean(), torch.stack(losses).mean())


def test_the_reference_takes_no_gradient_and_an_unmoved_map_no_penalty() -> None:
    flow_map, _ = pair()
    reference = flow_map.frozen_copy()
    for penalty in ("noise", "path"):
        method = DirectBackprop(2, penalty=penalty)  # type: ignore[arg-type]
        reward = as_reward(brightness) + 0.5 * as_reward(lambda images: images.mean((1, 2, 3)), "mean")
        tuned = method(batch(flow_map, reward, 3, 0.3, reference=reference))
        assert torch.equal(penalty_of(tuned), torch.zeros(3))
        assert tuned.rewards is not None
        assert torch.allclose(tuned.loss, -tuned.rewards)
        assert torch.allclose(tuned.rewards, tuned.parts["brightness"] + 0.5 * tuned.parts["mean"])
        tuned.loss.mean().backward()
        assert all(p.grad is None for p in reference.parameters())


def test_gradients_pass_pixels_that_were_clamped() -> None:
    flow_map, reference = pair()
    with torch.no_grad():
        flow_map.network.leave.bias.fill_(-9.0)  # type: ignore[union-attr]
    tuned = DirectBackprop(1, penalty="noise")(
        batch(flow_map, lambda images: images.mean((1, 2, 3)), 3, 0.01, reference=reference)
    )
    assert tuned.x0 is not None
    assert tuned.rewards is not None
    assert (tuned.x0 > 1).all()
    assert torch.allclose(tuned.rewards, torch.ones(3))  # what was scored was clamped
    (gradient,) = torch.autograd.grad(tuned.rewards.sum(), flow_map.network.leave.bias)  # type: ignore[union-attr]
    assert gradient.abs().min() > 0


def test_wrong_arguments_are_said() -> None:
    for arguments in ({"last": 0}, {"last": 3}, {"jumps": 0}, {"last": -1}):
        with pytest.raises(ConfigError, match="last must lie between 1 and jumps"):
            DirectBackprop(**({"jumps": 2} | arguments))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="penalty is 'noise', 'path' or 'sample', got 'kl'"):
        DirectBackprop(penalty="kl")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="last is a number of jumps, 'random' or none, got 'some'"):
        DirectBackprop(last="some")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="renoised samples repeat the last jump alone: they need last=1"):
        DirectBackprop(2, 2, penalty="sample", renoised=1)


def test_a_detached_reward_is_named() -> None:
    class Detached(Reward):
        def score(self, images: Tensor, prompts: Any, **metadata: Any) -> Tensor:
            return images.detach().mean((1, 2, 3))

    flow_map, reference = pair()
    with pytest.raises(RewardError, match="'detached' gave values without a gradient: it detaches"):
        DirectBackprop(1)(batch(flow_map, Detached(), 3, 0.1, reference=reference))
