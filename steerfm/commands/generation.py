"""Sample a flow map, steered or not, and keep what came out: what `sample` and `steer` share."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from steerfm import images
from steerfm.commands import common, loggers
from steerfm.commands.sample_parts import SampleParts
from steerfm.commands.submitting import carried_out
from steerfm.config import Composed
from steerfm.data import PromptSeeds
from steerfm.errors import ConfigError
from steerfm.modules import SteeredSampling
from steerfm.runs import Run, is_main_process
from steerfm.steering import Budget, Progress, Watch
from steerfm.types import Samples


def run(arguments: argparse.Namespace, command: str) -> int:
    """Sample as the recipe describes (each point of a sweep, in turn); return the exit code."""
    for folder in carried_out(generate, list(common.each(arguments, command))):
        common.say(f"Saved {folder}")
    return 0


def generate(recipe: Composed) -> Path:
    """Sample a composed recipe in its run folder and return the folder.

    Rewards given to a plain sampler only score; held-out rewards never steer. An interrupted run keeps the batches
    that it has and goes on with the others, on any number of processes.
    """
    with common.running(recipe) as run, loggers.opened(recipe, run) as logger:
        flow_map, method, reward = (recipe.build(part) for part in ("flow_map", "method", "reward"))
        held_out = [judge for judge in (recipe.build("held_out") or {}).values() if judge is not None]
        reference = recipe.build("reference")
        module = SteeredSampling(flow_map, method, reward, held_out, _watch(recipe, logger))
        parts = SampleParts(run.folder / "parts")
        with common.interruptible(run):
            count = _predict(recipe, run, module, parts)
        means = None
        if is_main_process():
            batches = parts.joined(count)
            _keep(run, batches, reference)
            parts.remove()
            means = _means(batches)
        run.finish(means)
    return run.folder


def _watch(recipe: Composed, logger: Any) -> Watch:
    """Return what the recipe says of budget and trace, of which it may have neither, and who is told of the steps."""
    traced = bool(recipe.values.get("trace"))
    told = [News()] if recipe.values["trainer"].get("enable_progress_bar", True) else []
    told += [loggers.Lines(logger)] if logger else []

    def tell(progress: Progress) -> None:
        for each in told:
            each(progress)

    return Watch(recipe.build("cost") or Budget(), tell if told else None, traced)


class News:
    """Print a line on the steps of a batch, at most one a second, from the main process only."""

    def __init__(self, pause: float = 1.0) -> None:
        self.pause = pause
        self.last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self.last >= self.pause and is_main_process():
            self.last = now
            Tqdm.write(told(progress), file=sys.stdout)


def told(progress: Progress) -> str:
    """Return a step's news in one line: mean reward, mean effective sample size, and what a sample has cost."""
    means = {name: float(values.double().mean()) for name, values in progress.values.items() if values.ndim == 1}
    said = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in means.items()]
    said.append(f"{progress.cost.network_calls:.4g} network calls a sample")
    return f"step {progress.done} of {progress.of}, t = {progress.t:.3g}: {', '.join(said)}"


def trace_sheet(look_aheads: Tensor, columns: int = 12) -> Tensor:
    """Return one picture of look-aheads (B, steps, C, H, W): a row a sample, time from left to right."""
    steps = look_aheads.shape[1]
    columns = min(columns, steps)
    chosen = torch.linspace(0, steps - 1, columns).round().long()
    return images.grid(look_aheads[:, chosen].flatten(0, 1), columns)


def _predict(recipe: Composed, run: Run, module: SteeredSampling, parts: SampleParts) -> int:
    """Write the samples of all pairs that are not there yet, each process its own; return the number of pairs."""
    data = recipe.build("data")
    if not isinstance(data, PromptSeeds):
        raise ConfigError(f"Samples are drawn for PromptSeeds, got {type(data).__name__}: derive it from that class.")
    data.done = parts.done
    callbacks = [*common.callbacks(recipe, len(data.predict_dataloader())), parts]
    trainer = common.trainer(recipe, run, callbacks=callbacks, logger=False, enable_checkpointing=False)
    trainer.predict(module, data, return_predictions=False)
    return len(data.pairs)


def _keep(run: Run, batches: Sequence[Samples], reference: Tensor | None) -> None:
    """Write samples, pictures and reference data into the run folder."""
    names = dict.fromkeys(name for batch in batches for name in batch.held_out)
    held_out = {name: torch.cat([batch.held_out[name] for batch in batches]) for name in names}
    run.write_samples(batches, held_out=held_out, reward_unclamped=_unclamped(batches))
    look_aheads = batches[0].trace.get("look_ahead")
    if look_aheads is not None and look_aheads.ndim == 5:
        run.write_bytes("trace.png", images.encode_png(trace_sheet(look_aheads), scale=4))
        common.say(f"Look-aheads from noise (left) to data (right): {run.folder / 'trace.png'}")
    if reference is not None:
        run.write_reference(reference)


def _unclamped(batches: Sequence[Samples]) -> Tensor | None:
    """Return the rewards before clamping, those after it where a batch had nothing to clamp, or None."""
    if all(batch.rewards_unclamped is None for batch in batches):
        return None
    values = [batch.rewards if batch.rewards_unclamped is None else batch.rewards_unclamped for batch in batches]
    return torch.cat([value for value in values if value is not None])


def _means(batches: Sequence[Samples]) -> dict[str, float]:
    """Return the mean reward and held-out rewards over all samples."""
    columns: dict[str, list[Tensor]] = {}
    for batch in batches:
        rewards = {} if batch.rewards is None else {"reward": batch.rewards}
        for name, values in {**rewards, **{f"held_out.{key}": value for key, value in batch.held_out.items()}}.items():
            columns.setdefault(name, []).append(values)
    return {name: float(torch.cat(values).mean()) for name, values in columns.items()}
