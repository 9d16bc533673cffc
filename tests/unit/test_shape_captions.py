"""Captions of scenes: said, read back, and judged part by part."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
import pytest

from steerfm.config import compose
from steerfm.errors import DataError
from steerfm.shape_captions import VOCABULARY, Description, Followed, Wanted, describe, follow, plain, read, say
from steerfm.shapes import COLORS, SHAPES, SIZES, SPLITS, Object, Scene, sample_scene


@functools.cache
def described() -> list[tuple[Scene, Description, str]]:
    """Return 5001 scenes of all splits with a description of each and a caption of it."""
    rng = np.random.default_rng(1)
    scenes = [sample_scene(rng, None, split) for split in SPLITS for _ in range(1667)]
    descriptions = [describe(scene, rng) for scene in scenes]
    return [(s, d, say(d, rng)) for s, d in zip(scenes, descriptions, strict=True)]


def test_sizes_are_not_said_of_objects_that_are_counted_together() -> None:
    """One "two red circles" stands for both, whatever their sizes."""
    alike = (Object("circle", "red", 0.3, 0.5, SIZES["small"]), Object("circle", "red", 0.7, 0.5, SIZES["large"]))
    for seed in range(50):
        assert describe(alike, np.random.default_rng(seed)) == Description.of([Wanted("circle", "red")] * 2)


def test_captions_round_trip_and_are_true() -> None:
    for scene, description, caption in described():
        assert read(caption) == description == read(plain(description))
        wanted = follow(description, scene)
        assert wanted == Followed(1, 1, 1, 1, 1 if description.place else None, 1)


def test_the_vocabulary_is_what_captions_are_made_of() -> None:
    said = {word for _, _, caption in described() for word in re.findall(r"[\w'-]+", caption)}
    assert said == {*VOCABULARY} - {"also"}  # which is only read
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_the_recipe_has_the_vocabulary() -> None:
    flow_map = compose("train", ["recipe=shapes"]).values["module"]["flow_map"]
    assert tuple(flow_map["conditioner"]["vocabulary"]) == VOCABULARY


def ask(*objects: str, place: str = "") -> Description:
    """Return a description from words such as "small red circle"."""
    parts = [text.split() for text in objects]
    size, color = ({w: w for w in words} for words in (SIZES, COLORS))
    first = [Wanted(p[-1], *(next((w for w in p if w in known), "") for known in (color, size))) for p in parts]
    return Description.of(first, place)


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("circle", ask("circle")),
        ("a red circle", ask("red circle")),
        ("A RED Circle!", ask("red circle")),
        ("red small cross", ask("small red cross")),
        ("there is a red circle", ask("red circle")),
        ("there are two red circles.", ask("red circle", "red circle")),
        ("one circle that is red and small", ask("small red circle")),
        ("a small circle that is red", ask("small red circle")),
        ("three large triangles", ask(*["large triangle"] * 3)),
        ("two crosses that are cyan and large", ask(*["large cyan cross"] * 2)),
        ("a red circle and a blue square", ask("red circle", "blue square")),
        ("a blue square and a red circle", ask("red circle", "blue square")),
        ("a red circle, a blue square", ask("red circle", "blue square")),
        ("a red circle, a blue square, and a cross", ask("red circle", "blue square", "cross")),
        ("two red circles and a cross", ask("red circle", "red circle", "cross")),
        ("a red circle and also a red circle", ask("red circle", "red circle")),
        ("a red circle left of a blue square", ask("red circle", "blue square", place="left of")),
        ("a blue square to the right of a red circle", ask("red circle", "blue square", place="left of")),
        ("the circle is to the left of the square", ask("circle", "square", place="left of")),
        ("a circle that is left of a square", ask("circle", "square", place="left of")),
        ("a circle above a square", ask("circle", "square", place="above")),
        ("a circle over a square", ask("circle", "square", place="above")),
        ("a circle under a square", ask("square", "circle", place="above")),
        ("a circle is below a square", ask("circle", "square", place="below")),
        ("below a square is a circle", ask("square", "circle", place="above")),
        ("below a square there is a circle", ask("square", "circle", place="above")),
        ("left of a square that is large there is a circle", ask("circle", "large square", place="left of")),
        ("a cross, and a circle above a square", ask("circle", "square", "cross", place="above")),
        ("a circle above a square, and a cross", ask("circle", "square", "cross", place="above")),
        ("a circle that is red and a square", ask("red circle", "square")),
        ("to the right of a cyan cross a small square", ask("cyan cross", "small square", place="left of")),
    ],
)
def test_word_order_is_free(caption: str, wanted: Description) -> None:
    assert read(caption) == wanted


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("", "a shape is missing"),
        ("a red", "a shape is missing"),
        ("a red circle and", "a shape is missing"),
        ("a red circel", r"at 'circel'; did you mean 'circle'\?$"),
        ("a photo of a dog", "a shape was expected at 'photo'"),
        ("a pink circle", "a shape was expected at 'pink'"),
        ("four circles", "a shape was expected at 'four'"),
        ("circles", "'circles' are several: say 'two circles' or 'three circles'"),
        ("a red and blue circle", "a shape was expected at 'and'"),
        ("a red blue circle", "one circle has several colours or sizes: red, blue"),
        ("a small circle that is large", "one circle has several colours or sizes: small, large"),
        ("two circles and two squares", "it asks for 4 objects, and three is the most"),
        ("two circles above a square", "a place is between two single objects"),
        ("a circle above a square and a cross above a square", "it says two places, and one is the most"),
        ("a circle left of", "a shape is missing"),
        ("a circle beside a square", "a shape was expected at 'beside'"),
    ],
)
def test_what_cannot_be_read_is_refused(caption: str, said: str) -> None:
    with pytest.raises(DataError, match=f"cannot be read as a scene: .*{said}"):
        read(caption)


def test_a_place_needs_two_objects_and_a_name() -> None:
    for objects, place in ((["circle"], "right of"), (["circle", "square"], "beside"), ([], "left of")):
        with pytest.raises(DataError, match=r"A place is one of left of, above, right of, below, of two objects"):
            ask(*objects, place=place)


def parts(description: Description, scene: Scene) -> set[str]:
    """Return the names of the parts that are less than 1."""
    followed = dataclasses.asdict(follow(description, scene))
    return {name for name, value in followed.items() if value is not None and value < 1}


def full(scene: Scene) -> Description:
    """Return the description that says all of a scene but where its objects lie."""
    return Description.of(Wanted(item.shape, item.color, item.size) for item in scene)


OTHER_COLOR = dict(zip(COLORS, [*COLORS][1:] + [*COLORS][:1], strict=True))
OTHER_SHAPE: dict[str, str] = dict(zip(SHAPES, SHAPES[1:] + SHAPES[:1], strict=True))


def test_one_changed_attribute_lowers_what_it_should() -> None:
    for scene, _, _ in described()[::5]:
        first, rest, wanted = scene[0], scene[1:], full(scene)

        def change(first: Object = first, **new: object) -> Object:
            return dataclasses.replace(first, **new)  # type: ignore[arg-type]

        share = 1 - 1 / len(scene)
        recoloured = (change(color=OTHER_COLOR[first.color]), *rest)
        assert parts(wanted, recoloured) == {"color", "binding", "correct"}
        assert follow(wanted, recoloured).color == follow(wanted, recoloured).binding == pytest.approx(share)
        reshaped = (change(shape=OTHER_SHAPE[first.shape]), *rest)
        assert parts(wanted, reshaped) == {"shape", "binding", "correct"}
        assert follow(wanted, reshaped).shape == pytest.approx(share)
        assert parts(wanted, (change(radius=0.11 if first.size == "large" else 0.17), *rest)) == {"binding", "correct"}
        assert parts(wanted, (*scene, first)) == {"count", "correct"}
        assert parts(wanted, (*scene, change(fit=0.5))) == {"count", "correct"}  # rubbish beside the objects
        assert parts(wanted, rest) == {"color", "shape", "count", "binding", "correct"}
        assert parts(wanted, ()) == {"color", "shape", "count", "binding", "correct"}
        assert parts(wanted, (*rest, change(x=1 - first.x, y=1 - first.y))) == set()  # no place was asked for


def test_places_and_bindings() -> None:
    swaps = 0
    for scene, description, _ in described():
        if description.place:
            mirrored = tuple(dataclasses.replace(item, x=1 - item.x, y=1 - item.y) for item in scene)
            assert parts(description, mirrored) == {"position", "correct"}
            assert parts(description, ()) == {"color", "shape", "count", "binding", "position", "correct"}
        if len(scene) == 2 and scene[0].color != scene[1].color and scene[0].shape != scene[1].shape:
            a, b = scene
            swapped = (dataclasses.replace(a, color=b.color), dataclasses.replace(b, color=a.color))
            assert parts(full(scene), swapped) == {"binding", "correct"}
            swaps += 1
    assert swaps > 1000


def test_the_best_match_is_judged() -> None:
    """A wanted object that may be either of two takes the one that leaves the other its own."""
    small, large = (Object("circle", "red", x, 0.5, r) for x, r in ((0.3, 0.11), (0.7, 0.17)))
    assert follow(ask("circle", "small circle"), (small, large)).binding == 1
    assert follow(ask("circle", "circle"), (small,)).binding == 0.5
    assert follow(ask("small circle", "circle", place="left of"), (small, large)).correct == 1
    assert follow(ask("circle", "small circle", place="left of"), (small, large)).position == 0
