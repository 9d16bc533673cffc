"""`steerfm env`: what this machine and this installation are, to be pasted into a question; with --plan, what a recipe
would hold in memory."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from steerfm.errors import ConfigError
from steerfm.report.wandb import resolve_mode

PACKAGES = (
    "steerfm", "torch", "torchvision", "lightning", "hydra-core", "omegaconf", "wandb", "open-clip-torch",
    "transformers", "torchmetrics", "scikit-learn", "numpy", "safetensors", "diffusers", "peft", "trl", "datasets",
    "wandb-workspaces",
)  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Print versions, devices, cores, memory and W&B's mode; or the plan of a recipe."""
    if arguments.plan:
        return _plan(arguments)
    if arguments.overrides:
        raise ConfigError(f"'{arguments.overrides[0]}' is a value of a recipe: steerfm env --plan recipe=NAME.")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in facts():
        table.add_row(name, value)
    Console(highlight=False).print(table)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    """Print what a recipe would hold in memory at most; nothing is downloaded."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read by the hub's client as it is imported
    from steerfm import config
    from steerfm.commands.plan import plan
    from steerfm.commands.plan_page import show

    overrides = arguments.overrides
    command = config.preview(overrides, folders=arguments.recipes).get("command")
    recipe = config.compose(str(command), overrides, folders=arguments.recipes, trusted=arguments.trust)
    show(recipe, plan(recipe), Console(highlight=False))
    return 0


def facts() -> Iterator[tuple[str, str]]:
    """Yield (what, value) for everything that decides whether and how fast a run works."""
    yield "python", f"{platform.python_version()} ({platform.platform()})"
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    yield "cores", f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}"
    memory = machine_memory()
    yield "memory", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB"
    yield from _devices()
    yield "W&B", resolve_mode()


def machine_memory() -> int | None:
    """Return the machine's memory in bytes, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    yield "threads", str(torch.get_num_threads())
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}", f"{device.name}, {device.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        yield "cuda", "none: everything runs on the CPU"
    if torch.backends.mps.is_available():
        yield "mps", "available"
