"""A comparison's pictures as one PNG: a row a run, a column a seed, the run's label at the left."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from steerfm.report.compare import Comparison
from steerfm.report.pictures import chosen_pairs, read_picture, rows_by_pair
from steerfm.report.sources import Source

CELL = 48  # pixels a picture is drawn with
GAP = 4
INK, PAPER = (30, 30, 30), (255, 255, 255)


def sheet(comparison: Comparison, columns: int = 12) -> bytes:
    """Return the PNG of the first seeds of every run, the same column the same prompt and seed."""
    chosen = chosen_pairs(comparison, prompts=columns, seeds=columns)
    pairs = [(prompt, seed) for prompt, seeds in chosen.items() for seed in seeds][:columns]
    font = ImageFont.load_default(size=16)
    labels = [source.label for source in comparison.sources]
    margin = max(int(font.getlength(label)) for label in labels) + 3 * GAP
    width = margin + len(pairs) * (CELL + GAP)
    canvas = Image.new("RGB", (width, len(labels) * (CELL + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    for row, source in enumerate(comparison.sources):
        top = GAP + row * (CELL + GAP)
        draw.text((GAP, top + CELL / 2), source.label, fill=INK, font=font, anchor="lm")
        for column, picture in enumerate(_pictures(source, pairs)):
            if picture is not None:
                canvas.paste(_cell(picture), (margin + column * (CELL + GAP), top))
    stream = io.BytesIO()
    canvas.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _pictures(source: Source, pairs: Sequence[tuple[str, int]]) -> list[np.ndarray | None]:
    """Return the source's pictures of these pairs, None where it has none."""
    places = rows_by_pair(source)
    return [read_picture(source.samples.picture(places[pair])) if pair in places else None for pair in pairs]


def _cell(pixels: np.ndarray) -> Image.Image:
    """Return a picture at the cell's size, its pixels visible where it is smaller than the cell."""
    small = max(pixels.shape[:2]) < CELL
    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return ImageOps.pad(Image.fromarray(pixels), (CELL, CELL), method, color=PAPER)
