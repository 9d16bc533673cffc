"""Training under torch.compile: the same losses, gradients, noise and names; one log line where it cannot be."""

import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.optim import AdamW
from trainers import copied, digit_map, equal, point_map, trainer

from steerfm import EMA, Digits, DiT, FlowMap, FlowMapTraining
from steerfm.modules.compiling import Compiler
from steerfm.networks.mlp import randomise
from steerfm.networks.unet import UNet
from steerfm.objectives import (
    Compositional,
    Consistency,
    Eulerian,
    FlowMapMatching,
    FlowMatching,
    Lagrangian,
    SelfAverage,
    Shrinking,
)
from steerfm.times import Triangle
from steerfm.types import Condition, Values

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "dit": lambda: DiT((1, 8, 8), patch=2, width=16, depth=1, heads=2, num_classes=10),
    "unet": lambda: UNet((1, 8, 8), channels=[8, 16], groups=4, num_classes=10),
}
METHODS: dict[str, Callable[[FlowMap], Callable[..., Values]]] = {
    "flow matching": lambda teacher: FlowMatching(),
    "MeanFlow": lambda teacher: Eulerian(),
    "improved MeanFlow": lambda teacher: Eulerian(along="self"),
    "AYF-EMD": lambda teacher: Eulerian(velocity="teacher", teacher=teacher),
    "AYF-LMD": lambda teacher: Lagrangian(teacher=teacher, stop="target"),
    "PSD": lambda teacher: Compositional("uniform"),
    "CT": lambda teacher: Consistency(),
    "CTM": lambda teacher: Consistency(velocity="teacher", teacher=teacher, compare="data"),
    "LSD by differences": lambda teacher: Lagrangian("central"),
    "LSD": lambda teacher: Lagrangian(),
    "ESD": lambda teacher: Eulerian(velocity="self", stop="spatial"),
    "FMM": lambda teacher: FlowMapMatching(),
}


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch.compiler.reset()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what the library has warned of."""
    caplog.set_level(logging.INFO, "steerfm")
    return lambda: [r.getMessage() for r in caplog.records if r.levelno > logging.INFO and "steerfm" in r.name]


def random_map(network: str, seed: int = 0) -> FlowMap:
    built = NETWORKS[network]()
    randomise(built, 0.2, seed)
    return FlowMap(built)


def inputs(count: int = 8, seed: int = 0) -> tuple[Any, ...]:
    """Return x0, x1, strided times, labels, a generator and a step."""
    generator = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(2, count, 1, 8, 8, generator=generator)
    s, t = torch.rand(count, 2, generator=generator).unbind(1)
    label = torch.randint(0, 10, (count,), generator=generator)
    return x0, x1, torch.maximum(s, t), t, Condition({"label": label}), generator, seed


def gradient(flow_map: FlowMap, losses: Values) -> Tensor:
    got = torch.autograd.grad(losses.mean(), list(flow_map.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in got])


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm())


def double(flow_map: FlowMap, x0: Tensor, *others: Any) -> Values:
    """Cost twice as much when compiled."""
    losses = (flow_map.average_velocity(x0, 1.0, 0.0, others[3]) ** 2).mean((1, 2, 3))
    return 2 * losses if torch.compiler.is_compiling() else losses


def test_without_a_compiler_training_is_plain_and_says_so_once(lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    flow_map = random_map("dit")
    compiler = Compiler(flow_map.parameters)
    for objective in (FlowMatching(), double):
        wanted = objective(flow_map, *inputs())
        assert torch.equal(compiler(objective, flow_map, *inputs()), wanted)
    assert lines() == ["No C++ compiler was found, so training is not compiled: install g++, or set CXX."]


def test_what_does_not_compile_runs_plain_and_says_why_once(lines: Any) -> None:
    flow_map, objective = point_map(), Eulerian()
    compiler = Compiler(flow_map.parameters)
    x0, x1 = torch.randn(2, 2, 4, 2)
    s, t = torch.rand(2, 4)
    with inductor.patch({"cpp.cxx": (None, "false"), "fx_graph_cache": False}):
        for step in (0, 1):
            got = compiler(objective, flow_map, x0[step], x1[step], s, t)
            assert torch.equal(got, objective(flow_map, x0[step], x1[step], s, t))
    (line,) = lines()
    assert line.startswith("Eulerian is not compiled (") and "derivative='central'" in line


def test_what_compiles_to_something_else_runs_plain(lines: Any) -> None:
    flow_map = FlowMap(NETWORKS["dit"]())  # it starts at zero, where twice the loss is the same
    compiler, before = Compiler(flow_map.parameters), copied(flow_map.state_dict())
    arguments = inputs()
    assert torch.equal(compiler(double, flow_map, *arguments), double(flow_map, *arguments))
    (line,) = lines()
    assert line.startswith("double is not compiled (its losses would be off by ")
    assert equal(flow_map.state_dict(), before)


def test_a_check_in_mid_step_leaves_what_came_before_differentiable() -> None:
    flow_map = random_map("dit")
    earlier = double(flow_map, *inputs())
    wanted = gradient(flow_map, double(flow_map, *inputs()))
    Compiler(flow_map.parameters)(double, flow_map, *inputs())
    assert torch.equal(gradient(flow_map, earlier), wanted)


def test_validation_is_plain() -> None:
    seen = []

    def objective(flow_map: FlowMap, x0: Tensor, *others: Any) -> Values:
        seen.append(torch.compiler.is_compiling())
        return (flow_map.velocity(x0, 0.5) ** 2).mean(1)

    module = FlowMapTraining(point_map(), objective, Triangle(0.0), compile=True).eval()
    module.losses({"x0": torch.randn(4, 2), "prompt": [""] * 4}, torch.Generator(), False)
    assert seen == [False]


def test_a_gradient_through_a_tangent_passes_layer_norm() -> None:
    flow_map, objective = point_map(), Lagrangian()
    x0, x1 = torch.randn(2, 8, 2)
    s, t = torch.rand(2, 8)
    compiled = torch.compile(objective, backend="aot_eager")
    wanted, got = (gradient(flow_map, each(flow_map, x0, x1, s, t)) for each in (objective, compiled))
    assert gap(wanted, got) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_those_of_plain_training(method: str, network: str, lines: Any) -> None:
    flow_map, objective = random_map(network), METHODS[method](random_map(network, seed=1).frozen_copy())
    compiler = Compiler(flow_map.parameters)
    for seed in (0, 1):
        plain, compiled = (call(flow_map, *inputs(seed=seed)) for call in (objective, partial(compiler, objective)))
        assert gap(plain, compiled) < 1e-5
        assert gap(gradient(flow_map, plain), gradient(flow_map, compiled)) < 1e-5
    assert lines() == []


@pytest.mark.slow
@pytest.mark.parametrize("objective", [Consistency(Shrinking(0.5, 0.01, 100)), Eulerian(warm_up=100)])
def test_a_schedule_compiles_twice_and_not_at_every_step(objective: Callable[..., Values]) -> None:
    flow_map = random_map("dit")
    compiler = Compiler(flow_map.parameters)
    graphs = []
    for seed in range(12):
        compiled = compiler(objective, flow_map, *inputs(seed=seed))
        assert gap(objective(flow_map, *inputs(seed=seed)), compiled) < 1e-5
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) <= 2


@pytest.mark.slow
def test_dropout_draws_what_it_draws_in_plain_training(lines: Any) -> None:
    class Dropping(DiT):
        def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5), s, t, condition)

    torch.manual_seed(0)
    flow_map = FlowMap(Dropping((1, 8, 8), patch=2, width=16, depth=1, heads=2, num_classes=10))
    randomise(flow_map.network, 0.2)
    compiler, objective, got = Compiler(flow_map.parameters), FlowMatching(), []
    for call in (partial(compiler, objective), objective, partial(compiler, objective)):
        torch.manual_seed(1)
        got.append(call(flow_map, *inputs()))
    assert gap(got[1], got[0]) < 1e-5 and gap(got[1], got[2]) < 1e-5
    assert lines() == []


@pytest.mark.slow
def test_a_compiled_run_is_saved_and_averaged_as_a_plain_one(tmp_path: Path, lines: Any) -> None:
    ends = []
    for compile in (False, True):
        module = FlowMapTraining(
            digit_map(),
            Consistency(average=SelfAverage(0.5), velocity="self"),
            Triangle(0.5),
            optimizer=partial(AdamW, lr=1e-2, eps=1e-3),
            flow_matching_steps=2,
            guidance=2.0,
            prompt_dropout=0.5,
            compile=compile,
        )
        ema = EMA(0.9)
        trainer(tmp_path, 5, ema, val_check_interval=4).fit(module, Digits(16, validation_size=8))
        loaded = FlowMap.load(module.save(tmp_path / str(compile)))
        ends.append((copied(module.state_dict()), ema.average, loaded.state_dict()))
    for plain, compiled in zip(*ends, strict=True):
        assert set(plain) == set(compiled)
        for name, tensor in plain.items():
            torch.testing.assert_close(tensor, compiled[name], rtol=1e-4, atol=1e-5)
    assert lines() == []


@pytest.mark.slow
@pytest.mark.parametrize("objective", [Eulerian(), Eulerian(along="self")], ids=["MeanFlow", "improved"])
def test_a_compiled_step_of_the_digits_dit_is_faster(objective: Callable[..., Values]) -> None:
    torch.set_num_threads(1)
    data = Digits(128, captions=False, validation_size=0)
    modules = []
    for compile in (False, True):
        flow_map = FlowMap(DiT((1, 8, 8), patch=2, width=128, depth=4, heads=4))
        modules.append(FlowMapTraining(flow_map, objective, Triangle(), prompt_dropout=0.0, compile=compile))

    def seconds(module: FlowMapTraining) -> float:
        start = time.process_time()
        for step in range(4):
            module.losses(data.batch(step), torch.Generator().manual_seed(step), False)[0].mean().backward()
        return time.process_time() - start

    rounds = [[seconds(module) for module in modules] for _ in range(8)]
    assert statistics.median(compiled / plain for plain, compiled in rounds[1:]) < 0.85
