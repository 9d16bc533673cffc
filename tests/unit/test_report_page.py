"""The comparison page as a file: it loads nothing, runs only our scripts, shows text as text, and every picture."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_runs import make_run, points_run, pose
from PIL import Image

from steerfm import report
from steerfm.images import to_uint8
from steerfm.report import encodings, viewer
from steerfm.report.pictures import spread_pairs
from steerfm.report.settings import different_settings
from steerfm.runs import Run

EVIL = "</script><script>alert('x')</script><!--<img src=x onerror=alert(1)>\u2028"


@pytest.fixture(scope="module")
def compared(six: Path) -> report.Comparison:
    return report.compare(["base", "best-of-16", "tilting--T---0-1", "fine-tuned--T---0-01"], root=six)


class Page(HTMLParser):
    """Collect what a page would load, show and run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.data: dict[str, Any] = {}
        self.style = ""
        self.ids: list[str] = []
        self.policy = ""
        self._in: tuple[str, dict[str, str | None]] = ("", {})
        self._text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.loads += [found[name] or "" for name in ("src", "href", "xlink:href", "srcset", "data") if name in found]
        self.ids += [found["id"] or ""] if "id" in found else []
        assert not [name for name in found if name.startswith("on") or name == "style"]
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""
        self._in, self._text = ((tag, found) if tag in ("script", "style") else ("", {})), ""

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        kind, found = self._in
        if kind == "style":
            self.style += self._text
        elif kind == "script" and found.get("type") == "application/json":
            self.data[found["id"] or ""] = json.loads(self._text)
        elif kind == "script":
            self.scripts.append(self._text)
        self._in = ("", {})


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_the_page_is_one_file_that_loads_nothing(compared: report.Comparison) -> None:
    page = Page(report.page(compared))
    assert all(load.startswith(("data:", "#")) for load in page.loads)
    assert "url(" not in page.style and "@import" not in page.style
    assert page.policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in page.policy
    for text, where in ((page.style, "style-src"), *((script, "script-src") for script in page.scripts)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in re.search(rf"{where} ([^;]*)", page.policy)[1]  # pyright: ignore[reportOptionalSubscript]
    assert len(page.scripts) == 2, "ours and Vega's"
    assert len(page.ids) == len(set(page.ids))


def test_the_viewer_holds_every_sample_as_it_is(compared: report.Comparison) -> None:
    found = Page(report.page(compared)).data["samples-data"]
    assert found["runs"] == [source.label for source in compared.sources]
    assert found["figures"] == ["reward", "judge p(7) (held out)"] and found["judged"] == 1
    assert len(found["pairs"]) == found["total"] == 48
    for run, source in enumerate(compared.sources):
        images = to_uint8(pose(source.label)[0].images)
        for pair, (_, seed) in enumerate(found["pairs"]):
            place, reward, judged = found["cells"][run][pair]
            row = source.rows[seed]
            assert (reward, judged) == pytest.approx((row["reward"], row["held_out"]["judge p(7)"]), rel=1e-4)
            assert (pixels(found["pictures"][place]) == images[seed]).all()
    assert found["tiny"]


def test_parts_are_shown_where_there_are_several(tmp_path: Path) -> None:
    samples, _ = pose("base", count=3)
    parts = {"clip": torch.tensor([1.0, float("nan"), 3.0]), "size": torch.zeros(3)}
    with Run.start("two", command="sample", config={}, recipe="r", root=tmp_path) as run:
        run.write_samples(dataclasses.replace(samples, parts=parts))
    found = viewer.gallery(report.compare(["two"], root=tmp_path))
    assert found is not None
    assert found["figures"] == ["reward", "clip (part)", "size (part)"] and found["judged"] == -1
    assert [cell[2] for cell in found["cells"][0]] == [1.0, None, 3.0]


def test_text_from_runs_is_never_html(tmp_path: Path) -> None:
    samples = dataclasses.replace(pose("base", count=3)[0], prompts=[EVIL] * 3, note=EVIL)
    config = {"recipe": EVIL, "</pre>": EVIL}
    for label in (EVIL, EVIL + "2"):
        name = f"evil{len(label)}"
        with Run.start(
            name, command="sample", config={**config, "label": label}, recipe=EVIL, label=label, root=tmp_path
        ) as run:
            run.write_samples(samples, held_out={EVIL: torch.rand(3)})
    comparison = report.compare("evil*", root=tmp_path)
    html = report.page(comparison, title=EVIL)
    page = Page(html)
    assert page.tags.count("script") == 4 and page.tags.count("img") == 0
    assert page.data["samples-data"]["prompts"] == [EVIL]
    assert all(load.startswith(("data:", "#")) for load in page.loads)
    assert "<script>alert" not in report.markdown(comparison)


def test_points_show_as_scatter_plots(tmp_path: Path) -> None:
    points_run(tmp_path, "mixture")
    points_run(tmp_path, "moons", x0=torch.full((64, 2), float("nan")))
    comparison = report.compare(["mixture", "moons"], root=tmp_path)
    page = Page(html := report.page(comparison))
    assert "Scatter plot of the samples of mixture" in html
    counts = [
        sum(point["ours"] for point in page.data["charts-data"]["charts"][f"points-{i}"]["data"]["values"])
        for i in (0, 1)
    ]
    assert 50 < counts[0] <= 64 and counts[1] == 0
    assert "samples-data" not in page.data
    assert any("samples that are not finite" in warning for warning in comparison.warnings)


def test_large_pictures_are_made_smaller_and_broken_ones_left_blank(tmp_path: Path) -> None:
    samples = dataclasses.replace(
        pose("base", count=2)[0],
        x0=torch.randn(2, 4, 8, 8),
        images=torch.rand(2, 3, 300, 600),
        prompts=["a", "b"],
        seeds=[0, 1],
    )
    with Run.start("large", command="sample", config={}, recipe="r", root=tmp_path) as run:
        run.write_samples(samples)
    (run.folder / "images/000001.png").write_bytes(b"\x89PNG broken")
    comparison = report.compare(["large"], root=tmp_path)
    found = viewer.gallery(comparison)
    assert found is not None and not found["tiny"]
    assert [cell[0] for cell in found["cells"][0]] == [0, -1]
    assert found["pictures"][0].startswith("data:image/webp") and pixels(found["pictures"][0]).shape == (128, 256, 3)
    assert "at most 256 pixels large here" in report.page(comparison)


def test_too_many_pictures_are_spread_over_the_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, "base", prompts=("a", "b", "c"), count=8)
    make_run(tmp_path, "best of 16", prompts=("a", "b"), count=4)
    comparison = report.compare(["base", "best-of-16"], root=tmp_path)
    assert spread_pairs(comparison, 5) == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    assert [prompt for prompt, _ in spread_pairs(comparison, 99)] == ["a"] * 4 + ["b"] * 4, "those that all runs have"
    make_run(tmp_path, "tilting, T = 0.1", prompts=("d",), count=4)
    apart = report.compare(["base", "tilting--T---0-1"], root=tmp_path)
    assert len(spread_pairs(apart, 99)) == 28
    monkeypatch.setattr(viewer, "MOST_PICTURES", 10)
    found = viewer.gallery(comparison)
    assert found is not None and len(found["pairs"]) == 5 and found["total"] == 24
    assert "5 of 24" in report.page(comparison)


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    for name, method in {"a": {"n": 16}, "b": {"n": 4, "temperature": 0.1}, "c": None}.items():
        with Run.start(
            name, command="sample", config={"name": name, "seeds": [0, 1], "method": method}, recipe="r", root=tmp_path
        ) as run:
            run.write_samples(pose("base", count=2)[0])
    sources = report.compare(["a", "b", "c"], root=tmp_path).sources
    assert different_settings(sources) == [
        ("method.n", ["16", "4", "–"]),
        ("method.temperature", ["–", "0.1", "–"]),
        ("method", ["–", "–", "null"]),
    ]
    assert different_settings(sources[:1]) == []


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted([luminance(a), luminance(b)], reverse=True)
    return (high + 0.05) / (low + 0.05)


def colours(dark: bool) -> dict[str, str]:
    css = (Path(report.__file__).parent / "templates" / "style.css").read_text()
    return {name: pair[dark] for name, *pair in re.findall(r"--(\w[\w-]*): light-dark\((#\w{6}), (#\w{6})\)", css)}


@pytest.mark.parametrize("dark", [False, True])
def test_colours_have_contrast_in_light_and_dark(dark: bool) -> None:
    theme = colours(dark)
    for ground in ("page", "card", "hover"):
        assert contrast(theme["ink"], theme[ground]) >= 7
        assert contrast(theme["soft"], theme[ground]) >= 4.5  # WCAG 2.2, 1.4.3
        assert contrast(theme["edge"], theme[ground]) >= 3  # of controls, 1.4.11
    assert contrast(theme["ink"], theme["alert"]) >= 7
    for i in range(encodings.STYLES):
        assert contrast(theme[f"s{i}"], theme["card"]) >= 3  # 1.4.11
    assert [theme[f"s{i}"] for i in range(encodings.STYLES)] == list(encodings.COLOURS[dark])
    assert [theme[name] for name in ("ink", "soft", "line")] == list(encodings.INKS[dark])
