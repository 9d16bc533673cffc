"""Directional derivatives: forward mode against central differences, for every network, and the traps it names."""

from collections.abc import Callable

import pytest
import torch
from exact import numbers, uniforms
from torch import Tensor, nn
from torch.nn import functional

from steerfm.conditions import Labels
from steerfm.derivatives import directional_derivative
from steerfm.errors import ConfigError, DerivativeError
from steerfm.flow_map import FlowMap
from steerfm.networks import MLP, DiT, UNet
from steerfm.networks.mlp import randomise
from steerfm.types import Condition

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": lambda classes: MLP((3,), width=16, depth=2, num_classes=classes),
    "unet": lambda classes: UNet((1, 4, 4), channels=(8, 16), num_classes=classes),
    "dit": lambda classes: DiT((2, 4, 4), 2, 8, 2, 2, num_classes=classes),
    "unet with attention": lambda classes: UNet((2, 4, 4), channels=(8, 16), attention_heads=2, num_classes=classes),
}


def setting(kind: str, classes: int, n: int = 3, guidance_scale: float = 1.0) -> tuple[FlowMap, Condition | None]:
    """Return a float64 flow map whose weights are all drawn anew, and a condition where it takes one."""
    network = NETWORKS[kind](classes)
    randomise(network)
    names = [f"class {i}" for i in range(classes)]
    flow_map = FlowMap(network, conditioner=Labels(names) if classes else None, guidance_scale=guidance_scale)
    flow_map.double()
    return flow_map, flow_map.encode_prompts([names[i % classes] for i in range(n)] if classes else [""] * n)


def arguments(flow_map: FlowMap, n: int = 3) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return a point (x, s, t) well inside [0, 1] and a direction."""
    x, dx = numbers(0, n, *flow_map.data_shape), numbers(1, n, *flow_map.data_shape)
    primals = (x, uniforms(2, n, 0.6, 0.9), uniforms(3, n, 0.1, 0.4))
    return primals, (dx, torch.ones(n, dtype=x.dtype), -0.5 * torch.ones(n, dtype=x.dtype))


def richardson(function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """Return the derivative from central differences with steps h and h / 2, extrapolated: error of order h^4."""
    h = 2e-4  # rates up to 32: truncation (32 h)^4 = 2e-9, rounding 1e-16 / h = 5e-13
    coarse, fine = (
        directional_derivative(function, primals, tangents, method="central", step=step)[1] for step in (h, h / 2)
    )
    return (4 * fine - coarse) / 3


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("classes", [0, 3], ids=["free", "conditional"])
@pytest.mark.parametrize("kind", list(NETWORKS))
def test_forward_mode_equals_central_differences(kind: str, classes: int):
    flow_map, condition = setting(kind, classes)

    def u(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return flow_map.average_velocity(x, s, t, condition)

    primals, tangents = arguments(flow_map)
    value, forward = directional_derivative(u, primals, tangents, network=flow_map.network)
    assert torch.equal(value, u(*primals)) or relative(value, u(*primals)) < 1e-12  # attention's kernel may differ
    assert forward.norm() > 1e-3
    assert relative(forward, richardson(u, primals, tangents)) < 1e-7


def test_guidance_passes_through_forward_mode():
    flow_map, condition = setting("mlp", 3, guidance_scale=2.5)

    def u(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return flow_map.average_velocity(x, s, t, condition)

    primals, tangents = arguments(flow_map)
    _, forward = directional_derivative(u, primals, tangents, network=flow_map.network)
    assert relative(forward, richardson(u, primals, tangents)) < 1e-7
    plain, _ = setting("mlp", 3)
    _, unguided = directional_derivative(
        lambda x, s, t: plain.average_velocity(x, s, t, condition), primals, tangents, network=plain.network
    )
    assert relative(forward, unguided) > 1e-3


def test_the_denoised_output_passes_through_forward_mode():
    network = NETWORKS["mlp"](0)
    randomise(network)
    flow_map = FlowMap(network, output="denoised").double()
    primals, tangents = arguments(flow_map)
    _, forward = directional_derivative(flow_map.average_velocity, primals, tangents, network=network)
    assert relative(forward, richardson(flow_map.average_velocity, primals, tangents)) < 1e-7


def test_attention_takes_the_kernel_that_has_forward_mode():
    q, k, v, dq = (numbers(i, 2, 2, 5, 8) for i in range(4))

    def attend(query: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query, k, v)

    _, forward = directional_derivative(attend, (q,), (dq,))
    assert relative(forward, richardson(attend, (q,), (dq,))) < 1e-7


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_gradients_flow_backward_through_the_tangent(kind: str):
    """The gradient of |tangent|^2 by one weight, against its own central difference."""
    flow_map, _ = setting(kind, 0)
    primals, tangents = arguments(flow_map)

    def loss() -> Tensor:
        _, tangent = directional_derivative(flow_map.average_velocity, primals, tangents, network=flow_map.network)
        return tangent.square().sum()

    weight = next(p for p in flow_map.parameters() if p.ndim > 1)
    direction = numbers(4, *weight.shape)
    (gradient,) = torch.autograd.grad(loss(), weight)
    sides = []
    for h in (1e-4, -1e-4):
        with torch.no_grad():
            weight.add_(h * direction)
            sides.append(float(loss()))
            weight.sub_(h * direction)
    assert float((gradient * direction).sum()) == pytest.approx((sides[0] - sides[1]) / 2e-4, rel=1e-5)


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(8), nn.LayerNorm([2, 4], bias=False), nn.InstanceNorm1d(2, affine=True), nn.GroupNorm(2, 2)],
    ids=["layer", "layer of two", "instance", "group"],
)
def test_gradients_through_the_tangent_of_a_norm_are_those_of_its_definition(norm: nn.Module):
    """PyTorch's fused layer and instance norms are wrong here (pytorch/pytorch issue 196700), without an error."""
    norm = norm.double()
    randomise(norm, 1.0)
    shape = (3, 8) if isinstance(norm, nn.LayerNorm) and norm.normalized_shape == (8,) else (3, 2, 4)
    x, dx, scale = numbers(8, *shape), numbers(9, *shape), numbers(10, *shape)
    outer = numbers(11, *shape)

    def loss(factor: Tensor) -> Tensor:
        value, tangent = directional_derivative(lambda point: norm(point * factor), (x,), (dx,), network=norm)
        return (outer * (value + tangent.square())).sum()

    leaf = scale.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    step = 1e-6 * numbers(12, *shape)
    change = loss(scale + step) - loss(scale - step)
    assert float((gradient * step).sum()) == pytest.approx(float(change.detach()) / 2, rel=1e-6)


@pytest.mark.parametrize("method", ["forward", "central"])
@pytest.mark.parametrize("kind", list(NETWORKS))
def test_autocast_is_off_inside_a_derivative(kind: str, method: str):
    """In bfloat16 a central difference is off by half, and a convolution's forward mode fails."""
    flow_map, _ = setting(kind, 0)
    flow_map.float()
    primals, tangents = ([part.float() for part in parts] for parts in arguments(flow_map))

    def derivative() -> Tensor:
        return directional_derivative(
            flow_map.average_velocity,
            primals,
            tangents,
            method=method,  # type: ignore[arg-type]
            network=flow_map.network,
        )[1]

    expected = derivative()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(derivative(), expected)


def test_gradients_flow_through_a_central_difference():
    flow_map, _ = setting("mlp", 0)
    primals, tangents = arguments(flow_map)
    gradients = []
    for method in ("forward", "central"):
        value, tangent = directional_derivative(
            flow_map.average_velocity, primals, tangents, method=method, step=1e-4, network=flow_map.network
        )
        (value.square().sum() + tangent.square().sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in flow_map.parameters() if p.grad is not None]))
        flow_map.zero_grad()
    assert relative(gradients[1], gradients[0]) < 1e-5  # truncation (32 h)^2 / 6 = 2e-6


def test_central_differences_are_of_second_order():
    flow_map, _ = setting("mlp", 0)
    primals, tangents = arguments(flow_map)
    _, truth = directional_derivative(flow_map.average_velocity, primals, tangents)
    errors = []
    for step in (4e-3, 2e-3):
        _, central = directional_derivative(flow_map.average_velocity, primals, tangents, method="central", step=step)
        errors.append(relative(central, truth))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.02)


# --- what forward mode cannot do ------------------------------------------------------------------------------


class NoForwardRule(torch.autograd.Function):
    """Double a tensor, with a backward rule only."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, ...], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0] * 2


class Doubling(nn.Module):
    """Apply the function above."""

    def forward(self, x: Tensor) -> Tensor:
        result = NoForwardRule.apply(x)
        assert isinstance(result, Tensor)
        return result


class Stack(nn.Module):
    """Two linear layers with one of another kind between them, in float32, where LSTM has no forward mode."""

    data_shape = (4,)

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), middle, nn.Linear(4, 4)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        h = self.middle(self.first(x))
        return self.last(h[0] if isinstance(h, tuple) else h) + (s - t)[:, None]


@pytest.mark.parametrize(
    ("layer", "name"),
    [(nn.BatchNorm1d(4), "BatchNorm1d"), (nn.LSTM(4, 4), "LSTM"), (Doubling(), "Doubling")],
    ids=["BatchNorm", "LSTM", "custom"],
)
def test_a_layer_without_forward_mode_is_named(layer: nn.Module, name: str):
    flow_map = FlowMap(Stack(layer))
    x, time = torch.randn(3, 4), torch.rand(3)

    def derivative(method: str) -> Tensor:
        return directional_derivative(
            lambda point: flow_map.jump(point, time, time / 2),
            (x,),
            (torch.randn(3, 4),),
            method=method,  # type: ignore[arg-type]
            network=flow_map.network,
        )[1]

    with pytest.raises(DerivativeError, match=rf"'middle' \({name}\).*derivative='central'"):
        derivative("forward")
    assert torch.isfinite(derivative("central")).all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in flow_map.modules())
    assert torch.func.jvp(torch.sin, (x,), (x,))[1].shape == x.shape  # the failed trace left nothing open


def test_batch_norm_passes_in_evaluation_mode():
    network = Stack(nn.BatchNorm1d(4)).double().eval()
    x, d, time = numbers(5, 3, 4), numbers(6, 3, 4), uniforms(7, 3)
    _, forward = directional_derivative(lambda point: network(point, time, time), (x,), (d,), network=network)
    assert relative(forward, richardson(lambda point: network(point, time, time), (x,), (d,))) < 1e-7


def test_the_network_itself_is_named_where_it_has_no_layers():
    class Whole(Doubling):
        pass

    network = Whole()
    with pytest.raises(DerivativeError, match=r"\(Whole\)"):
        directional_derivative(network, (torch.ones(2, 2),), (torch.ones(2, 2),), network=network)


def test_an_error_behind_the_network_is_left_as_it_is():
    network = Stack(nn.Identity())
    time = torch.rand(3)

    def broken(x: Tensor) -> Tensor:
        return network(x, time, time) @ torch.ones(7)

    with pytest.raises(RuntimeError, match=r"size mismatch|shape"):
        directional_derivative(broken, (torch.randn(3, 4),), (torch.randn(3, 4),), network=network)


def test_an_error_that_has_nothing_to_do_with_forward_mode_is_left_as_it_is():
    network = Stack(nn.Identity())
    time = torch.rand(3)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        directional_derivative(
            lambda x: network(x, time, time), (torch.randn(3, 5),), (torch.randn(3, 5),), network=network
        )


def test_times_without_dimensions_and_unknown_methods_are_refused():
    time = torch.tensor(0.5)
    with pytest.raises(DerivativeError, match="batch-shaped times"):
        directional_derivative(torch.sin, (time,), (time,))
    with pytest.raises(ConfigError, match="'forward' or 'central', got 'backward'"):
        directional_derivative(torch.sin, (torch.ones(1),), (torch.ones(1),), method="backward")  # type: ignore[arg-type]
