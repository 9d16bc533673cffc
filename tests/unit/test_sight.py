"""Maps that are told a noisy state and draw x0 given it: exact on a Gaussian, and learnt by FlowMapTraining."""

from functools import partial
from typing import Any

import pytest
import torch
from exact import within_standard_errors
from oracles import gaussian_map
from torch import Tensor, nn

from steerfm import FlowMap, FlowMapTraining
from steerfm.conditions.sight import sight
from steerfm.errors import ConfigError
from steerfm.networks import UNet
from steerfm.networks.mlp import randomise
from steerfm.objectives import Compositional
from steerfm.paths import Linear, Path, Trigonometric
from steerfm.steering import PosteriorDrawGuidance, Sighted
from steerfm.times import Triangle
from steerfm.types import Condition

MEAN, C2 = torch.tensor([0.3, -0.2], dtype=torch.float64), 0.49


class GaussianPosterior(nn.Module):
    """The exact u of p(x0 | x_t) for data N(MEAN, C2 I), read off a sight; off by `error` in its mean."""

    data_shape = (2,)

    def __init__(self, error: float = 0.0) -> None:
        super().__init__()
        self.error = nn.Parameter(torch.tensor(error, dtype=torch.float64))

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        picture = torch.zeros(len(x), 3, dtype=x.dtype) if condition is None else condition["picture"]
        alpha = picture[:, -1:]
        x_t = torch.where(alpha > 0, picture[:, :2] / alpha.clamp_min(1e-12), 0.0)
        sigma2 = (1 - alpha) ** 2
        gain = alpha * C2 / (alpha**2 * C2 + sigma2)
        mean = MEAN + gain * (x_t - alpha * MEAN) + self.error
        spread2 = C2 * sigma2 / (alpha**2 * C2 + sigma2)
        s, t = s[:, None], t[:, None]
        before, after = (((1 - time) ** 2 * spread2 + time**2).sqrt() for time in (s, t))
        rate = (t + s - spread2 * (2 - t - s)) / ((after + before) * before)
        return rate * (x - (1 - s) * mean) - mean


def training(error: float = 0.0, **more: Any) -> FlowMapTraining:
    flow_map = FlowMap(GaussianPosterior(error))
    options: dict[str, Any] = {"times": Triangle(0.5), "prompt_dropout": 0.0, "sighted": True}
    return FlowMapTraining(flow_map, Compositional(), **{**options, **more})


def batch(n: int, seed: int = 0) -> dict[str, Any]:
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)
    return {"x0": MEAN + C2**0.5 * noise, "prompt": [""] * n}


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=lambda path: type(path).__name__)
def test_a_sight_is_the_state_and_how_much_of_it_is_data(path: Path) -> None:
    x, t = torch.randn(4, 3, 5, 5), torch.tensor([0.0, 0.3, 0.9, 1.0])
    picture = sight(path, x, t)["picture"]
    assert picture.shape == (4, 4, 5, 5)
    assert torch.allclose(picture[0, :3], x[0])
    assert torch.equal(picture[:, 3], path.alpha(t)[:, None, None].expand(4, 5, 5))
    assert picture[3].abs().max() < 1e-6
    told = sight(path, x, t, Condition({"label": torch.arange(4)}))
    assert set(told.tensors) == {"label", "picture"}
    with pytest.raises(ConfigError, match="both give 'picture'"):
        sight(path, x, t, told)


def test_the_exact_posterior_is_what_training_leaves_alone() -> None:
    """Its jumps have no defect, its mean gradient is zero within four standard errors, and a wrong mean's is not."""
    losses, s, t = training().losses(batch(64), torch.Generator().manual_seed(0), False)
    assert losses[s != t].abs().max() < 1e-12
    for error, zero in ((0.0, True), (0.1, False)):
        gradients = []
        for seed in range(40):
            module = training(error)
            losses, _, _ = module.losses(batch(256, seed), torch.Generator().manual_seed(seed), True)
            (gradient,) = torch.autograd.grad(losses.mean(), module.flow_map.network.error)  # type: ignore[arg-type]
            gradients.append(gradient)
        assert within_standard_errors(torch.stack(gradients), torch.tensor(0.0)) == zero


def test_an_unsighted_map_is_the_datas_own() -> None:
    flow_map, plain = FlowMap(GaussianPosterior()), gaussian_map(MEAN.tolist(), C2**0.5)
    x = torch.randn(6, 2, dtype=torch.float64)
    assert torch.allclose(flow_map.jump(x, 1.0, 0.2), plain.jump(x, 1.0, 0.2))


def test_every_row_is_told_its_own_state() -> None:
    """The wrong pairing of sights and data would have a large flow-matching loss near t = 0."""
    module = training()
    told: list[Tensor] = []
    forward = module.flow_map.network.forward

    def listen(x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        assert condition is not None
        told.append(condition["picture"])
        return forward(x, s, t, condition)

    module.flow_map.network.forward = listen  # type: ignore[method-assign]
    rows = batch(512)
    module.losses(rows, torch.Generator().manual_seed(0), True)
    alpha = told[0][:, -1]
    residual = told[0][:, :2] - (alpha**2)[:, None] * rows["x0"]
    noise = residual / (alpha * (1 - alpha))[:, None]
    assert within_standard_errors(noise.flatten(), torch.tensor(0.0))
    assert within_standard_errors(noise.square().flatten(), torch.tensor(1.0))
    assert within_standard_errors(alpha, torch.tensor(0.5))


def test_a_unet_learns_from_sights() -> None:
    """Twenty steps on two pictures: with a clear sight the draw is nearer to the one that was seen."""
    torch.manual_seed(0)
    network = UNet((1, 8, 8), channels=(8, 16), picture_channels=1)
    randomise(network, 0.05)
    flow_map = FlowMap(network)
    optimizer = partial(torch.optim.Adam, lr=3e-3)
    module = FlowMapTraining(flow_map, times=Triangle(1.0), prompt_dropout=0.0, sighted=True, optimizer=optimizer)
    x0 = torch.stack([torch.full((1, 8, 8), -0.8), torch.full((1, 8, 8), 0.8)])
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
    rows = {"x0": x0.repeat(32, 1, 1, 1), "prompt": [""] * 64}
    for step in range(60):
        losses, _, _ = module.losses(rows, torch.Generator().manual_seed(step), True)
        optimiser.zero_grad()
        losses.mean().backward()
        optimiser.step()
    told = sight(Linear(), x0, torch.tensor([0.05, 0.05]))
    with torch.no_grad():
        drawn = flow_map.denoise(torch.randn(2, 1, 8, 8), 1.0, told).mean((1, 2, 3))
    assert drawn[0] < -0.4 < 0.4 < drawn[1]


def test_guidance_is_not_learnt_with_sights() -> None:
    class Free(nn.Module):
        def forward(self, prompts: list[str]) -> Condition:
            return Condition({"label": torch.zeros(len(prompts))})

        def null(self, n: int) -> Condition:
            return Condition({"label": torch.ones(n)})

    flow_map = FlowMap(GaussianPosterior(), conditioner=Free())
    with pytest.raises(ConfigError, match="guidance=1, or sighted=False"):
        FlowMapTraining(flow_map, sighted=True, guidance=2.0, prompt_dropout=0.1)


def test_draws_of_a_sighted_map_are_the_posterior_and_their_calls_count() -> None:
    """20,000 draws at one state have the posterior's mean and variance, and guidance by them meets a linear tilt."""
    plain, sighted = gaussian_map(MEAN.tolist(), C2**0.5), Sighted(FlowMap(GaussianPosterior()))
    x, t = torch.tensor([[0.9, -0.4]], dtype=torch.float64).expand(20_000, 2), 0.6
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = sighted.draw(plain, x, t, noise, None)
    spread = C2 * t**2 / ((1 - t) ** 2 * C2 + t**2)
    mean = plain.denoise(x[:1], t)
    assert within_standard_errors(drawn, mean)
    assert within_standard_errors((drawn - mean) ** 2, torch.full((2,), spread))

    def first(points: Tensor) -> Tensor:
        return points[:, 0]

    out = PosteriorDrawGuidance(40, 0.5, 64, draws=sighted)(plain, first, seeds=range(300))
    assert out.cost.network_calls == 40 * (64 + 1)
    # N(m, c^2) with r = x / T tilts to m + c^2 / T; 300 samples know it to 4 * 0.7 / sqrt(300), 40 steps to 1 / 40
    assert float(out.x0[:, 0].mean()) == pytest.approx(0.3 + C2 / 0.5, abs=0.16 + 0.03)


def test_sighted_draws_take_at_least_one_jump() -> None:
    with pytest.raises(ConfigError, match="jumps must be at least 1, got 0"):
        Sighted(FlowMap(GaussianPosterior()), jumps=0)
