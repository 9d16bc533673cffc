"""The true reward of prompt following."""

import math

import pytest
import torch

from steerfm.data.shapes import Shapes
from steerfm.errors import RewardError
from steerfm.metrics.prompt_following import prompt_following
from steerfm.reward import check
from steerfm.rewards.shape_prompts import PARTS, ShapePrompts
from steerfm.shapes import Object, render

SCENE = (Object("circle", "red", 0.25, 0.5, 0.11), Object("square", "blue", 0.75, 0.5, 0.17))


def test_parts_are_the_metrics() -> None:
    batch = Shapes(60, count=2).batch(0)
    images, prompts = (batch["x0"] + 1) / 2, [*batch["prompt"][:20], *batch["prompt"][21:], batch["prompt"][20]]
    values = prompt_following(images, prompts).values
    for part in {*PARTS} - {"graded", "position"}:
        assert ShapePrompts(part)(images, prompts).total.tolist() == pytest.approx(values[part].tolist())
    graded = torch.stack([values[p] for p in ("color", "shape", "count", "binding", "position")]).nanmean(0)
    found = ShapePrompts("graded")(images, prompts).total
    assert found.tolist() == pytest.approx(graded.tolist())
    assert ((found == 1) == (ShapePrompts()(images, prompts).total == 1)).all()
    assert (found[:20] == 1).all()


def test_position_by_hand() -> None:
    prompts = ["a red circle left of a square", "a red circle right of a square"]
    assert ShapePrompts("position")(render([SCENE] * 2), prompts).total.tolist() == [1, 0]
    with pytest.raises(RewardError, match="'a circle' asks for none: use part='graded'"):
        ShapePrompts("position")(render([SCENE]), ["a circle"])


def test_its_check_finds_nothing() -> None:
    images, prompts = render([SCENE, SCENE[:1], SCENE[1:], ()]), ["a red circle", "a circle", "a square", "a cross"]
    assert not ShapePrompts().differentiable
    assert check(ShapePrompts(), images, prompts) == []


def test_wrong_input_is_one_sentence() -> None:
    with pytest.raises(RewardError, match="no part 'colour'; did you mean 'color'"):
        ShapePrompts("colour")
    with pytest.raises(RewardError, match="cannot be read as a scene: a shape was expected at 'cat'"):
        ShapePrompts()(render([SCENE]), ["a cat"])
    with pytest.raises(RewardError, match="not finite"):
        ShapePrompts()(torch.full((1, 3, 32, 32), math.nan), ["a circle"])
    with pytest.raises(RewardError, match="square RGB pictures"):
        ShapePrompts()(torch.zeros(1, 1, 8, 8), ["a circle"])
