"""The picture of lines: runs that belong together, each mark and interval where its figures say."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
from made_runs import make_runs
from PIL import Image

from steerfm import report
from steerfm.errors import RunError
from steerfm.report import curves
from steerfm.report.curves import COLOURS, GAP, HEIGHT, LEFT, TOP, WIDTH

RUNS = ["base", "best-of-16", "guidance--T---0-1", "tilting--T---0-1"]
LINES = {"keep the best": {"best of n": ["base", "best-of-16"]}, "gradients": {"guided": ["guidance, T = 0.1"]}}
PAPER, INK = [255, 255, 255], [28, 31, 35]


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of six finished runs."""
    root = tmp_path_factory.mktemp("runs")
    make_runs(root)
    return root


@pytest.fixture(scope="module")
def joined(six: Path) -> report.Comparison:
    return report.compare(RUNS, lines=LINES, root=six)


def colour(name: str) -> list[int]:
    return [int(name[i : i + 2], 16) for i in (1, 3, 5)]


def near(pixel: np.ndarray, wanted: list[int], most: int = 12) -> bool:
    return bool(np.abs(pixel.astype(int) - wanted).max() <= most)


def places(comparison: report.Comparison, label: str, row: int, column: int) -> tuple[int, int, int, int]:
    """Return where a run's mark and the ends of its interval lie in the picture: x, and three times y."""
    runs = {each.label: each for each in comparison.rows if each.kind == "run"}
    drawn = [runs[name] for name in ("base", "best of 16", "guidance, T = 0.1")]
    quantity = curves.quantities(comparison, drawn)[row]
    found = quantity.get(runs[label])
    assert found is not None and found.low is not None and found.high is not None
    x = curves.cost_axis([each.costs["network_calls"] for each in drawn]).place(runs[label].costs["network_calls"])
    top = TOP + row * (HEIGHT + GAP)
    y = [round(top + quantity.axis.place(value)) for value in (found.mean, found.low, found.high)]
    return round(LEFT + column * (WIDTH + GAP) + x), y[0], y[1], y[2]


def test_lines_name_runs_by_name_or_label_and_refuse_others(six: Path, joined: report.Comparison) -> None:
    assert [(line.group, line.label, line.runs) for line in joined.lines] == [
        ("keep the best", "best of n", ("base", "best of 16")),
        ("gradients", "guided", ("guidance, T = 0.1",)),
    ]
    with pytest.raises(RunError, match=r"'best of n' names 'best-of-61', which is not compared.*'best-of-16'"):
        report.compare(RUNS, lines={"": {"best of n": ["best-of-61"]}}, root=six)


@pytest.mark.parametrize("row", [0, 1])
def test_marks_and_intervals_lie_where_the_figures_say(joined: report.Comparison, row: int) -> None:
    with Image.open(io.BytesIO(curves.curves(joined))) as image:
        pixels = np.asarray(image.convert("RGB"))
    for label, column in (("best of 16", 0), ("guidance, T = 0.1", 1)):
        x, y, low, high = places(joined, label, row, column)
        assert near(pixels[y, x], colour(COLOURS[0])), f"no mark of {label}"
        for end in (low, high):
            inside = end + (1 if end < y else -1)
            assert not near(pixels[inside, x - 1 : x + 2].min(0), PAPER, 40), f"{label}: the interval ends too soon"
        above = pixels[TOP + row * (HEIGHT + GAP) + 2 : high - 3, x - 1 : x + 2]
        assert above.size and (above > 200).all(), f"{label}: the interval goes on too far"
    _, y, _, _ = places(joined, "base", row, 0)
    for column in (0, 1):
        left = LEFT + column * (WIDTH + GAP)
        dashes = [near(pixels[y - 1 : y + 2, left + k].min(0), INK, 120) for k in range(8, 72)]
        assert 0.4 < np.mean(dashes) < 0.9, "the first run's line is dashed"


def test_a_run_that_no_line_names_is_not_drawn(six: Path, joined: report.Comparison) -> None:
    """The run of 768 calls would stretch the axis, and that of 96 lies near its end."""
    x, *_ = places(joined, "guidance, T = 0.1", 0, 1)
    assert x > LEFT + WIDTH + GAP + 0.9 * WIDTH
    assert curves.curves(joined) == curves.curves(report.compare(RUNS[:3], lines=LINES, root=six))


def test_a_cost_of_zero_has_a_linear_axis(six: Path) -> None:
    assert curves.cost_axis([1, 64]).logarithmic and not curves.cost_axis([0, 64]).logarithmic
    gradients = report.compare(RUNS, lines=LINES, root=six, x="reward_gradients")
    with Image.open(io.BytesIO(curves.curves(gradients))) as image:
        assert image.width == LEFT + 2 * (WIDTH + GAP)


def test_runs_that_know_no_cost_are_left_out(joined: report.Comparison) -> None:
    rows = tuple(dataclasses.replace(row, costs={}) for row in joined.rows)
    with Image.open(io.BytesIO(curves.curves(dataclasses.replace(joined, rows=rows)))) as image:
        assert image.height < HEIGHT


def test_the_picture_is_kept_and_on_the_page(joined: report.Comparison, six: Path, tmp_path: Path) -> None:
    page = report.write_comparison(joined, tmp_path / "with")
    text = page.read_text(encoding="utf-8")
    assert (page.parent / "curves.png").read_bytes() == curves.curves(joined)
    assert 'alt="keep the best: best of n; gradients: guided"' in text and 'id="plots"' not in text
    plain = report.write_comparison(report.compare(RUNS, root=six), tmp_path / "without")
    assert not (plain.parent / "curves.png").exists()
    assert 'id="plots"' in plain.read_text(encoding="utf-8")


def test_colours_are_the_page_s_and_marks_differ() -> None:
    css = (Path(report.__file__).parent / "templates" / "style.css").read_text()
    light = dict(re.findall(r"--(s\d): (#[0-9a-f]{6})", css.partition("@media")[0]))
    assert tuple(light[f"s{i}"] for i in range(len(COLOURS))) == COLOURS
    kinds = {(i % len(COLOURS), tuple(map(tuple, np.round(curves.mark(i, 0, 0), 6)))) for i in range(40)}
    assert len(kinds) == 40
