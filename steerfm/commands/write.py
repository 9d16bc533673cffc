"""`steerfm write`: tune a language model that writes prompts for a frozen flow map."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from steerfm.commands import common
from steerfm.config import Composed
from steerfm.data.prompts import read_prompts
from steerfm.metrics.paired import paired_change
from steerfm.prompt_writer import judged, prompt_writer
from steerfm.records import finite
from steerfm.report.wandb import begin
from steerfm.runs import Run
from steerfm.types import Samples, Values

TOLD = {"reward": "reward", "reward_std": "spread within a group", "kl": "KL", "completions/mean_length": "tokens"}


def run(arguments: argparse.Namespace) -> int:
    """Tune the writer that the recipe describes (each point of a sweep, in turn); return the exit code."""
    for recipe in common.each(arguments, "write"):
        common.say(f"Saved {tune(recipe)}")
    return 0


def tune(recipe: Composed) -> Path:
    """Tune a composed recipe's writer in its run folder and return the folder of what was saved.

    An unfinished run continues from its last checkpoint. samples.jsonl holds the pictures of what is written after,
    under the wishes; written.jsonl each wish with what was written and its mean reward, before and after.
    """
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)  # within TRL
    with common.running(recipe) as run:
        writer, painter, reward, options = (recipe.build(key) for key in ("writer", "painter", "reward", "options"))
        held_out = {key: judge for key, judge in (recipe.build("held_out") or {}).items() if judge is not None}
        prompts, wishes = (read_prompts(recipe.build(key)) for key in ("prompts", "wishes"))
        checkpoints = run.folder / "checkpoints"
        trainer = prompt_writer(writer, painter, reward, prompts, options, checkpoints)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(News())
        before = writer.write(wishes, options.max_completion_length)
        if options.report_to == "wandb" and trainer.is_world_process_zero():
            begin(run.folder, run.folder.name)
        try:
            with common.interruptible(run):
                trainer.train(resume_from_checkpoint=_last_whole(checkpoints))
        finally:
            _close(trainer)
        saved = run.folder / recipe.values["save_as"]
        if trainer.is_world_process_zero():
            writer.save(saved)
            after = writer.write(wishes, options.max_completion_length)
            first, last = (judged(painter, reward, wishes, texts, held_out) for texts in (before, after))
            run.finish(_keep(run, wishes, before, after, first, last))
    return saved


class News(TrainerCallback):
    """Print a line on the steps since the last one."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **other: Any) -> None:
        """Print what concerns the reward; the rest is in the checkpoints' trainer_state.json and in W&B."""
        said = [f"{name} {float(logs[key]):.4g}" for key, name in TOLD.items() if logs and key in logs]
        if said:
            common.say(f"step {state.global_step} of {state.max_steps}: {', '.join(said)}")


def _last_whole(checkpoints: Path) -> str | None:
    """Return the newest of TRL's checkpoints that was written to its end, or None; the state is written last."""
    whole = [path.parent for path in checkpoints.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _close(trainer: Any) -> None:
    """Let a W&B run end with its training, so that the next of a sweep does not write into it."""
    for callback in trainer.callback_handler.callbacks:
        wandb = getattr(callback, "_wandb", None)
        if wandb is not None:
            wandb.finish()


def _keep(
    run: Run, wishes: Sequence[str], before: Sequence[str], after: Sequence[str], first: Samples, last: Samples
) -> dict[str, float]:
    """Write what was written before and after, and the pictures after, into the run folder; return the figures."""
    old, new = _values(first, len(wishes)), _values(last, len(wishes))
    metrics: dict[str, float] = {}
    for name in new:
        change = paired_change(old[name], new[name])
        common.say(f"{name}: {old[name].mean():.4g} before, {change.mean:+.4g} ± {change.error:.2g} after")
        metrics |= {name: float(new[name].mean()), f"{name}_change": change.mean, f"{name}_change_error": change.error}
    rows = [
        {"wish": wish, "before": before[i], "after": after[i]}
        | {f"{name}_before": float(values[i]) for name, values in old.items()}
        | {f"{name}_after": float(values[i]) for name, values in new.items()}
        for i, wish in enumerate(wishes)
    ]
    run.write_text("written.jsonl", "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows))
    run.write_samples(last, held_out=last.held_out)
    return metrics


def _values(samples: Samples, wishes: int) -> dict[str, Values]:
    """Return reward and held-out rewards, each wish's the mean of its pictures, (wishes,)."""
    found = {"reward": samples.rewards, **{f"held_out.{name}": values for name, values in samples.held_out.items()}}
    return {
        name: values.unflatten(0, (wishes, -1)).mean(1).cpu() for name, values in found.items() if values is not None
    }
