"""What Lightning costs: a training step through the Trainer against the same step in a bare PyTorch loop.

    python benchmarks/training_overhead.py            two CPU cores, about 3 min

The step is that of recipe=digits: batch 128, the digits MLP, flow matching on three quarters of the rows and
LSD on the rest, gradient clip 1, AdamW, logging every 50 steps, the EMA in both. Rounds alternate between the
two, so that a slow spell of the machine hits both; the figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from functools import partial
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from torch.optim import AdamW

from steerfm import EMA, MLP, Digits, FlowMap, FlowMapTraining, Lagrangian, Triangle

WARM_UP = 10  # steps that are not timed


def new_module() -> FlowMapTraining:
    """Return the digits training of recipe=digits, from the same start every time."""
    torch.manual_seed(0)
    flow_map = FlowMap(MLP((1, 8, 8), width=256, depth=4, expansion=2.0))
    return FlowMapTraining(
        flow_map,
        Lagrangian(),
        Triangle(diagonal=0.75, both=True),
        optimizer=partial(AdamW, lr=1e-3),
        prompt_dropout=0.0,
    )


class Stopwatch(Callback):
    """Time the steps after the warm-up."""

    start = seconds = 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == WARM_UP:
            self.start = time.perf_counter()

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def through_lightning(steps: int, folder: str) -> float:
    """Return the seconds that a step takes through the Trainer."""
    watch = Stopwatch()
    trainer = Trainer(
        max_steps=WARM_UP + steps,
        accelerator="cpu",
        gradient_clip_val=1.0,
        callbacks=[watch, EMA(0.999)],
        logger=CSVLogger(folder),
        log_every_n_steps=50,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(new_module(), Digits(128, captions=False, validation_size=0))
    return watch.seconds / steps


def bare(steps: int) -> float:
    """Return the seconds that the same step takes in a plain loop."""
    module, data = new_module(), Digits(128, captions=False)
    parameters = list(module.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = AdamW(parameters, lr=1e-3)
    start = 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            start = time.perf_counter()
        losses, _, _ = module.losses(data.batch(step), torch.Generator().manual_seed(step), False)
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1e-3)
    return (time.perf_counter() - start) / steps


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            pairs.append((through_lightning(arguments.steps, folder), bare(arguments.steps)))
    table = Table("", "median ms a step", title=f"{arguments.rounds} rounds of {arguments.steps} steps")
    table.add_row("bare loop", f"{1e3 * statistics.median(b for _, b in pairs):.2f}")
    table.add_row("Lightning", f"{1e3 * statistics.median(a for a, _ in pairs):.2f}")
    ratios = sorted(a / b for a, b in pairs)
    table.add_row("ratio", f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    Console().print(table)


if __name__ == "__main__":
    main()
