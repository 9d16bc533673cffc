"""Noise adapters on Gaussians: where they lead, that the map behind them stays, and posteriors that are known."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from oracles import gaussian_map
from PIL import Image
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from trainers import copied, digit_map, equal, trainer
from tuning import batch, draws, normal

from steerfm import EMA, MLP, BestOfN, FlowMap, Pictures, Prompts, RewardFineTuning, UNet
from steerfm.analytic import GaussianMixture, QuadraticReward, analytic_flow_map
from steerfm.errors import ConfigError
from steerfm.finetuning import AdaptedNoise, NoiseAdapter
from steerfm.finetuning.noise_adapter import AdaptedNetwork, with_conditioner
from steerfm.flow_map import Output
from steerfm.networks.mlp import randomise
from steerfm.sampling import few_jumps
from steerfm.types import Condition

MEAN, SCALE, A, TEMPERATURE = (0.3, -0.2), 0.7, (0.8, -0.5), 0.4


class Affine(nn.Module):
    """weight y + bias, of the state or of the condition's "y"; zero at first, in float64."""

    def __init__(self, d: int, of: int | None = None, out: int | None = None) -> None:
        super().__init__()
        self.data_shape = (out or d,)
        self.of = of
        self.layer = nn.Linear(of or out or d, out or d).double()
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        assert (s == 1).all() and (t == 0).all()
        if self.of is None:
            return self.layer(x)
        assert condition is not None
        return self.layer(condition["y"])


def brightness(images: Tensor, prompts: Any) -> Tensor:
    return images.square().mean((1, 2, 3))


def network_of(flow_map: FlowMap) -> AdaptedNetwork:
    assert isinstance(flow_map.network, AdaptedNetwork)
    return flow_map.network


def trained(flow_map: FlowMap) -> set[int]:
    return {id(p) for p in flow_map.parameters() if p.requires_grad}


def filled(flow_map: FlowMap, seed: int = 3) -> FlowMap:
    """Return the map with an adapter that no longer begins at zero."""
    randomise(network_of(flow_map).adapter, seed=seed)
    return flow_map


# --- the map ---


@pytest.mark.parametrize("output", ["average_velocity", "denoised"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_jump_from_noise_is_the_bases_from_adapted_noise(stochastic: bool, output: Output) -> None:
    base = digit_map().double()
    base.output = output
    adapter = MLP((2 if stochastic else 1, 8, 8), width=8, depth=1, num_classes=10)
    tuned = NoiseAdapter(adapter, stochastic)(base)
    x, condition = normal(draws(4), base), base.encode_prompts(["a handwritten seven", "a handwritten two", "", ""])
    assert torch.equal(tuned.look_ahead(x, 1.0, condition), base.look_ahead(x, 1.0, condition))  # it begins at zero
    filled(tuned)
    z = network_of(tuned).adapt(x, condition).z
    assert (z - x).abs().mean() > 0.01
    for t in (0.0, 0.3, 0.9):
        expected = base.jump(z, 1.0, t, condition)
        torch.testing.assert_close(tuned.jump(x, 1.0, t, condition), expected, rtol=0, atol=1e-12)
    expected = few_jumps(base, z, 4, condition)
    torch.testing.assert_close(few_jumps(tuned, x, 4, condition), expected, rtol=0, atol=1e-12)
    for s, t in ((1.0, 1.0), (0.999, 0.2), (0.0, 1.0), (0.5, 0.5)):
        assert torch.equal(tuned.jump(x, s, t, condition), base.jump(x, s, t, condition))
        assert torch.equal(tuned.velocity(x, s, condition), base.velocity(x, s, condition))
    s, t = torch.tensor([1.0, 0.4, 1.0, 1.0]).double(), torch.tensor([0.5, 0.4, 1.0, 0.0]).double()
    rows = tuned.average_velocity(x, s, t, condition)
    for i in range(4):
        alone = tuned.average_velocity(x, float(s[i]), float(t[i]), condition)[i]
        torch.testing.assert_close(rows[i], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stochastic", [False, True])
def test_an_adapted_map_is_a_flow_map(stochastic: bool, tmp_path: Path) -> None:
    base = digit_map()
    start = copied(base.state_dict())
    tuned = filled(NoiseAdapter(MLP((1 + stochastic, 8, 8), width=8, depth=1, num_classes=10), stochastic)(base))
    assert equal(base.state_dict(), start)
    adapted = network_of(tuned)
    assert {id(p) for p in adapted.network.parameters()} == {id(p) for p in base.network.parameters()}  # held once
    assert trained(tuned) == {id(p) for p in adapted.adapter.parameters()}
    back = FlowMap.load(tuned.save(tmp_path))

    def best(flow_map: FlowMap) -> Tensor:
        return BestOfN(2, 2)(flow_map, brightness, prompts=["a handwritten two"], seeds=[0]).x0

    assert torch.equal(best(back), best(tuned))
    again = NoiseAdapter()(back)
    assert torch.equal(best(again), best(tuned))
    assert trained(again) == {id(p) for p in network_of(again).adapter.parameters()}
    assert not torch.equal(best(back), best(base))


def test_what_cannot_be_adapted_is_said() -> None:
    base, adapter = digit_map(), MLP((1, 8, 8), width=8, depth=1)
    with pytest.raises(ConfigError, match="has a noise adapter already"):
        NoiseAdapter(adapter)(NoiseAdapter(adapter)(base))
    with pytest.raises(ConfigError, match="no noise adapter to go on with"):
        NoiseAdapter()(base)
    with pytest.raises(ConfigError, match=r"needs data_shape \(2, 8, 8\), got \(1, 8, 8\)"):
        NoiseAdapter(adapter, stochastic=True)(base)
    with pytest.raises(ConfigError, match=r"guidance by two calls \(scale 2\)"):
        NoiseAdapter(adapter)(base.with_guidance(2.0))
    with pytest.raises(ConfigError, match=r"AdaptedNoise trains a noise adapter: set adapter=NoiseAdapter"):
        AdaptedNoise()(batch(base, brightness))
    with pytest.raises(ConfigError, match="reads its prompts by Labels already"):
        with_conditioner(base, Pictures(1, 8))


# --- where it leads ---


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("jumps", [1, 2, 4])
def test_a_linear_reward_shifts_the_noise_as_is_known(jumps: int, checkpointing: bool, tmp_path: Path) -> None:
    """F(z) = m + c z and r = a . x: dz = c a / T. Each step halves the rest of the way, so forty leave 1e-12 of it."""
    base, adapter = gaussian_map(MEAN, SCALE), Affine(2)
    adapter.layer.weight.requires_grad_(False)
    module = RewardFineTuning(
        base,
        QuadraticReward.linear(A),
        AdaptedNoise(jumps, checkpointing),
        TEMPERATURE,
        optimizer=partial(SGD, lr=0.5 / TEMPERATURE),
        adapter=lambda given: frozen_weight(NoiseAdapter(adapter)(given)),
    )
    trainer(tmp_path, 40).fit(module, Prompts([""], 4))
    expected = SCALE * torch.tensor(A, dtype=torch.float64) / TEMPERATURE
    assert torch.allclose(adapter.layer.bias, expected, rtol=1e-10)
    assert torch.equal(base.network.mean, torch.tensor(MEAN, dtype=torch.float64))  # type: ignore[arg-type]
    x1 = normal(draws(4, 7), base)
    moved = module.flow_map.look_ahead(x1, 1.0) - base.look_ahead(x1, 1.0)
    assert torch.allclose(moved, (SCALE * expected).expand(4, 2), rtol=1e-10)  # c^2 a / T, as the tilt's mean


def frozen_weight(flow_map: FlowMap) -> FlowMap:
    network_of(flow_map).adapter.layer.weight.requires_grad_(False)  # type: ignore[union-attr]
    return flow_map


class Design:
    """Draws whose means and second moments are those of N(0, I) exactly: plus and minus sqrt(d) along each axis."""

    def __init__(self, d: int, prompts: int = 1) -> None:
        axes = math.sqrt(d) * torch.eye(d, dtype=torch.float64)
        self.rows = torch.cat([axes, -axes]).repeat(prompts, 1)

    def normal(self, shape: Sequence[int], count: int = 1) -> Tensor:
        return self.rows


def train(flow_map: FlowMap, base: FlowMap, reward: Any, prompts: Sequence[str] = ("",)) -> None:
    """Bring the adapter to its optimum at temperature 1; for a quadratic reward the loss is an expectation, exactly."""
    d, adapter = base.data_shape[0], network_of(flow_map).adapter
    rows = [prompt for prompt in prompts for _ in range(2 * d)]
    work = batch(flow_map, reward, prompts=rows, temperature=1.0, reference=base)
    work = dataclasses.replace(work, draws=Design(d, len(prompts)))  # type: ignore[arg-type]
    optimizer = torch.optim.LBFGS(
        adapter.parameters(), max_iter=400, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = AdaptedNoise()(work).loss.mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]


def moments(flow_map: FlowMap, prompt: str = "") -> tuple[Tensor, Tensor]:
    """Return mean and covariance of the map's samples in one jump."""
    rows = Design(flow_map.data_shape[0]).rows
    with torch.no_grad():
        x0 = flow_map.look_ahead(rows, 1.0, flow_map.encode_prompts([prompt] * len(rows)))
    return x0.mean(0), (x0 - x0.mean(0)).T @ (x0 - x0.mean(0)) / len(x0)


def test_variances_of_its_own_make_a_gaussian_tilt_exact() -> None:
    """N(0, 1) tilted by exp(-3 x^2 / 2) has variance 1 / 4. A shift of every sample ends at x / (1 + 3): 1 / 16."""
    base, reward = gaussian_map([0.0], 1.0), QuadraticReward.distance([0.0], 3.0)
    for stochastic, variance in ((False, 1 / 16), (True, 1 / 4)):
        tuned = NoiseAdapter(Affine(1, out=1 + stochastic), stochastic)(base)
        train(tuned, base, reward)
        mean, covariance = moments(tuned)
        assert abs(float(mean)) < 1e-9
        assert float(covariance) == pytest.approx(variance, rel=1e-8)


class Numbers(nn.Module):
    """Read a prompt as a number: what was measured."""

    def forward(self, prompts: Sequence[str]) -> Condition:
        return Condition({"y": torch.tensor([[float(prompt)] for prompt in prompts], dtype=torch.float64)})

    def null(self, n: int) -> Condition:
        return self(["0"] * n)


def test_samples_given_a_measurement_are_the_posteriors() -> None:
    """One coordinate is seen with noise: the adapter learns from two measurements and is exact for a third."""
    sigma, mean = 0.3, torch.tensor(MEAN, dtype=torch.float64)

    def likelihood(points: Tensor, prompts: Sequence[str]) -> Tensor:
        y = torch.tensor([float(prompt) for prompt in prompts], dtype=torch.float64)
        return -(y - points[:, 0]).square() / (2 * sigma**2)

    base = with_conditioner(gaussian_map(MEAN, SCALE), Numbers())
    tuned = NoiseAdapter(Affine(2, of=1, out=4), stochastic=True)(base)
    train(tuned, base, likelihood, ["0.9", "-1.3"])
    variance = 1 / (1 / SCALE**2 + 1 / sigma**2)
    for y in (0.9, 2.0):
        found, covariance = moments(tuned, str(y))
        wanted = mean.clone()
        wanted[0] = variance * (mean[0] / SCALE**2 + y / sigma**2)
        assert torch.allclose(found, wanted, atol=1e-6)
        assert torch.allclose(covariance, torch.diag(torch.tensor([variance, SCALE**2]).double()), atol=1e-6)


def test_where_noise_is_entangled_the_mean_is_exact_and_the_spread_too_small() -> None:
    """The posterior of the noise has precision P = 1 + J'A'AJ / sigma^2, J the linear map; q's is the diagonal of P."""
    d, sigma = 4, 0.3
    apart = (torch.arange(d)[:, None] - torch.arange(d)).abs().double()
    base = analytic_flow_map(GaussianMixture(torch.zeros(1, d), (0.7**apart)[None]), steps=2, order=2)
    A, y = torch.eye(d, dtype=torch.float64)[::2], torch.tensor([0.8, -0.4], dtype=torch.float64)
    reward = QuadraticReward(A.T @ A / sigma**2, A.T @ y / sigma**2, -(y @ y) / (2 * sigma**2))
    J = base.look_ahead(torch.eye(d, dtype=torch.float64), 1.0).T
    P = torch.eye(d) + J.T @ A.T @ A @ J / sigma**2
    tuned = NoiseAdapter(Affine(d, out=2 * d), stochastic=True)(base)
    train(tuned, base, reward)
    mean, covariance = moments(tuned)
    assert torch.allclose(mean, J @ torch.linalg.solve(P, J.T @ A.T @ y / sigma**2), atol=1e-6)
    assert torch.allclose(covariance, J @ torch.diag(1 / P.diagonal()) @ J.T, atol=1e-6)
    assert covariance.trace() < 0.95 * (J @ torch.linalg.inv(P) @ J.T).trace()


# --- through Lightning ---


def test_the_adapter_alone_is_trained_and_resumes(tmp_path: Path) -> None:
    def fit(folder: str, steps: int, resume: Path | None = None) -> RewardFineTuning:
        network = MLP((1, 8, 8), width=8, depth=1, num_classes=10)
        randomise(network, seed=4)
        module = RewardFineTuning(
            digit_map(),
            brightness,
            AdaptedNoise(2),
            0.1,
            optimizer=partial(AdamW, lr=1e-2),
            adapter=NoiseAdapter(network),
            monitor_every=2,
            held_out=[brightness],
        )
        keep = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=2, save_top_k=-1, monitor=None)
        data = Prompts(["a handwritten seven", "a handwritten two"], 4)
        trainer(tmp_path, steps, EMA(0.9), keep).fit(module, data, ckpt_path=resume, weights_only=True)
        return module

    straight = fit("straight", 4)
    resumed = fit("resumed", 4, tmp_path / "straight" / "step=2.ckpt")
    assert equal(straight.state_dict(), resumed.state_dict())
    found = FlowMap.load(tmp_path / "straight" / "step=4.ckpt", weights="raw")
    assert equal(found.state_dict(), straight.flow_map.state_dict())
    start = digit_map().state_dict()
    assert equal({name: network_of(found).network.state_dict()[name.removeprefix("network.")] for name in start}, start)


@pytest.mark.parametrize("stochastic", [False, True])
def test_it_runs_in_bfloat16_and_goes_on(stochastic: bool, tmp_path: Path) -> None:
    flow_map, adapter = (
        digit_map(),
        NoiseAdapter(MLP((1 + stochastic, 8, 8), width=8, depth=1, num_classes=10), stochastic),
    )
    for each in (adapter, NoiseAdapter()):
        module = RewardFineTuning(flow_map, brightness, AdaptedNoise(), optimizer=partial(AdamW, lr=1e-2), adapter=each)
        start = copied(module.flow_map.state_dict())
        trainer(tmp_path, 2, precision="bf16-mixed").fit(module, Prompts(["a handwritten two"], 4))
        flow_map = module.flow_map
        moved = {name for name, tensor in flow_map.state_dict().items() if not torch.equal(tensor, start[name])}
        assert moved and all(name.startswith("network.adapter.") for name in moved)
        assert all(torch.isfinite(p).all() for p in flow_map.parameters())
    reference: Any = module._reference.module
    assert equal(reference.state_dict(), start)  # what it was when it went on, adapter included


def test_an_adapter_reads_a_picture_that_the_map_does_not(tmp_path: Path) -> None:
    prompts = []
    for name, grey in (("dark", 20), ("light", 220)):
        Image.new("L", (8, 8), grey).save(tmp_path / f"{name}.png")
        prompts.append(f"@ {tmp_path}/{name}.png")
    base = with_conditioner(digit_map(classes=False), Pictures(1, 8))
    adapter = UNet((2, 8, 8), channels=(4, 4), picture_channels=1)
    module = RewardFineTuning(
        base,
        brightness,
        AdaptedNoise(),
        optimizer=partial(AdamW, lr=1e-2),
        adapter=NoiseAdapter(adapter, stochastic=True),
    )
    trainer(tmp_path, 2).fit(module, Prompts(prompts, 4))
    back = FlowMap.load(module.save(tmp_path / "map"))
    x1 = normal(draws(1), back).expand(2, 1, 8, 8)
    x0 = back.look_ahead(x1, 1.0, back.encode_prompts(prompts))
    assert torch.equal(x0, module.flow_map.eval().look_ahead(x1, 1.0, back.encode_prompts(prompts)))
    assert not torch.equal(x0[0], x0[1])
    assert torch.equal(*base.look_ahead(x1, 1.0, back.encode_prompts(prompts)))
