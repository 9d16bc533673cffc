"""How well the digits flow map samples: pixel Frechet distance at 1 to 64 jumps, after recipe=digits.

    python benchmarks/digits.py            two CPU cores, about 1 min

Protocol: 2000 samples of seeds 0 to 1999, clamped to [-1, 1], against all 1797 scans, in the 64 pixels. The floor
is the distance of a bootstrap of the scans of the same size to the scans; halves of the scans lie at 0.24 to 0.28.
Also printed: Euler steps of the same map's velocity, and how far two jumps lead from one (semigroup defect).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from steerfm import FlowMap, Unsteered
from steerfm.cli import main as steerfm
from steerfm.data.digits import digit_scans
from steerfm.divergence import semigroup_defect
from steerfm.metrics import frechet_distance, frechet_floor
from steerfm.seeds import noise

COUNTS = (1, 2, 4, 8, 16, 64)


def distances(flow_map: FlowMap, sampler: str) -> list[float]:
    """Return the Frechet distance to all scans at each number of jumps or steps."""
    scans = digit_scans().flatten(1)
    found = []
    for count in COUNTS:
        samples = Unsteered(sampler, count)(flow_map, seeds=range(2000))  # type: ignore[arg-type]
        found.append(float(frechet_distance(samples.x0.clamp(-1, 1).flatten(1), scans)))
    return found


def defect(flow_map: FlowMap) -> float:
    """Return the mean gap between one jump and two from noise, over 500 seeds."""
    x1 = noise(range(500), flow_map.data_shape)
    one, half, zero = (torch.full((500,), t) for t in (1.0, 0.5, 0.0))
    with torch.no_grad():
        return float(semigroup_defect(flow_map, x1, one, half, zero).mean())


def main() -> None:
    """Train (unless a map is given) and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", help="a saved map or run; trained anew by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = None
        path = arguments.map or str(Path(folder) / "digits")
        if arguments.map is None:
            start = time.perf_counter()
            if steerfm(["train", "recipe=digits", "name=digits", f"folder={folder}"]):
                raise SystemExit(1)
            seconds = time.perf_counter() - start
        flow_map = FlowMap.load(path)
    table = Table("", *map(str, COUNTS), title="Pixel Frechet distance by jumps or steps")
    table.add_row("jumps", *(f"{d:.2f}" for d in distances(flow_map, "jumps")))
    table.add_row("Euler", *(f"{d:.2f}" for d in distances(flow_map, "euler")))
    console = Console()
    console.print(table)
    floor = frechet_floor(digit_scans().flatten(1), 2000)
    console.print(f"floor {floor:.2f}; semigroup defect {defect(flow_map):.2f}")
    if seconds is not None:
        console.print(f"trained in {seconds:.0f} s, imports included")


if __name__ == "__main__":
    main()
