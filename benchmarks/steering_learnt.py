"""Steering by a learnt map where the answer is known: what an error of the map costs each method.

    python benchmarks/steering_learnt.py          six maps and the exact one; one core, 90 min, goes on where it stopped
    python benchmarks/steering_learnt.py --fast   two maps, few methods, held to their order; one core, 3 min

The map of recipe=mixture is learnt anew in 250, 500, ... 8,000 steps. Its error: root mean square distance, from one
noise, between its jump to data and the exact map's; the same of look-aheads F(x_t, t, 0), t uniform; and sliced W2 of
what it samples in one jump to the mixture, over the floor. Each map is then steered to the two tilts of
benchmarks/steering_exact.py, whose methods, particles and measures these are, with three seeds.

--write PATH writes the tables as Markdown, --picture PATH the curves as SVG.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import vl_convert
from landscape import start_worker, trained
from rich.console import Console
from rich.table import Table
from steering_exact import PLANE, PROBLEMS, SETTINGS, N, Problem, bound, exact_set, measure, worst_mode
from torch import Tensor

from steerfm import FlowMap, config, seeds
from steerfm.commands import common
from steerfm.files import read_json, write_atomic
from steerfm.metrics import sliced_wasserstein
from steerfm.report.encodings import SCHEMA, VERSION, theme
from steerfm.runs import run_fingerprint

STEPS = (250, 500, 1000, 2000, 4000, 8000)
METHODS = {
    "importance": "softmax of 4096",
    "monte_carlo": "Monte Carlo",
    "noise_sampling": "noise sampling",
    "tilting-100": "tilting",
}
SEEDS = 3
console = Console(width=None if os.isatty(1) else 160)


@dataclass(frozen=True, eq=False)
class Learnt(Problem):
    """A problem that is steered with a learnt map."""

    learnt: FlowMap | None = None

    def flow_map(self, dtype: torch.dtype = torch.float32) -> FlowMap:
        """Return the learnt map, or the exact one where there is none."""
        return super().flow_map(dtype) if self.learnt is None else self.learnt


@dataclass(frozen=True)
class Map:
    """A map and its name; digest: of its weights, "exact" for the exact map."""

    name: str
    flow_map: FlowMap | None
    digest: str

    @property
    def problems(self) -> dict[str, Learnt]:
        """The problems of the plane, to be steered with this map."""
        return {name: Learnt(PROBLEMS[name].mixture, PROBLEMS[name].reward, learnt=self.flow_map) for name in PLANE}


def learn(steps: int, folder: Path) -> Map:
    """Train recipe=mixture for so many steps unless that is done, and return its map."""
    overrides = ["recipe=mixture", f"name=map-{steps}", f"folder={folder}", f"trainer.max_steps={steps}", "threads=1"]
    overrides += ["logger=none", "callbacks.grid=null", "trainer.enable_progress_bar=false"]
    recipe = config.compose("train", overrides)
    saved = trained(recipe, run_fingerprint(recipe.values, common.inputs(recipe), str(folder)))
    weights = b"".join(path.read_bytes() for path in sorted(saved.glob("*.safetensors")))
    return Map(str(steps), FlowMap.load(saved).eval(), hashlib.sha256(weights).hexdigest())


@torch.no_grad()
def errors(learnt: FlowMap | None) -> dict[str, float]:
    """Return how far a map is from the exact one: of jumps from noise, of look-aheads, and of what it samples."""
    problem = PROBLEMS["mixture-1"]
    exact = problem.flow_map()
    flow_map = exact if learnt is None else learnt
    x1, x0 = seeds.noise(range(N), (2,)), drawn(0).float()
    t = torch.rand(N, generator=torch.Generator().manual_seed(6))
    x_t = torch.lerp(x0, x1, t[:, None])
    samples = flow_map.jump(x1, 1.0, 0.0)
    return {
        "jump": distance(samples, exact.jump(x1, 1.0, 0.0)),
        "look_ahead": distance(flow_map.look_ahead(x_t, t), exact.look_ahead(x_t, t)),
        "samples": sliced_wasserstein(samples.double(), drawn(1)),
    }


def drawn(seed: int) -> Tensor:
    """Return N points of the mixture."""
    return PROBLEMS["mixture-1"].mixture.sample(N, torch.Generator().manual_seed(20_000 + seed))


def distance(a: Tensor, b: Tensor) -> float:
    """Return the root mean square distance of rows."""
    return float((a - b).square().sum(1).mean().sqrt())


def known(folder: Path, learnt: Map, problem: str, name: str, count: int) -> list[dict[str, Any]]:
    """Measure a method with a map on `count` seeds, or return what an earlier run of the same map and method found."""
    path = folder / f"{learnt.name}_{problem}_{name}.json"
    made_from = f"{SETTINGS[name].method} on {N} with {learnt.digest}"
    kept = read_json(path) if path.exists() else {}
    found = kept["found"] if kept.get("made_from") == made_from else {}
    for seed in range(count):
        if str(seed) not in found:
            found[str(seed)] = measure(learnt.problems[problem], SETTINGS[name], seed)
            write_atomic(path, json.dumps({"made_from": made_from, "found": found}).encode())
    return [found[str(seed)] for seed in range(count)]


@cache
def floor(problem: str | None) -> float:
    """Return the median W2 of 100 pairs of exact sets of a problem's tilt, or of the mixture itself."""
    sets = [exact_set(PROBLEMS[problem], seed) if problem else drawn(seed) for seed in range(200)]
    return statistics.median(map(sliced_wasserstein, sets[::2], sets[1::2]))


def ratio(found: Sequence[dict[str, Any]], problem: str) -> float:
    """Return the median W2 over the floor."""
    return statistics.median(each["w2"] for each in found) / floor(problem)


Found = dict[str, dict[str, list[dict[str, Any]]]]  # of one problem, by map and by method


def rows(problem: str, maps: dict[str, dict[str, float]], found: Found) -> list[list[str]]:
    """Return a row a map: its errors, and what each method comes to."""
    return [
        [
            name,
            *(f"{maps[name][key]:.3f}" for key in ("jump", "look_ahead")),
            f"{maps[name]['samples'] / floor(None):.1f}",
            *(f"{ratio(each, problem):.1f} ({worst_mode(each):+.3f})" for each in by_method.values()),
        ]
        for name, by_method in found.items()
    ]


def headings(methods: Sequence[str]) -> list[str]:
    """Return the headings of the table."""
    return ["steps", "jump", "look-ahead", "samples", *(METHODS[name] for name in methods)]


def judge(problem: str, maps: dict[str, dict[str, float]], found: Found) -> list[str]:
    """Return a line on each order: more training, a better map; a better map, a tilt that is met more closely."""
    names = [name for name in found if name != "exact"]
    first, last = names[0], names[-1]
    lines = [
        bound(f"{last} steps, error of the {key}, over that of {first}", maps[last][key] / maps[first][key], 1.0)
        for key in ("jump", "look_ahead")
    ]
    for method in found[first]:
        nearer = ratio(found[last][method], problem) / ratio(found[first][method], problem)
        lines.append(bound(f"{problem}: {method}, {last} steps, W2 over that of {first}", nearer, 1.0))
    return lines


def picture(maps: dict[str, dict[str, float]], found: dict[str, Found]) -> str:
    """Return the curves of W2 over the floor against look-aheads' error as SVG, a panel a problem, on log scales."""
    learnt = [name for name in maps if name != "exact"]
    points = [
        {
            "problem": problem,
            "method": METHODS[m],
            "gap": maps[name]["look_ahead"],
            "ratio": ratio(of[name][m], problem),
        }
        for problem, of in found.items()
        for m in of[learnt[0]]
        for name in learnt
    ]
    logarithmic = {"type": "log", "nice": False, "padding": 12}
    x = {
        "field": "gap",
        "type": "quantitative",
        "title": "root mean square error of a look-ahead",
        "scale": logarithmic,
    }
    y = {"field": "ratio", "type": "quantitative", "title": "sliced W2 over the floor", "scale": logarithmic}
    method = {"field": "method", "type": "nominal", "title": None, "legend": {"orient": "bottom"}}
    curves = {
        "mark": {"type": "line", "point": {"filled": True, "size": 50}},
        "encoding": {"x": x, "y": y, "color": method, "order": {"field": "gap"}},
    }
    floor = {"mark": {"type": "rule", "strokeDash": [4, 3]}, "encoding": {"y": {"datum": 1}}}
    specification = {
        "$schema": SCHEMA,
        "data": {"values": points},
        "facet": {"column": {"field": "problem", "type": "nominal", "title": None, "sort": list(found)}},
        "spec": {"width": 330, "height": 260, "layer": [floor, curves]},
        "config": {**theme(dark=False), "background": "#ffffff"},
    }
    return vl_convert.vegalite_to_svg(specification, vl_version=VERSION)


def markdown(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    return "\n".join(f"| {' | '.join(each)} |" for each in [titles, ["--:"] * len(titles), *lines])


def main() -> None:
    """Train, measure, print a table a problem and the bounds; exit with 1 where one is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="two maps, two methods, one seed, sigma = 1")
    parser.add_argument("--folder", type=Path, default=Path("runs/steering_learnt"), help="of maps and what is known")
    parser.add_argument("--write", type=Path, metavar="PATH", help="write the tables as Markdown")
    parser.add_argument("--picture", type=Path, metavar="PATH", help="write the curves as SVG")
    arguments = parser.parse_args()
    start_worker()
    problems = PLANE[1:] if arguments.fast else PLANE
    methods = list(METHODS)[:2] if arguments.fast else list(METHODS)
    learnt = [learn(steps, arguments.folder) for steps in ((250, 1000) if arguments.fast else STEPS)]
    learnt += [] if arguments.fast else [Map("exact", None, "exact")]
    maps = {each.name: errors(each.flow_map) for each in learnt}
    count = 1 if arguments.fast else SEEDS
    found: dict[str, Found] = {
        problem: {
            each.name: {name: known(arguments.folder, each, problem, name, count) for name in methods}
            for each in learnt
        }
        for problem in problems
    }
    pages, lines = [], []
    for problem, of in found.items():
        caption = (
            f"{problem}: W2 over its floor, {floor(problem):.3f}, and the worst mode's error; {count} seeds of {N}"
        )
        table = Table(*headings(methods), title=caption)
        for cells in rows(problem, maps, of):
            table.add_row(*cells)
        console.print(table)
        pages.append(f"{caption}.\n\n{markdown(headings(methods), rows(problem, maps, of))}\n")
        lines += judge(problem, maps, of)
    if arguments.write:
        write_atomic(arguments.write, "\n".join(pages).encode())
    if arguments.picture:
        write_atomic(arguments.picture, picture(maps, found).encode())
    console.print("\n".join(dict.fromkeys(lines)), markup=False)
    raise SystemExit(any(not line.startswith("holds") for line in lines))


if __name__ == "__main__":
    main()
