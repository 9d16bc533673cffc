"""The benchmark of what steering costs: every method has its line, within its budget, and the claim is looked at."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from oracles import gaussian_map

from steerfm import steering
from steerfm.analytic import QuadraticReward
from steerfm.steering import Steering

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("steering_cost")


def built(line: Any, budget: int) -> Any:
    """Return a line's method at a budget, as its recipe and its options say, on digits."""
    recipe = yaml.safe_load((ROOT / "recipes" / "method" / f"{line.method}.yaml").read_text())
    for key, value in {**line.options, **line.by_data.get("digits", {}), **line.budgets[budget]}.items():
        *parts, last = key.split(".")
        node = recipe
        for part in parts:
            node = node[part]
        node[last] = value
    return made(recipe)


def made(node: Any) -> Any:
    """Return what a recipe's node stands for."""
    if not isinstance(node, dict):
        return node
    return pkgutil.resolve_name(node["_target_"])(**{k: made(v) for k, v in node.items() if k != "_target_"})


def test_every_method_has_a_line_and_a_name(cost: ModuleType) -> None:
    kinds = {getattr(steering, name) for name in steering.__all__}
    methods = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Steering) and kind is not Steering}
    assert methods <= {type(built(line, max(line.budgets))) for line in cost.LINES.values()}
    assert cost.LINES.keys() == cost.NAMES.keys() >= set(cost.FAST)
    assert f"best_{4 * cost.QUARTER}" == cost.BEST


def test_no_setting_exceeds_its_budget_or_wastes_it(cost: ModuleType) -> None:
    """A quarter may be left over: particles and steps are whole."""
    flow_map = gaussian_map([0.3, -0.2], 0.7)
    for name, line in cost.LINES.items():
        assert line.budgets.keys() <= set(cost.BUDGETS), name
        for budget in line.budgets:
            spent = built(line, budget)(flow_map, QuadraticReward.linear((0.8, -0.5)), seeds=[0]).cost.network_calls
            assert 0.75 * budget <= spent <= budget, f"{name} at {budget}: {spent}"


@pytest.mark.parametrize(("judge", "word"), [(0.9, "holds"), (0.5, "BROKEN")])
def test_the_claim_looks_at_cheap_runs_alone(cost: ModuleType, judge: float, word: str) -> None:
    def row(label: str, calls: float, held_out: float, kind: str = "run") -> dict[str, Any]:
        return {"kind": kind, "label": label, "network_calls": calls, "held_out.judge": held_out}

    def gap(label: str, metric: str, mean: float) -> dict[str, Any]:
        return {"label": label, "metric": metric, "difference": {"mean": mean, "low": mean - 1, "high": mean + 1}}

    table = {
        "rows": [row("aim", 64, 0.8), row("dear", 17, 0.99), row("cheap", 15, judge), row("worse", 4, 0.1)],
        "differences": [gap("cheap", "reward", 7.0), gap("cheap", "held_out.judge", judge - 0.8)],
    }
    table["rows"].append(row("real", 0, 1.0, "reference"))
    told = cost.claim("digits", table)
    assert told.split()[0] == word
    assert f"cheap has judge {judge:.3f} at 15 calls, aim 0.800" in told
    assert f"{judge - 0.8:+.3f} ({judge - 1.8:+.3f} to {judge + 0.2:+.3f})" in told
