"""A demo is a list of recipes: finished stages are kept, changed ones made anew, interrupted ones continued."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_recipes import read, tiny

from steerfm.cli import main

HASTY = """\
from pathlib import Path


def hasty(images, prompts):
    if Path("hurry").exists():
        raise KeyboardInterrupt
    return images.flatten(1).mean(1)
"""


def stage(name: str, recipe: str, *more: str) -> dict[str, Any]:
    """Return a stage that runs a recipe in a moment."""
    command, *values = tiny(recipe)
    overrides = [text for text in values if not text.startswith(("recipe=", "name=", "map="))] + list(more)
    return {"title": f"Make {name}", "name": name, "command": command, "recipe": recipe, "overrides": overrides}


@pytest.fixture
def kitchen_table(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty current directory with a demo of the user's own in ./recipes, and a reward."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (workplace / "hurried.py").write_text(HASTY)
    stages = [
        stage("moons", "moons"),
        stage("few", "points_sample", "map=${folder}/moons"),
        stage("more", "points_sample", "map=${folder}/moons", "method.steps=8"),
        {**stage("both", "compare", "runs=[few,more]"), "title": "Compare"},
    ]
    write(workplace, stages)
    return workplace


def write(folder: Path, stages: list[dict[str, Any]]) -> None:
    path = folder / "recipes" / "demo" / "mine.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"stages": stages}))


def stages_of(folder: Path) -> list[dict[str, Any]]:
    return yaml.safe_load((folder / "recipes" / "demo" / "mine.yaml").read_text())["stages"]


def test_stages_run_once_and_again_only_if_their_recipe_or_an_input_changed(
    kitchen_table: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["demo", "mine"]) == 0
    first = capsys.readouterr().out
    assert "4/4" in first and "page.html" in first and "All 4 stages took" in first
    started = {name: read(kitchen_table / "runs" / name)["started"] for name in ("moons", "few", "more", "both")}
    assert main(["demo", "mine"]) == 0
    second = capsys.readouterr().out
    assert second.count("kept:") == 4 and "page.html" in second
    assert {name: read(kitchen_table / "runs" / name)["started"] for name in started} == started
    stages = stages_of(kitchen_table)
    stages[2]["overrides"].append("method.sampler=euler")
    write(kitchen_table, stages)
    assert main(["demo", "mine"]) == 0
    third = capsys.readouterr().out
    assert third.count("kept:") == 2, "the map and the other samples are unchanged"
    assert (kitchen_table / "runs" / "more.old-1" / "samples.jsonl").exists()


def test_an_interrupted_demo_goes_on_where_it_was(kitchen_table: Path, capsys: pytest.CaptureFixture[str]):
    stages = stages_of(kitchen_table)
    stages[1]["overrides"] += ["reward=hurried:hasty"]
    write(kitchen_table, stages)
    (kitchen_table / "hurry").touch()
    assert main(["demo", "mine"]) == 130
    assert "steerfm demo mine" in capsys.readouterr().err
    assert read(kitchen_table / "runs" / "few")["error"] == "interrupted"
    (kitchen_table / "hurry").unlink()
    assert main(["demo", "mine"]) == 0
    out = capsys.readouterr().out
    assert out.count("kept:") == 1 and "Continuing runs/few" in out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"comand": "train"}, "no such key 'comand'; did you mean 'command'?"),
        ({"command": "tarin"}, "command is one of train"),
        ({"recipe": "moon"}, "did you mean 'moons'?"),
        ({"overrides": ["netwrk.width=3"]}, "did you mean 'network'?"),
    ],
)
def test_a_wrong_stage_is_named_before_anything_runs(
    change: dict[str, Any], said: str, kitchen_table: Path, capsys: pytest.CaptureFixture[str]
):
    stages = stages_of(kitchen_table)
    write(kitchen_table, [stages[0], {**stages[0], "name": "second", **change}])
    assert main(["demo", "mine"]) == 2
    assert said in capsys.readouterr().err
    assert not (kitchen_table / "runs").exists()
