"""Scenes changed in one respect: hard negatives for a reward that is to tell captions apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from steerfm.shapes import COLORS, SHAPES, SIZES, UNSEEN, Object, Scene, is_held_out, is_possible

Edit = Callable[[Scene, np.random.Generator], Scene]


def edited(scene: Scene, generator: np.random.Generator) -> Scene:
    """Return the scene changed in one respect, drawn at random among those of EDITS that it allows.

    A colour, a shape or a size becomes another; two objects swap colours, shapes or places; an object leaves. What
    training may not see does not come in by an edit: no object gets an UNSEEN combination of colour and shape, and
    a scene that is not held out does not become one that is.
    """
    names, held_out = list(EDITS), _is_held_out(scene)
    while True:  # most edits are allowed, so that one round is nearly always enough
        for i in generator.permutation(len(names)):
            found = EDITS[names[i]](scene, generator)
            if found != scene and is_possible(found) and _may_be_seen(found, held_out):
                return found


def _may_be_seen(scene: Scene, held_out: bool) -> bool:
    seen = not any((item.color, item.shape) in UNSEEN for item in scene)
    return seen and (held_out or not _is_held_out(scene))


def _is_held_out(scene: Scene) -> bool:
    return len(scene) > 1 and is_held_out([(item.color, item.shape) for item in scene])


def _replaced(scene: Scene, i: int, item: Object) -> Scene:
    return (*scene[:i], item, *scene[i + 1 :])


def _recolored(scene: Scene, generator: np.random.Generator) -> Scene:
    i = int(generator.integers(len(scene)))
    color = list(COLORS)[generator.integers(len(COLORS))]
    return _replaced(scene, i, dataclasses.replace(scene[i], color=color))


def _reshaped(scene: Scene, generator: np.random.Generator) -> Scene:
    i = int(generator.integers(len(scene)))
    return _replaced(scene, i, dataclasses.replace(scene[i], shape=SHAPES[generator.integers(len(SHAPES))]))


def _resized(scene: Scene, generator: np.random.Generator) -> Scene:
    i = int(generator.integers(len(scene)))
    other = {"small": "large", "large": "small"}[scene[i].size]
    radius = scene[i].radius * SIZES[other] / SIZES[scene[i].size]
    return _replaced(scene, i, dataclasses.replace(scene[i], radius=radius))


def _swapped(*names: str) -> Edit:
    """Return the edit that lets the first two objects swap these attributes."""

    def edit(scene: Scene, generator: np.random.Generator) -> Scene:
        if len(scene) < 2:
            return scene
        a, b = scene[:2]
        of_a, of_b = ({name: getattr(item, name) for name in names} for item in (a, b))
        return (dataclasses.replace(a, **of_b), dataclasses.replace(b, **of_a), *scene[2:])

    return edit


def _without_one(scene: Scene, generator: np.random.Generator) -> Scene:
    if len(scene) < 2:
        return scene
    i = int(generator.integers(len(scene)))
    return scene[:i] + scene[i + 1 :]


EDITS: dict[str, Edit] = {
    "color": _recolored,
    "shape": _reshaped,
    "size": _resized,
    "swap colors": _swapped("color"),
    "swap shapes": _swapped("shape"),
    "swap places": _swapped("x", "y"),
    "leave": _without_one,
}
