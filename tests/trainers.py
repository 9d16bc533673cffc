"""Small maps and trainers on the CPU, shared by the tests that run Lightning."""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer

from steerfm import MLP, FlowMap, digits
from steerfm.conditions import Labels
from steerfm.networks.mlp import randomise

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
for _text in (
    ".*does not have many workers.*",
    ".*isn't a directory|exists and is not empty.*",
    ".*`IterableDataset`.*",
):
    warnings.filterwarnings("ignore", _text)


def trainer(folder: Path, steps: int, *callbacks: Callback, **more: Any) -> Trainer:
    """Return a quiet trainer on one CPU process, for so many steps."""
    arguments = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "deterministic": True,
        "num_sanity_val_steps": 0,
    }
    return Trainer(max_steps=steps, callbacks=list(callbacks), **(arguments | more))


def point_map(seed: int = 0) -> FlowMap:
    """Return a small random map of points in the plane."""
    network = MLP((2,), width=16, depth=1, frequencies=4)
    randomise(network, seed=seed)
    return FlowMap(network)


def digit_map(classes: bool = True, seed: int = 0) -> FlowMap:
    """Return a small random map of 8x8 digits, told their class by its caption."""
    network = MLP((1, 8, 8), width=16, depth=1, frequencies=4, num_classes=10 if classes else 0)
    randomise(network, seed=seed)
    return FlowMap(network, conditioner=Labels(digits.CAPTIONS) if classes else None)


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies that stay as they are while training goes on."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Return whether two state dicts hold the same names and the same bits."""
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
