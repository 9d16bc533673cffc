"""Scenes of one to three coloured shapes on black: rendered exactly, and parsed back from pixels.

The data set and the true reward share this file. A scene is described in shares of the picture's side, so that
it renders at any resolution. Every edge is a signed distance turned into coverage over one pixel, and a pixel is
coverage times colour; so the parser can take the two apart again, find the shapes as connected patches of one
colour, and ask for each which shape, rendered with the same area at the same centre, covers the same pixels.
Captions of scenes are in shape_captions.py.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from steerfm.errors import ConfigError, DataError, nearest

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.80, 0.10, 0.80),
    "cyan": (0.10, 0.80, 0.85),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.11, "large": 0.175}  # radius of the circle of the same area, as a share of the side
SIZE_BORDER = 0.1385  # the geometric mean of the two
JITTER = 0.08  # radii vary by this share about their size
UNSEEN = frozenset({("blue", "triangle"), ("purple", "square"), ("green", "cross")})  # never in training
MOST_OBJECTS = 3
SPLITS = ("train", "held_out", "unseen")
GAP = 0.07  # between the bounding boxes of two objects: more than two pixels of 32
MARGIN = 0.03  # between an object and the border

# What the parser takes for an object. True scenes fit at 0.95 or better at 32 pixels, 0.98 at 64; at 16, 0.77.
LEAST_COVERAGE = 0.5  # of a pixel that belongs to a patch
LEAST_AREA = 0.012  # of a patch, as a share of the picture; the smallest object has 0.032
MOST_RADIUS = 0.25  # of a shape that is fitted; the largest object has 0.19
LEAST_COSINE = 0.95  # between a patch's mean colour and its hue: 18 degrees, where white is 30 from all of them
LEAST_FIT = 0.80
TIE = 0.015  # parsing may move the gap between two centres by this much, as a share of the side


@dataclass(frozen=True)
class Object:
    """One shape: its name, colour, centre (x to the right, y down) and radius, in shares of the side.

    radius is that of the circle of the same area. fit: for parsed objects, how well the pixels agree, in [0, 1].
    """

    shape: str
    color: str
    x: float
    y: float
    radius: float
    fit: float = 1.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES or self.color not in COLORS or not self.radius > 0:
            raise ConfigError(
                f"An object is one of {', '.join(SHAPES)}, in one of {', '.join(COLORS)}, with a radius above 0: "
                f"got '{self.shape}', '{self.color}' and {self.radius}."
            )

    @property
    def size(self) -> str:
        """Return "small" or "large"."""
        return "small" if self.radius < SIZE_BORDER else "large"


Scene = tuple[Object, ...]


def relation(a: Object, b: Object) -> str:
    """Return where a lies from b, along the axis on which they are further apart: "left of", "above", ..."""
    across, down = a.x - b.x, a.y - b.y
    if abs(across) >= abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def lies(a: Object, b: Object, place: str) -> bool:
    """Say whether a lies from b as `place` says ("left of", ...); near a diagonal, within TIE, either axis will do."""
    across, down = a.x - b.x, a.y - b.y
    if place not in ("left of", "right of"):
        across, down = down, across
    along = -across if place in ("left of", "above") else across
    return along > 0 and along >= abs(down) - TIE


def sample_scene(generator: np.random.Generator, count: int | None = None, split: str = "train") -> Scene:
    """Return a random scene of `count` objects (1, 2 or 3 with probabilities 0.35, 0.45 and 0.2 by default).

    One scene of several objects in six repeats one shape and colour, so that counting can be learnt. split:
    "train"; "held_out", where several objects come in combinations that "train" never has together (a tenth of
    all; single objects are as in training); or "unseen", where the first object has an UNSEEN combination.
    """
    count = int(generator.choice([1, 2, 3], p=[0.35, 0.45, 0.2])) if count is None else count
    if not 1 <= count <= MOST_OBJECTS:
        raise ConfigError(f"A scene has 1 to {MOST_OBJECTS} objects, got {count}.")
    if split not in SPLITS:
        raise ConfigError(f"Scenes have no split '{split}'{nearest(split, SPLITS) or '.'} They have: {SPLITS}.")
    while True:
        kinds = _kinds(generator, count, split == "unseen")
        if split == "unseen" or count == 1 or is_held_out(kinds) == (split == "held_out"):
            scene = _placed(kinds, [str(size) for size in generator.choice(list(SIZES), size=count)], generator)
            if scene is not None:
                return scene


def _kinds(generator: np.random.Generator, count: int, unseen: bool) -> list[tuple[str, str]]:
    """Return random (colour, shape) pairs."""
    kinds = [_kind(generator) for _ in range(count)]
    if unseen:
        kinds[0] = sorted(UNSEEN)[generator.integers(len(UNSEEN))]
    return kinds[:1] * count if count > 1 and generator.random() < 1 / 6 else kinds


def is_held_out(kinds: Sequence[tuple[str, str]]) -> bool:
    """Say whether these (colour, shape) pairs come together only in the held-out split; a tenth do, by a fixed hash."""
    name = " ".join(sorted(f"{color}-{shape}" for color, shape in kinds))
    return zlib.crc32(name.encode()) % 10 == 0


def _kind(generator: np.random.Generator) -> tuple[str, str]:
    """Return a random (colour, shape) that may be seen in training."""
    colors = list(COLORS)
    while True:
        kind = (colors[generator.integers(len(colors))], SHAPES[generator.integers(len(SHAPES))])
        if kind not in UNSEEN:
            return kind


def _placed(kinds: Sequence[tuple[str, str]], sizes: Sequence[str], generator: np.random.Generator) -> Scene | None:
    """Return the objects at random places where they do not touch; None where twenty tries find no room."""
    placed: list[Object] = []
    for (color, shape), size in zip(kinds, sizes, strict=True):
        radius = SIZES[size] * generator.uniform(1 - JITTER, 1 + JITTER)
        left, top, right, bottom = (extent * radius for extent in EXTENTS[shape])
        for _ in range(20):
            x = generator.uniform(MARGIN + left, 1 - MARGIN - right)
            y = generator.uniform(MARGIN + top, 1 - MARGIN - bottom)
            candidate = Object(shape, color, float(x), float(y), float(radius))
            if all(_apart(candidate, other) for other in placed):
                placed.append(candidate)
                break
        else:
            return None
    return tuple(placed)


def is_possible(scene: Scene) -> bool:
    """Say whether all objects of a scene lie inside the picture, GAP apart from each other."""
    for item in scene:
        left, top, right, bottom = (extent * item.radius for extent in EXTENTS[item.shape])
        if min(item.x - left, item.y - top, 1 - item.x - right, 1 - item.y - bottom) < MARGIN - 1e-9:
            return False
    return all(_apart(a, b) for a, b in itertools.combinations(scene, 2))


def _apart(a: Object, b: Object) -> bool:
    """Say whether the bounding boxes of two objects are at least GAP apart along one axis."""
    left_a, top_a, right_a, bottom_a = (extent * a.radius for extent in EXTENTS[a.shape])
    left_b, top_b, right_b, bottom_b = (extent * b.radius for extent in EXTENTS[b.shape])
    across = max(b.x - left_b - a.x - right_a, a.x - left_a - b.x - right_b)
    down = max(b.y - top_b - a.y - bottom_a, a.y - top_a - b.y - bottom_b)
    return max(across, down) >= GAP


# ---- rendering -------------------------------------------------------------------------------------------------

# Of shapes with the area of a unit circle: half the square's side, the triangle's inradius, half the cross's length
# (whose arms are a third as wide as it is long).
HALF_SIDE = math.sqrt(math.pi) / 2
INRADIUS = math.sqrt(math.pi / (3 * math.sqrt(3)))
HALF_LENGTH = math.sqrt(9 * math.pi / 20)

# How far each unit shape reaches from its centre: left, top, right, bottom.
EXTENTS: dict[str, tuple[float, float, float, float]] = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (HALF_SIDE, HALF_SIDE, HALF_SIDE, HALF_SIDE),
    "triangle": (math.sqrt(3) * INRADIUS, 2 * INRADIUS, math.sqrt(3) * INRADIUS, INRADIUS),
    "cross": (HALF_LENGTH, HALF_LENGTH, HALF_LENGTH, HALF_LENGTH),
}


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y.abs().clamp_min(1e-20)) - 1  # at (0, 0) hypot has no gradient


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - HALF_SIDE


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    slope = x.abs() * (math.sqrt(3) / 2) - y / 2  # the two sides that meet at the top
    return torch.maximum(slope, y) - INRADIUS


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    width = HALF_LENGTH / 3
    lying = torch.maximum(x - HALF_LENGTH, y - width)
    standing = torch.maximum(x - width, y - HALF_LENGTH)
    return torch.minimum(lying, standing)


# Signed distances (negative inside) of the unit shapes, exact next to straight edges, which is where they count.
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor, size: int) -> Tensor:
    """Return how much of every pixel shapes cover, (N, size, size) in [0, 1], for centres and radii (N,).

    Differentiable in all three.
    """
    if shape not in DISTANCES:
        raise ConfigError(f"There is no shape '{shape}'{nearest(shape, SHAPES) or '.'} Shapes: {', '.join(SHAPES)}.")
    middle = (torch.arange(size, dtype=x.dtype, device=x.device) + 0.5) / size
    across = (middle[None, None, :] - x[:, None, None]) / radius[:, None, None]
    down = (middle[None, :, None] - y[:, None, None]) / radius[:, None, None]
    across, down = torch.broadcast_tensors(across, down)
    distance = DISTANCES[shape](across, down) * radius[:, None, None] * size  # in pixels
    return (0.5 - distance).clamp(0, 1)


def render(scenes: Sequence[Scene], size: int = 32) -> Tensor:
    """Return pictures of scenes, (B, 3, size, size) float32 in [0, 1]."""
    flat = [(i, item) for i, scene in enumerate(scenes) for item in scene]
    pictures = torch.zeros(len(scenes), 3, size, size)
    for shape in SHAPES:
        chosen = [(i, item) for i, item in flat if item.shape == shape]
        if not chosen:
            continue
        where = torch.tensor([i for i, _ in chosen])
        x, y, radius = torch.tensor([(item.x, item.y, item.radius) for _, item in chosen]).unbind(1)
        color = torch.tensor([COLORS[item.color] for _, item in chosen])
        covered = coverage(shape, x, y, radius, size)
        pictures.index_add_(0, where, covered[:, None] * color[:, :, None, None])
    return pictures.clamp(0, 1)  # objects do not touch, so only hand-made scenes can exceed 1


# ---- parsing ---------------------------------------------------------------------------------------------------


def parse(images: Tensor) -> list[Scene]:
    """Return what pictures (B, 3, H, H) in [0, 1] show: the objects of each, from left to right.

    A patch of one colour counts as an object if it is large enough and some shape fits it (`Object.fit`, at least
    LEAST_FIT). Patches that fit no shape are left out; `patches` returns them too. Raises as `patches` does.
    """
    return [tuple(item for item in found if item.fit >= LEAST_FIT) for found in patches(images)]


def patches(images: Tensor) -> list[Scene]:
    """Return every patch of one colour that is large enough, as the shape that fits it best, whatever its fit.

    The fit is the overlap of coverages over their union; 0 for a colour that the palette does not have. Numbers
    outside [0, 1] are clamped. Raises DataError for pictures of another form, or that are not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise DataError(f"Scenes are square RGB pictures (B, 3, H, H) in [0, 1], got {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise DataError(f"Scenes are read from floats in [0, 1], got {images.dtype}: use steerfm.images.")
    images = images.detach().float().cpu()
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        raise DataError(f"Picture {int(finite.int().argmin())} has pixels that are not finite: it shows no scene.")
    scenes: list[list[Object]] = [[] for _ in images]
    for start in range(0, len(images), 256):  # so that memory stays small
        for i, item in _found(images[start : start + 256].clamp(0, 1)):
            scenes[start + i].append(item)
    return [tuple(sorted(scene, key=lambda item: item.x)) for scene in scenes]


def _found(images: Tensor) -> list[tuple[int, Object]]:
    """Return (picture, object) for every patch in a batch."""
    size = images.shape[-1]
    hue, covered = _unmixed(images)
    label = _connected(hue, covered > LEAST_COVERAGE)
    names, pixels = label[label > 0].unique(return_counts=True)
    names = names[pixels >= LEAST_AREA * size**2]
    if len(names) == 0:
        return []
    picture, hue = (names - 1) // size**2, hue.flatten()[names - 1]
    own = _patch_coverage(label[picture], names, covered[picture])
    x, y, radius = _centre(own)
    fits = torch.stack([_overlap(coverage(shape, x, y, radius.clamp_max(MOST_RADIUS), size), own) for shape in SHAPES])
    fit, shape = fits.max(0)
    fit = fit * (_cosine(torch.einsum("kchw,khw->kc", images[picture], own), hue) >= LEAST_COSINE)
    numbers = torch.stack([x, y, radius, fit], 1).tolist()
    return [(int(picture[k]), Object(SHAPES[shape[k]], list(COLORS)[hue[k]], *numbers[k])) for k in range(len(names))]


def _unmixed(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the palette's nearest hue of every pixel, (B, H, W) long, and how much it covers, (B, H, W).

    On black, a pixel is coverage times colour: the hue is the direction, the coverage the length along it.
    """
    palette = torch.tensor(list(COLORS.values()))
    along = torch.einsum("bchw,kc->bkhw", images, palette) / palette.square().sum(1)[:, None, None]
    cosine = along * palette.norm(dim=1)[:, None, None]  # times the pixel's length, which is the same for all
    hue = cosine.argmax(1)
    return hue, along.gather(1, hue[:, None])[:, 0].clamp(0, 1)


def _cosine(colors: Tensor, hue: Tensor) -> Tensor:
    """Return the cosine between colours (K, 3) and hues of the palette (K,); (K,)."""
    return functional.cosine_similarity(colors, torch.tensor(list(COLORS.values()))[hue])


def _connected(hue: Tensor, inside: Tensor) -> Tensor:
    """Return a label for every pixel of a connected patch of one hue, (B, H, W) long; 0 elsewhere.

    A patch's label is the place of its last pixel, counted from 1 through the batch. Every pixel points to one
    further on in its patch; where neighbours (by edge or corner) point to two different ones, the nearer of these is
    made to point to the other, and all pointers are shortened, until nothing changes: about log(pixels) rounds.
    """
    a, b = _neighbours(hue, inside)
    end = torch.arange(inside.numel())
    while True:
        further = torch.maximum(end[a], end[b])
        tied = end.scatter_reduce(0, torch.cat([end[a], end[b]]), further.repeat(2), "amax")
        tied = tied[tied]
        if torch.equal(tied, end):
            return torch.where(inside, end.reshape(inside.shape) + 1, 0)
        end = tied


def _neighbours(hue: Tensor, inside: Tensor) -> Tensor:
    """Return the places of all pairs of neighbouring pixels that are inside and of one hue, (2, pairs)."""
    _, height, width = inside.shape
    place = torch.arange(inside.numel()).reshape(inside.shape)
    pairs = []
    for down, right in ((0, 1), (1, -1), (1, 0), (1, 1)):
        a = (slice(None), slice(height - down), slice(max(0, -right), width - max(0, right)))
        b = (slice(None), slice(down, height), slice(max(0, right), width - max(0, -right)))
        alike = inside[a] & inside[b] & (hue[a] == hue[b])
        pairs.append(torch.stack([place[a][alike], place[b][alike]]))
    return torch.cat(pairs, 1)


def _patch_coverage(label: Tensor, names: Tensor, covered: Tensor) -> Tensor:
    """Return each patch's coverage (K, H, W), in its picture's: its own pixels and the faint ones around them."""
    core = label == names[:, None, None]
    near = functional.max_pool2d(core.float()[:, None], 3, stride=1, padding=1)[:, 0] > 0
    return covered * (core | (near & (label == 0)))


def _centre(own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the centre and radius of patches (K, H, W); (K,) each, in shares of the side."""
    size = own.shape[-1]
    middle = (torch.arange(size) + 0.5) / size
    total = own.sum((1, 2))
    x = (own.sum(1) * middle).sum(1) / total
    y = (own.sum(2) * middle).sum(1) / total
    return x, y, (total / math.pi).sqrt() / size


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Return the intersection of two coverages over their union, (K,)."""
    return torch.minimum(a, b).sum((1, 2)) / torch.maximum(a, b).sum((1, 2)).clamp_min(1e-6)
