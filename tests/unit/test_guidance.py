"""Classifier-free guidance: in an interval of times, its scale as an input of the network, and of a teacher."""

from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from exact import column, numbers, uniforms
from torch import Tensor, nn

from steerfm.conditions import CaptionWords, Labels, Pictures, SceneAttributes
from steerfm.conditions.guidance import null_rows, with_scale, without_scale
from steerfm.derivatives import directional_derivative
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.networks import MLP, DiT, UNet, WordEncoder
from steerfm.networks.embeddings import GuidanceEmbedding
from steerfm.networks.mlp import randomise
from steerfm.objectives import Eulerian, Lagrangian
from steerfm.objectives.flow_matching import flow_matching
from steerfm.sampling import Unsteered, measure
from steerfm.types import Condition

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": lambda **o: MLP((1, 4, 4), width=16, depth=2, **o),
    "unet": lambda **o: UNet((1, 4, 4), channels=(8, 16), **o),
    "dit": lambda **o: DiT((1, 4, 4), 2, 16, 2, 4, **o),
    "dit with decoupled times": lambda **o: DiT((1, 4, 4), 2, 16, 3, 2, decoupled=1, **o),
}
every_network = pytest.mark.parametrize("kind", list(NETWORKS))
PROMPTS = ["one", "two", "", "two"]


def made(kind: str = "mlp", *, told: bool = False, **options: Any) -> FlowMap:
    """Return a float64 map of two classes with all weights drawn anew; told: its network reads the scale."""
    network = NETWORKS[kind](num_classes=2, guidance_input=told)
    randomise(network)
    return FlowMap(network, conditioner=Labels(["one", "two"]), **options).double()


def asked(flow_map: FlowMap, prompts: list[str] = PROMPTS) -> Condition:
    condition = flow_map.encode_prompts(prompts)
    assert condition is not None
    return condition


def calls(flow_map: FlowMap, run: Callable[[], object]) -> float:
    """Return how many rows pass the network while `run` runs."""
    with measure(flow_map, None, 1) as cost:
        run()
    return cost().network_calls


# --- an interval of source times ------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [False, True], ids=["two calls", "scale as an input"])
def test_guidance_acts_inside_its_interval_ends_included(told: bool):
    """Row by row, in one batch, up to the rounding of products of another batch size."""
    flow_map, x = made(told=told), numbers(0, 6, 1, 4, 4)
    s = torch.tensor([0.0, 0.29, 0.3, 0.5, 0.7, 0.71], dtype=torch.float64)
    t, condition = torch.zeros_like(s), asked(flow_map, ["one"] * 6)
    plain, guided = (flow_map.with_guidance(g).average_velocity(x, s, t, condition) for g in (1.0, 3.0))
    limited = flow_map.with_guidance(3.0, (0.3, 0.7)).average_velocity(x, s, t, condition)
    inside = torch.tensor([False, False, True, True, True, False])
    expected = torch.where(inside[:, None, None, None], guided, plain)
    assert torch.allclose(limited, expected, rtol=0, atol=1e-12)
    assert ((plain - guided).abs().amax((1, 2, 3)) > 1e-4).all()


def test_the_whole_interval_is_every_time():
    flow_map, condition = made(), asked(made())
    everywhere, from_zero = flow_map.with_guidance(2.0), flow_map.with_guidance(2.0, (0.0, 0.5))
    for s in (0.0, 0.5, -0.01):  # a central difference may step outside a little
        times, x = torch.full((4,), s, dtype=torch.float64), numbers(0, 4, 1, 4, 4)
        assert torch.equal(from_zero.velocity(x, times, condition), everywhere.velocity(x, times, condition))
    assert torch.equal(
        everywhere.velocity(x, 1.0, condition), flow_map.with_guidance(2.0, (0, 1)).velocity(x, 1.0, condition)
    )


def test_a_batch_outside_pays_for_one_call():
    flow_map, x = made(guidance_scale=2.0, guidance_interval=(0.2, 0.6)), numbers(0, 4, 1, 4, 4)
    condition = asked(flow_map)
    assert calls(flow_map, lambda: flow_map.velocity(x, 0.7, condition)) == 4
    assert calls(flow_map, lambda: flow_map.velocity(x, 0.1, condition)) == 4
    assert calls(flow_map, lambda: flow_map.velocity(x, 0.6, condition)) == 8
    mixed = torch.tensor([0.1, 0.1, 0.1, 0.3])
    assert calls(flow_map, lambda: flow_map.velocity(x, mixed, condition)) == 8
    # eight jumps start at 1, 7/8, ... 1/8: three of them in [0.2, 0.6]
    assert Unsteered("jumps", 8)(flow_map, prompts=["one"], seeds=[0, 1]).cost.network_calls == 8 + 3


def test_a_limited_interval_passes_through_forward_mode():
    flow_map = made(guidance_scale=2.0, guidance_interval=(0.0, 0.8))
    x, s, condition = numbers(0, 4, 1, 4, 4), torch.tensor([0.5, 0.6, 0.9, 0.95], dtype=torch.float64), asked(made())

    def u(x: Tensor, s: Tensor) -> Tensor:
        return flow_map.average_velocity(x, s, 0.1, condition)

    primals, tangents = (x, s), (numbers(1, 4, 1, 4, 4), torch.ones_like(s))
    value, forward = directional_derivative(u, primals, tangents, network=flow_map.network)
    _, central = directional_derivative(u, primals, tangents, method="central", step=1e-4)
    assert torch.allclose(value, u(x, s), rtol=0, atol=1e-12)
    assert (forward - central).norm() < 1e-4 * central.norm()  # of order (32 h)^2


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.6, 0.4), (-0.1, 0.5), (0.5, 1.5), (0.1, float("nan")), (0.5,)])
def test_impossible_intervals_are_refused(interval: tuple[float, ...]):
    for make in (lambda: FlowMap(MLP((2,)), guidance_interval=interval), lambda: made().with_guidance(2.0, interval)):
        with pytest.raises(ConfigError, match="0 <= low < high <= 1, source times, got"):
            make()


@pytest.mark.parametrize("told", [False, True], ids=["two calls", "scale as an input"])
def test_scale_and_interval_are_saved_and_a_view_sets_both(told: bool, tmp_path: FilePath):
    flow_map = made(told=told, guidance_scale=2.0, guidance_interval=(0.25, 0.75))
    back, x, condition = FlowMap.load(flow_map.save(tmp_path / "map")), numbers(0, 4, 1, 4, 4), asked(flow_map)
    assert (back.guidance_scale, back.guidance_interval) == (2.0, (0.25, 0.75))
    for s in (0.5, 0.9):
        assert torch.equal(back.velocity(x, s, condition), flow_map.velocity(x, s, condition))
    assert back.with_guidance(1.0).guidance_interval == (0.0, 1.0)
    assert back.guidance_interval == (0.25, 0.75)


# --- the scale as an input of the network ---------------------------------------------------------------------


@every_network
def test_a_network_reads_the_scale_of_each_row(kind: str):
    flow_map, x, s, t = (
        made(kind, told=True),
        numbers(0, 4, 1, 4, 4),
        uniforms(1, 4, 0.5, 1.0),
        uniforms(2, 4, 0.0, 0.5),
    )
    condition = asked(flow_map, ["one", "two", "one", "two"])
    scales = torch.tensor([1.0, 1.5, 4.0, 9.0])
    whole = flow_map.network(x, s, t, with_scale(condition, scales))
    for i, scale in enumerate(scales.tolist()):
        row = slice(i, i + 1)
        alone = flow_map.network(x[row], s[row], t[row], with_scale(condition.select(row), scale))
        assert torch.allclose(whole[row], alone, atol=1e-12)
    unsaid = flow_map.network(x, s, t, condition)
    assert torch.equal(unsaid, flow_map.network(x, s, t, with_scale(condition, 1.0)))
    moved = (whole - unsaid).abs().amax((1, 2, 3))
    assert moved[0] < 1e-12
    assert (moved[1:] > 1e-5).all()
    free = flow_map.network(x, s, t, None)
    null = with_scale(Labels(["one", "two"]).null(4), 1.0)
    assert torch.equal(free, flow_map.network(x, s, t, null))


@every_network
def test_a_network_starts_as_one_that_is_not_told_and_learns_the_scale(kind: str):
    network = NETWORKS[kind](num_classes=2, guidance_input=True).double()
    randomise(network)
    embedding = network.guidance
    assert isinstance(embedding, GuidanceEmbedding)
    x, s, condition = numbers(0, 3, 1, 4, 4), uniforms(1, 3), Condition({"label": torch.tensor([0, 1, 2])})
    network(x, s, s, with_scale(condition, 2.0)).square().sum().backward()
    for name, parameter in embedding.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    fresh = GuidanceEmbedding(16)
    assert torch.equal(fresh(with_scale(condition, 3.0), torch.zeros(3)), torch.zeros(3, 16))
    assert all(p.abs().max() > 0 for p in list(fresh.parameters())[:2])  # so that the last layer learns at once


@every_network
def test_a_guided_map_that_reads_its_scale_is_one_call_a_jump(kind: str):
    flow_map, x = made(kind, told=True), numbers(0, 4, 1, 4, 4)
    condition = asked(flow_map)
    guided = flow_map.with_guidance(3.0)
    expected = flow_map.network(
        x, *torch.ones(2, 4, dtype=x.dtype), with_scale(condition, torch.tensor([3.0, 3, 1, 3]))
    )
    assert torch.equal(guided.velocity(x, 1.0, condition), expected)  # 1 in the null row
    assert calls(flow_map, lambda: guided.velocity(x, 1.0, condition)) == 4
    assert torch.equal(
        flow_map.velocity(x, 1.0, condition), flow_map.network(x, *torch.ones(2, 4, dtype=x.dtype), condition)
    )
    assert torch.equal(guided.velocity(x, 1.0), flow_map.velocity(x, 1.0))  # nothing to guide
    assert Unsteered("jumps", 4)(guided, prompts=["one"], seeds=[0]).cost.network_calls == 4


def test_a_text_and_the_scale_are_told_together():
    network = UNet((1, 4, 4), channels=(8,), text=WordEncoder(2, 3, 8, 1, 2), text_heads=2, guidance_input=True)
    randomise(network, scale=0.3)
    flow_map = FlowMap(network, conditioner=CaptionWords(["red", "blue"], 3)).double()
    x, condition = numbers(0, 2, 1, 4, 4), asked(flow_map, ["red", ""])
    moved = flow_map.with_guidance(5.0).velocity(x, 0.5, condition) - flow_map.velocity(x, 0.5, condition)
    assert moved[0].abs().max() > 1e-4
    assert torch.equal(moved[1], torch.zeros_like(moved[1]))


@pytest.mark.parametrize("told", [False, True], ids=["two calls", "scale as an input"])
def test_scales_in_the_condition_come_before_the_maps_own(told: bool):
    flow_map, x = made(told=told), numbers(0, 4, 1, 4, 4)
    condition, scales = asked(flow_map, ["one", "two"] * 2), [1.0, 2.0, 3.0, 0.0]
    own = with_scale(condition, torch.tensor(scales))
    together = flow_map.with_guidance(7.0).velocity(x, 0.6, own)
    for i, scale in enumerate(scales):
        assert torch.allclose(together[i], flow_map.with_guidance(scale).velocity(x, 0.6, condition)[i], atol=1e-12)
    limited = flow_map.with_guidance(1.0, (0.0, 0.5)).velocity(x, 0.6, own)
    assert torch.equal(limited, flow_map.velocity(x, 0.6, condition))


def test_conditions_take_and_lose_scales():
    condition = Condition({"label": torch.tensor([0, 1, 2])})
    assert without_scale(condition) is condition
    two = with_scale(condition, 2)
    assert two["guidance"].tolist() == [2.0] * 3
    assert with_scale(two, torch.tensor([1.0, 2.0, 3.0]))["guidance"].tolist() == [1.0, 2.0, 3.0]
    assert list(without_scale(two).tensors) == ["label"]
    assert two.select(torch.tensor([True, False, True])).repeat_interleave(2)["guidance"].tolist() == [2.0] * 4
    with pytest.raises(ConfigError, match="one batch size"):
        with_scale(condition, torch.ones(2))


@pytest.mark.parametrize(
    ("conditioner", "prompts"),
    [
        (Labels(["one", "two"]), ["two", "", "one"]),
        (CaptionWords(["a", "red", "circle"], 4), ["a red circle", "", "red"]),
        (SceneAttributes(), ["a red circle", "", "a blue square"]),
        (Pictures(1, 4, captions=CaptionWords(["red"], 2)), ["red", "", "red red"]),
    ],
    ids=["labels", "words", "attributes", "pictures and words"],
)
def test_null_rows_are_those_of_the_empty_prompt(conditioner: nn.Module, prompts: list[str]):
    condition, null = conditioner(prompts), conditioner.null(1)  # type: ignore[operator]
    assert null_rows(condition, null).tolist() == [False, True, False]
    assert null_rows(with_scale(condition, 3.0), null).tolist() == [False, True, False]


def test_a_picture_without_a_caption_is_not_null():
    conditioner = Pictures(1, 2, captions=CaptionWords(["red"], 2))
    condition = conditioner(["", ""])
    condition["picture"][1, -1] = 1
    assert null_rows(condition, conditioner.null(1)).tolist() == [True, False]


# --- learning it ----------------------------------------------------------------------------------------------


class Lines(nn.Module):
    """One velocity a class, the same everywhere, linear in the guidance scale: the optimum's own form.

    Data of one point c a class have the velocity x1 - c at x1 = 0, and guidance moves it along a line.
    """

    data_shape = (2,)
    guidance_input = True

    def __init__(self) -> None:
        super().__init__()
        self.starts, self.slopes = nn.Embedding(3, 2), nn.Embedding(3, 2)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        assert condition is not None
        scale = condition.tensors.get("guidance", torch.ones(len(x)))
        return self.starts(condition["label"]) + column(scale.to(x) - 1) * self.slopes(condition["label"])


def test_one_network_learns_every_scale():
    """Gradient descent ends at v_null + g (v - v_null) for all g at once, null rows at the null velocity."""
    lines, conditioner = Lines(), Labels(["a", "b"])
    flow_map = FlowMap(lines, conditioner=conditioner).double()
    centres = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    told = Condition({"label": torch.tensor([0, 2, 0, 2, 1, 2, 1, 2])})  # one row in two is dropped
    scales = torch.tensor([1.0, 6.0, 3.0, 2.0, 1.5, 1.0, 4.0, 9.0], dtype=torch.float64)
    x0, x1, t = centres[labels], torch.zeros(8, 2, dtype=torch.float64), uniforms(4, 8)
    optimizer = torch.optim.SGD(flow_map.parameters(), lr=0.2)
    for _ in range(600):
        optimizer.zero_grad()
        flow_matching(flow_map, x0, x1, t, with_scale(told, scales)).sum().backward()
        optimizer.step()
    velocity, null = -centres, -centres.mean(0)
    x, condition = numbers(5, 3, 2), asked(flow_map, ["a", "b", ""])
    for scale in (1.0, 2.0, 3.5, 7.0):
        learnt = flow_map.with_guidance(scale).velocity(x, 0.5, condition).detach()
        torch.testing.assert_close(learnt, torch.cat([null + scale * (velocity - null), null[None]]))


# --- a guided teacher -----------------------------------------------------------------------------------------


class Spreading(nn.Module):
    """The exact map of the velocity x - m: F = m + e^(t - s) (x - m), with one centre m a class.

    Its guided velocity is x - (m_null + g (m - m_null)). told: centres are lines in the scale, m_null + g (m - m_null).
    """

    data_shape = (2,)

    def __init__(self, centres: Tensor, told: bool = False) -> None:
        super().__init__()
        self.centres, self.guidance_input = nn.Parameter(centres.clone()), told

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        assert condition is not None
        m = self.centres[condition["label"]]
        if self.guidance_input:
            m = self.centres[-1] + column(condition["guidance"].to(x)) * (m - self.centres[-1])
        interval = t - s
        short = interval.abs() < 1e-6
        rate = torch.where(short, 1 + interval / 2, interval.expm1() / torch.where(short, torch.ones_like(s), interval))
        return column(rate) * (x - m)


CENTRES = torch.tensor([[1.0, -0.5], [-0.7, 0.4], [0.2, 0.3]], dtype=torch.float64)  # the last one is the null class
SCALE = 2.5
GUIDED = CENTRES[-1] + SCALE * (CENTRES - CENTRES[-1])
Distiller = Callable[[FlowMap], Callable[..., Tensor]]
LAGRANGIAN: dict[str, Distiller] = {
    "LMD": lambda teacher: Lagrangian(teacher=teacher, stop="nothing"),
    "LMD, velocity stopped": lambda teacher: Lagrangian(teacher=teacher),
    "AYF-LMD": lambda teacher: Lagrangian(teacher=teacher, stop="target"),
}
EULERIAN: dict[str, Distiller] = {
    "EMD": lambda teacher: Eulerian(velocity="teacher", teacher=teacher, stop="nothing"),
    "EMD, gradient stopped": lambda teacher: Eulerian(velocity="teacher", teacher=teacher, stop="spatial"),
    "AYF-EMD": lambda teacher: Eulerian(velocity="teacher", teacher=teacher),
}
every_distiller = pytest.mark.parametrize("kind", [*LAGRANGIAN, *EULERIAN])


def distilling(kind: str, teacher: FlowMap) -> Callable[..., Tensor]:
    return (LAGRANGIAN | EULERIAN)[kind](teacher)


def spreading(centres: Tensor, told: bool = False) -> FlowMap:
    return FlowMap(Spreading(centres, told), conditioner=Labels(["a", "b"]))


def batch(n: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return numbers(0, n, 2), numbers(1, n, 2), uniforms(2, n, 0.6, 1.0), uniforms(3, n, 0.0, 0.4)


@every_distiller
def test_a_guided_view_teaches_the_guided_velocity(kind: str):
    """No residual at the guided map, one at the plain map, and descent ends at the guided one."""
    teacher, student = spreading(CENTRES).with_guidance(SCALE), spreading(GUIDED)
    condition, (x0, x1, s, t) = asked(student, ["a", "b", ""] * 4), batch()
    assert distilling(kind, teacher)(student, x0, x1, s, t, condition).max() < 1e-20
    assert distilling(kind, spreading(CENTRES))(student, x0, x1, s, t, condition)[:2].min() > 1e-3
    student = spreading(torch.zeros_like(CENTRES))
    optimizer = torch.optim.SGD(student.parameters(), lr=2.0)
    for _ in range(120):
        optimizer.zero_grad()
        distilling(kind, teacher)(student, x0, x1, s, t, condition).mean().backward()
        optimizer.step()
    assert isinstance(student.network, Spreading)
    torch.testing.assert_close(student.network.centres.detach(), GUIDED, atol=1e-6, rtol=0)


@every_distiller
def test_a_guided_teacher_stops_at_its_interval(kind: str):
    """Lagrangian rules ask for the velocity at t, Eulerian ones at s; outside it is the plain one."""
    condition, (x0, x1, s, t) = asked(spreading(CENTRES), ["a", "b", ""] * 4), batch()
    plain, halves = spreading(CENTRES), [(0.0, 0.5), (0.5, 1.0)]
    outside, inside = halves if kind in EULERIAN else reversed(halves)
    assert distilling(kind, plain.with_guidance(SCALE, outside))(plain, x0, x1, s, t, condition).max() < 1e-20
    assert distilling(kind, plain.with_guidance(SCALE, inside))(plain, x0, x1, s, t, condition)[:2].min() > 1e-3


@every_distiller
def test_a_student_that_reads_the_scale_learns_from_a_teacher_that_does_not(kind: str):
    """Scales in the condition guide both, each in its way; a teacher that leaves them out is seen."""
    teacher, student = spreading(CENTRES), spreading(CENTRES, told=True)
    condition, (x0, x1, s, t) = asked(teacher, ["a", "b", ""] * 4), batch()
    scales = torch.tensor([1.0, 2.0, 5.0, 3.5] * 3, dtype=torch.float64)
    assert distilling(kind, teacher)(student, x0, x1, s, t, with_scale(condition, scales)).max() < 1e-20
    unguided = distilling(kind, teacher.with_guidance(1.0, (0.45, 0.55)))(
        student, x0, x1, s, t, with_scale(condition, scales)
    )
    guided = (scales != 1) & (condition["label"] != 2)
    assert unguided[guided].min() > 1e-3
    assert unguided[~guided].max() < 1e-20
