"""What the commands that run recipes share: composing, opening the run folder, progress bars."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from rich.console import Console
from rich.logging import RichHandler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from steerfm import config
from steerfm.config import Composed
from steerfm.errors import ConfigError, DataError, RewardError, SteerfmError, causes
from steerfm.memory import first_sentence, out_of_memory, what_was_asked
from steerfm.reward import Reward
from steerfm.runs import Run, choose_name, is_main_process

console = Console(highlight=False)

NO_CONCERN = (
    ".*Checkpoint directory .* exists and is not empty",  # it does when a run continues
    ".*isinstance.treespec, LeafSpec",
    ".*Your `IterableDataset` has `__len__` defined",  # each process yields its own rows
    ".*torch.jit.script. is deprecated",
    ".*does not have many workers",  # batches are made in microseconds
    ".*You passed in a `val_dataloader` but have no `validation_step`",
    ".*is smaller than the logging interval",
    ".*your dataloader is not resumable",  # it is: a batch is a function of the step
    r".*module\(s\) in eval mode at the start of training",  # frozen ones, which stay so
    ".*Total length of `list` across ranks is zero",  # a recipe without validation
)

UNSET = object()
# What makes a run need less memory, the first with the same result.
LESS_MEMORY = (
    "module.micro_batch", "method.micro_batch", "data.batch_size", "data.prompts_per_step", "data.samples_per_prompt",
    "method.particles", "method.n", "method.count", "method.jumps", "method.steps", "callbacks.guard.batch_size",
)  # fmt: skip


def composed(arguments: argparse.Namespace, command: str) -> list[Composed]:
    """Compose every recipe that the arguments ask for (one, or each point of a sweep), before any is run.

    The runs of a sweep lie in one folder.
    """
    if not arguments.multirun:
        return [config.compose(command, arguments.overrides, folders=arguments.recipes, trusted=arguments.trust)]
    points = config.sweep(arguments.overrides)
    recipes = [
        config.compose(command, lines, folders=arguments.recipes, trusted=arguments.trust) for lines, _ in points
    ]
    first = recipes[0]
    stem = choose_name(first.recipe, str(first.values["name"] or ""), first.values["folder"])
    return [
        recipe.named(f"{stem}/{suffix}" if suffix else stem)
        for recipe, (_, suffix) in zip(recipes, points, strict=True)
    ]


def start(recipe: Composed) -> Run:
    """Open the run folder of a recipe, and say where it is; the run is resumed if it is unfinished."""
    values = recipe.values
    run = Run.start(
        choose_name(recipe.recipe, str(values["name"] or ""), values["folder"]),
        command=values["command"],
        config=values,
        recipe=recipe.recipe,
        label=str(values["label"] or ""),
        inputs=inputs(recipe),
        root=values["folder"],
    )
    say(f"{'Continuing' if run.resumed else 'Running'} {run.folder}")
    return run


def say(text: str) -> None:
    """Print a line, from the main process only."""
    if is_main_process():
        console.print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def running(recipe: Composed) -> Iterator[Run]:
    """Open the run folder of a recipe and use as many CPU threads as it says, inside the block."""
    wanted, before = recipe.values["threads"], torch.get_num_threads()
    if wanted is not None and wanted < 1:
        raise ConfigError(f"threads is a number of at least 1, or null for PyTorch's own choice, got {wanted}.")
    with start(recipe) as run:
        torch.set_num_threads(wanted or before)
        try:
            yield run
        except Exception as error:
            told = in_one_sentence(error, recipe.values)
            if told is None:
                raise
            raise told from error
        finally:
            torch.set_num_threads(before)


def in_one_sentence(error: Exception, values: dict[str, Any]) -> SteerfmError | None:
    """Return what an error of somebody else's means for a run, where that is known: memory, data workers, rewards."""
    kept = "what was saved before is untouched"
    if out_of_memory(error):
        known = [(key, _find(values, key)) for key in LESS_MEMORY]
        lower = ", ".join(f"{key}={json.dumps(value)}" for key, value in known if value is not UNSET)
        return SteerfmError(
            f"Out of memory ({what_was_asked(error)}): lower {lower or 'the size of the batches'} (null is all at "
            f"once), and give the run another name; {kept}."
        )
    death = _death_of_a_reader(error)
    if death is not None:
        return DataError(
            f"A process that reads data has died ({first_sentence(death)}), often for want of memory: give the data "
            f"fewer workers, or run the same command again; {kept}."
        )
    name = _reward_that_raised(error)
    if name and not isinstance(error, SteerfmError | ImportError):
        place = traceback.extract_tb(error.__traceback__)[-1]
        return RewardError(
            f"'{name}' raised {type(error).__name__} ({first_sentence(error)}) in {place.filename}, line "
            f"{place.lineno}: mend it, and run the same command again; {kept}."
        )
    return None


def _death_of_a_reader(error: Exception) -> BaseException | None:
    """Return what in an error says that a data worker has died: PyTorch's word for it, or a connection cut before.

    PyTorch says it from a signal handler, whatever the run is at just then, so that other errors may come of it.
    Tensors come through a connection of their own. A worker that dies while one is fetched breaks that connection,
    and PyTorch passes the break on where the system has not yet reported the death.
    """
    for each in causes(error):
        if isinstance(each, RuntimeError) and str(each).startswith("DataLoader worker"):
            return each
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    cut = isinstance(error, OSError | EOFError) and _MultiProcessingDataLoaderIter._try_get_data.__code__ in codes
    return error if cut else None


def _reward_that_raised(error: Exception) -> str:
    """Return the name of the innermost reward that was being asked when an error was raised, "" if there was none."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    asked = [frame.f_locals["self"] for frame in frames if frame.f_code is Reward.evaluate.__code__]
    return asked[-1].name if asked else ""


def _find(values: Any, key: str) -> Any:
    """Return the value at a dotted key of nested dictionaries, UNSET if there is none."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return UNSET
        values = values[part]
    return values


def inputs(recipe: Composed) -> list[str]:
    """Return the runs, files and folders that a recipe reads."""
    given = recipe.values["inputs"]
    return [str(path) for path in (given.values() if isinstance(given, dict) else given)]


class ProgressBar(TQDMProgressBar):
    """Show one bar of steps with the losses, redrawn fifty times in all, ten where nobody watches a terminal."""

    def __init__(self, steps: int) -> None:
        super().__init__(refresh_rate=max(1, steps // (50 if console.is_terminal else 10)))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Leave out the logger's version number."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def init_validation_tqdm(self) -> Any:
        """Draw no bar of its own for validation, which is one batch."""
        return Tqdm(disable=True)


def trainer(recipe: Composed, run: Run, **extra: Any) -> Any:
    """Build the recipe's Trainer for a run folder; `extra` are its callbacks and its logger."""
    return recipe.build("trainer", default_root_dir=str(run.folder), **extra)


def callbacks(recipe: Composed, steps: int) -> list[Any]:
    """Build the recipe's callbacks, in its order, without those set to null; with a progress bar unless it is off."""
    built = [callback for callback in (recipe.build("callbacks") or {}).values() if callback is not None]
    shown = recipe.values["trainer"].get("enable_progress_bar", True)
    return [*built, ProgressBar(steps)] if shown else built


@contextlib.contextmanager
def interruptible(run: Run) -> Iterator[None]:
    """Turn Lightning's quiet exit on Ctrl-C (or a scheduler's SIGTERM) into KeyboardInterrupt, inside the block.

    Its text is what to type to continue. Lightning switches Ctrl-C off while it shuts down; that is undone.
    """
    on_interrupt = signal.getsignal(signal.SIGINT)
    again = f"steerfm {run.info.command} recipe={run.info.recipe} name={run.info.name} (and the same values)"
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        raise KeyboardInterrupt(again) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)


def show_log() -> None:
    """Send steerfm's log to the terminal, on the main process only, without tips that do not concern its users."""
    for message in NO_CONCERN:
        warnings.filterwarnings("ignore", message=message)
    library = logging.getLogger("steerfm")
    if not library.handlers:
        library.addHandler(RichHandler(console=Console(stderr=True), show_time=False, show_path=False))
    library.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)


def each(arguments: argparse.Namespace, command: str) -> Iterator[Composed]:
    """Yield each composed recipe with the log turned on."""
    recipes = composed(arguments, command)
    show_log()
    yield from recipes
