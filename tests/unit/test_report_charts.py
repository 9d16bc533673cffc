"""Plots as Vega-Lite draws them: each mark and interval where its figures say, lines joined, runs switched off."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import pytest
import vl_convert
from PIL import Image

from steerfm import report
from steerfm.errors import RunError
from steerfm.report import charts, encodings
from steerfm.report.lines import lines
from steerfm.report.rows import Row

RUNS = ["base", "best-of-16", "guidance--T---0-1", "tilting--T---0-1", "fine-tuned--T---0-1", "fine-tuned--T---0-01"]
LINES = {"keep the best": {"best of n": ["base", "best-of-16"]}, "gradients": {"guided": ["guidance, T = 0.1"]}}


@pytest.fixture(scope="module")
def compared(six: Path) -> report.Comparison:
    return report.compare(RUNS, root=six)


@pytest.fixture(scope="module")
def joined(six: Path) -> report.Comparison:
    return report.compare(RUNS[:4], lines=LINES, root=six)


def drawn(specification: dict) -> str:
    return vl_convert.vegalite_to_svg(specification, vl_version=encodings.VERSION)


def places(svg: str) -> dict[str, tuple[float, float]]:
    """Return where each run's mark lies in a drawing, x to the right and y downward, by what it says of itself."""
    found = re.findall(
        r'aria-label="[^"]*run: ([^";]*)[^"]*" role="graphics-symbol"[^>]*transform="translate\(([\d.-]+),([\d.-]+)\)"',
        svg,
    )
    return {label: (float(x), float(y)) for label, x, y in found}


def rows_of(comparison: report.Comparison) -> dict[str, Row]:
    return {row.label: row for row in comparison.rows if row.kind == "run"}


def test_marks_lie_where_the_figures_say(compared: report.Comparison) -> None:
    cost, judged, spread = charts.charts(compared)
    assert [chart.title for chart in (cost, judged, spread)] == [
        "Reward against network calls",
        "Reward against judge p(7)",
        "Reward against diversity",
    ]
    rows = rows_of(compared)
    at = places(drawn(cost.specification))
    assert set(at) == set(rows)
    assert at["base"][0] == at["fine-tuned, T = 0.1"][0] < at["best of 16"][0] < at["tilting, T = 0.1"][0]
    for chart, value in (
        (judged, lambda row: row.held_out["judge p(7)"].mean),
        (spread, lambda row: row.diversity_ratio),
    ):
        at = places(drawn(chart.specification))
        first, last = at["base"], at["fine-tuned, T = 0.01"]
        for label, (x, y) in at.items():
            share = (value(rows[label]) - value(rows["base"])) / (
                value(rows["fine-tuned, T = 0.01"]) - value(rows["base"])
            )
            assert (x - first[0]) / (last[0] - first[0]) == pytest.approx(share, abs=0.01)
            higher = (reward(rows[label]) - reward(rows["base"])) / (
                reward(rows["fine-tuned, T = 0.01"]) - reward(rows["base"])
            )
            assert (y - first[1]) / (last[1] - first[1]) == pytest.approx(higher, abs=0.01)
            assert y < first[1] or label == "base", "up is more reward"


def reward(row: Row) -> float:
    assert row.reward is not None
    return row.reward.mean


def test_tooltips_and_words_hold_the_figures(compared: report.Comparison) -> None:
    _, judged, _ = charts.charts(compared)
    row = rows_of(compared)["best of 16"]
    (point,) = (each for each in judged.specification["data"]["values"] if each["run"] == "best of 16")
    assert row.reward is not None and row.reward.low is not None
    assert point["y"] == row.reward.mean and point["y_low"] == row.reward.low
    assert point["x_high"] == row.held_out["judge p(7)"].high
    assert point["reward"].startswith("0.6") and "95%" in point["value"]
    assert "best of 16: reward 0.6" in judged.text


def test_the_step_joins_what_no_other_run_beats(compared: report.Comparison) -> None:
    rows = rows_of(compared)
    values = sorted(((row.diversity_ratio or 0, reward(row), label) for label, row in rows.items()), reverse=True)
    best, front = float("-inf"), []
    for _, value, label in values:
        if value >= best:
            best, front = value, [*front, label]
    svg = drawn(charts.charts(compared)[2].specification)
    path = re.search(r'class="mark-line[^"]*"[^>]*><path [^>]*d="([^"]*)"', svg)
    assert path is not None
    corners = {tuple(map(float, corner)) for corner in re.findall(r"([\d.-]+),([\d.-]+)", path[1])}
    at = places(svg)
    on = {label for label, (x, y) in at.items() if any(abs(x - a) < 0.01 and abs(y - b) < 0.01 for a, b in corners)}
    assert on == set(front) and len(front) > 1


def test_a_run_that_is_switched_off_leaves_the_chart(compared: report.Comparison) -> None:
    specification = charts.charts(compared)[0].specification
    hidden = {**specification, "params": [{"name": charts.HIDDEN, "value": ["best of 16"]}]}
    assert set(places(drawn(specification))) - set(places(drawn(hidden))) == {"best of 16"}


def test_runs_without_the_figure_are_left_out(compared: report.Comparison) -> None:
    rows = tuple(dataclasses.replace(row, costs={}) for row in compared.rows)
    assert next(chart.title for chart in charts.charts(dataclasses.replace(compared, rows=rows))).endswith("judge p(7)")
    rows = tuple(dataclasses.replace(row, divergence=2.0 * i) for i, row in enumerate(compared.rows))
    assert (
        charts.charts(dataclasses.replace(compared, rows=rows))[-1].title == "Reward against divergence D from the base"
    )


def test_ticks_are_round() -> None:
    assert encodings.log_ticks(3, 1500) == [10, 100, 1000]
    assert encodings.log_ticks(3, 40) == [5, 10, 20]
    assert encodings.powers_of_four(3, 1500) == [4, 16, 64, 256, 1024]
    assert encodings.powers_of_four(5, 60) == encodings.log_ticks(5, 60) == [5, 10, 20, 50]


def test_all_charts_are_one_specification_for_files(compared: report.Comparison, joined: report.Comparison) -> None:
    at = drawn(charts.specification(compared))
    assert at.count("Reward against") >= 3 and len(places(at)) == 6
    assert charts.specification(joined) == lines(joined)
    with Image.open(io.BytesIO(encodings.png(charts.specification(compared)))) as image:
        assert image.width > 1000


def test_lines_name_runs_by_name_or_label_and_refuse_others(six: Path, joined: report.Comparison) -> None:
    assert [(line.group, line.label, line.runs) for line in joined.lines] == [
        ("keep the best", "best of n", ("base", "best of 16")),
        ("gradients", "guided", ("guidance, T = 0.1",)),
    ]
    with pytest.raises(RunError, match=r"'best of n' names 'best-of-61', which is not compared.*'best-of-16'"):
        report.compare(RUNS, lines={"": {"best of n": ["best-of-61"]}}, root=six)


def test_lines_share_their_axes_and_join_their_runs(joined: report.Comparison) -> None:
    specification = lines(joined)
    top_left, top_right, low_left, _ = specification["concat"]
    assert specification["columns"] == 2
    scales = [panel["layer"][-1]["encoding"]["y"]["scale"] for panel in specification["concat"]]
    assert scales[0] == scales[1] != scales[2] == scales[3]
    rows = rows_of(joined)
    assert [(v["at"], v["x"], v["y"]) for v in top_left["data"]["values"]] == [
        ("base", 4, reward(rows["base"])),
        ("best of 16", 64, reward(rows["best of 16"])),
    ]
    assert low_left["data"]["values"][1]["y_low"] == rows["best of 16"].held_out["judge p(7)"].low
    assert [v["at"] for v in top_right["data"]["values"]] == ["guidance, T = 0.1"]
    dashed = [layer for layer in top_right["layer"] if layer["mark"].get("strokeDash")]
    assert dashed[0]["data"]["values"] == [{"y": reward(rows["base"]), "said": "base"}]
    x = top_left["layer"][-1]["encoding"]["x"]
    assert x["scale"]["type"] == "log" and x["scale"]["domain"][1] < 200, "a run that no line names does not stretch it"
    assert "best of n" in drawn(specification) and "guided" in drawn(specification)


def test_a_cost_of_zero_has_a_linear_axis(six: Path) -> None:
    gradients = report.compare(RUNS[:4], lines=LINES, root=six, x="reward_gradients")
    assert "type" not in lines(gradients)["concat"][0]["layer"][-1]["encoding"]["x"]["scale"]
    assert encodings.cost_axis("c", [1, 64])["scale"]["type"] == "log"


def test_the_picture_of_lines_is_kept_and_on_the_page(joined: report.Comparison, six: Path, tmp_path: Path) -> None:
    page = report.write_comparison(joined, tmp_path / "with")
    text = page.read_text(encoding="utf-8")
    assert (page.parent / "curves.png").read_bytes() == encodings.png(lines(joined))
    assert "keep the best: best of n; gradients: guided" in text and 'id="plots"' not in text
    plain = report.write_comparison(report.compare(RUNS, root=six), tmp_path / "without")
    assert not (plain.parent / "curves.png").exists()
    assert 'id="plots"' in plain.read_text(encoding="utf-8")


def test_colours_and_marks_differ() -> None:
    assert len({(encodings.mark_style(i), encodings.mark_path(i)) for i in range(40)}) == 40
