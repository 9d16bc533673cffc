"""Inverse problems: what steering draws for a measured digit or scene, and whether the truth is among it.

    python benchmarks/inverse.py                    one core, 20 min; goes on where it stopped
    python benchmarks/inverse.py --data digits --truths 8

The problems are those of recipe=digits_inverse and recipe=shapes_inverse: half of a picture, a blurred one, or the
means of blocks, with noise of 0.1; temperature 1, at which the tilt is the posterior. Truths come from the map itself
(so that its prior is right, and what is consistent calibrated) or from data (held-out scenes; scans, of those that the
digits' map was trained on), a measurement each. A method draws a population for each of them.

PSNR: in dB, of the population's mean and of one draw, mean over truths. Coverage: share of the truth's pixels (those
hidden, where half is), and of 32 random projections of these, that lie inside the central 90% of the population: the
truth's rank, weighted, ties broken at random, so that a truth and particles from one law give 90%, and a population
that is one particle 0; ± the standard error over truths. ESS: of all particles. Calls: network forwards (backwards
counting two) for each of them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from landscape import start_worker
from posterior import trained
from rich.console import Console
from rich.table import Table
from torch import Tensor

from steerfm import FlowMap, config, seeds
from steerfm.data.digits import digit_picture
from steerfm.data.shapes import shape_picture
from steerfm.files import read_json, write_atomic
from steerfm.rewards.inverse import Mask, Measurement, Operator
from steerfm.sampling import Unsteered, few_jumps
from steerfm.steering import (
    BestOfN,
    FlowMapTilting,
    LookAheadGuidance,
    NoiseSampling,
    PosteriorDrawGuidance,
    Renoised,
    SequentialMonteCarlo,
)
from steerfm.types import Samples

PROBLEMS = ("inpainting", "deblurring", "super_resolution")
CENTRAL, PROJECTIONS = 0.9, 32
FIRST_SEED = 1_000_000  # of the truths that the map draws: far from those of the methods
console = Console(width=None if os.isatty(1) else 150)


@dataclass(frozen=True)
class Setting:
    """A data set: how many truths and particles, jumps of a draw, steps of a trajectory, moves of a chain's warm-up.

    A truth of the map, and a draw where a method jumps from noise, takes `jumps`. truth: a picture of the data.
    """

    truths: int
    particles: int
    jumps: int
    steps: int
    warm_up: int
    truth: Callable[[int], Tensor]

    @property
    def methods(self) -> dict[str, Any]:
        """The methods by name."""
        n, jumps, steps = self.particles, self.jumps, self.steps
        return {
            "the map alone": Unsteered("jumps", jumps),
            f"softmax of {16 * n}": BestOfN(16 * n, jumps, 1.0),
            "tilting": FlowMapTilting(n, steps, 1.0),
            "Monte Carlo": SequentialMonteCarlo(n, steps, 1.0, strength="adaptive", keep=0.9, gamma=0.3),
            "noise sampling": NoiseSampling(n, jumps, self.warm_up, temperature=1.0),
            "posterior mean (DPS)": LookAheadGuidance(steps, 1.0, "posterior_mean"),
            "posterior draws": PosteriorDrawGuidance(steps, 1.0, count=8, draws=Renoised(weighted=False)),
        }


ALONE = ("the map alone", "posterior mean (DPS)", "posterior draws")  # they return one sample a seed, no population
SETTINGS = {
    "digits": Setting(16, 64, 1, 32, 64, digit_picture),
    "shapes": Setting(4, 16, 2, 16, 32, partial(shape_picture, count=2)),
}


@dataclass(frozen=True)
class Case:
    """A problem of a data set: the map, the operator and the noise's standard deviation, as the recipe has them."""

    setting: Setting
    flow_map: FlowMap
    operator: Operator
    sigma: float

    @torch.no_grad()
    def truth(self, kind: str, i: int) -> Tensor:
        """Return truth number i, (C, H, W) in [0, 1]: of the "data", or a draw of the "map"."""
        if kind == "data":
            return self.setting.truth(i)
        x1 = seeds.noise([FIRST_SEED + i], self.flow_map.data_shape)
        x0 = few_jumps(self.flow_map, x1, self.setting.jumps, self.flow_map.encode_prompts([""]))
        return self.flow_map.decode(x0)[0]

    def made_from(self, name: str) -> str:
        """Return what the figures of a method depend on."""
        shape = self.flow_map.data_shape
        probe = self.operator(torch.linspace(0, 1, math.prod(shape)).reshape(1, *shape))
        tensors = [*self.flow_map.state_dict().values(), probe]
        digest = hashlib.sha256(b"".join(each.numpy().tobytes() for each in tensors)).hexdigest()
        return f"{self.setting.methods[name]}, {self.setting.particles} at {self.sigma}, by map and operator {digest}"


def case_of(data: str, problem: str, path: str) -> Case:
    """Return a problem of recipe=digits_inverse or shapes_inverse with the map at a path."""
    recipe = config.compose("steer", [f"recipe={data}_inverse", f"reward={data}_{problem}", f"map={path}"])
    reward = recipe.build("reward")
    return Case(SETTINGS[data], recipe.build("flow_map").eval(), reward.operator, reward.sigma)


def measure(case: Case, name: str, kind: str, i: int) -> dict[str, Any]:
    """Return what a method's population for truth number i is like."""
    setting, alone, truth = case.setting, name in ALONE, case.truth(kind, i)
    reward = Measurement(case.operator, case.sigma, picture=truth, seed=i)
    numbers = range(i * setting.particles, (i + 1) * setting.particles) if alone else [i]
    out: Samples = setting.methods[name](case.flow_map, reward, seeds=numbers)
    pictures = out.images if alone else case.flow_map.decode(particles_of(out))
    weights = torch.full((len(pictures),), 1 / len(pictures)).double() if alone else weights_of(out)
    mean = torch.einsum("n,nchw->chw", weights, pictures.double())
    hidden = ~reward.operator.seen.bool().expand(truth.shape) if isinstance(reward.operator, Mask) else truth > -1
    true, drawn = truth[hidden].double(), pictures[:, hidden].double()
    generator = torch.Generator().manual_seed(i)
    directions = torch.randn(len(true), PROJECTIONS, generator=generator, dtype=torch.float64)
    return {
        "psnr_mean": psnr(mean, truth),
        "psnr_one": psnr(out.images[0], truth),
        "pixels": coverage(true, drawn, weights, generator),
        "projections": coverage(true @ directions, drawn @ directions, weights, generator),
        "ess": 1 / float(weights.square().sum()) / len(weights),
        "calls": out.cost.network_calls / (1 if alone else len(pictures)),
    }


def particles_of(out: Samples) -> Tensor:
    """Return the particles of one population."""
    assert out.particles is not None
    return out.particles[0]


def weights_of(out: Samples) -> Tensor:
    """Return the weights of one population, float64."""
    assert out.log_weights is not None
    return out.log_weights[0].double().softmax(0)


def psnr(picture: Tensor, truth: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB, of pictures in [0, 1]."""
    return -10 * math.log10(float((picture - truth).double().square().mean()))


def coverage(truth: Tensor, drawn: Tensor, weights: Tensor, generator: torch.Generator) -> float:
    """Return the share of numbers (d,) whose rank among those drawn (n, d) is in the central 90%.

    With equal weights the rank (k + U (e + 1)) / (n + 1), of k below and e equal, is uniform if truth and draws are
    exchangeable.
    """
    uniform = torch.rand(len(truth), generator=generator, dtype=torch.float64)
    below, equal = weights @ (drawn < truth).double(), weights @ (drawn == truth).double()
    n = len(weights)
    rank = (n * (below + uniform * equal) + uniform) / (n + 1)
    return float(((rank - 0.5).abs() < CENTRAL / 2).double().mean())


def known(path: Path, case: Case, name: str, kind: str, truths: int) -> list[dict[str, Any]]:
    """Measure a method on each truth, or return what an earlier run of the same found."""
    kept, made_from = read_json(path) if path.exists() else {}, case.made_from(name)
    found = kept["found"] if kept.get("made_from") == made_from else {}
    for i in range(truths):
        if str(i) not in found:
            found[str(i)] = measure(case, name, kind, i)
            write_atomic(path, json.dumps({"made_from": made_from, "found": found}).encode())
    return [found[str(i)] for i in range(truths)]


HEADINGS = ["method", "PSNR of the mean", "of one draw", "pixels", "projections", "ESS", "calls"]


def row(name: str, found: Sequence[dict[str, Any]]) -> list[str]:
    """Return a method's row of the table."""

    def mean(key: str, scale: float = 1.0) -> float:
        return scale * statistics.mean(each[key] for each in found)

    def share(key: str) -> str:
        error = (
            100 * statistics.stdev(each[key] for each in found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
        )
        return f"{mean(key, 100):.0f} ± {error:.0f}%"

    figures = [f"{mean('psnr_mean'):.1f}", f"{mean('psnr_one'):.1f}", share("pixels"), share("projections")]
    return [name, *figures, f"{mean('ess', 100):.0f}%", f"{mean('calls'):,.0f}"]


def main() -> None:
    """Measure and print a table a problem and kind of truth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(SETTINGS), nargs="+", default=list(SETTINGS), help="default: both")
    parser.add_argument("--problems", choices=PROBLEMS, nargs="+", default=list(PROBLEMS), help="default: all")
    parser.add_argument("--truths", type=int, help="how many (default: 16 digits, 4 scenes)")
    parser.add_argument("--map", help="a run of recipe=digits; trained by default")
    parser.add_argument("--folder", type=Path, default=Path("runs/inverse"), help="of what is known")
    parser.add_argument("--write", type=Path, metavar="PATH", help="write the tables as Markdown")
    arguments = parser.parse_args()
    start_worker()
    pages = []
    for data, problem in itertools.product(arguments.data, arguments.problems):
        path = (arguments.map or trained("digits")) if data == "digits" else "${zoo:shapes32}"
        case = case_of(data, problem, path)
        truths = arguments.truths or case.setting.truths
        for kind in ("map", "data"):
            lines = []
            for name in case.setting.methods:
                file = arguments.folder / f"{data}_{problem}_{kind}_{name.replace(' ', '_')}.json"
                lines.append(row(name, known(file, case, name, kind, truths)))
            caption = f"{data}, {problem}, {truths} truths of the {kind}"
            table = Table(*HEADINGS, title=caption)
            for cells in lines:
                table.add_row(*cells)
            console.print(table)
            pages.append(markdown(caption, lines))
    if arguments.write:
        write_atomic(arguments.write, "\n".join(pages).encode())


def markdown(caption: str, lines: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    titles = [HEADINGS, [":--", *["--:"] * (len(HEADINGS) - 1)]]
    return "\n".join([f"{caption}:", "", *(f"| {' | '.join(cells)} |" for cells in [*titles, *lines]), ""])


if __name__ == "__main__":
    main()
