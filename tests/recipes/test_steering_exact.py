"""The benchmark of steering where the answer is known: problems, bounds, what it keeps, and (slow) its fast mode."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from steerfm.steering import BestOfN, Steering

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("steering_exact")


def figures(w2: float, modes: list[float], moment: float = 0.0, evidence: float | None = 0.1) -> dict[str, Any]:
    return {
        "w2": w2,
        "modes": modes,
        "moments": [moment, moment],
        "moment_errors": [0.01, 0.01],
        "log_evidence": evidence,
        "ess": 0.5,
        "reward": -1.0,
        "calls": [3.0, 1.0, 0.0],
    }


@pytest.mark.parametrize("name", ["mixture-0.2", "mixture-10d", "inpainting"])
def test_problems_have_the_tilt_that_they_say(exact: ModuleType, name: str):
    """Importance sampling from the base, which asks none of the formulas, finds the same moments and evidence."""
    problem = exact.PROBLEMS[name]
    x0 = problem.mixture.sample(400_000, torch.Generator().manual_seed(0))
    log_weights = problem.reward(x0)
    weights, along = log_weights.softmax(0), x0 @ exact.direction(problem)
    size = 1 / float(weights.square().sum())
    assert abs(float(log_weights.exp().mean().log()) - problem.log_evidence) < 4 / size**0.5
    found = exact.moments(along, weights)
    assert ((found - exact.exact_moments(problem)).abs() < 4 * exact.effective_spread(along, weights)).all()
    shares = exact.mode_shares(x0, weights, problem.tilt)
    assert torch.allclose(shares, exact.exact_shares(problem), atol=4 * 0.5 / size**0.5 + 0.003)


def test_every_method_has_its_row(exact: ModuleType):
    steering = importlib.import_module("steerfm.steering")
    kinds = {getattr(steering, name) for name in steering.__all__}
    methods = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Steering) and kind is not Steering}
    assert methods <= {type(setting.method) for setting in exact.SETTINGS.values()}
    assert set(exact.FAST) | exact.WITHIN.keys() <= exact.SETTINGS.keys()


def test_what_is_known_is_kept_and_another_setting_is_measured_anew(
    exact: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(exact, "N", 64)
    monkeypatch.setitem(exact.SETTINGS, "importance", exact.population(BestOfN(64, 1, 1.0)))
    first = exact.known(tmp_path, "inpainting", "importance", range(2))
    kept = tmp_path / "inpainting_importance.json"
    values = json.loads(kept.read_text())
    values["found"]["0"]["w2"] = 7.0
    kept.write_text(json.dumps(values))
    again = exact.known(tmp_path, "inpainting", "importance", range(3))
    assert [each["w2"] for each in again[:2]] == [7.0, first[1]["w2"]]
    assert first[0]["calls"] == [1.0, 1.0, 0.0]
    monkeypatch.setitem(exact.SETTINGS, "importance", exact.population(BestOfN(64, 2, 1.0)))
    assert exact.known(tmp_path, "inpainting", "importance", range(1))[0]["calls"] == [2.0, 1.0, 0.0]


def test_bounds_hold_for_what_is_good_and_not_for_what_is_not(exact: ModuleType):
    def said(problem: str, **table: list[dict[str, Any]]) -> dict[str, bool]:
        named = {name.replace("_x", "-x").replace("tilting_", "tilting-"): found for name, found in table.items()}
        lines = exact.judge(problem, named, floor=0.1)
        return {line.split(": ")[1]: line.startswith("holds") for line in lines}

    good, bad = figures(0.14, [0.005, -0.005]), figures(0.2, [0.05, -0.05], moment=0.2)
    assert all(said("mixture-1", tilting_100=[good] * 3).values())
    assert not any(said("mixture-1", tilting_100=[bad] * 3).values())
    even = [figures(0.14, [0.05, -0.05]), figures(0.14, [-0.05, 0.05])]  # errors of either sign are no bias
    assert all(said("mixture-1", tilting_100=even).values())
    closest = said("inpainting", importance=[bad], importance_x16=[good], look_ahead=[bad])
    assert closest == {"importance at its best, W2 over the floor": True}
    assert not said("inpainting", importance=[bad])["importance at its best, W2 over the floor"]


@pytest.mark.slow
def test_the_fast_mode_holds(tmp_path: Path):
    command = [sys.executable, str(BENCHMARKS / "steering_exact.py"), "--fast", "--folder", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert ran.returncode == 0, ran.stdout + ran.stderr
