"""docs/metrics.md: its snippet runs, it names every metric, and its closed forms are right."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from oracles import gaussian_map

from steerfm import metrics

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_snippets_run(capsys: pytest.CaptureFixture[str]) -> None:
    for snippet in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(snippet, "docs/metrics.md", "exec"), {})
    assert "KernelDistance(mean=" in capsys.readouterr().out


def test_every_distance_is_on_the_page() -> None:
    helpers = {"frechet_between_halves", "histogram_counts", "median_distance", "statistics", "vendi_score_of"}
    public = {name for name in metrics.__all__ if not dataclasses.is_dataclass(getattr(metrics, name))}
    assert sorted(name for name in public - helpers if name not in PAGE) == []


def test_straightness_of_a_gaussian_as_the_page_says() -> None:
    """The mean of |z|² over 4000 normals in 2 dimensions is known to 3% in four of its errors."""
    x1 = torch.randn(4000, 2, dtype=torch.float64)
    found = float(metrics.straightness(gaussian_map((1.0, 2.0), 0.5), x1).mean())
    assert found == pytest.approx(0.5 * (2 - math.pi / 2) * 2, rel=0.07)
