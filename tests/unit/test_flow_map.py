"""The flow map: what its functions are, guidance, outputs, times, codecs, and copies."""

from typing import Any

import pytest
import torch
from exact import NAMES, PATHS, column, mixture, numbers, uniforms
from torch import Tensor, nn

from steerfm.analytic import GaussianMixture, MixtureNetwork, analytic_flow_map
from steerfm.conditions import Labels
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap, Identity, Pixels, as_times
from steerfm.networks import MLP, UNet
from steerfm.networks.mlp import randomise
from steerfm.paths import Linear, Path
from steerfm.types import Condition

every_path = pytest.mark.parametrize("path", PATHS, ids=NAMES)


def learnt(**options: Any) -> FlowMap:
    network = MLP((2,), width=8, depth=1, num_classes=2)
    randomise(network)
    return FlowMap(network, conditioner=Labels(["one", "two"]), **options).double()


def batch(n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return numbers(0, n, 2), uniforms(1, n, 0.4, 1.0), uniforms(2, n, 0.0, 0.4)


@every_path
def test_every_function_is_its_definition(path: Path):
    flow_map, (x, s, t) = learnt(path=path), batch()
    condition = flow_map.encode_prompts(["one", "two", "", "one", "two"])
    u = flow_map.network(x, s, t, condition)
    assert torch.equal(flow_map.average_velocity(x, s, t, condition), u)
    assert torch.allclose(flow_map.jump(x, s, t, condition), x + column(t - s) * u)
    assert torch.allclose(flow_map.look_ahead(x, s, condition), flow_map.jump(x, s, torch.zeros_like(s), condition))
    v = flow_map.network(x, s, s, condition)
    assert torch.equal(flow_map.velocity(x, s, condition), v)
    assert torch.equal(flow_map.denoise(x, s, condition), path.denoised(x, v, s))
    assert torch.equal(flow_map.score(x, s, condition), path.score(x, v, s))
    assert torch.equal(flow_map.jump(x, s, s, condition), x)


def test_a_sample_and_the_posterior_mean_are_not_the_same():
    flow_map, (x, s, _) = analytic_flow_map(mixture()), batch()
    assert (flow_map.look_ahead(x, s) - flow_map.denoise(x, s)).norm() > 0.1
    assert torch.allclose(flow_map.denoise(x, s), x - column(s) * flow_map.velocity(x, s), atol=1e-12)


def test_the_denoised_output_is_the_same_map_in_other_words():
    """D = x - s u leads to the same jumps; on the diagonal of the linear path D is E[x0 | x_t]."""
    inner = MixtureNetwork(mixture())

    class Denoised(nn.Module):
        data_shape = (2,)

        def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
            return x - column(s) * inner(x, s, t)

    direct, denoised = FlowMap(inner), FlowMap(Denoised(), output="denoised")
    x, s, t = batch()
    assert torch.allclose(direct.average_velocity(x, s, t), denoised.average_velocity(x, s, t), atol=1e-12)
    assert torch.allclose(denoised.network(x, s, s), direct.denoise(x, s), atol=1e-12)
    assert torch.allclose(denoised.look_ahead(x, s), denoised.network(x, s, torch.zeros_like(s)), atol=1e-12)
    assert torch.isfinite(denoised.average_velocity(x, 0.0, 0.5)).all()


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_guidance_is_its_formula_and_off_without_a_condition(scale: float):
    flow_map, (x, s, t) = learnt(guidance_scale=scale), batch()
    condition = flow_map.encode_prompts(["one"] * 5)
    guided, free = flow_map.network(x, s, t, condition), flow_map.network(x, s, t, None)
    assert torch.allclose(flow_map.average_velocity(x, s, t, condition), free + scale * (guided - free))
    assert torch.equal(flow_map.average_velocity(x, s, t), free)
    plain = flow_map.with_guidance(1.0)
    assert torch.equal(plain.average_velocity(x, s, t, condition), guided)
    assert plain.network is flow_map.network
    assert flow_map.guidance_scale == scale


def test_guidance_needs_a_null_condition():
    network = MLP((2,), width=8, depth=1, num_classes=2)
    flow_map = FlowMap(network, guidance_scale=2.0)
    with pytest.raises(ConfigError, match="Guidance needs a null condition"):
        flow_map.velocity(torch.zeros(1, 2), 0.5, Condition({"label": torch.zeros(1, dtype=torch.long)}))


# --- times ----------------------------------------------------------------------------------------------------


def test_times_may_be_numbers_or_tensors():
    x = numbers(3, 4, 2).float()
    for t in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), torch.full((4,), 0.5)):
        times = as_times(t, x)
        assert times.shape == (4,)
        assert times.dtype == torch.float32
        assert times.tolist() == [0.5] * 4
    assert as_times(1, x).tolist() == [1.0] * 4
    for slack in (-0.01, 1.01):  # a central difference may step outside a little
        assert as_times(torch.full((4,), slack), x).shape == (4,)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("t", [999.0, -0.5, 1.2, float("nan")])
def test_times_outside_the_unit_interval_are_refused(t: float, as_tensor: bool):
    """One wrong time of a batch is enough."""
    times = torch.tensor([0.5, 0.5, t, 0.5], dtype=torch.float64) if as_tensor else t
    expected = rf"t must lie in \[0, 1\], got {t}\. diffusers timesteps are 1000 t: divide, or use steerfm.backbones"
    with pytest.raises(ConfigError, match=expected):
        learnt().velocity(torch.zeros(4, 2), times)


def test_numbers_have_no_slack():
    with pytest.raises(ConfigError, match=r"got 1\.01"):
        learnt().velocity(torch.zeros(4, 2), 1.01)


@pytest.mark.parametrize("shape", [(3,), (4, 1), (1,)])
def test_times_of_another_shape_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ConfigError, match=r"one time a sample, shape \(4,\), got"):
        learnt().velocity(torch.zeros(4, 2), torch.full(shape, 0.5))


# --- model space ----------------------------------------------------------------------------------------------


def test_pictures_are_decoded_to_the_unit_interval_and_encoded_back():
    flow_map = FlowMap(UNet((1, 4, 4), channels=(8, 16)))
    assert flow_map.codec == Pixels()
    pictures = torch.rand(2, 1, 4, 4)
    assert torch.allclose(flow_map.decode(flow_map.encode(pictures)), pictures, atol=1e-6)
    x = torch.tensor([[[[-3.0, -1.0], [0.0, 3.0]]]], requires_grad=True)
    decoded = flow_map.decode(x)
    assert decoded.flatten().tolist() == [0.0, 0.0, 0.5, 1.0]
    decoded.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 0.5))  # also where it was clamped


def test_points_are_their_own_codes():
    flow_map, points = learnt(), 7 * numbers(4, 3, 2)
    assert flow_map.codec == Identity()
    assert torch.equal(flow_map.decode(points), points)
    assert torch.equal(flow_map.encode(points), points)


def test_prompts_become_conditions_on_the_maps_device():
    condition = learnt().encode_prompts(["two", ""])
    assert condition is not None
    assert condition["label"].tolist() == [1, 2]
    assert analytic_flow_map(mixture()).encode_prompts(["anything"]) is None


# --- the object -----------------------------------------------------------------------------------------------


def test_device_and_type_are_those_of_the_weights():
    assert learnt().dtype == torch.float64
    assert learnt().float().dtype == torch.float32
    assert analytic_flow_map(mixture()).dtype == torch.float64  # buffers only
    assert learnt().device.type == "cpu"


def test_the_output_has_the_type_of_the_state_under_autocast():
    flow_map = learnt().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flow_map.velocity(torch.zeros(3, 2), 0.5).dtype == torch.float32


def test_a_frozen_copy_has_weights_of_its_own():
    flow_map, (x, s, t) = learnt(), batch()
    copy = flow_map.frozen_copy()
    before = copy.average_velocity(x, s, t)
    with torch.no_grad():
        for p in flow_map.parameters():
            p.add_(1.0)
    assert torch.equal(copy.average_velocity(x, s, t), before)
    assert not any(p.requires_grad for p in copy.parameters())
    assert all(p.requires_grad for p in flow_map.parameters())
    assert not copy.training
    assert flow_map.training


def test_wrong_arguments_are_refused():
    with pytest.raises(ConfigError, match="'average_velocity' or 'denoised', got 'noise'"):
        FlowMap(MLP((2,)), output="noise")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Linear has no data_shape"):
        FlowMap(nn.Linear(2, 2))


def test_an_exact_velocity_is_one_evaluation():
    """Numbers for times too: the solver is not asked to integrate over nothing."""

    class Counted(GaussianMixture):
        calls = 0

        def velocity(self, x: Tensor, t: Tensor, path: Path) -> Tensor:
            Counted.calls += 1
            return super().velocity(x, t, path)

    flow_map = FlowMap(MixtureNetwork(Counted([[0.0, 0.0]], [1.0]), Linear()))
    for t in (0.5, torch.full((3,), 0.5)):
        Counted.calls = 0
        flow_map.velocity(torch.zeros(3, 2), t)
        assert Counted.calls == 1
