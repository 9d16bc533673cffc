"""What a plan says: what is held at the peak, whether it fits where it is to run, and what to lower first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from steerfm.commands.env import machine_memory
from steerfm.commands.plan_counts import FROZEN, GRADIENTS, STATE, TRAINED
from steerfm.commands.plan_course import Course
from steerfm.commands.shapes import Peak
from steerfm.config import Composed
from steerfm.flow_map import declared

GIB, MIB = 2**30, 2**20
RESERVE = 0.1  # of a GPU's memory, for the CUDA context, libraries' workspaces and gaps between blocks
CARDS = (24, 48, 80)  # GiB of usual GPUs, where there is none to ask


@dataclass(frozen=True)
class Plan:
    """What a recipe holds at most: `peak`, by kind, and the most in each phase, in bytes on each device.

    what: was followed. processes: among which the batch is divided. notes: what was counted as nothing, or as more.
    remedies: what to lower first.
    """

    what: str
    peak: Peak
    phases: dict[str, int]
    processes: int = 1
    notes: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()


def remedies(course: Course, module: Any, peak: Peak) -> Iterator[str]:
    """Yield what would lower the peak, what saves most for least first."""
    values, kinds = course.recipe.values, peak.kinds
    method = getattr(module, "method", None)
    key = "module." if hasattr(module, "_held_out") and "module" in values else "method."
    worked = kinds.get("activations", 0) > 0.3 * peak.size
    if worked and getattr(module if key == "module." else method, "micro_batch", 0) is None:
        yield f"{key}micro_batch=1 (pictures decoded and scored at once)"
    if worked and getattr(method, "checkpointing", None) is False:
        yield "method.checkpointing=true (keeps the states between jumps alone)"
    inner = declared(getattr(module, "flow_map", None) or nn.Identity(), "model")
    if worked and getattr(inner, "is_gradient_checkpointing", None) is False and peak.phase in ("backward", "forward"):
        yield "checkpointing: true of the pretrained map (keeps the inputs of its blocks alone)"
    jumps = getattr(method, "jumps", None)
    if worked and isinstance(jumps, int) and jumps > 1 and peak.phase in ("backward", "network"):
        yield "fewer method.jumps, or method.last=1"
    trained = sum(kinds.get(kind, 0) for kind in (TRAINED, GRADIENTS, STATE, "moving average", "reference"))
    if trained > 0.4 * peak.size and kinds.get(FROZEN, 0) < kinds.get(TRAINED, 0):
        yield "adapter=lora (trains low-rank additions, and holds base and reference once)"
    if kinds.get("text encoders", 0) > 0.1 * peak.size:
        yield "text_device: cpu of the pretrained map, or its conditioner's release() once the prompts are read"
    yield "a smaller batch (data)"


def show(recipe: Composed, made: Plan, console: Console) -> None:
    """Print a plan, and whether it fits where it is to run."""
    table = Table("held at the peak", "", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for kind, size in sorted(made.peak.kinds.items(), key=lambda item: -item[1]):
        if size > 0:
            table.add_row(kind, written(size))
    table.add_row("peak", f"{written(made.peak.size)}, in phase '{made.peak.phase}'", style="bold")
    console.print(f"{recipe.recipe}: {made.what}, on each of {made.processes} device(s)")
    console.print(table)
    phases = ", ".join(f"{name} {written(size)}" for name, size in made.phases.items() if name != "start")
    console.print(f"most in each phase: {phases}")
    for note in made.notes:
        console.print(note)
    console.print(fit(made, Course(recipe).on_gpu))
    console.print(
        "Bytes of tensors, by shape. On a GPU add 0.3 to 0.6 GiB for the CUDA context and up to a tenth for gaps and "
        "workspaces; attention is counted as flash kernels hold it."
    )


def fit(made: Plan, on_gpu: bool) -> str:
    """Return one sentence: whether the peak fits the device, and what to lower first where it does not."""
    need, lower = made.peak.size, f" Lower first: {'; then '.join(made.remedies)}."
    if not on_gpu:
        have, name = machine_memory(), "this machine's memory"
    elif torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        have, name = int(device.total_memory * (1 - RESERVE)), f"{device.name}, nine tenths of its memory"
    else:
        fits = [f"{card} GiB" for card in CARDS if need <= card * GIB * (1 - RESERVE)]
        return f"There is no GPU here to compare with; it fits one of {fits[0]}." if fits else (
            f"There is no GPU here to compare with; it fits none of {CARDS[-1]} GiB.{lower}"
        )  # fmt: skip
    if have is None:
        return "What this machine has could not be found out."
    return f"It fits: {written(have)} is {name}." if need <= have else (
        f"It does not fit: {written(have)} is {name}.{lower}"
    )  # fmt: skip


def written(size: float) -> str:
    """Return a number of bytes as it is read."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"
