"""What a step of fine-tuning holds in memory at once, and how long it takes, by the number of jumps or steps.

    python benchmarks/finetuning_memory.py                    on the CPU, bytes of tensors; one core, two minutes
    python benchmarks/finetuning_memory.py --device cuda      what the allocator gave out

A U-Net of 32 x 32 colour pictures with random weights, a differentiable reward, 8 samples; forward and backward. MB:
the most in use at once beyond what was in use before. Seconds: of a step, the median of three.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from steerfm import AdjointMatching, DirectBackprop, FlowMap, PolicyGradient, UNet
from steerfm.finetuning import Batch, FineTuning
from steerfm.networks.mlp import randomise
from steerfm.reward import as_reward
from steerfm.reward_check import peak_memory
from steerfm.seeds import RowDraws

ROWS, JUMPS = 8, (2, 8, 32)
METHODS: dict[str, Callable[[int, bool], FineTuning]] = {
    "direct, sample": lambda k, keep: DirectBackprop(k, penalty="sample", checkpointing=keep),
    "direct, last=1": lambda k, keep: DirectBackprop(k, 1, penalty="sample", checkpointing=keep),
    "direct, path": lambda k, keep: DirectBackprop(k, penalty="path", checkpointing=keep),
    "adjoint matching": lambda k, keep: AdjointMatching(k, checkpointing=keep),
    "policy gradient": lambda k, keep: PolicyGradient(k, checkpointing=keep),
}
console = Console(width=None if os.isatty(1) else 150)


def left(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return how bright the left half is."""
    return images[..., :16].mean((1, 2, 3))


def measured(method: FineTuning, flow_map: FlowMap, reference: FlowMap) -> tuple[float, float]:
    """Return the most MB in use at once in a step, and its seconds."""

    def step() -> None:
        flow_map.zero_grad()
        draws = RowDraws(0, 0, range(ROWS))
        method(Batch(flow_map, reference, as_reward(left), [""] * ROWS, None, 0.1, draws)).loss.mean().backward()
        if flow_map.device.type == "cuda":
            torch.cuda.synchronize()

    step()  # gradients are there from now on, and no part of the figure
    peak, seconds = peak_memory(step, flow_map.device) / 1e6, []
    for _ in range(3):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return peak, statistics.median(seconds)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="where to measure (default: cpu)")
    arguments = parser.parse_args()
    network = UNet((3, 32, 32), channels=(16, 32), blocks=1)
    randomise(network, 0.05)
    flow_map = FlowMap(network).to(arguments.device)
    reference = flow_map.frozen_copy()
    table = Table("method", "checkpointing", *(f"{k} jumps" for k in JUMPS), "32 over 2", title="MB at most (seconds)")
    for name, make in METHODS.items():
        for keep in (False, True):
            found = [measured(make(k, keep), flow_map, reference) for k in JUMPS]
            cells = [f"{peak:.1f} ({seconds:.2f})" for peak, seconds in found]
            table.add_row(name, "yes" if keep else "no", *cells, f"{found[-1][0] / found[0][0]:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
