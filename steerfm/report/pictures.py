"""Which samples a page or a W&B table shows, and their pictures."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from steerfm.conditions.pictures import MAX_BYTES, MAX_PIXELS
from steerfm.report.compare import Comparison
from steerfm.report.sources import FORMATS, UNREADABLE, Source

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


def spread_pairs(comparison: Comparison, most: int) -> list[tuple[str, int]]:
    """Return at most so many (prompt, seed) pairs, equally many of each prompt: of those that all runs have.

    Of all pairs, where the runs have none in common.
    """
    every = list(dict.fromkeys(pair for source in comparison.sources for pair in source.pairs))
    common = set.intersection(*(set(source.pairs) for source in comparison.sources))
    ranks: dict[str, int] = {}
    ranked = []
    for pair in (pair for pair in every if pair in common or not common):
        ranks[pair[0]] = ranks.get(pair[0], -1) + 1
        ranked.append((ranks[pair[0]], pair))
    chosen = [pair for _, pair in sorted(ranked, key=lambda entry: entry[0])[:most]]
    places = {prompt: i for i, prompt in enumerate(comparison.prompts)}
    return sorted(chosen, key=lambda pair: places[pair[0]])


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
        if path.stat().st_size > MAX_BYTES:
            return None
        # From memory: a damaged PNG can tell Pillow to ask a file for gigabytes, for which the system would make room.
        with Image.open(io.BytesIO(path.read_bytes()), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            return np.asarray(image.convert("RGB"))
    except UNREADABLE:
        return None


def is_tiny(sizes: Iterable[tuple[int, int]]) -> bool:
    """Say whether all pictures are so small that their pixels should stay visible."""
    return all(max(size) <= TINY_SIDE for size in sizes)
