"""The landscape benchmark: what it measures on known samples, what it keeps, its bounds, and (slow) its fast mode."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_recipes import RECIPES
from torch import Tensor, nn

from steerfm import FlowMap
from steerfm.data.points import point_cloud
from steerfm.metrics import histogram_counts, histogram_kl, histogram_kl_floor
from steerfm.runs import Run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ("network.width=8", "network.depth=1", "data.batch_size=16")


@pytest.fixture
def landscape(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # which its workers are told too
    return importlib.import_module("landscape")


class ToAPoint(nn.Module):
    """The exact map to all mass in one point, u = (x - point) / s, which notes the times it is asked for."""

    def __init__(self, point: tuple[float, float]) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.tensor(point))
        self.asked: set[tuple[float, float]] = set()

    data_shape = (2,)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        self.asked.add((float(s[0]), float(t[0])))
        return (x - self.point) / s[:, None]


class Start(ToAPoint):
    """u = s in both coordinates, no flow map: two jumps and one lie (s - r) (r - t) apart in each."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        return s[:, None].expand_as(x)


def figures(*divergences: float, cost: float = 2.0) -> dict[str, Any]:
    kl = dict(zip(("1", "2", "4", "8", "16"), divergences, strict=True))
    return {"kl": kl, "off_support": 0.1, "defect": None, "cost": cost, "steps": 10}


def test_every_recipe_of_the_landscape_has_a_row(landscape: ModuleType):
    assert set(landscape.METHODS) == {name.removeprefix("landscape/") for name in RECIPES if "landscape/" in name}
    known = set(landscape.METHODS)
    for named in ("PASSES", "EULER_STEPS", "RENOISED", "FROM_NOISE", "JUDGED", "SEEDS", "LIMITS", "FAST_METHODS"):
        assert set(getattr(landscape, named)) <= known


def test_the_board_is_that_of_the_data(landscape: ModuleType):
    real, points = landscape.board(), point_cloud("checkerboard", 200_000)
    assert float(real.sum()) == pytest.approx(1)
    floor = histogram_kl_floor(real, len(points))
    assert histogram_kl(points, real) == pytest.approx(floor, rel=0.1)
    assert float(histogram_counts(points)[:-1][real.flatten() == 0].sum()) == 0
    assert histogram_kl(points.flip(1) * torch.tensor([-1.0, 1.0]), real) > 5  # its white squares


@pytest.mark.parametrize(("point", "share"), [((-0.72, -0.72), 0.0), ((-0.72, -0.22), 1.0), ((3.0, 0.0), 1.0)])
def test_all_mass_in_one_point_has_known_figures(landscape: ModuleType, point: tuple[float, float], share: float):
    found = landscape.measure(FlowMap(ToAPoint(point)), "lsd", 4000)
    q = torch.full((512,), 0.5, dtype=torch.float64)
    if share == 0:
        q[0] += 4000
    expected = -math.log(512) - float((q / (4000 + 1601 / 2)).log().mean())
    assert found["kl"] == pytest.approx(dict.fromkeys(("1", "2", "4", "8", "16"), expected), abs=1e-9)
    assert found["off_support"] == pytest.approx(share)
    assert found["defect"] < 1e-5


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("flow_matching", {(i / 16, i / 16) for i in range(1, 17)}),
        ("ct", {(i / 16, 0.0) for i in range(1, 17)}),
        ("free_flow", {(1.0, 0.0)}),
        ("psd", {((i + 1) / n, i / n) for n in (1, 2, 4, 8, 16) for i in range(n)}),
    ],
)
def test_maps_are_asked_only_for_jumps_that_they_have_learnt(
    landscape: ModuleType, name: str, asked: set[tuple[float, float]]
):
    network = ToAPoint((0.1, 0.1))
    found = landscape.measure(FlowMap(network), name, 4000)
    assert network.asked == asked
    assert (found["defect"] is None) == (name != "psd")
    assert list(found["kl"]) == (["1"] if name == "free_flow" else ["1", "2", "4", "8", "16"])


@pytest.mark.parametrize(("name", "interval"), [("psd", 1.0), ("fmm", 0.25)])
def test_the_defect_is_that_of_the_longest_jump_a_map_is_made_for(landscape: ModuleType, name: str, interval: float):
    found = landscape.measure(FlowMap(Start((0.0, 0.0))), name, 4000)
    assert found["defect"] == pytest.approx(math.sqrt(2) * (interval / 2) ** 2, rel=1e-5)


def test_teachers_come_first(landscape: ModuleType):
    assert landscape.in_order(["psd"]) == [["psd"]]
    assert landscape.in_order(["pfmm", "lmd", "psd"]) == [["flow_matching", "fmm"], ["lmd", "psd", "pfmm"]]
    recipe = landscape.compose("pfmm", 2, landscape.Options("runs/here"))
    assert recipe.values["teacher"] == "runs/here/fmm-2"
    assert (recipe.values["seed"], recipe.values["data"]["seed"]) == (2, 2)


def test_bounds(landscape: ModuleType):
    found = {
        "flow_matching": [figures(6, 3, 1.3, 0.4, 0.2)],
        "lsd": [figures(0.2, 0, 0.2, 0, 0), figures(0.3, 0, 0.4, 0, 0), figures(0.37, 0, 0, 0, 0)],
        "mean_flow": [figures(0.65, 0.7, 0.4, 0.2, 0.2)],
        "improved_mean_flow": [figures(0.66, 0.7, 0.4, 0.2, 0.2)],
        "fmm": [figures(9, 3, 1.2, 1, 1)],
    }
    lines = landscape.judge(found, landscape.EULER, in_full=True)
    broken = {line.split("  ")[1].split(":")[0] for line in lines if line.startswith("BROKEN")}
    assert broken == {"fmm at 4, as four Euler steps", "improved_mean_flow at 1, as mean_flow"}
    assert "holds   lsd at 1: 0.290, at most 0.300" in lines
    assert all(line.startswith("holds") for line in landscape.judge(found, 1.3, in_full=False))
    found["lsd"] = [figures(math.nan, 0, 0, 0, 0)]
    assert sum(line.startswith("BROKEN") for line in landscape.judge(found, 1.3, in_full=False)) == 1


def test_the_table_says_mean_spread_and_dashes(landscape: ModuleType, tmp_path: Path):
    one = figures(0.5, 0.4, 0.3, 0.2, 0.1) | {"kl": {"1": 0.5}}
    found = {"free_flow": [one], "lsd": [figures(0.1, 0, 0, 0, 0), figures(0.3, 0, 0, 0, 0)]}
    landscape.write(tmp_path / "table.md", found, 4000)
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert rows[2] == "| Lagrangian | free_flow | 0.500 | – | – | – | – | 0.100 | – | 2.000 | 4.00 (12) |"
    assert rows[3].startswith("| Lagrangian | lsd | 0.200 ± 0.141 | 0.000 ± 0.000 |")
    assert "4,000 samples" in rows[-1]


def test_what_is_known_is_kept_and_what_changed_is_made_anew(landscape: ModuleType, workplace: Path):
    options = landscape.Options("runs", steps=2, samples=4000, overrides=TINY)
    landscape.learn("flow_matching", 0, options)
    first = landscape.learn("lmd", 0, options)
    run, kept = workplace / "runs" / "lmd-0", workplace / "runs" / "figures" / "lmd-0.json"
    assert json.loads(kept.read_text()) == first
    assert first["cost"] > 0
    assert landscape.learn("lmd", 0, options) == first  # down to the cost: it was read

    made = (run / "map" / "flow_map.safetensors").stat().st_mtime_ns
    kept.unlink()
    again = landscape.learn("lmd", 0, options)
    assert again["kl"] == first["kl"]
    assert (run / "map" / "flow_map.safetensors").stat().st_mtime_ns == made  # it was measured, not trained

    other = landscape.learn("lmd", 0, replace(options, overrides=(*TINY, "module.optimizer.lr=0.1")))
    assert other["made_from"] != first["made_from"]
    assert Run.open(run.with_name("lmd-0.old-1")).info.status == "finished"


@pytest.mark.slow
def test_one_failure_costs_only_those_who_learn_from_it(landscape: ModuleType, workplace: Path):
    (workplace / "runs").mkdir()
    (workplace / "runs" / "flow_matching-0").write_text("in the way")
    options = landscape.Options("runs", steps=2, samples=4000, overrides=TINY)
    found, lines = landscape.learn_all(["lmd", "psd_uniform"], options, jobs=1)
    assert list(found) == ["psd_uniform"]
    assert [line.split(":")[0] for line in lines] == ["FAILED  flow_matching, seed 0", "FAILED  lmd"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_fast_mode_finds_the_order(workplace: Path):
    script = [sys.executable, str(BENCHMARKS / "landscape.py"), "--fast"]
    done = subprocess.run(script, cwd=workplace, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()[-3000:]
