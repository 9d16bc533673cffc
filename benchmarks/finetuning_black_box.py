"""Rewards without a gradient: JPEG size and mirror symmetry of digits, by policy gradients and negative-aware tuning.

    python benchmarks/finetuning_black_box.py       one CPU core, 15 min: it trains the digits map first, once

JPEG size is made smaller and larger, and symmetry, which is scored through numpy, greater. Gain: mean reward of 500
samples in 4 jumps over the base's, in base standard deviations; KL: the divergence D from the base; diversity: mean
pairwise distance over the base's.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning import Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from steerfm import EMA, FlowMap, NegativeAware, PolicyGradient, Prompts, RewardFineTuning, Unsteered
from steerfm.callbacks.ema import averaged
from steerfm.cli import main as steerfm
from steerfm.divergence import monitor
from steerfm.finetuning import FineTuning
from steerfm.metrics import mean_pairwise_distance
from steerfm.reward import Reward
from steerfm.rewards.simple import JPEGSize

SAMPLES, BATCH, STEPS = 500, 128, 300
console = Console(width=None if os.isatty(1) else 120)


class Symmetry(Reward):
    """Score how like its mirror image a picture is, in numpy: minus the root mean square difference."""

    differentiable = False

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: object) -> Tensor:
        """Return the scores, (B,)."""
        grey = images.detach().cpu().numpy().mean(1)
        return torch.from_numpy(-np.sqrt(((grey - grey[:, :, ::-1]) ** 2).mean((1, 2)))).to(images)


def tuned(base: FlowMap, reward: Reward, method: FineTuning, temperature: float) -> FlowMap:
    """Return the tuned map with its averaged weights."""
    module = RewardFineTuning(
        base.frozen_copy(),
        reward,
        method,
        temperature,
        optimizer=partial(AdamW, lr=1e-3, weight_decay=0.0),
        scheduler=partial(CosineAnnealingLR, T_max=STEPS),
        monitor_every=10 * STEPS,
    )
    trainer = Trainer(
        max_steps=STEPS, accelerator="cpu", callbacks=[EMA(0.98)], gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, Prompts([""], BATCH))
    with averaged(module):
        return module.flow_map.frozen_copy()


def main() -> None:
    """Tune toward each reward by each method, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", help="a map of recipe=digits; trained first by default")
    parser.add_argument("--folder", type=Path, default=Path("runs/finetuning_black_box"), help="of that map")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    given = arguments.map or str(arguments.folder / "digits")
    if arguments.map is None and not (arguments.folder / "digits" / "metrics.json").exists():
        steerfm(["train", "recipe=digits", "name=digits", f"folder={arguments.folder}"])
    base, table = FlowMap.load(given), Table("reward", "method", "gain", "KL", "diversity", "seconds")
    for name, reward in {"smaller JPEG": -JPEGSize(), "larger JPEG": 1.0 * JPEGSize(), "symmetry": Symmetry()}.items():
        before = Unsteered("jumps", 4)(base, reward, seeds=range(SAMPLES))
        assert before.rewards is not None
        values = before.rewards.double().tolist()
        std = statistics.stdev(values)
        methods = {
            "policy gradient": (PolicyGradient(4, "jumps"), 0.1 * std),
            "negative-aware": (NegativeAware(statistics.mean(values), 6 * std, 20, STEPS // 20), 0.2 * std),
        }
        for label, (method, temperature) in methods.items():
            start = time.perf_counter()
            flow_map = tuned(base, reward, method, temperature)
            seconds = time.perf_counter() - start
            after = Unsteered("jumps", 4)(flow_map, reward, seeds=range(SAMPLES))
            assert after.rewards is not None
            with torch.no_grad():
                moved = monitor(flow_map, base, after.x0, None, torch.Generator().manual_seed(0))["divergence"]
            gain = (float(after.rewards.mean()) - statistics.mean(values)) / std
            spread = mean_pairwise_distance(after.x0.flatten(1)) / mean_pairwise_distance(before.x0.flatten(1))
            table.add_row(name, label, f"{gain:+.2f}", f"{float(moved):.1f}", f"{spread:.2f}", f"{seconds:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
