"""Steering where the answer is known: how far each method ends from the exact tilt, and what it pays for that.

    python benchmarks/steering_exact.py               20 seeds of everything; one core, hours, goes on where it stopped
    python benchmarks/steering_exact.py --only tilting-100,monte_carlo --problems mixture-0.2
    python benchmarks/steering_exact.py --fast        3 seeds, few methods, held to their bounds; one core, 3 min

Problems: the mixture of three modes in the plane under r = -(y - a . x)^2 / (2 sigma^2), sigma 0.2 and 1; mixtures in
10 and 100 dimensions under a measurement of one direction; Gaussian inverse problems (half of the coordinates seen;
sums of neighbours seen), whose posterior is known. Temperature 1 everywhere, the map exact, float32.

A seed is a population of N = 4096: the particles of one population, or as many seeds of a method that returns one
sample a seed; some budgets have 4 or 16 times as many, and a consistent method that has not come close with them is
given a larger one. Weights are resampled systematically to N for the distance, which is taken to an exact set of its
own for every seed; the floor is the median of 100 pairs of exact sets. W2: sliced, over 100 directions, median. Modes:
the largest error of the weight of a mode, signed mean over seeds. log Z: mean error of the log evidence. ESS: effective
sample size, percent of all particles. Calls: network forwards (backwards counting two), rewards and reward gradients,
for each of N.

consistent: ends at the tilt as its budget grows; biased: does not, and the bias is what is printed; argmax: has no tilt
as its target, and is shown for its mean reward beside the tilt's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from steerfm.analytic import GaussianMixture, QuadraticReward, analytic_flow_map
from steerfm.distributed import draw_ancestors
from steerfm.files import read_json, write_atomic
from steerfm.flow_map import FlowMap
from steerfm.metrics import sliced_wasserstein
from steerfm.sampling import Unsteered
from steerfm.steering import (
    BeamSearch,
    BestOfN,
    FlowMapControl,
    FlowMapTilting,
    LookAheadGuidance,
    NoiseOptimisation,
    NoiseSampling,
    PathSearch,
    PosteriorDrawGuidance,
    SequentialMonteCarlo,
    SuccessiveHalving,
    ZeroOrderSearch,
)
from steerfm.types import Samples

Kind = Literal["consistent", "biased", "argmax"]
N = 4096
console = Console(width=None if os.isatty(1) else 170)


@dataclass(frozen=True, eq=False)
class Problem:
    """A mixture and a reward whose tilt is known; solver: steps of the exact map and their order."""

    mixture: GaussianMixture
    reward: QuadraticReward
    solver: tuple[int, int] = (3, 3)

    @property
    def tilt(self) -> GaussianMixture:
        """The distribution that is to be met."""
        return self.mixture.tilt(self.reward)

    @property
    def log_evidence(self) -> float:
        """The logarithm of E exp(r), which is the value at t = 1, where x says nothing of x0."""
        x = torch.zeros(1, *self.mixture.data_shape, dtype=torch.float64)
        return float(self.mixture.value(x, torch.ones(1, dtype=torch.float64), self.reward))

    def flow_map(self, dtype: torch.dtype = torch.float32) -> FlowMap:
        """Return the exact map."""
        return analytic_flow_map(self.mixture, None, *self.solver).frozen_copy().to(dtype)


def plane(sigma: float) -> Problem:
    """Return the mixture of three modes in the plane, and the measurement of one direction (Meta Flow Maps)."""
    mixture = GaussianMixture([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], [0.5] * 3)
    return Problem(mixture, QuadraticReward.rank_one([1.2, -0.8], -1.0, sigma))


def high(d: int) -> Problem:
    """Return three modes three standard deviations apart in d dimensions, under a measurement of one direction."""
    generator = torch.Generator().manual_seed(d)
    axes = torch.linalg.qr(torch.randn(d, 3, generator=generator, dtype=torch.float64)).Q.T
    mixture = GaussianMixture(1.5 * math.sqrt(2) * math.sqrt(0.5) * axes, [0.5] * 3)
    a = axes[0] - 0.5 * axes[1] + torch.randn(d, generator=generator, dtype=torch.float64) / d
    return Problem(mixture, QuadraticReward.rank_one(a, 1.0, 0.5))


def inverse(kind: str, d: int = 8, sigma: float = 0.3) -> Problem:
    """Return a Gaussian of neighbours that resemble each other, of which a noisy half, or sums of pairs, are seen."""
    apart = (torch.arange(d)[:, None] - torch.arange(d)).abs().double()
    prior = GaussianMixture(torch.zeros(1, d), (0.7**apart)[None])
    eye = torch.eye(d, dtype=torch.float64)
    A = eye[::2] if kind == "inpainting" else (eye[::2] + eye[1::2]) / math.sqrt(2)
    y = A @ prior.sample(1, torch.Generator().manual_seed(7))[0]
    constant = -(y @ y) / (2 * sigma**2)
    return Problem(prior, QuadraticReward(A.T @ A / sigma**2, A.T @ y / sigma**2, constant))


PROBLEMS: dict[str, Problem] = {
    "mixture-0.2": plane(0.2),
    "mixture-1": plane(1.0),
    "mixture-10d": high(10),
    "mixture-100d": high(100),
    "inpainting": inverse("inpainting"),
    "deblurring": inverse("deblurring"),
}


@dataclass(frozen=True)
class Setting:
    """A method with a budget; alone: it returns one sample a seed, so that N seeds make a population."""

    kind: Kind
    method: Any
    alone: bool = False


def population(method: Any) -> Setting:
    """Return a consistent method that returns a population."""
    return Setting("consistent", method)


def walk(particles: int, keep: float, **options: Any) -> SequentialMonteCarlo:
    """Return sequential Monte Carlo over 100 steps of the SDE, of adaptive strength."""
    return SequentialMonteCarlo(
        particles, 100, 1.0, **{"kernel": "sde", "strength": "adaptive", "keep": keep, **options}
    )


MEAN: dict[str, Any] = {"clean": "posterior_mean", "twisted": True}
SETTINGS: dict[str, Setting] = {
    "untilted": Setting("biased", Unsteered("jumps", 1), alone=True),
    "importance": population(BestOfN(N, 1, 1.0)),
    "importance-x16": population(BestOfN(16 * N, 1, 1.0)),
    "tilting-100": population(FlowMapTilting(N, 100, 1.0)),
    "tilting-400": population(FlowMapTilting(N, 400, 1.0)),
    "monte_carlo": population(SequentialMonteCarlo(N, 16, 1.0, strength="adaptive", keep=0.9, gamma=0.3)),
    "monte_carlo-x4": population(SequentialMonteCarlo(4 * N, 16, 1.0, strength="adaptive", keep=0.95, gamma=0.3)),
    "feynman_kac": population(walk(N, 0.95)),
    "feynman_kac-x4": population(walk(4 * N, 0.95)),
    "feynman_kac-constant": population(walk(N, 0.95, clean="posterior_mean", strength="constant")),
    "feynman_kac-max": population(walk(N, 0.95, clean="posterior_mean", strength="constant", potential="max")),
    "twisted": population(walk(N, 0.99, **MEAN)),
    "twisted-x4": population(walk(4 * N, 0.99, **MEAN)),
    "twisted-constant": population(walk(N, 0.99, **MEAN, strength="constant")),
    "twisted-geometric": population(walk(N, 0.99, **MEAN, strength="geometric")),
    "noise_sampling": population(NoiseSampling(N, temperature=1.0)),
    "noise_sampling-pcn": population(NoiseSampling(N, warm_up=64, temperature=1.0, kernel="pcn")),
    "look_ahead": Setting("biased", LookAheadGuidance(100, 1.0), alone=True),
    "posterior_mean": Setting("biased", LookAheadGuidance(100, 1.0, clean="posterior_mean"), alone=True),
    "posterior_draws-4": Setting("biased", PosteriorDrawGuidance(100, 1.0, count=4), alone=True),
    "posterior_draws-16": Setting("biased", PosteriorDrawGuidance(100, 1.0, count=16), alone=True),
    "best_of_16": Setting("argmax", BestOfN(16, 1), alone=True),
    "halving": Setting("argmax", SuccessiveHalving(), alone=True),
    "beam": Setting("argmax", BeamSearch(), alone=True),
    "paths": Setting("argmax", PathSearch(), alone=True),
    "zero_order": Setting("argmax", ZeroOrderSearch(), alone=True),
    "noise_optimisation": Setting("argmax", NoiseOptimisation(), alone=True),
    "control": Setting("argmax", FlowMapControl(), alone=True),
}
LARGER: dict[str, Setting] = {  # where a method has not come CLOSE by the settings above
    "importance-x128": population(BestOfN(128 * N, 1, 1.0)),
    "monte_carlo-64-x4": population(SequentialMonteCarlo(4 * N, 64, 1.0, strength="adaptive", keep=0.6, gamma=0.3)),
    "feynman_kac-x8": population(walk(8 * N, 0.9)),
    "twisted-x16": population(walk(16 * N, 0.99, **MEAN)),
}
KNOWN = ChainMap(SETTINGS, LARGER)
FAST = ("untilted", "importance-x16", "tilting-400", "monte_carlo", "look_ahead")
PLANE = ("mixture-0.2", "mixture-1")
WITHIN = {"tilting-100": 1.5, "tilting-400": 1.4}  # of the floor, in the plane
SEEDS = 20
MODES, EXTRA = 0.01, 0.02  # allowed error of a mode's weight over SEEDS, of moments beyond four standard errors
CLOSE = 1.5  # of the floor: what a consistent method has to reach at some budget


def exact_set(problem: Problem, seed: int) -> Tensor:
    """Return N draws from the tilt."""
    return problem.tilt.sample(N, torch.Generator().manual_seed(10_000 + seed))


def measure(problem: Problem, setting: Setting, seed: int) -> dict[str, Any]:
    """Return what one population of a method is like, against the exact tilt."""
    seeds = range(seed * N, (seed + 1) * N) if setting.alone else [seed]
    out = setting.method(problem.flow_map(), problem.reward, seeds=seeds)
    x0, log_weights = pooled(out, setting)
    weights, tilt = log_weights.softmax(0), problem.tilt
    even = x0[draw_ancestors(log_weights[None], torch.tensor([[0.5]], dtype=torch.float64))[0]][:: len(x0) // N]
    shares, exact = mode_shares(x0, weights, tilt), exact_shares(problem)
    along = x0 @ direction(problem)
    errors, spread = moments(along, weights), effective_spread(along, weights)
    truth = exact_moments(problem)
    cost, share = out.cost, 1 if setting.alone else N
    return {
        "w2": sliced_wasserstein(even, exact_set(problem, 2 * seed)),
        "modes": (shares - exact).tolist(),
        "moments": (errors - truth).tolist(),
        "moment_errors": spread.tolist(),
        "log_evidence": None if out.log_evidence is None else float(out.log_evidence.mean()) - problem.log_evidence,
        "ess": 1 / float(weights.square().sum()) / len(weights),
        "reward": float(weights @ problem.reward(x0)),
        "calls": [each / share for each in (cost.network_calls, cost.reward_calls, cost.reward_gradients)],
    }


def pooled(out: Samples, setting: Setting) -> tuple[Tensor, Tensor]:
    """Return the points (N, d) and their log-weights (N,), in float64."""
    if setting.alone or out.particles is None or out.log_weights is None:
        return out.x0.double(), torch.zeros(len(out.x0), dtype=torch.float64)
    return out.particles[0].double(), out.log_weights[0].double()


def mode_shares(x0: Tensor, weights: Tensor, tilt: GaussianMixture) -> Tensor:
    """Return the weight of the points nearest to each mean of the tilt, (K,)."""
    nearest = torch.cdist(x0, tilt.means).argmin(1)
    return torch.zeros(len(tilt.means), dtype=torch.float64).index_add(0, nearest, weights)


@cache
def exact_shares(problem: Problem) -> Tensor:
    """Return `mode_shares` of the tilt itself, from 400,000 draws: known to 0.0008."""
    x0 = problem.tilt.sample(400_000, torch.Generator().manual_seed(3))
    return mode_shares(x0, torch.full((len(x0),), 1 / len(x0), dtype=torch.float64), problem.tilt)


def direction(problem: Problem) -> Tensor:
    """Return the direction in which the reward bends most, (d,)."""
    return torch.linalg.eigh(problem.reward.A).eigenvectors[:, -1]


def moments(along: Tensor, weights: Tensor) -> Tensor:
    """Return the first two moments, (2,)."""
    return torch.stack([weights @ along, weights @ along**2])


def effective_spread(along: Tensor, weights: Tensor) -> Tensor:
    """Return the standard errors of the first two moments, by the effective sample size, (2,)."""
    first, second = moments(along, weights)
    variances = torch.stack([weights @ (along - first) ** 2, weights @ (along**2 - second) ** 2])
    return (variances * weights.square().sum()).sqrt()


def exact_moments(problem: Problem) -> Tensor:
    """Return the first two moments of the tilt along `direction`, (2,)."""
    tilt, a = problem.tilt, direction(problem)
    means = tilt.means @ a
    within = torch.einsum("i,kij,j->k", a, tilt.covariances, a)
    return torch.stack([tilt.weights @ means, tilt.weights @ (within + means**2)])


def known(folder: Path, problem: str, name: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Measure a method on a problem for every seed, or return what an earlier run of the same setting found."""
    setting, path = KNOWN[name], folder / f"{problem}_{name}.json"
    made_from = f"{setting.method} on {N}"
    kept = read_json(path) if path.exists() else {}
    found = kept["found"] if kept.get("made_from") == made_from else {}
    for seed in seeds:
        if str(seed) not in found:
            found[str(seed)] = measure(PROBLEMS[problem], setting, seed)
            write_atomic(path, json.dumps({"made_from": made_from, "found": found}).encode())
    return [found[str(seed)] for seed in seeds]


def row(name: str, found: list[dict[str, Any]], floor: float, problem: Problem) -> list[str]:
    """Return a method's row of the table."""
    w2 = statistics.median(each["w2"] for each in found)
    evidence = [each["log_evidence"] for each in found if each["log_evidence"] is not None]
    return [
        name,
        KNOWN[name].kind,
        f"{w2:.3f} ({w2 / floor:.1f})",
        f"{worst_mode(found):+.3f}" if len(problem.mixture.means) > 1 else "–",
        f"{statistics.mean(evidence):+.3f}" if evidence else "–",
        f"{100 * statistics.mean(each['ess'] for each in found):.0f}",
        f"{statistics.mean(each['reward'] for each in found) - tilted_reward(problem):+.3f}",
        " / ".join(f"{calls:.3g}" for calls in found[0]["calls"]),
    ]


def worst_mode(found: list[dict[str, Any]]) -> float:
    """Return the error of a mode's weight, mean over seeds, that is the largest of all modes."""
    means = [statistics.mean(errors) for errors in zip(*(each["modes"] for each in found), strict=True)]
    return max(means, key=abs)


@cache
def tilted_reward(problem: Problem) -> float:
    """Return the mean reward under the tilt, from 400,000 draws."""
    return float(problem.reward(problem.tilt.sample(400_000, torch.Generator().manual_seed(4))).mean())


def judge(problem: str, table: dict[str, list[dict[str, Any]]], floor: float) -> list[str]:
    """Return a line on each bound: tilting in the plane, and that each consistent method comes close at some budget."""
    lines = []
    for name, found in table.items():
        ratio = statistics.median(each["w2"] for each in found) / floor
        if problem in PLANE and name in WITHIN:
            lines.append(bound(f"{problem}: {name}, W2 over the floor", ratio, WITHIN[name]))
            most = MODES * math.sqrt(max(1.0, SEEDS / len(found)))  # fewer seeds know a mean by so much less
            lines.append(bound(f"{problem}: {name}, error of a mode", abs(worst_mode(found)), most))
            for moment in range(2):
                mean = statistics.mean(each["moments"][moment] for each in found)
                error = math.sqrt(sum(each["moment_errors"][moment] ** 2 for each in found)) / len(found)
                text = f"{problem}: {name}, error of moment {moment + 1}"
                lines.append(bound(text, abs(mean), 4 * error + EXTRA))
    best = closest(table, floor)
    return [*lines, *(bound(f"{problem}: {name} at its best, W2 over the floor", r, CLOSE) for name, r in best.items())]


def closest(table: dict[str, list[dict[str, Any]]], floor: float) -> dict[str, float]:
    """Return how close each consistent method came, over the floor; its settings have its name before a dash."""
    best: dict[str, float] = {}
    for name, found in table.items():
        if KNOWN[name].kind == "consistent":
            method = name.partition("-")[0]
            ratio = statistics.median(each["w2"] for each in found) / floor
            best[method] = min(ratio, best.get(method, math.inf))
    return best


def bound(text: str, value: float, most: float) -> str:
    """Return a line that says whether a value is at most what it may be."""
    return f"{'holds ' if value <= most else 'BROKEN'}  {text}: {value:.3f}, at most {most:.3f}"


HEADINGS = [
    "method",
    "kind",
    "W2 (over floor)",
    "modes",
    "log Z",
    "ESS %",
    "reward - tilt's",
    "network / reward / grad",
]


def main() -> None:
    """Measure, print a table a problem and the bounds; exit with 1 where one is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="methods, separated by commas (default: all)")
    parser.add_argument("--problems", help="problems, separated by commas (default: all)")
    parser.add_argument("--seeds", type=int, help="how many (default: 20, 3 if fast)")
    parser.add_argument("--fast", action="store_true", help="few methods in the plane")
    parser.add_argument("--folder", type=Path, default=Path("runs/steering_exact"), help="of what is known")
    parser.add_argument("--write", type=Path, metavar="PATH", help="write the tables as Markdown")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(FAST if arguments.fast else SETTINGS)
    chosen = arguments.problems.split(",") if arguments.problems else list(PROBLEMS)[: 2 if arguments.fast else None]
    if unknown := (set(names) - KNOWN.keys()) | (set(chosen) - PROBLEMS.keys()):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; methods are {', '.join([*SETTINGS, *LARGER])}")
    seeds = range(arguments.seeds or (3 if arguments.fast else SEEDS))
    lines, pages = [], []
    for problem in chosen:
        exact = PROBLEMS[problem]
        least = statistics.median(
            sliced_wasserstein(exact_set(exact, 2 * seed), exact_set(exact, 2 * seed + 1)) for seed in range(100)
        )
        found = {name: known(arguments.folder, problem, name, seeds) for name in names}
        if names == list(SETTINGS):
            far = {method for method, ratio in closest(found, least).items() if ratio > CLOSE}
            larger = [name for name in LARGER if name.partition("-")[0] in far]
            found |= {name: known(arguments.folder, problem, name, seeds) for name in larger}
        rows = [row(name, each, least, exact) for name, each in found.items()]
        caption = f"{problem}: floor {least:.3f}, {len(seeds)} seeds of {N} particles, log Z {exact.log_evidence:.3f}"
        table = Table(*HEADINGS, title=caption)
        for cells in rows:
            table.add_row(*cells)
        console.print(table)
        pages.append(markdown(caption, HEADINGS, rows))
        lines += judge(problem, found, least)
    if arguments.write:
        write_atomic(arguments.write, "\n".join(pages).encode())
    console.print("\n".join(lines), markup=False)
    raise SystemExit(any(not line.startswith("holds") for line in lines))


def markdown(caption: str, headings: list[str], rows: list[list[str]]) -> str:
    """Return a table as Markdown."""
    lines = [f"{caption}.", "", *(f"| {' | '.join(cells)} |" for cells in [headings, [":--"] * len(headings), *rows])]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
