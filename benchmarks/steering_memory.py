"""What steering holds in memory at once, by the number of particles and of jumps.

    python benchmarks/steering_memory.py                    on the CPU, bytes of tensors; one core, two minutes
    python benchmarks/steering_memory.py --device cuda      what the allocator gave out

A U-Net of 32 x 32 colour pictures with random weights, a differentiable reward, one pair. Figures: the most in use at
once beyond what was in use before, in MB; over particles, at 4 jumps, in micro-batches of 8 and all at once; and over
jumps, with 8 particles (8 pairs, for methods without particles). A state of the map is 12 kB.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from torch import Tensor

from steerfm import FlowMap, UNet
from steerfm.networks.mlp import randomise
from steerfm.reward_check import peak_memory
from steerfm.steering import (
    FlowMapTilting,
    LookAheadGuidance,
    NoiseOptimisation,
    NoiseSampling,
    SequentialMonteCarlo,
    Steering,
)

MICRO_BATCH, FEWEST = 8, 4
PARTICLES, JUMPS = (16, 64, 256), (4, 16, 64)
console = Console(width=None if os.isatty(1) else 140)


def tilting(particles: int, jumps: int, micro_batch: int | None) -> Steering:
    """Return trajectory tilting."""
    return FlowMapTilting(particles, jumps, micro_batch=micro_batch)


def monte_carlo(particles: int, jumps: int, micro_batch: int | None) -> Steering:
    """Return sequential Monte Carlo over jumps and fresh noise, which takes no gradients."""
    return SequentialMonteCarlo(particles, jumps, micro_batch=micro_batch)


def twisted(particles: int, jumps: int, micro_batch: int | None) -> Steering:
    """Return twisted sequential Monte Carlo over the SDE."""
    return SequentialMonteCarlo(particles, jumps, kernel="sde", twisted=True, micro_batch=micro_batch)


def chains(particles: int, jumps: int, micro_batch: int | None) -> Steering:
    """Return chains in noise space, which differentiate every jump."""
    return NoiseSampling(particles, jumps, 1, 1, micro_batch=micro_batch)


def chains_without_gradient(particles: int, jumps: int, micro_batch: int | None) -> Steering:
    """Return chains in noise space that take no gradients."""
    return NoiseSampling(particles, jumps, 1, 1, kernel="pcn", micro_batch=micro_batch)


def guidance(jumps: int) -> Steering:
    """Return look-ahead guidance."""
    return LookAheadGuidance(jumps)


def ascent(jumps: int) -> Steering:
    """Return noise optimisation through every jump."""
    return NoiseOptimisation(jumps, 2)


def truncated_ascent(jumps: int) -> Steering:
    """Return noise optimisation through the last jump."""
    return NoiseOptimisation(jumps, 2, last=1)


POPULATIONS = {
    "tilting": tilting,
    "Monte Carlo": monte_carlo,
    "Monte Carlo, twisted": twisted,
    "noise sampling": chains,
    "noise sampling, pCN": chains_without_gradient,
}
TRAJECTORIES = {
    "guidance": guidance,
    "noise optimisation": ascent,
    "noise optimisation, last=1": truncated_ascent,
}


def left(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return how bright the left half is."""
    return images[..., :16].mean((1, 2, 3))


def peak(method: Steering, flow_map: FlowMap, seeds: Sequence[int] = (0,)) -> str:
    """Return the most MB in use at once in a run."""
    return f"{peak_memory(lambda: method(flow_map, left, seeds=seeds), flow_map.device) / 1e6:.1f}"


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="where to measure (default: cpu)")
    arguments = parser.parse_args()
    network = UNet((3, 32, 32), channels=(16, 32), blocks=1)
    randomise(network, 0.05)
    flow_map = FlowMap(network).to(arguments.device)
    titles = [f"{n} particles" for n in PARTICLES] + [f"{PARTICLES[-1]} at once"] + [f"{n} jumps" for n in JUMPS]
    table = Table("method", *titles, title=f"MB at most, micro-batches of {MICRO_BATCH}")
    for name, make in POPULATIONS.items():
        cells = [peak(make(n, FEWEST, MICRO_BATCH), flow_map) for n in PARTICLES]
        cells += [peak(make(PARTICLES[-1], FEWEST, None), flow_map)]
        cells += [peak(make(MICRO_BATCH, n, MICRO_BATCH), flow_map) for n in JUMPS]
        table.add_row(name, *cells)
    for name, alone in TRAJECTORIES.items():
        cells = [peak(alone(n), flow_map, range(MICRO_BATCH)) for n in JUMPS]
        table.add_row(name, *["–"] * (len(PARTICLES) + 1), *cells)
    console.print(table)


if __name__ == "__main__":
    main()
