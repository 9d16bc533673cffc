"""No recipe of the landscape is another's copy: on one batch and one network each has a gradient of its own."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tiny_recipes import RECIPES, tiny
from torch import Tensor

from steerfm import config
from steerfm.modules import FlowMapTraining
from steerfm.networks import PlainMLP
from steerfm.networks.mlp import randomise
from steerfm.objectives.teachers import Following

NAMES = sorted(name for name in RECIPES if name.startswith("landscape/"))
STEP = 5_200  # of 10,000: past every warm-up, and in the middle of every schedule

# Pairs whose gradients agree, and why; docs/taxonomy.md says the same.
EQUAL: dict[frozenset[str], str] = {}


def gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return the gradient of a training step in the map's weights, all maps and batches being the same."""
    arguments = [text for text in tiny(name)[1:] if not text.startswith(("trainer.max_steps", "module.flow_matching"))]
    values = config.compose("train", [*arguments, "data.batch_size=32"]).values
    module = config.instantiate(values["module"])
    assert isinstance(module, FlowMapTraining)
    monkeypatch.setattr(FlowMapTraining, "global_step", STEP)
    for i, follower in enumerate(module.modules()):
        if isinstance(follower, Following):
            follower.begin(module.flow_map)
            randomise(_mlp(follower), seed=50 + i)  # it has fallen behind the map
    module.double()
    for teacher in module._teachers:
        teacher.module.double()
    randomise(_mlp(module.flow_map), seed=0)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(32, 2, generator=generator, dtype=torch.float64) * 2 - 1
    losses, s, t = module.losses({"x0": x0, "prompt": [""] * 32}, generator, False)
    module.weighting(losses, s, t).mean().backward()
    return torch.cat([p.grad.flatten() for p in _mlp(module.flow_map).parameters() if p.grad is not None])


def _mlp(module: torch.nn.Module) -> PlainMLP:
    return next(part for part in module.modules() if isinstance(part, PlainMLP))


def test_every_recipe_has_a_gradient_of_its_own(here: Path, monkeypatch: pytest.MonkeyPatch):
    gradients = {name.split("/")[1]: gradient(name, monkeypatch) for name in NAMES}
    assert len(gradients) == 30
    assert {len(found) for found in gradients.values()} == {len(gradients["lsd"])}
    for a, b in itertools.combinations(gradients, 2):
        gap = float((gradients[a] - gradients[b]).norm() / gradients[b].norm())
        assert (gap < 1e-9) == (frozenset((a, b)) in EQUAL), (a, b, gap)
        assert gap < 1e-9 or gap > 1e-3, (a, b, gap)
