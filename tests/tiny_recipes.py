"""Recipes made so small that they run in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steerfm import config
from steerfm.recipe_files import Library

LIBRARY = Library()
RECIPES = {recipe.name: recipe for recipe in LIBRARY.recipes()}
COMMANDS = {name: config.preview([f"recipe={name}"])["command"] for name in RECIPES}

PRETRAINED = {name for name in RECIPES if name.split("_")[0] in ("pretrained", "flux", "sana", "latents")}
PRETRAINED |= {name for name in RECIPES if name.startswith("rehearsal/")}  # test_pretrained_recipes.py runs these

PAIRS = Path(__file__).parent / "data" / "pairs" / "pairs.jsonl"

# What makes a run tiny, by the first key of the recipe that it needs.
TINY = {
    "trainer.max_steps": ["trainer.max_steps=2", "trainer.enable_progress_bar=false", "checkpoint_every=1"],
    "network.width": ["network.width=16", "network.depth=1"],
    "network.channels": ["network.channels=[8,8]", "network.attention_heads=2"],
    "module.flow_matching_steps": ["module.flow_matching_steps=1"],
    "module.model.vision_cfg": ["module.model.vision_cfg.layers=1", "module.model.text_cfg.layers=1"],
    "data.prompts_per_step": ["data.prompts_per_step=4"],
    "data.batch_size": ["data.batch_size=8"],
    "data.seeds": ["seeds=[3,5]"],
    "callbacks.guard.samples": ["callbacks.guard.samples=20"],
    "callbacks.guard.prompts.n": ["callbacks.guard.prompts.n=2"],
    "callbacks.guard.data.n": ["callbacks.guard.data.n=8"],
    "drawn.n": ["drawn.n=1"],
    "reference.n": ["reference.n=40"],
    "method.particles": ["method.particles=2"],
    "method.jumps": ["method.jumps=2"],
    "method.pool": ["method.pool=8"],
    "method.steps": ["method.steps=2"],
    "method.sde_steps": ["method.sde_steps=2"],
    "method.count": ["method.count=2"],
    "points": ["points=moons"],
    "data.temperature": ["data.validation_size=8"],
    "pairs": [f"pairs={PAIRS}", "data.size=8", "data.validation_size=2"],
    "module.network.weights": ["module.network.model=runs/digits_clip/clip", "module.network.weights=null"],
}
NEEDS = {"clip": "digits_clip", "teacher": "moons"}  # missing values, and whose run fills them; `map` by the data


def find(values: Any, key: str) -> bool:
    """Say whether a dotted key is in nested dictionaries."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def tiny(name: str, *more: str) -> list[str]:
    """Return the arguments that run a recipe in a moment."""
    parts = [text for text in more if text.startswith(("method=", "reward=", "objective="))]
    values = config.preview([f"recipe={name}", *parts])
    steps = values.get("trainer", {}).get("max_steps", -1) > 0
    chosen = [text for key, texts in TINY.items() if find(values, key) for text in texts]
    if not steps:
        chosen = [text for text in chosen if not text.startswith(("trainer.max_steps", "checkpoint_every"))]
    if steps and find(values, "trainer.val_check_interval"):
        chosen.append("trainer.val_check_interval=2")
    if values.get("trainer", {}).get("accelerator") == "gpu":
        chosen.append("trainer=cpu")
    kind = "moons" if "points" in values else "shapes" if name.startswith("shapes") else "digits"
    needs = {**NEEDS, "map": kind}
    chosen += [f"{key}=runs/{run}" for key, run in needs.items() if values.get(key) == "???"]
    if "teacher" not in values and "'???'" in str(values.get("objective")):
        chosen.append(f"objective.teacher.path=runs/{name}")
    if "teacher" not in values and "${teacher}" in str(values.get("objective")):
        chosen.append(f"+teacher=runs/{name}")
    return [COMMANDS[name], f"recipe={name}", f"name={name}", *chosen, *more]


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())
