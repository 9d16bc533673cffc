"""Recipes, their overrides and what is composed of them, damaged: nothing that they name is run or imported."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import given

from fuzz.damage import damaged, damaged_bytes, garbage, hostile, randoms
from fuzz.watching import often, watched
from steerfm import config
from steerfm.checking import check

RECIPE: dict[str, Any] = {
    "defaults": [{"/objective@module.objective": "lagrangian"}, {"/times": "triangle"}, "_self_"],
    "command": "train",
    "seed": 3,
    "name": "${label}",
    "label": "a",
    "network": {"_target_": "steerfm.MLP", "data_shape": [2], "width": 4, "depth": 1},
    "flow_map": {"_target_": "steerfm.FlowMap", "network": "${network}", "path": {"_target_": "steerfm.paths.Linear"}},
    "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.001},
    "callbacks": {"ema": {"_target_": "steerfm.callbacks.EMA", "decay": 0.9}},
    "map": {"_target_": "steerfm.FlowMap.load", "path": "nothing"},
    "prompts": ["a red circle", "b"],
    "sizes": {"a": [1, 2.5, {"b": None}]},
}
OVERRIDES = ["seed=4", "network.width=8", "+x.y=[1,2]", "~callbacks", "++a={b:1}", "label='a b'", "times=triangle"]
BUILT = ("network", "flow_map", "optimizer", "callbacks", "map", "x", "sizes")


def text_of(random: Random) -> bytes:
    """Return a recipe as YAML: damaged as data, as text, or garbage."""
    head = b"# @package _global_\n"
    kind = random.randrange(8)
    if kind == 0:
        return head + garbage(random, [b"a: ", b"- ", b"&a [*a", b"!!python/object:os.system ", b"a: !!binary ", b"? "])
    if kind <= 2:
        return head + damaged_bytes(random, yaml.safe_dump(RECIPE).encode())
    values = damaged(random, RECIPE)
    return head + yaml.dump(values, allow_unicode=bool(random.randrange(2))).encode("utf-8", "surrogatepass")


def overrides_of(random: Random) -> list[str]:
    """Return overrides as somebody could type or paste them."""
    chosen = [random.choice(OVERRIDES) for _ in range(random.randrange(3))]
    if random.randrange(3) == 0:
        chosen.append(f"{random.choice(['x', '+x', 'seed', 'network', '+network._target_'])}={hostile(random)}"[:2000])
    if random.randrange(3) == 0 and chosen:
        chosen[-1] = damaged_bytes(random, chosen[-1].encode()).decode("utf-8", "surrogateescape")
    return chosen


@often
@given(random=randoms)
def test_a_recipe_composes_or_is_refused(workshop: Path, random: Random):
    (workshop / "recipes" / "recipe").mkdir(parents=True, exist_ok=True)
    (workshop / "recipes" / "recipe" / "sent.yaml").write_bytes(text_of(random))
    with watched():
        config.compose("train", ["recipe=sent", *overrides_of(random)])


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """Return the recipe as it is after composing."""
    flow_map = {**RECIPE["flow_map"], "network": RECIPE["network"]}
    return {**{key: value for key, value in RECIPE.items() if key != "defaults"}, "name": "a", "flow_map": flow_map}


@often
@given(random=randoms)
def test_what_is_composed_is_built_or_refused(workshop: Path, composed: dict[str, Any], random: Random):
    values = damaged(random, composed, most=4)
    with watched(ModuleNotFoundError):  # the command line names the extra of a missing package
        values = values if isinstance(values, dict) else {"x": values}
        check(values)
        recipe = config.Composed("sent", values)
        for key in BUILT:
            recipe.build(key)


def test_what_is_whole_is_built(workshop: Path, composed: dict[str, Any]):
    """Nothing that is refused here would say anything if whole recipes were refused as well."""
    (workshop / "recipes" / "recipe").mkdir(parents=True)
    (workshop / "recipes" / "recipe" / "sent.yaml").write_text("# @package _global_\n" + yaml.safe_dump(RECIPE))
    values = config.compose("train", ["recipe=sent"]).values
    assert values["flow_map"] == composed["flow_map"]
    built = config.Composed("sent", composed)
    assert all(built.build(key) is not None for key in BUILT if key not in ("map", "x"))


@often
@given(random=randoms)
def test_a_sweep_is_divided_or_refused(workshop: Path, random: Random):
    with watched():
        config.sweep([*overrides_of(random), "seed=1,2"])
