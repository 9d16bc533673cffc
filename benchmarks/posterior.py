"""Draws of a digit given a noisy state: a sighted map that has learnt them, against GLASS from an ordinary map.

    python benchmarks/posterior.py            one CPU core, 8 min: it trains both maps in runs/posterior, once

For each time t, 128 scans are noised to x_t and drawn 32 times. Coverage: share of the scans' pixels, of those that
vary at all among the draws, inside their central 80% (a calibrated posterior: 80%). Mean: root mean square distance,
in a pixel, between the mean of the draws and the map's posterior mean, over that of the posterior mean to the scan (0
is best; 32 draws of the right spread leave 0.18). Spread: the draws' root mean square deviation from their mean, over
the posterior mean's from the scan (1 is calibrated). Fréchet: pixel Fréchet distance of one draw each of 1797 states
to all scans, which is that of the data itself if the draws are right. Calls: network calls a draw.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from steerfm import FlowMap, digits, seeds
from steerfm.cli import main as steerfm
from steerfm.metrics import frechet_distance
from steerfm.steering import Glass, Renoised, Sighted
from steerfm.steering.posterior import Draws

TIMES = (0.3, 0.6, 0.9)
SCANS, DRAWS = 128, 32
console = Console(width=None if os.isatty(1) else 140)


@dataclass(frozen=True)
class Row:
    """Hold what the draws of one method at one time are like; see the module's text."""

    coverage: float
    mean: float
    spread: float
    frechet: float


@torch.no_grad()
def measure(flow_map: FlowMap, draws: Draws, t: float) -> Row:
    """Return what draws given states of the digits' scans at time t are like."""
    scans = digits.load().x0
    x0 = scans[torch.randperm(len(scans), generator=torch.Generator().manual_seed(0))[:SCANS]]
    x_t = noised(x0, t, 0)
    noise = seeds.noise(range(SCANS), x0.shape[1:], particles=DRAWS, stream="posterior")
    drawn = draws.draw(flow_map, x_t.repeat_interleave(DRAWS, 0), t, noise, None).clamp(-1, 1)
    drawn = drawn.reshape(SCANS, DRAWS, *x0.shape[1:])
    low, high = drawn.quantile(0.1, 1), drawn.quantile(0.9, 1)
    varying = high - low > 0.01
    inside = ((low <= x0) & (x0 <= high))[varying].double().mean()
    exact = flow_map.denoise(x_t, t)
    scale = rms(exact - x0)
    everything = draws.draw(flow_map, noised(scans, t, 1), t, noise_like(scans), None).clamp(-1, 1)
    return Row(
        float(inside),
        rms(drawn.mean(1) - exact) / scale,
        rms(drawn - drawn.mean(1, keepdim=True)) / scale,
        frechet_distance(everything.flatten(1), scans.flatten(1)),
    )


def trained(recipe: str) -> str:
    """Return the run of a recipe in runs/posterior, trained unless it is there."""
    folder = Path("runs/posterior") / recipe
    if not (folder / "map").exists() and steerfm(
        ["train", f"recipe={recipe}", f"name={recipe}", "folder=runs/posterior"]
    ):
        raise SystemExit(1)
    return str(folder)


def noised(x0: Tensor, t: float, seed: int) -> Tensor:
    """Return a state at time t for each picture."""
    generator = torch.Generator().manual_seed(seed)
    return (1 - t) * x0 + t * torch.randn(x0.shape, generator=generator)


def noise_like(x0: Tensor) -> Tensor:
    """Return noise for each picture."""
    return torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))


def rms(x: Tensor) -> float:
    """Return the root mean square."""
    return float(x.double().square().mean().sqrt())


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sighted", help="a run of recipe=digits_posterior; trained by default")
    parser.add_argument("--map", help="a run of recipe=digits; trained by default")
    arguments = parser.parse_args()
    paths = (arguments.map or trained("digits"), arguments.sighted or trained("digits_posterior"))
    torch.set_num_threads(1)
    flow_map, sighted = (FlowMap.load(path).eval() for path in paths)
    methods: dict[str, tuple[Draws, int]] = {
        "sighted, 1 jump": (Sighted(sighted, 1), 1),
        "sighted, 2 jumps": (Sighted(sighted, 2), 2),
        "sighted, 4 jumps": (Sighted(sighted, 4), 4),
        "GLASS, 4 Euler steps": (Glass(4, "euler"), 4),
        "GLASS, 4 Heun steps": (Glass(4), 7),
        "GLASS, 16 Heun steps": (Glass(16), 31),
        "re-noised, unweighted": (Renoised(weighted=False), 1),
    }
    table = Table("method", "calls", "t", "coverage", "mean", "spread", "Fréchet")
    for name, (draws, calls) in methods.items():
        table.add_section()
        for t in TIMES:
            row = measure(flow_map, draws, t)
            figures = [f"{row.mean:.2f}", f"{row.spread:.2f}", f"{row.frechet:.2f}"]
            table.add_row(name, str(calls), f"{t:g}", f"{100 * row.coverage:.0f}%", *figures)
    console.print(table)


if __name__ == "__main__":
    main()
