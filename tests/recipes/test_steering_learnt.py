"""The benchmark of steering by a learnt map: its errors, what it keeps, its bounds, and (slow) its fast mode."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from steerfm import FlowMap
from steerfm.networks import PlainMLP
from steerfm.steering import BestOfN

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def learnt(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return the benchmark, with sets of 64 points."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("steering_learnt")
    for each in (module, importlib.import_module("steering_exact")):
        monkeypatch.setattr(each, "N", 64)
    module.floor.cache_clear()
    yield module
    module.floor.cache_clear()


def figures(w2: float) -> dict[str, Any]:
    return {"w2": w2, "modes": [0.1, -0.1]}


def errors(jump: float) -> dict[str, float]:
    return {"jump": jump, "look_ahead": jump / 2, "samples": 0.2}


def test_the_exact_map_has_no_error_and_another_has_its_own(learnt: ModuleType):
    exact = learnt.errors(None)
    assert exact["jump"] == exact["look_ahead"] == 0

    class Shifted(torch.nn.Module):
        """The exact map, with 0.3 added to either coordinate at data: u - 0.3 / (s - t)."""

        data_shape = (2,)

        def __init__(self) -> None:
            super().__init__()
            self.exact = learnt.PROBLEMS["mixture-1"].flow_map().network

        def forward(self, x: torch.Tensor, s: torch.Tensor, t: torch.Tensor, condition: Any = None) -> torch.Tensor:
            return self.exact(x, s, t) - (0.3 / (s - t))[:, None]

    found = learnt.errors(FlowMap(Shifted()))
    assert found["jump"] == pytest.approx(0.3 * 2**0.5, rel=1e-3)
    assert found["look_ahead"] == pytest.approx(0.3 * 2**0.5, rel=1e-3)
    assert found["samples"] > exact["samples"] + 0.1


def test_what_is_known_is_kept_and_another_map_is_measured_anew(
    learnt: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(
        learnt.SETTINGS, "importance", importlib.import_module("steering_exact").population(BestOfN(64, 1, 1.0))
    )
    network = PlainMLP((2,), width=8, depth=1)
    first = learnt.known(tmp_path, learnt.Map("8", FlowMap(network), "a"), "mixture-1", "importance", 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    kept = learnt.known(tmp_path, learnt.Map("8", FlowMap(network), "a"), "mixture-1", "importance", 2)
    assert kept == first
    anew = learnt.known(tmp_path, learnt.Map("8", FlowMap(network), "b"), "mixture-1", "importance", 1)
    assert anew[0]["w2"] != first[0]["w2"]


def test_orders_are_judged_and_drawn(learnt: ModuleType):
    maps = {"250": errors(0.8), "8000": errors(0.1), "exact": errors(0.0)}
    good = {
        "250": {"tilting-100": [figures(0.9)]},
        "8000": {"tilting-100": [figures(0.2)]},
        "exact": {"tilting-100": [figures(0.1)]},
    }
    assert all(line.startswith("holds") for line in learnt.judge("mixture-1", maps, good))
    bad = {"250": good["8000"], "8000": good["250"]}
    assert [line.startswith("holds") for line in learnt.judge("mixture-1", maps, bad)] == [True, True, False]
    assert learnt.rows("mixture-1", maps, good)[1][:3] == ["8000", "0.100", "0.050"]
    svg = learnt.picture(maps, {"mixture-1": good})
    drawn = re.search(r'class="mark-line[^"]*"[^>]*><path [^>]*d="([^"]*)"', svg)
    assert drawn is not None
    places = [(float(x), float(y)) for x, y in re.findall(r"([\d.-]+),([\d.-]+)", drawn[1])]
    (left, low), (right, high) = sorted(places)
    assert left < right and low > high  # a worse map is further right and, as y points down, higher up


@pytest.mark.slow
def test_the_fast_mode_holds(tmp_path: Path):
    command = [sys.executable, str(BENCHMARKS / "steering_learnt.py"), "--fast", "--folder", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert ran.returncode == 0, ran.stdout + ran.stderr
