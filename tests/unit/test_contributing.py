"""The examples of CONTRIBUTING.md do what the text says."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from steerfm import config
from steerfm.flow_map import FlowMap
from steerfm.networks import MLP
from steerfm.reward import check

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def module(folder: Path, index: int) -> ModuleType:
    """Write a Python block to a file and import it."""
    path = folder / f"block_{index}.py"
    path.write_text(blocks("python")[index], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, path.stem, made)
        spec.loader.exec_module(made)
    return made


def test_the_reward_is_sound(tmp_path: Path):
    reward = module(tmp_path, 0).Warmth()
    findings = check(reward, torch.rand(6, 3, 8, 8), [f"picture {i}" for i in range(6)])
    assert [finding.message for finding in findings if finding.fault] == []


def test_the_method_keeps_what_is_good_enough(tmp_path: Path):
    method = module(tmp_path, 1).Rejection(threshold=0.55, n=32, jumps=2)
    flow_map = FlowMap(MLP((1, 8, 8), width=16, depth=1))

    def brightness(images, prompts):
        return images.mean((1, 2, 3))

    samples = method(flow_map, brightness, prompts=["a"], seeds=range(4))
    assert samples.rewards is not None and len(samples.rewards) == 4
    assert (samples.rewards >= 0.5).all()
    assert samples.cost.network_calls == 64
    alone = method(flow_map, brightness, prompts=["a"], seeds=[2])
    assert torch.allclose(alone.x0[0], samples.x0[2], atol=1e-6)


def test_the_recipe_composes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    part, recipe = blocks("yaml")
    assert yaml.safe_load(part)["_target_"] == "steerfm.rewards.warmth.Warmth"
    (tmp_path / "mine" / "recipe").mkdir(parents=True)
    (tmp_path / "mine" / "recipe" / "digits_reject.yaml").write_text(recipe, encoding="utf-8")
    (tmp_path / "base").mkdir()
    composed = config.compose("steer", ["recipe=digits_reject", "map=base"], folders=["mine"])
    assert composed.values["method"]["n"] * composed.values["method"]["jumps"] == 64


def test_the_files_that_it_names_are_there():
    named = re.findall(r"`((?:steerfm|tests|recipes|rewards)/[\w./]*)`", TEXT)
    examples = {"recipes/recipe/mine.yaml", "recipes/method/rejection.yaml"}
    assert [name for name in named if name not in examples and not (ROOT / name).exists()] == []
