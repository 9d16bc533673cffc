"""What the page's viewer of samples shows, as plain data: the same prompts and seeds of all runs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from steerfm.report.compare import Comparison
from steerfm.report.pictures import is_tiny, read_picture, rows_by_pair, spread_pairs
from steerfm.report.sources import Source

MOST_PICTURES = 6000  # of one page
MANY_PICTURES = 1000  # above, thumbnails are smaller
SIDES = 256, 160  # of a thumbnail, in pixels: of few pictures, of many
QUALITY = 85  # of a thumbnail's WebP


def gallery(comparison: Comparison) -> dict[str, Any] | None:
    """Return the viewer's data, or None where no run has a picture.

    runs: labels. figures: names of reward, parts and held-out values; `judged` is the place of the first held-out one.
    pairs: [prompt, seed], the prompt as its place among `prompts`. cells: a list a run of a list a pair,
    [picture, figure, ...] or None where the run lacks the pair; a picture is its place among `pictures` (data URIs), or
    -1. `total`: how many pairs there are. `common`: whether all runs have some. `tiny`: whether pixels should stay
    visible.
    """
    sources = comparison.sources
    pairs = spread_pairs(comparison, max(1, MOST_PICTURES // len(sources)))
    wheres = _figures(sources)
    album = Album(len(pairs) * len(sources))
    cells = [_cells(source, pairs, wheres, album) for source in sources]
    if not album.uris:
        return None
    places = {prompt: i for i, prompt in enumerate(comparison.prompts)}
    judged = [i for i, where in enumerate(wheres) if where.startswith("held_out.")]
    return {
        "runs": [source.label for source in sources],
        "prompts": list(comparison.prompts),
        "figures": [_named(where) for where in wheres],
        "judged": judged[0] if judged else -1,
        "pairs": [[places[prompt], seed] for prompt, seed in pairs],
        "cells": cells,
        "pictures": album.uris,
        "common": bool(set.intersection(*(set(source.pairs) for source in sources))),
        "total": len({pair for source in sources for pair in source.pairs}),
        "tiny": is_tiny(album.sizes),
        "side": album.side,
    }


class Album:
    """Keep each different picture once, as a data URI."""

    def __init__(self, expected: int) -> None:
        self.side = SIDES[expected > MANY_PICTURES]
        self.uris: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self._places: dict[bytes, int] = {}

    def add(self, path: Path | None) -> int:
        """Return the place of a picture, -1 where there is none or it cannot be read."""
        pixels = read_picture(path)
        if pixels is None:
            return -1
        data = thumbnail(pixels, self.side)
        if data not in self._places:
            self._places[data] = len(self.uris)
            kind = "png" if data.startswith(b"\x89PNG") else "webp"
            self.uris.append(f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}")
            self.sizes.append((pixels.shape[0], pixels.shape[1]))
        return self._places[data]


def thumbnail(pixels: np.ndarray, side: int) -> bytes:
    """Return a picture, uint8 (H, W, 3): whole, as a PNG, if it is no larger than `side`; else a smaller WebP."""
    image, stream = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) <= side:
        image.save(stream, format="PNG", optimize=True)
    else:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(stream, format="WEBP", quality=QUALITY)
    return stream.getvalue()


def _figures(sources: Sequence[Source]) -> list[str]:
    """Return where the figures of a sample stand: its reward, the parts where there are several, held-out values."""
    parts = dict.fromkeys(name for source in sources for name in source.names("parts"))
    held_out = dict.fromkeys(name for source in sources for name in source.names("held_out"))
    return [
        "reward",
        *(f"parts.{name}" for name in parts if len(parts) > 1),
        *(f"held_out.{name}" for name in held_out),
    ]


def _named(where: str) -> str:
    group, _, name = where.partition(".")
    return {"reward": "reward", "parts": f"{name} (part)", "held_out": f"{name} (held out)"}[group]


def _cells(
    source: Source, pairs: Sequence[tuple[str, int]], wheres: Sequence[str], album: Album
) -> list[list[float | int | None] | None]:
    """Return a run's cell for every pair."""
    places = rows_by_pair(source)
    columns = [source.values(where) for where in wheres]
    found: list[list[float | int | None] | None] = []
    for pair in pairs:
        place = places.get(pair)
        if place is None:
            found.append(None)
            continue
        values = [float(f"{column[place]:.5g}") if np.isfinite(column[place]) else None for column in columns]
        found.append([album.add(source.samples.picture(place)), *values])
    return found
