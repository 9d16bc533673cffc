"""A pretrained velocity model told a second time: nothing changes at first, and it learns to jump."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from steerfm import Compositional, Eulerian, FlowMatching, Lagrangian, Unsteered
from steerfm.backbones import LoRA, two_times
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.objectives import Total

tiny: Any = pytest.importorskip("tiny_pipelines")

PROMPTS = ["a red circle", "the blue square"]
FAMILIES = ["sd3", "flux-dev", "flux-schnell", "sana", "sd-epsilon", "sd-v", "pixart"]


def loaded(loader: Any, name: str) -> FlowMap:
    return loader.map(name, guidance_scale=1.0, **({"size": 16} if name.startswith("flux") else {}))


def last_layer(flow_map: FlowMap) -> torch.nn.Linear:
    """Return the layer that starts at zero."""
    network: Any = flow_map.network
    return network.interval[2]


def states(flow_map: FlowMap, count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *flow_map.data_shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_at_first_every_jump_is_an_euler_step_of_the_model(loader: Any, name: str) -> None:
    plain = loaded(loader, name)
    told = two_times(plain)
    x, condition = states(plain, 2), plain.encode_prompts(PROMPTS)
    with torch.no_grad():
        for s, t in ((0.9, 0.2), (0.5, 0.5), (0.3, 0.0)):
            assert torch.equal(told.average_velocity(x, s, t, condition), plain.velocity(x, s, condition))
        last_layer(told).weight.normal_(generator=torch.Generator().manual_seed(0))
        assert not torch.allclose(told.average_velocity(x, 0.9, 0.2, condition), plain.velocity(x, 0.9, condition))
        assert torch.equal(plain.average_velocity(x, 0.9, 0.2, condition), plain.velocity(x, 0.9, condition))


@pytest.mark.parametrize("name", ["sana", "sd-v"])
@pytest.mark.parametrize("lora", [False, True])
def test_it_learns_to_jump(loader: Any, name: str, lora: bool) -> None:
    """Taught by the model's own small steps, one jump comes nearer to where they lead."""
    teacher = loaded(loader, name)
    told = two_times(teacher) if not lora else LoRA(4)(two_times(teacher))
    teacher = loaded(loader, name)
    x, condition = states(teacher, 8), teacher.encode_prompts(PROMPTS * 4)
    with torch.no_grad():
        end = x.clone()
        for i in range(16):
            end = teacher.jump(end, 1 - i / 16, 1 - (i + 1) / 16, condition)
        before = float((told.jump(x, 1.0, 0.0, condition) - end).square().mean())
    trained = [parameter for parameter in told.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        u = told.average_velocity(x, 1.0, 0.0, condition)
        (u - (x - end)).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        after = float((told.jump(x, 1.0, 0.0, condition) - end).square().mean())
    assert after < 0.5 * before


@pytest.mark.parametrize("name", ["sd3", "sd-epsilon"])
@pytest.mark.parametrize(
    "objective",
    [
        Compositional(), Total([Compositional(), FlowMatching()]), Lagrangian(), Lagrangian(derivative="central"),
        Eulerian(),
    ],
    ids=["psd", "psd+fm", "lsd", "lsd-central", "mean_flow"],
)  # fmt: skip
def test_every_rule_teaches_it(loader: Any, name: str, objective: Any) -> None:
    told = two_times(loaded(loader, name))
    x0, x1, condition = states(told, 2), states(told, 2, 1), told.encode_prompts(PROMPTS)
    s, t = torch.tensor([0.9, 0.6]), torch.tensor([0.2, 0.5])
    loss = objective(told, x0, x1, s, t, condition)
    assert loss.shape == (2,) and bool(loss.isfinite().all())
    loss.sum().backward()
    gradient = last_layer(told).weight.grad
    assert gradient is not None and float(gradient.abs().max()) > 0


def test_it_saves_loads_and_samples(loader: Any, tmp_path: Path) -> None:
    told = two_times(loaded(loader, "sd3"))
    with torch.no_grad():
        last_layer(told).weight.normal_()
    again = FlowMap.load(told.save(tmp_path / "map"))
    sample = partial(Unsteered("jumps", 2), prompts=PROMPTS, seeds=[1])
    assert torch.equal(sample(told).images, sample(again).images)


def test_half_precision_keeps_its_layers_in_float32(loader: Any) -> None:
    told = two_times(loader.map("sd3", dtype="bfloat16", guidance_scale=1.0))
    assert last_layer(told).weight.dtype == torch.float32
    with torch.no_grad():
        assert told.average_velocity(states(told, 2), 0.9, 0.2, told.encode_prompts(PROMPTS)).isfinite().all()


def test_maps_that_cannot_or_need_not_are_refused(loader: Any) -> None:
    with pytest.raises(ConfigError, match="knows jumps to data alone"):
        two_times(loaded(loader, "sd-turbo"))
    with pytest.raises(ConfigError, match="has two times already"):
        two_times(two_times(loaded(loader, "sd3")))
