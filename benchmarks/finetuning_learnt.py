"""Fine-tuning learnt maps by every method, for the same time each: reward, held-out judge, diversity.

    python benchmarks/finetuning_learnt.py digits                    one CPU core, 45 min; goes on where it stopped
    python benchmarks/finetuning_learnt.py shapes                    the models that ship with the package; 60 min
    python benchmarks/finetuning_learnt.py digits --only nft,flow_grpo --seconds 20
    python benchmarks/finetuning_learnt.py digits --only ''             what there is to gain: the exact tilts

digits: a map that draws all ten digits and reads no class, toward "a handwritten seven" by the small CLIP; the judge
learnt from scans that the reward never saw. shapes: prompts of two objects, training ones toward the small CLIP,
measured on held-out ones; the judge parses the pixels. Every method gets the same processor time (SECONDS, what two
cores have in a minute; start and imports left out, the draws of a pool not), its step being timed first.

Reward: the CLIP's mean, of SAMPLES samples. Judge: the mean over that of real data the judge did not see (the share
that counts). Diversity: mean pairwise distance over that of real data. Frechet: pixel distance to real data; of digits
over that of as many sevens of the base, those that the judge calls so; of shapes over that of other samples of the
base. KL: the divergence D from the base. All at 4 jumps; judge and Frechet also at 1. "the tilt itself": what a method
that ends at the tilt would end at, by importance sampling of DRAWS samples of the base (digits, which read no prompt).
"""

from __future__ import annotations

import argparse
import json
import os
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from steerfm import FlowMap, Unsteered, config, zoo
from steerfm.cli import main as steerfm
from steerfm.data.digits import digit_scans
from steerfm.data.shapes import shape_pictures, shape_prompts
from steerfm.divergence import monitor
from steerfm.files import read_json, write_atomic
from steerfm.images import to_unit
from steerfm.metrics import frechet_distance, mean_pairwise_distance
from steerfm.reward import Reward
from steerfm.rewards.digit_judge import DigitJudge
from steerfm.rewards.shape_prompts import ShapePrompts

DIGIT, SAMPLES, SECONDS, TIMED, CHUNK = 7, 500, 120, 16, 100
DRAWS = 20_000  # of the base, for its tilts
console = Console(width=None if os.isatty(1) else 150)
Figures = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """A method of recipes/method, and what else its recipe is told; pool: draws that it makes before its first step."""

    method: str
    temperature: float
    overrides: tuple[str, ...]
    pool: int | None = None

    def named(self, name: str, steps: int) -> str:
        """Return the name of its run, another for any other setting."""
        return f"{name}-{steps}-{zlib.crc32(repr(self).encode()):08x}"


def setting(method: str, temperature: float, *more: str) -> Setting:
    """Return a setting at a temperature."""
    return Setting(method, temperature, more)


class Problem(ABC):
    """What is tuned toward what, and how it is judged."""

    settings: ClassVar[dict[str, Setting]]
    tilts: ClassVar[tuple[float, ...]] = ()  # temperatures whose exact tilt is shown

    @abstractmethod
    def given(self, folder: Path) -> list[str]:
        """Return the overrides that name recipe, map and reward; what has to be trained first is."""

    @abstractmethod
    def prompts(self, n: int) -> list[str]:
        """Return what the reward is asked about each of n samples."""

    @abstractmethod
    def judge(self) -> Reward:
        """Return the held-out judge."""

    @abstractmethod
    def real(self) -> Tensor:
        """Return real data in model space, (N, *dim)."""

    @abstractmethod
    def judged_real(self) -> float:
        """Return the judge's mean on real data that it did not see."""

    @abstractmethod
    def own(self, base: FlowMap) -> tuple[str, Tensor]:
        """Return the samples of the base whose Frechet distance is called 1, and what they are."""


class Digits(Problem):
    """A map that draws all ten digits, toward sevens."""

    tilts = (0.25, 0.13, 0.1, 0.05)
    taken = ("method.jumps=16", "method.repeats=1", "data.prompts_per_step=1", "data.samples_per_prompt=128")
    settings: ClassVar = {
        "direct-path": setting("direct", 0.13),
        "direct-sample": setting("direct_sample", 0.005, "method.jumps=2", "method.last=null"),
        "adjoint_matching": setting("adjoint_matching", 0.13),
        "tilt_matching": setting("tilt_matching", 0.05),
        "weighted_regression": setting("weighted_regression", 0.05),
        "weighted_regression-pool": Setting(
            "weighted_regression", 0.15, (*taken, "module.optimizer.lr=3e-3"), pool=10_000
        ),
        "reward_adaptive": setting("reward_adaptive", 0.13),
        "value_matching": setting("value_matching", 0.1),
        "nft": setting("nft", 0.05, "method.center=0.62", "method.divisor=0.6"),
        "flow_grpo": setting("flow_grpo", 0.13),
        "refl": setting("refl", 0.005),
        "leap_align": setting("leap_align", 0.005),
        "rg_lcm": setting("rg_lcm", 0.15),
    }

    def given(self, folder: Path) -> list[str]:
        longer = ["trainer.max_steps=8000", "module.flow_matching_steps=3000"]  # eight times: better sevens
        for recipe, more in {"digits": longer, "digits_clip": []}.items():
            if not (folder / recipe / "metrics.json").exists():
                steerfm(["train", f"recipe={recipe}", f"name={recipe}", f"folder={folder}", *more])
        return ["recipe=digits_finetune", f"map={folder / 'digits'}", f"clip={folder / 'digits_clip'}"]

    def prompts(self, n: int) -> list[str]:
        return ["a handwritten seven"] * n

    def judge(self) -> Reward:
        return DigitJudge(DIGIT)

    def real(self) -> Tensor:
        return digit_scans(DIGIT)

    def judged_real(self) -> float:
        unseen = to_unit(digit_scans(DIGIT, "reward"))
        return float(DigitJudge(DIGIT)(unseen, [""] * len(unseen)).total.mean())

    def own(self, base: FlowMap) -> tuple[str, Tensor]:
        x0 = draws_of(base)[: 14 * SAMPLES]
        return "sevens among its samples", x0[DigitJudge(DIGIT).labels(to_unit(x0)) == DIGIT][:SAMPLES]


class Shapes(Problem):
    """The map that ships with the package, toward its CLIP, for prompts of two objects."""

    few = ("data.prompts_per_step=8",)
    groups = ("data.prompts_per_step=2", "data.samples_per_prompt=8")
    drawn = (*groups, "method.repeats=1")
    settings: ClassVar = {
        "direct-path": setting("direct", 0.02, *few),
        "direct-sample": setting("direct_sample", 0.0002),
        "adjoint_matching": setting("adjoint_matching", 0.02, "method.sde_steps=8", *few),
        "tilt_matching": setting("tilt_matching", 0.05, *drawn),
        "weighted_regression": setting("weighted_regression", 0.05, *drawn),
        "reward_adaptive": setting("reward_adaptive", 0.05, *drawn),
        "value_matching": setting("value_matching", 0.05, "data.prompts_per_step=2", "method.count=8"),
        "nft": setting("nft", 0.02, "method.center=0.66", "method.divisor=1.1", *drawn),
        "flow_grpo": setting("flow_grpo", 0.02, *groups),
        "flow_grpo-jumps": setting("flow_grpo", 0.002, "method.sde_steps=4", "+method.noise=jumps", *groups),
        "refl": setting("refl", 0.0002),
        "leap_align": setting("leap_align", 0.0002),
        "rg_lcm": setting("rg_lcm", 0.02),
    }

    def given(self, folder: Path) -> list[str]:
        law = "torch.optim.lr_scheduler.CosineAnnealingLR"
        falling = f"{{_target_: {law}, _partial_: true, T_max: '${{trainer.max_steps}}'}}"
        return ["recipe=shapes_finetune", f"map={zoo.folder('shapes32')}", f"+module.scheduler={falling}"]

    def prompts(self, n: int) -> list[str]:
        return shape_prompts(n, count=2, seed=3)

    def judge(self) -> Reward:
        return ShapePrompts("correct")

    def real(self) -> Tensor:
        return shape_pictures(2000, count=2)

    def judged_real(self) -> float:
        return 1.0  # the parser reads every picture that the captions were made from

    def own(self, base: FlowMap) -> tuple[str, Tensor]:
        return "other samples of it", samples(self, base, 4, 10_000)


PROBLEMS: dict[str, type[Problem]] = {"digits": Digits, "shapes": Shapes}


def tuned(name: str, problem: Problem, given: Sequence[str], folder: Path, seconds: float) -> tuple[Path, int]:
    """Tune for so long, and return the run's map and its optimiser steps."""
    chosen = problem.settings[name]
    known = folder / f"{chosen.named(name, TIMED)}.json"  # seconds a step, and before the first
    if not known.exists():

        def timed(chosen: Setting, steps: int) -> float:
            start = time.process_time()
            fit(name, chosen, given, folder, steps)
            return time.process_time() - start

        quick = chosen if chosen.pool is None else replace(chosen, pool=1)
        timed(quick, 1)  # imports
        first = timed(quick, 2)
        each = (timed(quick, 2 + TIMED) - first) / TIMED
        made = 0.0 if chosen.pool is None else timed(chosen, 2) - first
        write_atomic(known, json.dumps({"each": each, "made": made}).encode())
    took = read_json(known)
    steps = max(10, round((seconds - took["made"]) / took["each"]))
    return fit(name, chosen, given, folder, steps), steps


def fit(name: str, chosen: Setting, given: Sequence[str], folder: Path, steps: int) -> Path:
    """Run the recipe for so many steps, unless it has been; return the map's folder."""
    run = chosen.named(name, steps)
    more = [f"method.every={max(1, steps // 10)}"] if chosen.method == "nft" else []
    more += [] if chosen.pool is None else [f"method.pool={chosen.pool}"]
    arguments = ["finetune", *given, f"method={chosen.method}", f"name={run}", f"folder={folder}"]
    arguments += [f"module.temperature={chosen.temperature}", f"trainer.max_steps={steps}", "callbacks=null"]
    arguments += ["threads=1", "checkpoint_every=100000"]
    arguments += ["trainer.enable_progress_bar=false", f"module.monitor_every={10 * steps}"]
    if not (folder / run / "map").exists() and steerfm([*arguments, *more, *chosen.overrides]):
        raise SystemExit(1)
    return folder / run / "map"


@cache
def draws_of(base: FlowMap) -> Tensor:
    """Return DRAWS samples of a map that reads no prompt, others than what is measured; (DRAWS, *dim)."""
    return Unsteered("jumps", 4)(base, seeds=range(10_000, 10_000 + DRAWS)).x0


def tilted(problem: Problem, base: FlowMap, reward: Reward, temperature: float) -> tuple[int, Figures]:
    """Return the figures of the exact tilt, by importance sampling, and how many of the draws count."""
    x0 = draws_of(base)
    with torch.no_grad():
        rewards = reward(to_unit(x0), problem.prompts(len(x0))).total.double()
    weights = (rewards / temperature).softmax(0)
    rows = torch.multinomial(weights, 4 * SAMPLES, replacement=True, generator=torch.Generator().manual_seed(0))
    return round(float(1 / weights.square().sum())), figures(problem, x0[rows], problem.prompts(len(rows)), reward)


@cache
def about_real(problem: Problem) -> tuple[Tensor, float, float]:
    """Return the real data as rows, their mean pairwise distance, and the judge's mean on them."""
    points = problem.real().flatten(1)
    return points, mean_pairwise_distance(points), problem.judged_real()


def figures(problem: Problem, x0: Tensor, prompts: Sequence[str], reward: Reward) -> Figures:
    """Return reward, judge, diversity and Frechet distance of samples (N, *dim) of so many prompts."""
    points, images = x0.clamp(-1, 1).flatten(1), to_unit(x0)
    real, spread, judged = about_real(problem)
    with torch.no_grad():
        return {
            "reward": float(reward(images, prompts).total.mean()),
            "judge": float(problem.judge()(images, prompts).total.mean()) / judged,
            "diversity": mean_pairwise_distance(points) / spread,
            "frechet": frechet_distance(points, real),
        }


def samples(problem: Problem, flow_map: FlowMap, jumps: int, seed: int = 0) -> Tensor:
    """Return one sample of each prompt, with noise of seed and those after it, (SAMPLES, *dim)."""
    prompts = problem.prompts(SAMPLES) if flow_map.conditioner else [""] * SAMPLES
    found = []
    for start in range(0, SAMPLES, CHUNK):
        asked, seeds = prompts[start : start + CHUNK], range(seed + start, seed + start + CHUNK)
        found.append(Unsteered("jumps", jumps)(flow_map, prompts=asked, seeds=seeds).x0)
    return torch.cat(found)


def measure(problem: Problem, flow_map: FlowMap, base: FlowMap, reward: Reward) -> dict[str, Any]:
    """Return the figures at 1 and 4 jumps, and the divergence from the base."""
    prompts = problem.prompts(SAMPLES)
    found = {jumps: samples(problem, flow_map, jumps) for jumps in (1, 4)}
    condition = flow_map.encode_prompts(prompts) if flow_map.conditioner else None
    with torch.no_grad():
        moved = monitor(flow_map, base, found[4], condition, torch.Generator().manual_seed(0))
    told = {str(jumps): figures(problem, x0, prompts, reward) for jumps, x0 in found.items()}
    return told | {name: float(value) for name, value in moved.items()}


def main() -> None:
    """Tune by every method, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=list(PROBLEMS))
    parser.add_argument("--only", help="methods, separated by commas (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of processor time each")
    parser.add_argument("--folder", type=Path, help="of what is known (default: runs/finetuning_PROBLEM)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.folder or Path(f"runs/finetuning_{arguments.problem}")
    problem = PROBLEMS[arguments.problem]()
    names = list(problem.settings) if arguments.only is None else [n for n in arguments.only.split(",") if n]
    if unknown := set(names) - problem.settings.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; methods are {', '.join(problem.settings)}")
    given = problem.given(folder)
    recipe = config.compose("finetune", list(given))
    base, reward = FlowMap.load(recipe.values["map"]).frozen_copy(), recipe.build("reward")
    label, x0 = problem.own(base)
    own = figures(problem, x0, problem.prompts(len(x0)), reward)
    headings = ["reward", "judge", "diversity", "Frechet", "KL", "judge,1", "Frechet,1", "defect"]
    table = Table("method", "temperature", "steps", *headings)
    table.add_row("base", "", "", *cells(measure(problem, base, base, reward), own["frechet"]))
    table.add_row(label, "", "", *(f"{own[key]:.2f}" for key in ("reward", "judge", "diversity")), "1.00")
    for temperature in problem.tilts:
        count, found = tilted(problem, base, reward, temperature)
        shown = [f"{found[key]:.2f}" for key in ("reward", "judge", "diversity")]
        table.add_row(
            f"the tilt itself ({count} count)", str(temperature), "", *shown, f"{found['frechet'] / own['frechet']:.2f}"
        )
    for name in names:
        path, steps = tuned(name, problem, given, folder, arguments.seconds)
        found = measure(problem, FlowMap.load(path).frozen_copy(), base, reward)
        table.add_row(name, str(problem.settings[name].temperature), str(steps), *cells(found, own["frechet"]))
    console.print(table)
    real = about_real(problem)[2]
    console.print(f"judge on real data {real:.3f}; Frechet distance that is called 1: {own['frechet']:.2f}")


def cells(found: dict[str, Any], own: float) -> list[str]:
    """Return a method's cells."""
    one, four = found["1"], found["4"]
    numbers = [four["reward"], four["judge"], four["diversity"], four["frechet"] / own, found["divergence"]]
    return [f"{n:.2f}" for n in [*numbers, one["judge"], one["frechet"] / own, found["semigroup_defect"]]]


if __name__ == "__main__":
    main()
