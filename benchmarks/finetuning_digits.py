"""Fine-tuning digits toward "a handwritten seven" by every method, for the same time each.

    python benchmarks/finetuning_digits.py                       one CPU core, 25 min; goes on where it stopped
    python benchmarks/finetuning_digits.py --only nft,direct --seconds 20

The base draws all ten digits and reads no class; the reward is the small CLIP's; the judge learnt from scans that the
reward never saw. Every method gets the same processor time of one core (SECONDS, start and imports left out), its step
being timed first. Judge: mean p(7) of 500 samples, over its mean on real sevens that it did not see (the share that
counts). Diversity: mean pairwise distance over that of real sevens. Frechet: pixel distance to all real sevens, over
that of as many sevens of the base, those that the judge calls so. KL: the divergence D from the base. All at 4 jumps;
judge and Frechet also at 1.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from steerfm import FlowMap, Unsteered
from steerfm.cli import main as steerfm
from steerfm.data.digits import digit_scans
from steerfm.divergence import monitor
from steerfm.files import read_json, write_atomic
from steerfm.images import to_unit
from steerfm.metrics import frechet_distance, mean_pairwise_distance
from steerfm.rewards.digit_judge import DigitJudge

DIGIT, SAMPLES, SECONDS, TIMED = 7, 500, 60, 16
console = Console(width=None if os.isatty(1) else 150)


@dataclass(frozen=True)
class Setting:
    """A method of recipes/method, and what else its recipe is told."""

    method: str
    overrides: tuple[str, ...] = field(default=())


def setting(method: str, temperature: float, *more: str) -> Setting:
    """Return a setting at a temperature."""
    return Setting(method, (f"module.temperature={temperature}", *more))


SETTINGS = {
    "direct-path": setting("direct", 0.13),
    "direct-sample": setting("direct", 0.005, "method.penalty=sample", "method.jumps=2"),
    "adjoint_matching": setting("adjoint_matching", 0.13),
    "tilt_matching": setting("tilt_matching", 0.05),
    "weighted_regression": setting("weighted_regression", 0.05),
    "reward_adaptive": setting("reward_adaptive", 0.13),
    "value_matching": setting("value_matching", 0.1),
    "nft": setting("nft", 0.05, "method.center=0.62", "method.divisor=0.6"),
    "flow_grpo": setting("flow_grpo", 0.13),
    "refl": setting("refl", 0.005),
    "leap_align": setting("leap_align", 0.005),
    "rg_lcm": setting("rg_lcm", 0.5),
}


def tuned(name: str, folder: Path, map: str, clip: str, seconds: float) -> tuple[Path, int]:
    """Tune for so long, and return the run's map and its optimiser steps."""
    known = folder / f"{name}.steps.json"
    if not known.exists():
        fit(name, folder, map, clip, 1)  # imports
        start = time.process_time()
        fit(name, folder, map, clip, 2)
        first = time.process_time() - start
        start = time.process_time()
        fit(name, folder, map, clip, 2 + TIMED)
        each = (time.process_time() - start - first) / TIMED
        write_atomic(known, json.dumps({"steps": max(10, round(seconds / each))}).encode())
    steps = read_json(known)["steps"]
    return fit(name, folder, map, clip, steps), steps


def fit(name: str, folder: Path, map: str, clip: str, steps: int) -> Path:
    """Run the recipe for so many steps, unless it has been; return the map's folder."""
    chosen, run = SETTINGS[name], f"{name}-{steps}"
    more = [f"method.every={max(1, steps // 10)}"] if chosen.method == "nft" else []
    arguments = ["finetune", "recipe=digits_finetune", f"method={chosen.method}", f"name={run}", f"folder={folder}"]
    arguments += [f"map={map}", f"clip={clip}", f"trainer.max_steps={steps}", "callbacks=null", "threads=1"]
    arguments += ["checkpoint_every=100000", "trainer.enable_progress_bar=false", f"module.monitor_every={10 * steps}"]
    if not (folder / run / "map").exists() and steerfm([*arguments, *more, *chosen.overrides]):
        raise SystemExit(1)
    return folder / run / "map"


@cache
def sevens() -> Tensor:
    """Return all real sevens, (N, 64)."""
    return digit_scans(DIGIT).flatten(1)


@cache
def judged_real() -> float:
    """Return the judge's mean on real sevens that it did not see."""
    unseen = to_unit(digit_scans(DIGIT, "reward"))
    return float(DigitJudge(DIGIT)(unseen, [""] * len(unseen)).total.mean())


def figures(x0: Tensor) -> dict[str, float]:
    """Return judge, diversity and Frechet distance of samples (N, 1, 8, 8)."""
    points = x0.clamp(-1, 1).flatten(1)
    judge = DigitJudge(DIGIT)(to_unit(x0), [""] * len(x0)).total
    return {
        "judge": float(judge.mean()) / judged_real(),
        "diversity": mean_pairwise_distance(points) / mean_pairwise_distance(sevens()),
        "frechet": frechet_distance(points, sevens()),
    }


def measure(flow_map: FlowMap, base: FlowMap) -> dict[str, Any]:
    """Return the figures at 1 and 4 jumps, and the divergence from the base."""
    samples = {jumps: Unsteered("jumps", jumps)(flow_map, seeds=range(SAMPLES)).x0 for jumps in (1, 4)}
    with torch.no_grad():
        moved = monitor(flow_map, base, samples[4], None, torch.Generator().manual_seed(0))
    return {str(jumps): figures(x0) for jumps, x0 in samples.items()} | {n: float(v) for n, v in moved.items()}


def own_sevens(base: FlowMap) -> dict[str, float]:
    """Return the figures of the base's samples that the judge calls sevens, as many as of every method."""
    x0 = Unsteered("jumps", 4)(base, seeds=range(10_000, 10_000 + 14 * SAMPLES)).x0
    return figures(x0[DigitJudge(DIGIT).labels(to_unit(x0)) == DIGIT][:SAMPLES])


def main() -> None:
    """Tune by every method, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="methods, separated by commas (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of processor time each")
    parser.add_argument("--map", help="a map of recipe=digits; trained first by default")
    parser.add_argument("--clip", help="a CLIP of recipe=digits_clip; trained first by default")
    parser.add_argument("--folder", type=Path, default=Path("runs/finetuning_digits"), help="of what is known")
    arguments = parser.parse_args()
    folder, given = arguments.folder, {"digits": arguments.map, "digits_clip": arguments.clip}
    for recipe, path in given.items():
        if path is None:
            given[recipe] = str(folder / recipe)
            if not (folder / recipe / "metrics.json").exists():
                steerfm(["train", f"recipe={recipe}", f"name={recipe}", f"folder={folder}"])
    base = FlowMap.load(given["digits"]).frozen_copy()
    own = own_sevens(base)
    table = Table("method", "steps", "judge", "diversity", "Frechet", "KL", "judge at 1", "Frechet at 1", "defect")
    table.add_row("base", "", *cells(measure(base, base), own["frechet"]))
    table.add_row("its own sevens", "", f"{own['judge']:.2f}", f"{own['diversity']:.2f}", "1.00")
    for name in arguments.only.split(",") if arguments.only else SETTINGS:
        path, steps = tuned(name, folder, given["digits"], given["digits_clip"], arguments.seconds)
        table.add_row(name, str(steps), *cells(measure(FlowMap.load(path), base), own["frechet"]))
    console.print(table)
    console.print(f"judge on real sevens {judged_real():.3f}; Frechet of the base's own sevens {own['frechet']:.2f}")


def cells(found: dict[str, Any], own: float) -> list[str]:
    """Return a method's cells."""
    one, four = found["1"], found["4"]
    numbers = [four["judge"], four["diversity"], four["frechet"] / own, found["divergence"]]
    return [f"{n:.2f}" for n in [*numbers, one["judge"], one["frechet"] / own, found["semigroup_defect"]]]


if __name__ == "__main__":
    main()
