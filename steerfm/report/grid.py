"""A comparison's pictures as one figure, SVG with the words as text: a block a prompt, a row a run, a column a seed."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image, ImageFont

from steerfm.report.compare import Comparison
from steerfm.report.pictures import chosen_pairs, read_picture, rows_by_pair

CELL = 64  # units of the SVG that a picture is wide, which are pixels of the PNG at scale 1
GAP = 4
FONT, LINE = 11, 14  # size of the words and height of a line of them
WIDEST_LABEL, LONGEST_PROMPT = 28, 100  # characters of a line
LARGEST_SIDE = 512  # of a picture that is kept whole
ROOM = 1.15  # of the words' width as Pillow's font has it, since another font may draw them
INK, PAPER = "#1c1f23", "#ffffff"


@dataclass(frozen=True)
class Block:
    """Hold one prompt's pictures: its words, and for each run its pictures, None where there is none."""

    prompt: str
    rows: list[list[np.ndarray | None]]

    @property
    def words(self) -> list[str]:
        """Return the prompt in lines."""
        return textwrap.wrap(_printable(self.prompt), LONGEST_PROMPT)[:3]

    @property
    def height(self) -> int:
        """Return the height that the block takes."""
        return len(self.words) * LINE + len(self.rows) * (CELL + GAP) + 2 * GAP


def grid(comparison: Comparison, prompts: int = 8, seeds: int = 8) -> str | None:
    """Return the figure as SVG: the same column is the same seed in every run; None where no run has a picture.

    prompts, seeds: how many are shown at most. Pictures smaller than a cell are enlarged with their pixels visible.
    """
    places = [rows_by_pair(source) for source in comparison.sources]
    blocks = []
    for prompt, chosen in chosen_pairs(comparison, prompts, seeds).items():
        found = [[at.get((prompt, seed)) for seed in chosen] for at in places]
        rows = zip(comparison.sources, found, strict=True)
        pictures = [
            [None if i is None else read_picture(source.samples.picture(i)) for i in indices]
            for source, indices in rows
        ]
        blocks.append(Block(prompt, pictures))
    if all(picture is None for block in blocks for row in block.rows for picture in row):
        return None
    return _svg(blocks, [_label(source.label) for source in comparison.sources])


def _svg(blocks: list[Block], labels: list[list[str]]) -> str:
    font = ImageFont.load_default(size=FONT)
    margin = round(ROOM * max(font.getlength(line) for label in labels for line in label)) + 2 * GAP
    columns = max(len(row) for block in blocks for row in block.rows)
    words = max((font.getlength(line) for block in blocks for line in block.words), default=0)
    width = max(margin + columns * (CELL + GAP), round(ROOM * words) + 2 * GAP)
    height = sum(block.height for block in blocks)
    parts, top = [f'<rect width="{width}" height="{height}" fill="{PAPER}"/>'], 0
    for block in blocks:
        parts += _block(block, labels, margin, top)
        top += block.height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="Helvetica, Arial, Liberation Sans, sans-serif" font-size="{FONT}" fill="{INK}">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _block(block: Block, labels: list[list[str]], margin: int, top: int) -> Iterator[str]:
    """Yield the words and pictures of a block whose upper edge is at `top`."""
    for i, line in enumerate(block.words):
        yield f'<text x="{GAP}" y="{top + GAP + i * LINE + FONT}" font-style="italic">{escape(line)}</text>'
    first = top + len(block.words) * LINE + GAP
    for i, (row, label) in enumerate(zip(block.rows, labels, strict=True)):
        y = first + i * (CELL + GAP)
        middle = y + CELL / 2 - (len(label) - 1) * LINE / 2 + 0.35 * FONT
        for j, line in enumerate(label):
            yield f'<text x="{GAP}" y="{middle + j * LINE:.1f}">{escape(line)}</text>'
        for j, picture in enumerate(row):
            if picture is not None:
                yield _image(picture, margin + j * (CELL + GAP), y)


def _image(pixels: np.ndarray, x: int, y: int) -> str:
    """Return a picture as an element, in a cell of its own shape centred in the square."""
    image = Image.fromarray(pixels)
    if max(image.size) < CELL:  # enlarged here, since not every viewer leaves pixels visible
        factor = 2 * CELL // max(image.size)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    uri = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
    return f'<image x="{x}" y="{y}" width="{CELL}" height="{CELL}" href="{uri}"/>'


def _label(text: str) -> list[str]:
    """Return a run's label in lines; at most as many as stand beside a picture."""
    return textwrap.wrap(_printable(text), WIDEST_LABEL)[: CELL // LINE] or [""]


def _printable(text: str) -> str:
    """Return text on one line, without what XML forbids."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())
