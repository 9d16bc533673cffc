"""What a plan follows a recipe with: stand-ins for its trainer, for pretrained weights and for services."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from steerfm.backbones.pipeline_files import PipelineFiles
from steerfm.commands.shapes import Shapes
from steerfm.config import Composed
from steerfm.errors import RewardError
from steerfm.http_client import Client
from steerfm.logs import quiet

PRECISIONS = {"bf16": torch.bfloat16, "16": torch.float16}


@dataclass
class Course:
    """Hold what is found out on the way; `trainer` is the recipe's, of which only plain values are read."""

    recipe: Composed
    shapes: Shapes = field(default_factory=Shapes)
    notes: dict[str, None] = field(default_factory=dict)  # in order, each once

    @property
    def trainer(self) -> Mapping[str, Any]:
        return self.recipe.values.get("trainer") or {}

    @property
    def on_gpu(self) -> bool:
        kind = self.trainer.get("accelerator", "auto")
        return kind in ("gpu", "cuda") or (kind == "auto" and torch.cuda.is_available())

    @property
    def processes(self) -> int:
        devices = self.trainer.get("devices", 1)
        if devices in (-1, "-1", "auto"):
            devices = max(torch.cuda.device_count(), 1) if self.on_gpu else 1
        each = len(devices) if isinstance(devices, list) else int(devices)
        return each * int(self.trainer.get("num_nodes", 1) or 1)


def stand_in(course: Course) -> Any:
    """Return what modules and data ask of their trainer."""
    every = int(course.trainer.get("accumulate_grad_batches", 1) or 1)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=0))
    return SimpleNamespace(
        global_step=0, max_steps=1, accumulate_grad_batches=every, fit_loop=loop, callbacks=[], world_size=1,
        sanity_checking=False, should_stop=False, ckpt_path=None, loggers=[], logger=None, is_global_zero=True,
    )  # fmt: skip


def optimizer_of(module: Any, course: Course) -> Any:
    """Return the module's optimiser, which on a GPU works on all parameters at once, and needs memory for that."""
    configured = module.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    for group in optimizer.param_groups:
        if course.on_gpu and "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer


def share(batch: Any, processes: int) -> Any:
    """Return one process's rows of a batch of all of them."""
    rows = max((len(each) for each in batch.values() if isinstance(each, list | Tensor)), default=0)
    own = -(-rows // processes)
    cut = {
        name: each[:own] if isinstance(each, list | Tensor) and len(each) == rows else each
        for name, each in batch.items()
    }
    return batch if processes == 1 else cut


def in_precision(module: Any, course: Course) -> Any:
    """Return the module in Lightning's precision, where it converts weights."""
    bits, _, how = str(course.trainer.get("precision") or "32").partition("-")
    return module.to(PRECISIONS[bits]) if how == "true" and bits in PRECISIONS else module


def autocast(precision: Any) -> contextlib.AbstractContextManager[Any]:
    """Return the block in which Lightning's precision works, where it leaves weights as they are."""
    bits, _, how = str(precision or "32").partition("-")
    if how == "mixed" and bits in PRECISIONS:
        return torch.autocast("cpu", dtype=PRECISIONS[bits])
    return contextlib.nullcontext()


@contextlib.contextmanager
def no_weights() -> Iterator[None]:
    """Build the parts of a pretrained pipeline from their settings alone, inside the block."""
    read, PipelineFiles._model = PipelineFiles._model, _unfilled  # type: ignore[method-assign]
    try:
        yield
    finally:
        PipelineFiles._model = read  # type: ignore[method-assign]


def _unfilled(files: PipelineFiles, part: str, kind: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """Return a part of a pipeline without its weights; reading it is what `PipelineFiles` does."""
    with files._telling(part), torch.inference_mode(False), quiet(), _made_in(dtype):
        if kind.__module__.startswith("diffusers."):
            model = kind.from_config(files.config(part))
        else:
            model = kind(kind.config_class.from_pretrained(files.source, **options))
        return model.to(dtype).eval().requires_grad_(False)


@contextlib.contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Make weights in this type at once inside the block, as reading them does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def nobody_asked() -> Iterator[None]:
    """Let no reward that is scored elsewhere be asked for scores inside the block."""

    def refused(client: Client, path: str, content: bytes, media_type: str) -> Any:
        raise RewardError("it is scored elsewhere")

    post, Client.post = Client.post, refused  # type: ignore[method-assign]
    try:
        yield
    finally:
        Client.post = post  # type: ignore[method-assign]


def nothing(*arguments: Any, **more: Any) -> None:
    """Log nothing."""


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors that a structure of lists, tuples and dictionaries holds."""
    return [each for each in tree_leaves(value) if isinstance(each, Tensor)]
