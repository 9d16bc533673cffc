"""Prompt following: by hand, its floor, its chance, and how blur and noise lower it."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from steerfm.data.shapes import Shapes
from steerfm.errors import DataError
from steerfm.metrics.prompt_following import PARTS, prompt_following
from steerfm.shapes import Object, render

SCENE = (Object("circle", "red", 0.25, 0.5, 0.11), Object("square", "blue", 0.75, 0.5, 0.17))


@functools.cache
def true() -> tuple[Tensor, list[str]]:
    batch = Shapes(1000, split="held_out").batch(0)
    return (batch["x0"] + 1) / 2, batch["prompt"]


def test_by_hand() -> None:
    prompts = ["a red circle left of a blue square", "a blue circle and a red square", "a red circle", "two crosses"]
    found = prompt_following(render([SCENE] * 4), prompts)
    expected = {
        "color": [1, 1, 1, 1],  # "two crosses" asks for no colour
        "shape": [1, 1, 1, 0],
        "count": [1, 1, 0, 1],
        "binding": [1, 0, 1, 0],
        "correct": [1, 0, 0, 0],
    }
    assert {part: found.values[part].tolist() for part in expected} == expected
    assert found.values["position"].isnan().tolist() == [False, True, True, True]
    assert (found.position.mean, found.position.n) == (1, 1)
    assert math.isnan(found.position.standard_error)
    assert (found.binding.mean, found.binding.n) == (0.5, 4)
    assert found.binding.standard_error == pytest.approx(math.sqrt(1 / 3) / 2)  # deviation over the root of n


def test_true_scenes_score_one_and_others_what_chance_gives() -> None:
    images, prompts = true()
    assert all(getattr(prompt_following(images, prompts), part).mean == 1 for part in PARTS)
    chance = prompt_following(images, [*prompts[1:], prompts[0]])
    stated = {"color": 0.29, "shape": 0.35, "count": 0.36, "binding": 0.07, "position": 0.001, "correct": 0.009}
    for part, value in stated.items():
        share = getattr(chance, part)
        assert abs(share.mean - value) < 4 * max(share.standard_error, 0.003)  # two samples of scenes


def scores(spoilt: list[Tensor]) -> list[float]:
    return [prompt_following(images, true()[1][:300]).correct.mean for images in spoilt]


def test_blur_lowers_the_score() -> None:
    images = true()[0][:300]
    found = scores([gaussian_blur(images, [15, 15], [width, width]) for width in (0.3, 0.5, 0.7, 1.0, 1.5)])
    assert found == sorted(found, reverse=True)
    # measured on 1000 scenes: 1, 1, 0.52, 0.09, 0; 0.12 is four standard errors at 300
    assert found == pytest.approx([1, 1, 0.52, 0.09, 0], abs=0.12)


def test_noise_lowers_the_score() -> None:
    images = true()[0][:300]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    found = scores([images + strength * noise for strength in (0.05, 0.1, 0.15, 0.2, 0.3)])
    assert found == sorted(found, reverse=True)
    assert found == pytest.approx([1, 0.97, 0.26, 0.03, 0], abs=0.12)


@pytest.mark.parametrize(
    ("images", "prompts", "said"),
    [
        (render([SCENE]), "a red circle", "one string for 1 pictures"),
        (render([SCENE]), [], "got 0 prompts for 1 pictures"),
        (render([SCENE]), ["a cat"], "a shape was expected at 'cat'"),
        (render([SCENE])[:, :1], ["a circle"], "square RGB pictures"),
        (torch.full((1, 3, 32, 32), math.nan), ["a circle"], "Picture 0 has pixels that are not finite"),
    ],
)
def test_unfit_input_is_one_sentence(images: Tensor, prompts: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        prompt_following(images, prompts)


def test_no_pictures_have_no_mean() -> None:
    found = prompt_following(torch.zeros(0, 3, 32, 32), [])
    assert math.isnan(found.correct.mean)
    assert found.correct.n == 0
