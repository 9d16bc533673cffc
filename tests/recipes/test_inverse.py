"""Inverse problems: their recipes run, and the benchmark's measures are right where that is known."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_recipes import tiny

from steerfm.cli import main

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def inverse(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("inverse")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("recipe", ["digits_inverse", "shapes_inverse"])
@pytest.mark.parametrize("problem", ["inpainting", "deblurring", "super_resolution"])
def test_every_problem_is_steered(recipe: str, problem: str, here: Path):
    reward = f"{recipe.partition('_')[0]}_{problem}"
    assert main(tiny(recipe, f"reward={reward}", f"name={reward}")) == 0
    rows = [json.loads(line) for line in (here / "runs" / reward / "samples.jsonl").read_text().splitlines()]
    assert all(row["reward"] <= 0 and row["held_out"]["likeness"] <= 1 for row in rows)


@pytest.mark.parametrize("n", [4, 16])
def test_a_truth_of_the_law_of_the_draws_is_covered_nine_times_in_ten(inverse: ModuleType, n: int):
    """For any number of draws, and where numbers are so coarse that most are tied; known to four standard errors."""
    for coarse in (False, True):
        numbers = torch.randn(n + 1, 20_000, generator=generator(n), dtype=torch.float64)
        numbers = numbers.round() if coarse else numbers
        found = inverse.coverage(numbers[0], numbers[1:], torch.full((n,), 1 / n).double(), generator())
        assert abs(found - 0.9) < 4 * (0.09 / 20_000) ** 0.5


def test_weights_count_in_the_coverage(inverse: ModuleType):
    """Draws of N(0, 1) weighted by exp(x) are draws of N(1, 1); without the weights a truth of that is covered less."""
    n, truth = 1000, 1 + torch.randn(2000, generator=generator(1), dtype=torch.float64)
    drawn = torch.randn(n, 1, generator=generator(2), dtype=torch.float64)
    weights = drawn[:, 0].softmax(0)
    drawn = drawn.expand(n, 2000)
    assert abs(inverse.coverage(truth, drawn, weights, generator()) - 0.9) < 0.04
    assert inverse.coverage(truth, drawn, torch.full((n,), 1 / n).double(), generator()) < 0.8


def test_one_particle_covers_nothing(inverse: ModuleType):
    weights = torch.zeros(64, dtype=torch.float64).index_fill(0, torch.tensor([3]), 1.0)
    numbers = torch.randn(65, 500, generator=generator(), dtype=torch.float64)
    assert inverse.coverage(numbers[0], numbers[1:], weights, generator()) == 0


def test_decibels_are_those_of_the_mean_square(inverse: ModuleType):
    truth = torch.rand(1, 8, 8, generator=generator())
    assert inverse.psnr(truth + 0.1, truth) == pytest.approx(20, abs=1e-4)


def test_what_is_known_is_kept_and_another_operator_is_measured_anew(inverse: ModuleType, here: Path, tmp_path: Path):
    path, name = tmp_path / "digits.json", "the map alone"
    first, second = (inverse.case_of("digits", problem, "runs/digits") for problem in ("inpainting", "deblurring"))
    found = inverse.known(path, first, name, "map", 1)
    values = json.loads(path.read_text())
    values["found"]["0"]["psnr_mean"] = 7.0
    path.write_text(json.dumps(values))
    again = inverse.known(path, inverse.case_of("digits", "inpainting", "runs/digits"), name, "map", 2)
    assert [each["psnr_mean"] for each in again] == [7.0, pytest.approx(again[1]["psnr_mean"])]
    assert found[0]["calls"] == 1
    assert inverse.known(path, second, name, "map", 1)[0]["psnr_mean"] == pytest.approx(found[0]["psnr_mean"])


def test_the_hidden_half_alone_is_judged(inverse: ModuleType, here: Path, monkeypatch: pytest.MonkeyPatch):
    """A population that knows the half that is seen, and nothing else, is judged by the other."""
    case, judged = inverse.case_of("digits", "inpainting", "runs/digits"), []
    real = inverse.coverage

    def watched(truth: torch.Tensor, *rest: torch.Tensor) -> float:
        judged.append(len(truth))
        return real(truth, *rest)

    monkeypatch.setattr(inverse, "coverage", watched)
    inverse.measure(case, "the map alone", "data", 0)
    assert judged == [32, inverse.PROJECTIONS]
