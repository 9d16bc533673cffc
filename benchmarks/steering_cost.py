"""What steering costs: reward and held-out reward against network calls a sample, of every method, on real maps.

    python benchmarks/steering_cost.py digits         trains the map and its CLIP once; one core, 8 min
    python benchmarks/steering_cost.py shapes         the models that ship with the package; one core, 40 min
    python benchmarks/steering_cost.py digits --fast  few methods, at most 64 calls, 64 samples; one core, 3 min

Every method gets 1, 4, 16, 64, 256 and 512 network calls a returned sample, all particles charged and a backward pass
counting two, and makes of them what the table LINES says; where it can do nothing with so few, it is left out. Each is
an ordinary run in the folder, kept once it is finished, and `steerfm compare` draws them: reward and judge against
calls, a line a method, dashed the best of 64 single jumps. The claim at the end: the judge of the best of 64 is reached
with a quarter of its calls. Temperatures, strengths and rates were chosen on other seeds (and prompts) than these.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerfm import config
from steerfm.cli import main as steerfm
from steerfm.commands import common, generation
from steerfm.config import Composed
from steerfm.runs import Run, run_fingerprint, set_aside

BUDGETS = (1, 4, 16, 64, 256, 512)
BEST, QUARTER = "best_64", 16  # what is to be reached, and with how many calls
Options = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One method of the picture: in which of its columns, its recipe of recipes/method, and its options by budget.

    options: of all budgets. by_data: of all budgets on one kind of data.
    """

    kind: str
    method: str
    budgets: dict[int, Options]
    options: Options = field(default_factory=dict)
    by_data: dict[str, Options] = field(default_factory=dict)


def pairs(first: str, second: str, budgets: dict[int, tuple[int, int]]) -> dict[int, Options]:
    """Return two options by budget."""
    return {budget: {first: a, second: b} for budget, (a, b) in budgets.items()}


def single(name: str, budgets: dict[int, int]) -> dict[int, Options]:
    """Return one option by budget."""
    return {budget: {name: value} for budget, value in budgets.items()}


def chains(budgets: dict[int, tuple[int, int, int]]) -> dict[int, Options]:
    """Return the particles, warm-up and iterations of noise sampling by budget."""
    return {b: {"particles": p, "warm_up": w, "iterations": i} for b, (p, w, i) in budgets.items()}


def at(digits: float, shapes: float, name: str = "temperature") -> dict[str, Options]:
    """Return a temperature, or another strength, for each kind of data."""
    return {"digits": {name: digits}, "shapes": {name: shapes}}


TILT = at(0.02, 0.005)
CONSISTENT, GUIDED, ARGMAX = "end at the tilt", "guidance and control", "keep the best"
STEPS = {4: 1, 16: 4, 64: 16, 256: 64, 512: 128}
LINES: dict[str, Line] = {
    "importance": Line(
        CONSISTENT, "best_of_n", single("n", {1: 1, 4: 4, 16: 16, 64: 64, 256: 256, 512: 512}), {"jumps": 1}, TILT
    ),
    "tilting": Line(
        CONSISTENT,
        "tilting",
        pairs("particles", "jumps", {4: (1, 1), 16: (1, 3), 64: (2, 6), 256: (9, 6), 512: (13, 8)}),
        by_data=TILT,
    ),
    "monte_carlo": Line(
        CONSISTENT,
        "monte_carlo",
        pairs("particles", "steps", {1: (1, 1), 4: (2, 2), 16: (4, 4), 64: (16, 4), 256: (32, 8), 512: (64, 8)}),
        {"gamma": 1.0, "strength": "path"},
        TILT,
    ),
    "feynman_kac": Line(
        CONSISTENT,
        "feynman_kac",
        pairs("particles", "steps", {1: (1, 1), 4: (1, 2), 16: (4, 2), 64: (4, 6), 256: (8, 11), 512: (16, 11)}),
        by_data=TILT,
    ),
    "twisted": Line(
        CONSISTENT,
        "tempered",
        pairs("particles", "steps", {1: (1, 1), 4: (4, 1), 16: (1, 4), 64: (3, 5), 256: (4, 13), 512: (8, 13)}),
        by_data=TILT,
    ),
    "noise_sampling": Line(
        CONSISTENT,
        "noise_sampling",
        chains({16: (1, 2, 2), 64: (4, 3, 1), 256: (8, 5, 4), 512: (8, 16, 4)}),
        by_data=TILT,
    ),
    "noise_sampling_pcn": Line(
        CONSISTENT,
        "noise_sampling",
        chains({4: (1, 1, 1), 16: (4, 2, 1), 64: (16, 2, 1), 256: (32, 4, 3), 512: (64, 4, 3)}),
        {"kernel": "pcn"},
        TILT,
    ),
    "look_ahead": Line(GUIDED, "guidance", single("steps", STEPS), by_data=at(0.02, 0.01)),
    "posterior_mean": Line(GUIDED, "dps", single("steps", STEPS), by_data=at(0.03, 0.01)),
    "posterior_draws": Line(
        GUIDED,
        "posterior_draws",
        pairs("steps", "count", {16: (2, 3), 64: (4, 7), 256: (8, 15), 512: (12, 20)}),
        {"draws.steps": 2, "draws.solver": "euler"},
        TILT,
    ),
    "control": Line(GUIDED, "control", single("steps", STEPS), by_data=at(30, 30, "strength")),
    "best": Line(
        ARGMAX, "best_of_n", single("n", {1: 1, 4: 4, 16: 16, 64: 64, 256: 256, 512: 512}), {"jumps": 1}
    ),
    "best_4_jumps": Line(ARGMAX, "best_of_n", single("n", {4: 1, 16: 4, 64: 16, 256: 64, 512: 128}), {"jumps": 4}),
    "noise_optimisation": Line(
        ARGMAX, "noise_optimisation", single("iterations", {4: 1, 16: 5, 64: 21, 256: 85, 512: 170})
    ),
    "noise_climb": Line(
        ARGMAX,
        "noise_optimisation",
        pairs("candidates", "iterations", {16: (7, 3), 64: (28, 12), 256: (112, 48), 512: (224, 96)}),
        {"rate": 20.0, "momentum": 0.5},
    ),
    "halving": Line(ARGMAX, "successive_halving", single("n", {1: 1, 4: 2, 16: 4, 64: 10, 256: 32, 512: 64})),
    "beam": Line(
        ARGMAX,
        "beam_search",
        {
            budget: {"beams": b, "children": c, "steps": s}
            for budget, (b, c, s) in {
                1: (1, 1, 1), 4: (1, 2, 2), 16: (2, 2, 4), 64: (4, 4, 4), 256: (8, 8, 4), 512: (8, 8, 8)
            }.items()
        },
    ),
    "paths": Line(
        ARGMAX, "path_search", pairs("beams", "children", {16: (1, 3), 64: (4, 3), 256: (8, 7), 512: (12, 10)})
    ),
    "zero_order": Line(
        ARGMAX, "zero_order_search", single("rounds", {4: 1, 16: 5, 64: 21, 256: 85, 512: 170}),
        {"neighbours": 3, "similarity": 0.5},
    ),
}  # fmt: skip
NAMES = {
    "importance": "importance sampling",
    "tilting": "trajectory tilting",
    "monte_carlo": "Monte Carlo over jumps",
    "feynman_kac": "Feynman-Kac over the SDE",
    "twisted": "twisted and tempered (DAS)",
    "noise_sampling": "noise sampling with gradients",
    "noise_sampling_pcn": "noise sampling without",
    "look_ahead": "through the look-ahead",
    "posterior_mean": "through the posterior mean",
    "posterior_draws": "by posterior draws (GLASS)",
    "control": "control (FMRG)",
    "best": "best of n single jumps",
    "best_4_jumps": "best of n of 4 jumps",
    "noise_optimisation": "noise optimisation (ReNO)",
    "noise_climb": "ReNO from the best of k",
    "halving": "successive halving",
    "beam": "beam search",
    "paths": "path search",
    "zero_order": "zero-order search",
}
FAST = ("best", "tilting", "look_ahead", "noise_climb", "beam")


@dataclass(frozen=True)
class Data:
    """What is steered: the recipe, what all of its runs share, and how many seeds a prompt has at each budget."""

    recipe: str
    shared: tuple[str, ...]
    seeds: dict[int, int]


def data(name: str, folder: Path, fast: bool) -> Data:
    """Return what a kind of data is made of; trains the digits' models where they are not there yet."""
    if name == "digits":
        maps = (trained("digits", folder), trained("digits_clip", folder))
        return Data("digits_steer", (f"map={maps[0]}", f"clip={maps[1]}"), dict.fromkeys(BUDGETS, 64 if fast else 128))
    seeds = {budget: 4 if budget <= 64 else 1 for budget in BUDGETS}
    return Data("shapes_steer", (f"drawn.n={16 if fast else 32}",), seeds)


def trained(recipe: str, folder: Path) -> Path:
    """Return the run of a training recipe, made where it is not there."""
    run = folder / recipe
    if not any((run / part).exists() for part in ("map", "clip")) and steerfm(
        ["train", f"recipe={recipe}", f"name={recipe}", f"folder={folder}", "trainer.enable_progress_bar=false"]
    ):
        raise SystemExit(1)
    return run


def composed(name: str, kind: str, source: Data, budget: int, folder: Path) -> Composed:
    """Return the recipe of a method at a budget."""
    line = LINES[name]
    options = {**line.options, **line.by_data.get(kind, {}), **line.budgets[budget], "micro_batch": 64}
    return config.compose(
        "steer",
        [
            f"recipe={source.recipe}",
            f"method={line.method}",
            *(f"method.{key}={value}" for key, value in options.items()),
            *source.shared,
            f"seeds={source.seeds[budget]}",
            f"folder={folder / kind}",
            f"name={name}_{budget}",
            f"label='{NAMES[name]}, {budget}'",
            "threads=1",
            "trainer.enable_progress_bar=false",
        ],
    )


def run_all(
    kind: str, source: Data, names: Sequence[str], budgets: Sequence[int], folder: Path
) -> dict[str, list[str]]:
    """Run what is not finished, cheap budgets first; return the runs of each method."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for budget in budgets:
        for name in names:
            if budget in LINES[name].budgets:
                found[name].append(f"{name}_{budget}")
                run_one(composed(name, kind, source, budget, folder), found[name][-1])
    return found


def run_one(recipe: Composed, name: str) -> None:
    """Make a run unless it is finished; one of another recipe is set aside, one that was interrupted begins again."""
    root = recipe.values["folder"]
    fingerprint = run_fingerprint(recipe.values, common.inputs(recipe), root)
    if Run.is_done(root, name, fingerprint):
        return
    if (Path(root) / name / "run.json").exists() and Run.open(name, root).info.fingerprint != fingerprint:
        set_aside(root, name)
    generation.generate(recipe)


def compare(kind: str, found: dict[str, list[str]], folder: Path) -> Path:
    """Draw and print the comparison, and return its folder; the best of 64 is what the others are held against."""
    names = [run for runs in found.values() for run in runs if run != BEST]
    lines: dict[str, list[str]] = {}
    for name, runs in ((name, runs) for name, runs in found.items() if runs):
        label = re.sub(r"([()])", r"\\\1", NAMES[name])  # as Hydra's grammar wants them
        lines.setdefault(LINES[name].kind, []).append(f"{label}:[{','.join(runs)}]")
    drawn = ",".join(f"{column}:{{{','.join(each)}}}" for column, each in lines.items())
    count = 1 + sum(path.name.startswith("comparison") for path in (folder / kind).iterdir())
    told = [
        "compare",
        f"runs=[{','.join([BEST, *names])}]",
        f"lines={{{drawn}}}",
        f"folder={folder / kind}",
        f"name=comparison_{count}",
        f"title='{kind.capitalize()}, reward against network calls'",
    ]
    if steerfm(told):
        raise SystemExit(1)
    return folder / kind / f"comparison_{count}"


def claim(kind: str, table: dict[str, Any]) -> str:
    """Return a line that says which run of at most a quarter of the calls has the highest judge, and if it reaches."""
    rows = [row for row in table["rows"] if row["kind"] == "run"]
    aim, cheap = rows[0], [row for row in rows[1:] if row["network_calls"] <= QUARTER]
    best = max(cheap, key=lambda row: row["held_out.judge"])
    gaps = {each["label"]: each["difference"] for each in table["differences"] if each["metric"] == "held_out.judge"}
    gap = gaps[best["label"]]
    word = "holds " if best["held_out.judge"] >= aim["held_out.judge"] else "BROKEN"
    return (
        f"{word}  {kind}: {best['label']} has judge {best['held_out.judge']:.3f} at {best['network_calls']:g} calls, "
        f"{aim['label']} {aim['held_out.judge']:.3f}; on the same prompts and seeds {gap['mean']:+.3f} "
        f"({gap['low']:+.3f} to {gap['high']:+.3f})"
    )


def main() -> None:
    """Run, draw, and say whether the claim holds; exit with 1 where it does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("digits", "shapes"))
    parser.add_argument("--only", help="methods, separated by commas (default: all); best is always there")
    parser.add_argument("--largest", type=int, default=512, help="network calls a sample (default: 512)")
    parser.add_argument("--fast", action="store_true", help="few methods and samples, at most 64 calls")
    parser.add_argument("--folder", type=Path, default=Path("runs/steering_cost"), help="of the runs")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(FAST if arguments.fast else LINES)
    if unknown := set(names) - LINES.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; methods are {', '.join(LINES)}")
    names = names if "best" in names else ["best", *names]
    folder = arguments.folder / "fast" if arguments.fast else arguments.folder
    budgets = [b for b in BUDGETS if b <= min(arguments.largest, 64 if arguments.fast else 512)]
    common.show_log()
    source = data(arguments.data, arguments.folder, arguments.fast)
    found = run_all(arguments.data, source, names, budgets, folder)
    table = json.loads((compare(arguments.data, found, folder) / "table.json").read_text(encoding="utf-8"))
    told = claim(arguments.data, table)
    print(told)
    sys.exit(not told.startswith("holds"))


if __name__ == "__main__":
    main()
