"""Scenes of shapes: what is rendered is parsed back, and what is no scene is not."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch

from steerfm.errors import ConfigError, DataError
from steerfm.shapes import (
    COLORS,
    LEAST_FIT,
    SHAPES,
    SPLITS,
    TIE,
    UNSEEN,
    Object,
    Scene,
    coverage,
    lies,
    parse,
    patches,
    relation,
    render,
    sample_scene,
)


@functools.cache
def scenes() -> list[Scene]:
    """Return 10,200 random scenes: each split with each count."""
    rng = np.random.default_rng(0)
    return [sample_scene(rng, n, split) for split in SPLITS for n in (None, 1, 2, 3) for _ in range(850)]


def nearest_pairs(scene: Scene, found: Scene) -> list[tuple[Object, Object]]:
    return [(item, min(found, key=lambda b, a=item: math.hypot(a.x - b.x, a.y - b.y))) for item in scene]


# How far parsing may move a centre and a radius, in pixels, and the least fit, about a fifth beyond what is measured
# (0.083, 0.046 and 0.9555 at 32; 0.039, 0.025 and 0.9897 at 64): edges are sampled at pixel centres.
@pytest.mark.parametrize(
    ("size", "step", "moved", "grown", "fit"), [(32, 1, 0.1, 0.055, 0.95), (64, 5, 0.05, 0.03, 0.985)]
)
def test_rendering_and_parsing_agree(size: int, step: int, moved: float, grown: float, fit: float) -> None:
    chosen = scenes()[::step]
    assert len(chosen) >= (10_000 if size == 32 else 2_000)
    for start in range(0, len(chosen), 1000):
        part = chosen[start : start + 1000]
        for scene, found in zip(part, parse(render(part, size)), strict=True):
            pairs = nearest_pairs(scene, found)
            assert len(found) == len(scene) == len({id(b) for _, b in pairs})
            for a, b in pairs:
                assert (a.shape, a.color, a.size) == (b.shape, b.color, b.size)
                assert max(abs(a.x - b.x), abs(a.y - b.y)) * size < moved
                assert abs(a.radius - b.radius) * size < grown
                assert b.fit > fit > LEAST_FIT + 0.1
            for (a, c), (b, d) in itertools.permutations(pairs, 2):
                assert lies(c, d, relation(a, b))


def kinds(scene: Scene) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((item.color, item.shape) for item in scene))


def test_splits_never_share_what_is_held_out() -> None:
    train, held_out, unseen = (scenes()[i * 3400 : (i + 1) * 3400] for i in range(3))
    assert not UNSEEN & {kind for scene in [*train, *held_out] for kind in kinds(scene)}
    assert all(UNSEEN & set(kinds(scene)) for scene in unseen)
    several = [{kinds(scene) for scene in split if len(scene) > 1} for split in (train, held_out)]
    assert min(len(each) for each in several) > 50
    assert not several[0] & several[1]


def test_scenes_depend_on_the_generator_alone_and_never_change() -> None:
    scene = sample_scene(np.random.default_rng(5), 3)
    assert scene == sample_scene(np.random.default_rng(5), 3)
    assert len(scene) == 3
    assert len(set(scenes()[:850])) == 850


def test_objects_keep_clear_of_each_other_and_of_the_border() -> None:
    for scene in scenes()[::20]:
        alone = [render([(item,)])[0].amax(0) > 0 for item in scene]
        assert sum(mask.int() for mask in alone).max() <= 1  # type: ignore[union-attr]
        assert max(float(render([scene]).amax(1)[0][edge].max()) for edge in (0, -1)) < 0.05  # MARGIN is 0.96 pixels


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_differentiable(shape: str) -> None:
    numbers = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.413], [0.557], [0.171])]
    assert torch.autograd.gradcheck(lambda x, y, r: coverage(shape, x, y, r, 12), numbers)
    centred = [torch.tensor([v], requires_grad=True) for v in (1.5 / 8, 1.5 / 8, 0.3)]  # a pixel's very centre
    coverage(shape, centred[0], centred[1], centred[2], 8).sum().backward()
    assert all(v.grad is not None and v.grad.isfinite().all() for v in centred)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_one_radius_have_one_area(shape: str) -> None:
    x, y, radius = torch.tensor([[0.5], [0.51], [0.2]])
    area = coverage(shape, x, y, radius, 256).mean()
    assert float(area) == pytest.approx(math.pi * 0.2**2, rel=0.005)


CIRCLE = Object("circle", "red", 0.5, 0.5, 0.17)


@pytest.mark.parametrize("noise", [False, True])
def test_what_holds_no_object(noise: bool) -> None:
    full = [torch.tensor(color)[:, None, None].expand(3, 32, 32) for color in COLORS.values()]
    shade = render([(CIRCLE,)]).amax(1, keepdim=True)
    grey = [(shade * level).expand(-1, 3, -1, -1)[0] for level in (0.4, 0.7, 1.1)]
    pink = (shade * torch.tensor([1.1, 0.65, 0.65])[:, None, None])[0]
    dim = render([(CIRCLE,)])[0] * 0.7
    generator = torch.Generator().manual_seed(0)
    speckle = torch.rand(20, 3, 32, 32, generator=generator)
    sparse = (
        render([()])[0]
        + (torch.rand(1, 32, 32, generator=generator) < 0.1) * torch.tensor(COLORS["red"])[:, None, None]
    )
    pictures = [*speckle, sparse] if noise else [torch.zeros(3, 32, 32), torch.ones(3, 32, 32), *full, *grey, pink, dim]
    assert parse(torch.stack(pictures)) == [()] * len(pictures)


def test_touching_objects_of_two_colours_are_two() -> None:
    a = Object("square", "red", 0.3, 0.5, 0.15)
    b = Object("square", "blue", 0.3 + 0.15 * math.sqrt(math.pi), 0.5, 0.15)
    (found,) = parse(render([(a, b)]))
    assert [(o.shape, o.color) for o in found] == [("square", "red"), ("square", "blue")]
    assert [o.radius for o in found] == pytest.approx([0.15, 0.15], abs=0.002)  # nothing of the neighbour is its own
    one_colour = (a, dataclasses.replace(b, color="red"))
    assert parse(render([one_colour])) == [()]
    assert len(patches(render([one_colour]))[0]) == 1


def test_cut_and_two_coloured_objects_are_patches_but_no_objects() -> None:
    cut = dataclasses.replace(CIRCLE, x=0.0)
    both = render([(CIRCLE,), (dataclasses.replace(CIRCLE, color="blue"),)])
    half = torch.cat([both[0, :, :, :16], both[1, :, :, 16:]], 2)
    pictures = torch.stack([render([(cut,)])[0], half])
    assert parse(pictures) == [(), ()]
    assert [[o.color for o in found] for found in patches(pictures)] == [["red"], ["red", "blue"]]


def test_pictures_out_of_range_are_read_as_clamped() -> None:
    pictures = render(scenes()[:50])
    wild = torch.where(pictures == 0, torch.full_like(pictures, -7.0), pictures)
    assert parse(wild) == parse(pictures)
    assert parse(40 * pictures - 20) == parse((40 * pictures - 20).clamp(0, 1))


def test_each_picture_is_parsed_alone() -> None:
    pictures = render(scenes()[:300])
    for together, i in zip(parse(pictures), range(100), strict=False):
        (alone,) = parse(pictures[i : i + 1])
        assert [(o.shape, o.color, o.size) for o in alone] == [(o.shape, o.color, o.size) for o in together]
        # sums of float32 numbers are taken in another order
        assert [o.x for o in alone] == pytest.approx([o.x for o in together], abs=1e-5)
    assert parse(pictures[:0]) == []


def test_objects_are_read_from_left_to_right() -> None:
    low_left, high_right = Object("cross", "red", 0.25, 0.75, 0.11), Object("circle", "blue", 0.75, 0.25, 0.11)
    high_left, low_right = Object("cross", "red", 0.25, 0.25, 0.11), Object("circle", "blue", 0.75, 0.75, 0.11)
    for scene in ((high_right, low_left), (low_right, high_left)):
        (found,) = parse(render([scene]))
        assert [item.shape for item in found] == ["cross", "circle"]


def test_connection_is_by_edge_and_corner_and_of_any_length() -> None:
    snake = torch.zeros(1, 3, 32, 32)
    snake[0, 0, ::2] = 0.9
    snake[0, 0, 1::4, -1] = snake[0, 0, 3::4, 0] = 0.9
    assert len(patches(snake)[0]) == 1
    board = torch.zeros(1, 3, 32, 32)
    board[0, 0, ::2, ::2] = board[0, 0, 1::2, 1::2] = 0.9
    assert len(patches(board)[0]) == 1
    apart = torch.zeros(1, 3, 32, 32)
    apart[0, 0, ::2] = 0.9
    assert len(patches(apart)[0]) == 16


def place(x: float, y: float) -> Object:
    return Object("circle", "red", x, y, 0.1)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (-0.3, 0.1, "left of"),
        (0.3, 0.1, "right of"),
        (0.1, -0.3, "above"),
        (0.1, 0.3, "below"),
        (-0.25, 0.25, "left of"),
        (0.25, -0.25, "right of"),
    ],  # equally far: across counts
)
def test_relations(x: float, y: float, said: str) -> None:
    a, b = place(0.5 + x, 0.5 + y), place(0.5, 0.5)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relation(a, b) == said
    assert relation(b, a) == opposite[said]
    lie = {p for p in opposite if lies(a, b, p)}
    assert said in lie
    assert len(lie) == (2 if abs(x) == abs(y) else 1)


def test_a_diagonal_is_wide_as_its_tie() -> None:
    b = place(0.5, 0.5)
    assert lies(place(0.3, 0.3 - 0.9 * TIE), b, "left of")
    assert not lies(place(0.3, 0.3 - 1.1 * TIE), b, "left of")
    assert not lies(b, b, "left of")


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: parse(torch.zeros(3, 32, 32)), DataError, r"\(B, 3, H, H\).*got \(3, 32, 32\)"),
        (lambda: parse(torch.zeros(1, 1, 32, 32)), DataError, "RGB"),
        (lambda: parse(torch.zeros(1, 3, 32, 16)), DataError, "square"),
        (lambda: parse(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), DataError, r"torch\.uint8"),
        (lambda: parse(torch.eye(32).log().expand(2, 3, 32, 32)), DataError, "Picture 0 has pixels that are not"),
        (lambda: parse(torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), math.nan)])), DataError, "Picture 1"),
        (
            lambda: coverage("sqare", torch.ones(1), torch.ones(1), torch.ones(1), 8),
            ConfigError,
            "did you mean 'square'",
        ),
        (lambda: Object("circle", "grey", 0, 0, 1), ConfigError, "'grey'"),
        (lambda: Object("disc", "red", 0, 0, 1), ConfigError, "'disc'"),
        (lambda: Object("circle", "red", 0, 0, 0), ConfigError, "radius above 0"),
        (lambda: sample_scene(np.random.default_rng(0), 4), ConfigError, "1 to 3 objects, got 4"),
        (lambda: sample_scene(np.random.default_rng(0), 1, "trian"), ConfigError, "did you mean 'train'"),
    ],
)
def test_wrong_input_is_one_sentence(call, error, said) -> None:
    with pytest.raises(error, match=said):
        call()
