"""Direct fine-tuning of a flow map in two jumps on the task of a folder; against_alignprop.py starts it.

    python benchmarks/parity/alignprop/ours.py FOLDER

FOLDER holds task.json, which names a map and a CLIP. What theirs.py writes is written beside it: STEP.safetensors,
pictures of the held-out prompts after so many steps with their rewards, and figures.json, the seconds of each step, or
what one holds in memory.
"""

from __future__ import annotations

import logging
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from safetensors.torch import save_file
from sides import begin, finish, resident
from torch.optim import AdamW

from steerfm import DirectBackprop, FlowMap, RewardFineTuning, Unsteered
from steerfm.data import Prompts
from steerfm.reward_check import peak_memory
from steerfm.rewards.clip import CLIPScore


class Remembering(RewardFineTuning):
    """Note what a step holds in memory at most, in bytes: of the process in the first, of tensors in the second."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.figures: dict[str, Any] = {}

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        step = partial(super().optimizer_step, *args, **options)
        if self.global_step == 0:
            before = resident()
            step()
            self.figures["resident"] = resident() - before
        elif self.global_step == 1:
            self.figures["tensors"] = peak_memory(step, self.device)
        else:
            step()


class Marks(Callback):
    """Time each step, and show what comes out at the marks and at the end, which is when the time is up."""

    def __init__(self, task: dict[str, Any], folder: Path) -> None:
        self.task, self.folder = task, folder
        self.seconds: list[float] = []
        self.start = 0.0

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self._show(module, 0)

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self.seconds.append(time.process_time() - self.start)
        over = sum(self.seconds) >= self.task["seconds"]
        if over or trainer.global_step in self.task["marks"]:
            self._show(module, trainer.global_step)
        trainer.should_stop = over
        self.start = time.process_time()

    @torch.no_grad()
    def _show(self, module: Any, step: int) -> None:
        """Write pictures of the held-out prompts, from the same noise each time, and their rewards."""
        self.start = time.process_time()
        if self.task["memory"]:
            return
        prompts = self.task["held_out"]
        module.flow_map.eval()
        found = Unsteered("jumps", self.task["jumps"])(module.flow_map, module.reward, prompts=prompts)
        module.flow_map.train()
        save_file({"images": found.images, "rewards": found.rewards}, self.folder / f"{step}.safetensors")
        self.start = time.process_time()


def new_module(task: dict[str, Any]) -> RewardFineTuning:
    """Return the fine-tuning of all weights by the task's jumps, with the optimiser that TRL's defaults make."""
    method = DirectBackprop(task["jumps"], penalty="sample", checkpointing=task["checkpointing"])
    kind = Remembering if task["memory"] else RewardFineTuning
    return kind(
        FlowMap.load(task["map"]),
        CLIPScore(task["clip"], prompt=task["wish"]),
        method,
        temperature=task["temperature"],
        optimizer=partial(AdamW, lr=task["rate"], weight_decay=1e-4),
        monitor_every=10**9,
    )


def main() -> None:
    """Do the task."""
    folder, task = begin()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    module = new_module(task)
    marks = Marks(task, folder)
    trainer = Trainer(
        max_steps=task["steps"],
        accelerator="cpu",
        gradient_clip_val=1.0,
        callbacks=[marks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Prompts(task["trained"], task["batch"]))
    figures: dict[str, Any] = {"seconds": marks.seconds}
    if isinstance(module, Remembering):
        figures = module.figures | {"seconds": marks.seconds[2:]}
    finish(folder, figures, ("diffusers", "transformers", "torch"))


if __name__ == "__main__":
    main()
