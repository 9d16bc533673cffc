"""Synthetic run folders for the tests of comparisons: real digit scans posing as samples of several methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from steerfm.runs import Run
from steerfm.types import Cost, Samples

PROMPT = "a handwritten seven"

# label -> (share of sevens, noise added, how much is blended with one seven, cost, config, command)
METHODS = {
    "base": (0.1, 0.12, 0.0, Cost(4, 1, 0, 0.002), {}, "sample"),
    "best of 16": (0.75, 0.12, 0.0, Cost(64, 16, 0, 0.03), {"method": {"n": 16}}, "steer"),
    "guidance, T = 0.1": (0.8, 0.25, 0.1, Cost(96, 32, 32, 0.06), {"method": {"temperature": 0.1}}, "steer"),
    "tilting, T = 0.1": (0.93, 0.15, 0.0, Cost(768, 512, 512, 0.4), {"method": {"temperature": 0.1}}, "steer"),
    "fine-tuned, T = 0.1": (0.92, 0.12, 0.15, Cost(4, 1, 0, 0.002), {"method": {"temperature": 0.1}}, "finetune"),
    "fine-tuned, T = 0.01": (0.97, 0.1, 0.85, Cost(4, 1, 0, 0.002), {"method": {"temperature": 0.01}}, "finetune"),
}


def scans() -> tuple[torch.Tensor, np.ndarray]:
    """Return the scans (1797, 1, 8, 8) in [-1, 1] and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8), np.asarray(labels)


def pose(label: str, count: int = 48, prompts: Sequence[str] = (PROMPT,), first_seed: int = 0) -> tuple[Samples, dict]:
    """Return samples as a method might draw them, `count` for each prompt, and held-out values."""
    share, noise, blend, cost, _, _ = METHODS[label]
    x, labels = scans()
    generator = np.random.default_rng(sum(map(ord, label)))
    total = count * len(prompts)
    sevens, others = np.flatnonzero(labels == 7), np.flatnonzero(labels != 7)
    is_seven = generator.random(total) < share
    index = np.where(is_seven, generator.choice(sevens, total), generator.choice(others, total))
    x0 = torch.lerp(x[index], x[sevens[:1]], blend) + noise * torch.from_numpy(generator.normal(size=(total, 1, 8, 8)))
    x0 = x0.float()
    hacked = 0.6 if "0.01" in label else 0.0
    reward = np.where(is_seven, 0.8, 0.2) + hacked + 0.1 * generator.normal(size=total)
    judge = np.clip(np.where(is_seven, 0.95, 0.04) - hacked / 2 + 0.05 * generator.normal(size=total), 0, 1)
    samples = Samples(
        x0=x0,
        images=((x0 + 1) / 2).clamp(0, 1),
        prompts=[prompt for prompt in prompts for _ in range(count)],
        seeds=[first_seed + i for _ in prompts for i in range(count)],
        cost=cost,
        rewards=torch.from_numpy(reward),
        parts={"clip": torch.from_numpy(reward)},
        note="temperature is nominal: guidance is biased" if "guidance" in label else "",
    )
    return samples, {"judge p(7)": torch.from_numpy(judge)}


def make_run(root: Path, label: str, *, name: str = "", reference: bool = True, **options) -> Run:
    """Make a finished run folder of a method and return it open for reading."""
    samples, held_out = pose(label, **options)
    name = name or "".join(c if c.isalnum() else "-" for c in label)
    config, command = METHODS[label][4:]
    run = Run.start(
        name,
        command=command,
        config={"recipe": "made", "label": label, **config},
        recipe="made",
        label=label,
        root=root,
    )
    with run:
        run.write_samples(samples, held_out=held_out)
        if reference:
            x, labels = scans()
            run.write_reference(x[labels == 7])
    return Run.open(run.folder)


def make_runs(root: Path, **options) -> list[Path]:
    """Make a run folder for every method and return the folders."""
    return [make_run(root, label, **options).folder for label in METHODS]


def points_run(root: Path, name: str, **fields) -> Path:
    """Make a finished run of two-dimensional points, which have no pictures and no reward."""
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(len(name)))
    defaults = {"x0": x, "images": x, "prompts": [""] * 64, "seeds": list(range(64)), "cost": Cost(4)}
    with Run.start(name, command="sample", config={"name": name}, recipe="points", root=root) as run:
        run.write_samples(Samples(**{**defaults, **fields}))
        run.write_reference(torch.randn(500, 2, generator=torch.Generator().manual_seed(9)))
    return run.folder
