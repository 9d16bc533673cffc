"""What checkpoints cost: the time in which they are written, of the whole time of a run."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest

from steerfm.callbacks import Checkpoints
from steerfm.cli import main

log = logging.getLogger(__name__)

RUNS = {  # two checkpoints each
    "digits": ["train", "recipe=digits", "trainer.max_steps=400"],
    "digits_clip": ["train", "recipe=digits_clip", "trainer.max_steps=200"],
    "digits_finetune": [
        "finetune",
        "recipe=digits_finetune",
        "trainer.max_steps=50",
        "map=runs/digits",
        "clip=runs/digits_clip",
    ],
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_checkpoints_cost_less_than_three_percent(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each recipe's own checkpoint_every; digits in its first steps, which are its fastest."""
    spent: list[float] = []
    original = Checkpoints.save

    def save(self: Checkpoints, trainer: Any) -> Path:
        started = time.perf_counter()
        path = original(self, trainer)
        spent.append(time.perf_counter() - started)
        return path

    began: list[float] = []
    monkeypatch.setattr(Checkpoints, "save", save)
    monkeypatch.setattr(Checkpoints, "on_train_start", lambda self, *_: began.append(time.perf_counter()))
    for name, command in RUNS.items():
        spent.clear()
        assert main([*command, f"name={name}", "logger=none"]) == 0
        share = sum(spent) / (time.perf_counter() - began[-1])
        log.info("%s: %d checkpoints of %.0f ms, %.2f %% of the time", name, len(spent),
                 1000 * sum(spent) / len(spent), 100 * share)  # fmt: skip
        assert len(spent) == 2
        assert share < 0.03
