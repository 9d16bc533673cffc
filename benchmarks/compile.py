"""What torch.compile saves: a training step of the digits DiT with module.compile=true against the same step without.

    python benchmarks/compile.py                      one CPU core, about 40 min, most of it compiling
    python benchmarks/compile.py MeanFlow PSD         these methods only

The step is that of recipe=digits with network=digits_dit: batch 128, flow matching on three quarters of the rows
and the method on the rest, backward pass and AdamW. Times are the process's own, which other programs disturb less
than the clock's; rounds alternate between the two; the figures are medians, the ratio that of the rounds' ratios (below
1: compiled is faster). The last column is the first compiled step, with compilation and the check against the plain
step, by the clock.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch.optim import AdamW

from steerfm import Digits, DiT, FlowMap, FlowMapTraining, Triangle
from steerfm.objectives import Compositional, Consistency, Eulerian, FlowMapMatching, FlowMatching, Lagrangian
from steerfm.types import Values


def new_map() -> FlowMap:
    """Return the map of network=digits_dit, from the same start every time."""
    torch.manual_seed(0)
    return FlowMap(DiT((1, 8, 8), patch=2, width=128, depth=4, heads=4))


def methods() -> dict[str, Callable[..., Values]]:
    """Return the objectives by the names that papers give them."""
    teacher = new_map()
    return {
        "flow matching": FlowMatching(),
        "MeanFlow": Eulerian(),
        "improved MeanFlow": Eulerian(along="self"),
        "AYF-EMD": Eulerian(velocity="teacher", teacher=teacher),
        "AYF-LMD": Lagrangian(teacher=teacher, stop="target"),
        "PSD": Compositional(),
        "CT": Consistency(),
        "LSD": Lagrangian(),
        "LSD, central": Lagrangian("central"),
        "ESD": Eulerian(velocity="self", stop="spatial"),
        "FMM": FlowMapMatching(),
    }


class Loop:
    """A bare training loop."""

    def __init__(self, objective: Callable[..., Values], compiled: bool, data: Digits) -> None:
        times = Triangle(diagonal=0.75, both=True)
        self.module = FlowMapTraining(new_map(), objective, times, prompt_dropout=0.0, compile=compiled)
        self.optimizer = AdamW(self.module.parameters(), lr=1e-3)
        self.data, self.step = data, 0

    def run(self, steps: int) -> float:
        """Take so many steps and return the processor's seconds that each took."""
        start = time.process_time()
        for _ in range(steps):
            losses, _, _ = self.module.losses(
                self.data.batch(self.step), torch.Generator().manual_seed(self.step), False
            )
            self.optimizer.zero_grad()
            losses.mean().backward()
            self.optimizer.step()
            self.step += 1
        return (time.process_time() - start) / steps


def compare(objective: Callable[..., Values], data: Digits, steps: int, rounds: int) -> tuple[str, ...]:
    """Return the cells of a row: milliseconds of both, their ratio, and the seconds of the first compiled step."""
    plain, compiled = (Loop(objective, each, data) for each in (False, True))
    start = time.perf_counter()
    compiled.run(1)
    first = time.perf_counter() - start
    for loop in (plain, compiled):
        loop.run(2)
    pairs = [(plain.run(steps), compiled.run(steps)) for _ in range(rounds)]
    ratios = sorted(b / a for a, b in pairs)
    return (
        f"{1e3 * statistics.median(a for a, _ in pairs):.1f}",
        f"{1e3 * statistics.median(b for _, b in pairs):.1f}",
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        f"{first:.0f}",
    )


class Refusals(logging.Handler):
    """Keep what the library warns of: what is not compiled, and why."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="by name; all by default")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    refusals = Refusals()
    logging.getLogger("steerfm.modules.compiling").addHandler(refusals)
    data, known = Digits(128, captions=False, validation_size=0), methods()
    table = Table(
        "", "plain ms", "compiled ms", "ratio", "first step s", title="digits DiT, batch 128, a training step"
    )
    for name in arguments.methods or known:
        refusals.texts.clear()
        cells = compare(known[name], data, arguments.steps, arguments.rounds)
        table.add_row(name, *cells)
        for text in refusals.texts:
            table.add_row("", f"falls back: {text}")
    Console().print(table)


if __name__ == "__main__":
    main()
