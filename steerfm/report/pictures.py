"""Which samples a page or a W&B table shows, and their pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from steerfm.report.compare import Comparison
from steerfm.report.sources import Source

LARGEST_SIDE = 256  # of a picture on the page; larger ones are made smaller
TINY_SIDE = 64  # pictures up to this size are enlarged with their pixels visible
MOST_PROMPTS = 8
MOST_SEEDS = 12


def chosen_pairs(comparison: Comparison, prompts: int = MOST_PROMPTS, seeds: int = MOST_SEEDS) -> dict[str, list[int]]:
    """Return the first prompts and the first seeds of each, those that all runs have before any others."""
    every = list(dict.fromkeys(pair for source in comparison.sources for pair in source.pairs))
    common = set.intersection(*(set(source.pairs) for source in comparison.sources))
    chosen: dict[str, list[int]] = {}
    for prompt, seed in sorted(every, key=lambda pair: pair not in common):  # sorting keeps the order otherwise
        if (prompt in chosen or len(chosen) < prompts) and len(chosen.setdefault(prompt, [])) < seeds:
            chosen[prompt].append(seed)
    return {prompt: chosen[prompt] for prompt in comparison.prompts if prompt in chosen}


def rows_by_pair(source: Source) -> dict[tuple[str, int], int]:
    """Return the place of the first sample of each (prompt, seed) pair."""
    places: dict[tuple[str, int], int] = {}
    for i, pair in enumerate(source.pairs):
        places.setdefault(pair, i)
    return places


def read_picture(path: Path | None) -> np.ndarray | None:
    """Return a picture as uint8 (H, W, 3), or None where there is none or it cannot be read."""
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def data_uri(pixels: np.ndarray) -> str:
    """Return a picture, uint8 (H, W, 3), as a PNG data URI of at most `LARGEST_SIDE` pixels a side."""
    image = Image.fromarray(pixels)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def is_tiny(pictures: Sequence[np.ndarray]) -> bool:
    """Say whether all pictures are so small that their pixels should stay visible."""
    return all(max(pixels.shape[:2]) <= TINY_SIDE for pixels in pictures)
