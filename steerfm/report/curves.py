"""Methods at several costs as one PNG: a line a method, a column a group of them, reward above what was held out."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from steerfm.report.charts import COST_TITLES, STYLES, Axis, Tick
from steerfm.report.compare import Comparison, Line
from steerfm.report.estimates import Estimate
from steerfm.report.rows import Row

WIDTH, HEIGHT = 350, 240  # of one panel's drawing area, in pixels
LEFT, TOP, GAP, BOTTOM, ENTRY = 62, 34, 16, 46, 19
FINE = 3  # what it is drawn larger by, and made smaller again, so that lines are smooth
INK, SOFT, GRID, PAPER = "#1c1f23", "#5d636b", "#ececea", "#ffffff"
COLOURS = ("#616870", "#0072b2", "#c8500a", "#00805c", "#aa3377", "#8f6400", "#4b3fa8", "#b8336a")  # the page's
SHAPES = ((24, 0), (4, 45), (3, -90), (4, 0), (3, 90), (6, 0), (5, -90), (3, 0))  # sides and turn of each mark
Get = Callable[[Row], Estimate | None]


class Point(NamedTuple):
    """A run's place in a panel, and the ends of its interval."""

    x: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Quantity:
    """Hold what a row of panels shows: its title, how to read it off a run, and its axis."""

    title: str
    get: Get
    axis: Axis


def curves(comparison: Comparison) -> bytes:
    """Return the PNG of the comparison's lines against its cost, with 95% intervals.

    The columns share their axes. Dashed: the first run, which the others are held against. Runs that lack the cost or
    the value are left out.
    """
    rows = {row.label: row for row in comparison.rows if row.kind == "run"}
    columns = list(dict.fromkeys(line.group for line in comparison.lines))
    x = cost_axis([row.costs[comparison.x] for row in _drawn(comparison, rows)])
    shown = quantities(comparison, _drawn(comparison, rows))
    entries = 1 + max(sum(line.group == column for line in comparison.lines) for column in columns)
    width = LEFT + len(columns) * (WIDTH + GAP)
    height = TOP + len(shown) * (HEIGHT + GAP) + BOTTOM + entries * ENTRY
    pen = Pen(width, height)
    for i, column in enumerate(columns):
        left = LEFT + i * (WIDTH + GAP)
        lines = [line for line in comparison.lines if line.group == column]
        pen.text((left + WIDTH / 2, TOP / 2), column, INK, "mm")
        for j, quantity in enumerate(shown):
            top = TOP + j * (HEIGHT + GAP)
            _frame(pen, left, top, x, quantity, ticks=i == 0, below=j == len(shown) - 1)
            _baseline(pen, left, top, rows[comparison.sources[0].label], quantity)
            for style, line in enumerate(lines):
                known = sorted((rows[label] for label in line.runs), key=lambda row: row.costs.get(comparison.x, 0))
                _curve(pen, left, top, style, _points(known, comparison.x, x, quantity))
        top = TOP + len(shown) * (HEIGHT + GAP)
        pen.text((left + WIDTH / 2, top + 24), COST_TITLES[comparison.x], INK, "mm")
        _legend(pen, left, top + BOTTOM, [line.label for line in lines], comparison.sources[0].label)
    return pen.png()


def quantities(comparison: Comparison, rows: Sequence[Row]) -> list[Quantity]:
    """Return what is shown: the reward, and every held-out value that some row has."""
    found: dict[str, Get] = {"reward": lambda row: row.reward}
    found |= {f"{name}, held out": _held_out(name) for name in comparison.held_out}
    return [
        Quantity(title, get, value_axis([estimate for row in rows if (estimate := get(row))]))
        for title, get in found.items()
        if any(get(row) for row in rows)
    ]


def cost_axis(costs: Sequence[float]) -> Axis:
    """Return the horizontal axis of costs: by logarithm unless one of them is zero."""
    low, high = min(costs, default=0.0), max(costs, default=0.0)
    if low > 0:
        return Axis(low / 1.25, high * 1.25, 0, WIDTH, logarithmic=True)
    return Axis(low, high * 1.05 or 1.0, 0, WIDTH)


def value_axis(found: Sequence[Estimate]) -> Axis:
    """Return the vertical axis of values and their intervals, upward."""
    values = [value for each in found for value in (each.mean, each.low, each.high) if value is not None]
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - room, high + room, HEIGHT, 0)


class Pen:
    """Draw in pixels of the finished picture."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (FINE * width, FINE * height), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(size=13 * FINE)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.0) -> None:
        """Draw a line through points."""
        self.draw.line([_fine(point) for point in points], colour, max(1, round(width * FINE)), joint="curve")

    def shape(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        """Draw a filled polygon, with a thin edge of paper that sets it off."""
        self.draw.polygon([_fine(point) for point in points], colour, PAPER, FINE // 2)

    def text(self, place: tuple[float, float], text: str, colour: str, anchor: str, turned: bool = False) -> None:
        """Write text; turned: upward, centred at the place."""
        if not turned:
            self.draw.text(_fine(place), text, fill=colour, font=self.font, anchor=anchor)
            return
        length = math.ceil(self.font.getlength(text)) + 2 * FINE
        strip = Image.new("RGB", (length, 20 * FINE), PAPER)
        ImageDraw.Draw(strip).text((length / 2, 10 * FINE), text, fill=colour, font=self.font, anchor="mm")
        strip = strip.transpose(Image.Transpose.ROTATE_90)
        x, y = _fine(place)
        self.image.paste(strip, (round(x - strip.width / 2), round(y - strip.height / 2)))

    def png(self) -> bytes:
        """Return the picture at its size."""
        size = (self.image.width // FINE, self.image.height // FINE)
        stream = io.BytesIO()
        small = self.image.resize(size, Image.Resampling.LANCZOS)
        small.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
            stream, format="PNG", optimize=True
        )
        return stream.getvalue()


def _fine(place: tuple[float, float]) -> tuple[float, float]:
    return place[0] * FINE, place[1] * FINE


def _drawn(comparison: Comparison, rows: dict[str, Row]) -> list[Row]:
    """Return the runs of all lines that have the cost, and the first run."""
    labels = dict.fromkeys(label for line in comparison.lines for label in line.runs)
    named = [rows[label] for label in dict.fromkeys([*labels, comparison.sources[0].label])]
    return [row for row in named if comparison.x in row.costs]


def _held_out(name: str) -> Get:
    return lambda row: row.held_out.get(name)


def _points(rows: Sequence[Row], cost: str, x: Axis, quantity: Quantity) -> list[Point]:
    """Return the points of the runs that have both, in the panel's pixels."""
    found = [(x.place(row.costs[cost]), quantity.get(row)) for row in rows if cost in row.costs]
    up = quantity.axis.place
    return [
        Point(across, up(e.mean), up(e.mean if e.low is None else e.low), up(e.mean if e.high is None else e.high))
        for across, e in found
        if e is not None
    ]


def _frame(pen: Pen, left: float, top: float, x: Axis, quantity: Quantity, ticks: bool, below: bool) -> None:
    """Draw a panel's grid and frame, with numbers at the left (`ticks`) and below."""
    for tick in quantity.axis.ticks():
        pen.line([(left, top + tick.place), (left + WIDTH, top + tick.place)], GRID)
        if ticks:
            pen.text((left - 6, top + tick.place), tick.text, SOFT, "rm")
    for tick in _doublings(x):
        pen.line([(left + tick.place, top), (left + tick.place, top + HEIGHT)], GRID)
        if below:
            pen.text((left + tick.place, top + HEIGHT + 11), tick.text, SOFT, "mm")
    if ticks:
        pen.text((13, top + HEIGHT / 2), quantity.title, INK, "mm", turned=True)
    pen.line([(left, top + HEIGHT), (left, top), (left + WIDTH, top)], SOFT, 0.6)
    pen.line([(left, top + HEIGHT), (left + WIDTH, top + HEIGHT), (left + WIDTH, top)], SOFT, 0.6)


def _doublings(axis: Axis) -> list[Tick]:
    """Return ticks at powers of four on a logarithmic axis that has at least three of them, else the usual ones."""
    if not axis.logarithmic:
        return axis.ticks()
    powers = range(math.ceil(math.log(axis.low, 4)), math.floor(math.log(axis.high, 4)) + 1)
    found = [Tick(axis.place(4.0**p), f"{4.0**p:g}") for p in powers]
    return found if 3 <= len(found) <= 10 else axis.ticks()


def _baseline(pen: Pen, left: float, top: float, row: Row, quantity: Quantity) -> None:
    """Draw the first run's value as a dashed line."""
    found = quantity.get(row)
    if found is not None:
        _dashes(pen, left, left + WIDTH, top + quantity.axis.place(found.mean))


def _dashes(pen: Pen, start: float, end: float, y: float) -> None:
    for k in range(math.ceil((end - start) / 8)):
        pen.line([(start + 8 * k, y), (min(start + 8 * k + 5, end), y)], INK, 1.0)


def _curve(pen: Pen, left: float, top: float, style: int, points: Sequence[Point]) -> None:
    """Draw a line, its intervals, and its marks."""
    colour = COLOURS[style % STYLES]
    placed = [(left + point.x, top + point.mean) for point in points]
    for point in points:
        pen.line([(left + point.x, top + point.low), (left + point.x, top + point.high)], colour, 1.0)
    if len(placed) > 1:
        pen.line(placed, colour, 1.6)
    for place in placed:
        pen.shape(mark(style, *place), colour)


def _legend(pen: Pen, left: float, top: float, labels: Sequence[str], baseline: str) -> None:
    """Draw what the lines of a column are."""
    for style, label in enumerate(labels):
        y = top + style * ENTRY + ENTRY / 2
        pen.line([(left + 4, y), (left + 32, y)], COLOURS[style % STYLES], 1.6)
        pen.shape(mark(style, left + 18, y), COLOURS[style % STYLES])
        pen.text((left + 40, y), label, INK, "lm")
    y = top + len(labels) * ENTRY + ENTRY / 2
    _dashes(pen, left + 4, left + 32, y)
    pen.text((left + 40, y), baseline, INK, "lm")


def mark(style: int, x: float, y: float) -> list[tuple[float, float]]:
    """Return the outline of a style's mark around a place: colour and mark together stay unique beyond eight lines."""
    sides, turn = SHAPES[(style + style // STYLES) % STYLES]
    angles = [math.radians(turn) + 2 * math.pi * k / sides for k in range(sides)]
    size = 4.6 if sides > 4 else 5.4
    return [(x + size * math.cos(angle), y + size * math.sin(angle)) for angle in angles]


def described(lines: Sequence[Line]) -> str:
    """Return what the picture shows in words, for who cannot see it; the figures are the table's."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(line.group, []).append(line.label)
    return "; ".join(f"{group}: {', '.join(labels)}" for group, labels in groups.items())
