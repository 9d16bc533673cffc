"""Fine-tuning where the answer is known: how far each method ends from the exact tilt, and whether it still jumps.

    python benchmarks/finetuning_exact.py                  everything; one core, hours, goes on where it stopped
    python benchmarks/finetuning_exact.py --only adjoint_matching,direct-path --problems mixture
    python benchmarks/finetuning_exact.py --fast           two methods on Gaussians, held to bounds; one core, 2 min
    python benchmarks/finetuning_exact.py --known --write docs/finetuning_exact.md     what earlier runs found, no more

Problems in the plane, each at three temperatures: a Gaussian under a linear reward and under a quadratic one, and the
mixture of three modes under r = -(y - a . x)^2 / 2. The base is the exact map plus a network that starts at zero, which
is what is tuned: in so many optimiser steps of BATCH samples of one prompt (800 on Gaussians; on the mixture 2,400,
since in 800 the methods along the SDE have not arrived), Adam with a rate that falls to nothing, EMA. Adjoint matching
takes four times the samples for the coldest tilt of the mixture: with BATCH it misses the bound by a little.

W2: sliced, over 100 directions, of N samples in so many jumps to N exact ones, and over the floor, the median of 100
pairs of exact sets. Reward: mean in 64 jumps less the tilt's: above it is a failure, no win. Modes: the largest error
of the weight of a mode. Spread: standard deviation along the reward's direction over the tilt's. Jumps: root mean
square distance between 1 jump and 64 from the same noise, and between 4 and 64; Defect: of the semigroup, F(F(x, 1,
1/2), 1/2, 0) against F(x, 1, 0), mean; the base's are 0.003 and less. KL: the divergence D from the base, beside the
tilt's own. Seconds: processor time, of one core.

exact: ends at the tilt, but for its steps and samples; biased: does not, and by how much is what is printed. "Ran
away": the loss, or where 1, 4 or 64 jumps end, is not finite.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Trainer
from rich.console import Console
from rich.table import Table
from steering_exact import bound, markdown, mode_shares
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from steerfm import (
    EMA,
    AdjointMatching,
    DirectBackprop,
    DirectPreference,
    FlowMap,
    GaussianMixture,
    LeapAlign,
    NegativeAware,
    PolicyGradient,
    Prompts,
    QuadraticReward,
    RewardAdaptive,
    RewardDistillation,
    RewardFeedback,
    RewardFineTuning,
    TiltMatching,
    ValueMatching,
    WeightedRegression,
    analytic_flow_map,
)
from steerfm.callbacks.ema import averaged
from steerfm.data.batches import StepDataModule
from steerfm.divergence import semigroup_defect, squared_norm, velocity_divergence
from steerfm.errors import TrainingError
from steerfm.files import read_json, write_atomic
from steerfm.finetuning import FineTuning
from steerfm.metrics import sliced_wasserstein
from steerfm.networks import PlainMLP
from steerfm.sampling import few_jumps
from steerfm.types import Condition, State, Times

Kind = Literal["exact", "biased"]
N, BATCH, FAST_STEPS = 4096, 256, 300
console = Console(width=None if os.isatty(1) else 170)


class Corrected(nn.Module):
    """The exact u of a mixture and a network beside it, which starts at zero and is what is tuned."""

    def __init__(self, exact: nn.Module) -> None:
        super().__init__()
        self.data_shape: Any = exact.data_shape
        self.exact, self.correction = exact, PlainMLP(self.data_shape, 128, 3)

    def forward(self, x: State, s: Times, t: Times, condition: Condition | None = None) -> State:
        return self.exact(x, s, t, condition) + self.correction(x, s, t, condition)


@dataclass(frozen=True, eq=False)
class Problem:
    """Base, reward, the temperatures at which it is tilted, and the optimiser steps of a method."""

    mixture: GaussianMixture
    reward: QuadraticReward
    temperatures: tuple[float, ...]
    steps: int = 800

    def tilt(self, temperature: float) -> GaussianMixture:
        """Return what is to be met."""
        return self.mixture.tilt(self.reward / temperature)

    def base(self) -> FlowMap:
        """Return the exact map, ready to be tuned; the same network every time."""
        torch.manual_seed(0)
        exact = analytic_flow_map(copy.deepcopy(self.mixture), None, 2, 3).network  # cast below, and this must not be
        return FlowMap(Corrected(exact)).float()


PROBLEMS = {
    "linear": Problem(GaussianMixture([[0.3, -0.2]], [0.49]), QuadraticReward.linear([0.8, -0.5]), (1.0, 0.5, 0.25)),
    "quadratic": Problem(
        GaussianMixture([[0.3, -0.2]], [0.49]), QuadraticReward.distance([0.6, 0.6], 1.0), (1.0, 0.3, 0.1)
    ),
    "mixture": Problem(
        GaussianMixture([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], [0.5] * 3),
        QuadraticReward.rank_one([1.2, -0.8], -1.0, 1.0),
        (4.0, 1.0, 0.25),
        2400,
    ),
}


def usual(problem: Problem, temperature: float) -> int:
    """Return the samples of a step."""
    return BATCH


@dataclass(frozen=True)
class Setting:
    """A method, made for a problem, a temperature and so many steps; rate: Adam's, at first; batch: samples a step."""

    kind: Kind
    make: Callable[[Problem, float, int], FineTuning]
    rate: float = 2e-3
    batch: Callable[[Problem, float], int] = usual


def nft(problem: Problem, temperature: float, steps: int) -> NegativeAware:
    """Return negative-aware fine-tuning whose rewards are centred on the base, few of them cut."""
    rewards = problem.reward(problem.mixture.sample(N, torch.Generator().manual_seed(5)))
    return NegativeAware(float(rewards.mean()), 6 * float(rewards.std()), rounds=10, every=steps // 10, jumps=1)


def direct_path(problem: Problem, temperature: float, steps: int) -> DirectBackprop:
    """Return direct back-propagation through the SDE, in finer steps at the coldest: 16 leave that tilt too wide."""
    return DirectBackprop(32 if temperature == min(problem.temperatures) else 16, penalty="path")


def adjoint_matching(problem: Problem, temperature: float, steps: int) -> AdjointMatching:
    """Return adjoint matching, in finer steps for the narrowest Gaussian tilt; on the mixture they do not help."""
    return AdjointMatching(32 if problem is PROBLEMS["quadratic"] and temperature == 0.1 else 16)


def steady(problem: Problem, temperature: float) -> int:
    """Return the samples of a step of adjoint matching: more for the coldest mixture, where adjoints scatter most."""
    return 4 * BATCH if problem is PROBLEMS["mixture"] and temperature == 0.25 else BATCH


SETTINGS: dict[str, Setting] = {
    "direct-path": Setting("exact", direct_path),
    "adjoint_matching": Setting("exact", adjoint_matching, batch=steady),
    "tilt_matching": Setting("exact", lambda p, T, n: TiltMatching(1)),
    "weighted_regression": Setting("exact", lambda p, T, n: WeightedRegression(1)),
    "weighted_regression-pool": Setting("exact", lambda p, T, n: WeightedRegression(1, pool=200_000)),
    "value_matching": Setting("exact", lambda p, T, n: ValueMatching(32, jumps=1)),
    "policy_gradient": Setting("exact", lambda p, T, n: PolicyGradient(16)),
    "reward_adaptive": Setting("biased", lambda p, T, n: RewardAdaptive(1)),
    "nft": Setting("biased", nft),
    "direct-noise": Setting("biased", lambda p, T, n: DirectBackprop(1, penalty="noise")),
    "direct-sample": Setting("biased", lambda p, T, n: DirectBackprop(1, penalty="sample")),
    "reward_feedback": Setting("biased", lambda p, T, n: RewardFeedback(4)),
    "leap_align": Setting("biased", lambda p, T, n: LeapAlign(8)),
    "policy_gradient-jumps": Setting("biased", lambda p, T, n: PolicyGradient(4, "jumps")),
    "reward_distillation": Setting("biased", lambda p, T, n: RewardDistillation(jumps=1)),
    "preferences": Setting("biased", lambda p, T, n: DirectPreference()),
}
FAST = ("adjoint_matching", "direct-path")
HELD = ("direct-path", "adjoint_matching", "tilt_matching", "weighted_regression", "weighted_regression-pool")


class Choices(StepDataModule):
    """Pairs of the base's own samples; the first is preferred with the probability that Bradley and Terry give it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem

    def batch(self, step: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(step)
        a, b = (self.problem.mixture.sample(BATCH, generator) for _ in range(2))
        chance = (self.problem.reward(a) - self.problem.reward(b)).sigmoid()
        preferred = (torch.rand(BATCH, generator=generator) < chance).float()
        return {"prompt": [""] * BATCH, "image_a": a.float(), "image_b": b.float(), "preferred": preferred}


def learn(problem: Problem, setting: Setting, temperature: float, steps: int) -> tuple[FlowMap, float]:
    """Return the tuned map, with its averaged weights, and the seconds that it took; TrainingError if it ran away."""
    method = setting.make(problem, temperature, steps)
    flow_map = problem.base()
    module = RewardFineTuning(
        flow_map,
        problem.reward if method.needs_reward else None,
        method,
        temperature,
        optimizer=partial(Adam, lr=setting.rate),
        scheduler=partial(CosineAnnealingLR, T_max=steps),
        monitor_every=10 * steps,
        jumps=1,
    )
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[EMA(0.99)],
        gradient_clip_val=10.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.process_time()
    prompts = Prompts([""], 1, setting.batch(problem, temperature))
    trainer.fit(module, prompts if method.needs_reward else Choices(problem))
    seconds = time.process_time() - start
    with averaged(module):
        return module.flow_map.frozen_copy(), seconds


@torch.no_grad()
def measure(problem: Problem, flow_map: FlowMap, temperature: float) -> dict[str, Any]:
    """Return what a tuned map is like, against the exact tilt; TrainingError if its samples are not finite."""
    generator = torch.Generator().manual_seed(11)
    tilt, x1 = problem.tilt(temperature), torch.randn(N, 2, generator=generator)
    ends = {jumps: few_jumps(flow_map, x1, jumps).double() for jumps in (1, 4, 64)}
    if broken := [jumps for jumps, x0 in ends.items() if not x0.isfinite().all()]:
        raise TrainingError(f"The samples of {broken[0]} jumps are not finite.")
    exact, fine = tilt.sample(N, torch.Generator().manual_seed(12)), ends[64]
    tilted = tilted_figures(problem, temperature)
    shares = mode_shares(fine, torch.full((N,), 1 / N, dtype=torch.float64), tilt)
    s, half, t = (torch.full((N,), value) for value in (1.0, 0.5, 0.0))
    times = 0.02 + 0.98 * torch.rand(N, generator=generator)
    noise = torch.randn(N, 2, generator=generator)
    divergence = velocity_divergence(flow_map, problem.base(), fine.float(), noise, times)
    return {
        "w2": {str(jumps): sliced_wasserstein(x0, exact) for jumps, x0 in ends.items()},
        "reward": float(problem.reward(fine).mean()) - tilted.reward,
        "modes": (shares - tilted.shares).tolist(),
        "spread": float((fine @ direction(problem)).std()) / tilted.spread,
        "jumps": {str(jumps): float(squared_norm(ends[jumps] - fine).mean().sqrt()) for jumps in (1, 4)},
        "defect": float(semigroup_defect(flow_map, x1, s, half, t).mean()),
        "kl": float(divergence.mean()),
        "exact_kl": tilted.kl,
    }


@dataclass(frozen=True)
class Tilted:
    """What is known of a tilt: mean reward, KL from the base, weights of the modes, spread along `direction`."""

    reward: float
    kl: float
    shares: Tensor
    spread: float


@cache
def tilted_figures(problem: Problem, temperature: float) -> Tilted:
    """Return what is known of a tilt, from 400,000 draws."""
    tilt = problem.tilt(temperature)
    x0 = tilt.sample(400_000, torch.Generator().manual_seed(4))
    return Tilted(
        float(problem.reward(x0).mean()),
        float((tilt.log_prob(x0) - problem.mixture.log_prob(x0)).mean()),
        mode_shares(x0, torch.full((len(x0),), 1 / len(x0), dtype=torch.float64), tilt),
        float((x0 @ direction(problem)).std()),
    )


def direction(problem: Problem) -> Tensor:
    """Return the direction in which the reward bends most, of a linear one its own, (2,)."""
    if problem.reward.A.any():
        return torch.linalg.eigh(problem.reward.A).eigenvectors[:, -1]
    return problem.reward.b / problem.reward.b.norm()


@cache
def floor_of(problem: Problem, temperature: float) -> float:
    """Return the median sliced W2 between two exact sets, of 100 pairs."""
    tilt = problem.tilt(temperature)
    sets = [tilt.sample(N, torch.Generator().manual_seed(1000 + i)) for i in range(200)]
    return statistics.median(sliced_wasserstein(a, b) for a, b in zip(sets[::2], sets[1::2], strict=True))


@cache
def effective_share(problem: Problem, temperature: float) -> float:
    """Return the share of the base's draws that count as importance sampling of the tilt, from 400,000 of them."""
    r = problem.reward(problem.mixture.sample(400_000, torch.Generator().manual_seed(6))) / temperature
    return float(torch.exp(2 * r.logsumexp(0) - (2 * r).logsumexp(0))) / len(r)


def known(
    folder: Path, problem: str, name: str, temperature: float, steps: int, run: bool = True
) -> dict[str, Any] | None:
    """Return what an earlier run of the setting found, {} if it ran away; else tune and measure, None if not to run."""
    setting, path = SETTINGS[name], folder / f"{problem}-{temperature}_{name}.json"
    method = setting.make(PROBLEMS[problem], temperature, steps)
    made_from = f"{method} at {setting.rate} for {steps} steps of {setting.batch(PROBLEMS[problem], temperature)}"
    kept = read_json(path) if path.exists() else {}
    if kept.get("made_from") != made_from:
        if not run:
            return None
        try:
            flow_map, seconds = learn(PROBLEMS[problem], setting, temperature, steps)
            found = measure(PROBLEMS[problem], flow_map, temperature) | {"seconds": seconds}
        except TrainingError:
            found = {}
        kept = {"made_from": made_from, "found": found}
        write_atomic(path, json.dumps(kept).encode())
    return kept["found"]


def row(name: str, found: dict[str, Any], floor: float) -> list[str]:
    """Return a method's row of the table."""
    kind = SETTINGS[name].kind if name in SETTINGS else ""
    if not found:
        return [name, kind, "ran away", *[""] * (len(HEADINGS) - 3)]
    return [
        name,
        kind,
        *(f"{found['w2'][jumps] / floor:.2f}" for jumps in ("1", "4", "64")),
        f"{found['reward']:+.3f}",
        f"{max(found['modes'], key=abs):+.3f}" if len(found["modes"]) > 1 else "–",
        f"{found['spread']:.2f}",
        f"{found['jumps']['1']:.2f} / {found['jumps']['4']:.2f}",
        f"{found['defect']:.3f}",
        f"{found['kl']:.2f}",
        f"{found['seconds']:.0f}" if "seconds" in found else "",
    ]


def judge(where: str, table: dict[str, dict[str, Any]], floor: float, sound: bool) -> list[str]:
    """Return a line on each bound: W2 of what is held, where importance sampling is sound."""
    lines = []
    for name, found in table.items():
        if name in HELD and sound:
            ratio = found["w2"]["64"] / floor if found else math.inf
            lines.append(bound(f"{where}: {name}, W2 over the floor at 64 jumps", ratio, WITHIN))
    return lines


def overview(names: list[str], columns: dict[str, dict[str, str]]) -> str:
    """Return a table of what columns, a tilt each, say of the methods: W2 in 64 jumps, in Markdown."""
    rows = [[name, *(column.get(name, "") for column in columns.values())] for name in ["base", *names]]
    return markdown("W2 in 64 jumps over the floor, by problem and temperature", ["method", *columns], rows)


PAGE = """# Fine-tuning where the answer is known, all figures

`python benchmarks/finetuning_exact.py` tunes an exact flow map by every method toward a known tilt, and wrote
this page. The script's head says what the problems are; what the figures say is in [benchmarks](benchmarks.md).

W2: sliced, to the exact tilt, in 1, 4 or 64 jumps, over the floor between two exact sets. Reward: less the tilt's own
mean; above it is a failure. Modes: the largest error of the weight of a mode. Spread: standard deviation along the
reward's direction, over the tilt's. Jumps: distance of 1 and of 4 jumps from 64. Defect: of the semigroup. KL: the
divergence from the base. s: seconds of processor time. At most twice the floor in 64 jumps is asked of
{held},
where importance sampling is sound.
"""
HEADINGS = ["method", "kind", "W2: 1", "4", "64", "reward", "modes", "spread", "jumps 1 / 4", "defect", "KL", "s"]
SOUND, WITHIN = 0.02, 2.0  # the share of draws that must count for importance sampling; W2 over the floor


def main() -> None:
    """Tune, measure, print a table a problem and temperature, and the bounds; exit with 1 where one is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="methods, separated by commas (default: all)")
    parser.add_argument("--problems", help="problems, separated by commas (default: all)")
    parser.add_argument("--steps", type=int, help=f"optimiser steps (default: the problem's, {FAST_STEPS} if fast)")
    parser.add_argument("--fast", action="store_true", help="two methods at one temperature of each Gaussian problem")
    parser.add_argument("--folder", type=Path, default=Path("runs/finetuning_exact"), help="of what is known")
    parser.add_argument("--known", action="store_true", help="show what earlier runs found, and run nothing")
    parser.add_argument("--write", type=Path, metavar="PATH", help="write the tables as a page of Markdown")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(FAST if arguments.fast else SETTINGS)
    chosen = arguments.problems.split(",") if arguments.problems else list(PROBLEMS)[: 2 if arguments.fast else None]
    if unknown := (set(names) - SETTINGS.keys()) | (set(chosen) - PROBLEMS.keys()):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; methods are {', '.join(SETTINGS)}")
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    lines, pages, columns = [], [], {}
    for name in chosen:
        problem = PROBLEMS[name]
        steps = arguments.steps or (FAST_STEPS if arguments.fast else problem.steps)
        for temperature in problem.temperatures[1:2] if arguments.fast else problem.temperatures:
            floor, share = floor_of(problem, temperature), effective_share(problem, temperature)
            found = {
                each: known(arguments.folder, name, each, temperature, steps, not arguments.known) for each in names
            }
            table = {each: figures for each, figures in found.items() if figures is not None}
            base = measure(problem, problem.base(), temperature)
            rows = [row("base", base, floor), *(row(each, found, floor) for each, found in table.items())]
            caption = (
                f"{name}, T = {temperature}: floor {floor:.3f}, {100 * share:.0f}% of the base's draws count, "
                f"KL of the tilt {base['exact_kl']:.2f}; {steps} steps of {BATCH}"
            )
            batches = {each: SETTINGS[each].batch(problem, temperature) for each in table}
            caption += "".join(f", {each}: {batch}" for each, batch in batches.items() if batch != BATCH)
            shown = Table(*HEADINGS, title=caption)
            for cells in rows:
                shown.add_row(*cells)
            console.print(shown)
            pages.append(markdown(caption, HEADINGS, rows))
            columns[f"{name} {temperature:g}"] = {cells[0]: cells[4] or cells[2] for cells in rows}
            lines += judge(f"{name}, T = {temperature}", table, floor, share >= SOUND)
    if arguments.write:
        page = [PAGE.format(held=", ".join(HELD)), overview(names, columns), *pages]
        write_atomic(arguments.write, "\n".join(page).encode())
    console.print("\n".join(lines), markup=False)
    raise SystemExit(any(not line.startswith("holds") for line in lines))


if __name__ == "__main__":
    main()
