"""Scenes edited in one respect, and batches of pairs of them."""

from collections import Counter

import pytest
import torch

from steerfm.data import ShapePairs
from steerfm.errors import ConfigError
from steerfm.seeds import generator
from steerfm.shape_edits import EDITS, edited
from steerfm.shapes import UNSEEN, Scene, is_held_out, is_possible, parse, render, sample_scene

ATTRIBUTES = ("shape", "color", "size", "x", "y")


def changes(before: Scene, after: Scene) -> Counter:
    """Return how many objects differ in each attribute."""
    return Counter(
        name for a, b in zip(before, after, strict=True) for name in ATTRIBUTES if getattr(a, name) != getattr(b, name)
    )


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ("color", {"color": 1}),
        ("shape", {"shape": 1}),
        ("size", {"size": 1}),
        ("swap colors", {"color": 2}),
        ("swap shapes", {"shape": 2}),
        ("swap places", {"x": 2, "y": 2}),
    ],
)
def test_an_edit_changes_what_it_says_and_nothing_else(edit: str, expected: dict[str, int]) -> None:
    rng, seen = generator(3, "data"), 0
    for _ in range(300):
        scene = sample_scene(rng, 2)
        found = EDITS[edit](scene, rng)
        if found != scene:
            seen += 1
            assert changes(scene, found) == expected
            for name in expected if edit.startswith("swap") else ():
                assert [getattr(a, name) for a in found] == [getattr(b, name) for b in scene[::-1]]
    assert seen > 150


def test_one_object_leaves() -> None:
    rng = generator(4, "data")
    scene = sample_scene(rng, 3)
    found = EDITS["leave"](scene, rng)
    assert len(found) == 2 and set(found) < set(scene)
    assert EDITS["leave"](scene[:1], rng) == scene[:1]


def test_edited_scenes_are_possible_differ_and_stay_within_training() -> None:
    rng, pairs = generator(5, "data"), []
    for _ in range(500):
        scene = sample_scene(rng)
        pairs.append((scene, edited(scene, rng)))
    for before, after in pairs:
        assert before != after and is_possible(after)
        assert not any((item.color, item.shape) in UNSEEN for item in after)
    parsed = parse(render([after for _, after in pairs]))
    kinds = [sorted((o.shape, o.color, o.size) for o in after) for _, after in pairs]
    assert [sorted((o.shape, o.color, o.size) for o in scene) for scene in parsed] == kinds


def test_an_edit_brings_no_held_out_combination_into_training() -> None:
    """A tenth of all combinations are held out, so that of 400 edits to two or three objects many would be."""
    rng, several = generator(6, "data"), 0
    for _ in range(400):
        after = edited(sample_scene(rng, split="train"), rng)
        several += len(after) > 1
        assert len(after) == 1 or not is_held_out([(item.color, item.shape) for item in after])
    assert several > 100


def test_is_possible_refuses_what_touches_or_leaves_the_picture() -> None:
    scene = sample_scene(generator(0, "data"), 2)
    assert is_possible(scene)
    assert not is_possible((scene[0], scene[0]))
    moved = type(scene[0])(scene[0].shape, scene[0].color, 0.01, 0.5, scene[0].radius)
    assert not is_possible((moved,))


def test_pairs_are_neighbours_a_function_of_the_step_and_of_no_process(monkeypatch) -> None:
    data = ShapePairs(batch_size=16, validation_size=8)
    batch, again, other = data.batch(3), ShapePairs(batch_size=16).batch(3), data.batch(4)
    assert torch.equal(batch["x0"], again["x0"]) and batch["prompt"] == again["prompt"]
    assert not torch.equal(batch["x0"], other["x0"])
    assert (batch["x0"][0::2] != batch["x0"][1::2]).flatten(1).any(1).all()
    assert sum(a != b for a, b in zip(batch["prompt"][0::2], batch["prompt"][1::2], strict=True)) >= 4
    assert len(data.validation_batch()["prompt"]) == 8  # type: ignore[index]
    pairs = batch["x0"].unflatten(0, (-1, 2))
    for rank in range(2):
        monkeypatch.setattr("steerfm.data.batches.world", lambda rank=rank: (rank, 2))
        assert torch.equal(data.batch(3)["x0"], pairs[rank::2].flatten(0, 1))


def test_a_pair_mentions_sizes_and_places_alike() -> None:
    """Their captions are equally long, but where an object leaves: 0.76 of them, and 0.41 if each draws its own."""
    prompts = ShapePairs(batch_size=400).batch(0)["prompt"]
    alike = [len(a.split()) == len(b.split()) for a, b in zip(prompts[::2], prompts[1::2], strict=True)]
    assert sum(alike) > 0.65 * len(alike)


def test_an_odd_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="even batch_size"):
        ShapePairs(batch_size=7)
