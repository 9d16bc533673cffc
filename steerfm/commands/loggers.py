"""The logger of a run, W&B, TensorBoard or CSV: opened in its folder, told what the run gave, and closed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

from steerfm.callbacks.live_table import MOST_PICTURES, picture, table
from steerfm.config import Composed
from steerfm.errors import missing_package
from steerfm.report.artifacts import RECORD, Record, folder_artifact, model_artifact, origins, read_record
from steerfm.report.pictures import read_picture
from steerfm.report.sources import COSTS
from steerfm.report.wandb_run import WandbRun, resolve_mode, run_id
from steerfm.runs import Run, is_main_process
from steerfm.steering import Progress

log = logging.getLogger(__name__)

# What a W&B logger's recipe may say that is not wandb.init's: ours, what the run decides, and Lightning's own.
NOT_WANDBS = (
    "_target_",
    "mode",
    "artifacts",
    "seconds_to_send",
    "id",
    "resume",
    "config",
    "dir",
    "save_dir",
    "version",
)
NOT_WANDBS += ("offline", "anonymous", "log_model", "experiment", "prefix", "checkpoint_name", "add_file_policy")


@contextlib.contextmanager
def opened(recipe: Composed, run: Run) -> Iterator[Any]:
    """Yield the recipe's Lightning logger, False where it has none; it ends with the block.

    Where the block ends well the logger is told what the run folder then holds. A W&B run keeps its id when the run is
    resumed, and is offline unless WANDB_API_KEY is set or mode is "online"; W&B never stops a run.
    """
    built = build(recipe, run)
    try:
        yield built
    except BaseException:
        close(built, 1)
        raise
    if built and is_main_process():
        _tell(built, run, recipe)
        close(built)


def build(recipe: Composed, run: Run) -> Any:
    """Return the recipe's logger, writing into the run folder; raises SteerfmError where its package is missing."""
    node = recipe.values.get("logger")
    if node is None:
        return False
    if node["_target_"].endswith("WandbLogger"):
        page = _page(recipe, run, node) if is_main_process() else None
        return recipe.build("logger", name=run.info.label, save_dir=str(run.folder), experiment=page)
    logs = run.folder / "logs"
    if node["_target_"].endswith("TensorBoardLogger"):
        if not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
            raise missing_package("tensorboard", "tensorboard", "logger=tensorboard")
        return recipe.build("logger", save_dir=str(logs), name="", version="tensorboard")  # a resumed run goes on there
    return recipe.build("logger", save_dir=str(logs), name="", version=len(list(logs.glob("*"))))


def close(built: Any, exit_code: int = 0) -> None:
    """Let a W&B run end with its stage, so that the next one in this process does not write into it."""
    page = _page_of(built)
    if page is not None:
        page.finish(exit_code)


class Lines:
    """Log a steering method's news against network calls a sample: of the first batch, a row a step.

    All runs use the same names, so that one panel shows a line per method.
    """

    def __init__(self, built: Any) -> None:
        self.built = built
        self.batches = 0
        if _page_of(built) is not None:
            built.experiment.define_metric("steering/*", step_metric="steering/network_calls")

    def __call__(self, progress: Progress) -> None:
        self.batches += progress.done == 1
        if self.batches == 1 and is_main_process():
            means = {name: float(value.double().mean()) for name, value in progress.values.items() if value.ndim == 1}
            row = {"network_calls": progress.cost.network_calls, "t": progress.t, **means}
            self.built.log_metrics({f"steering/{name}": value for name, value in row.items()}, step=progress.done)


def _page(recipe: Composed, run: Run, node: dict[str, Any]) -> WandbRun:
    """Begin the W&B run of a run, and keep in the run folder where it is."""
    given: dict[str, Any] = {"name": run.info.label, "job_type": run.info.command}
    given |= {key: value for key, value in node.items() if key not in NOT_WANDBS}
    asked = "offline" if node.get("offline") else node.get("mode", "auto")
    mode = resolve_mode(None if asked == "auto" else asked)
    page = WandbRun(
        run.folder,
        mode,
        seconds_to_send=node.get("seconds_to_send"),
        quiet=True,
        id=run_id(run.folder, run.info.started),
        resume="allow",
        config=recipe.values,
        **given,
    )
    page.define_metric("trainer/global_step")
    page.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    if page.url:
        log.info("W&B: %s", page.url)
    elif page.kept is not None:
        log.info("W&B is offline; to send the run later: wandb sync %s", page.kept)
    if page.mode != "disabled":
        run.write_json(RECORD, dataclasses.asdict(_record(recipe, run, page, node)))
    return page


def _record(recipe: Composed, run: Run, page: WandbRun, node: dict[str, Any]) -> Record:
    inputs = origins(run.info.inputs, recipe.values["folder"])
    return Record(
        id=page.id,
        project=page.project,
        entity=page.entity,
        url=page.url,
        name=run.info.name,
        artifacts=bool(node.get("artifacts", True)),
        model=str(recipe.values.get("save_as") or ""),
        inputs={path: record.path for path, (_, record) in inputs.items()},
    )


def _tell(built: Any, run: Run, recipe: Composed) -> None:
    """Tell a logger what a finished run gave: figures and samples of those that sample, models and files in W&B."""
    page = _page_of(built)
    if (run.folder / "samples.jsonl").is_file():
        _tell_samples(built, run, page)
    if page is not None:
        _tell_artifacts(page, run, recipe)


def _tell_samples(built: Any, run: Run, page: WandbRun | None) -> None:
    """Log the mean reward, held-out rewards and costs, and in W&B the first samples as a table "samples"."""
    samples = run.read_samples()
    costs = {cost: [row["cost"].get(cost) for row in samples.rows] for cost in COSTS}
    figures = {name.replace("held_out.", "held_out/"): value for name, value in run.read_metrics().items()}
    figures |= {f"cost/{cost}": sum(each) / len(each) for cost, each in costs.items() if None not in each}
    built.log_metrics({name: value for name, value in figures.items() if value is not None}, step=0)
    built.finalize("success")
    names = dict.fromkeys(name for row in samples.rows for name in row["held_out"])
    shown = []
    for i, row in enumerate(samples.rows[:MOST_PICTURES]):
        pixels = read_picture(samples.picture(i))
        if pixels is not None:
            values = {f"held_out.{name}": row["held_out"].get(name) for name in names}
            known = {"step": 0, "prompt": row["prompt"], "seed": row["seed"]}
            shown.append({**known, "picture": pixels, "reward": row["reward"], **values})
    if page is not None and shown:
        page.log({"samples": table([{**row, "picture": picture(row["picture"])} for row in shown])})


def _tell_artifacts(page: WandbRun, run: Run, recipe: Composed) -> None:
    """Log the model that was saved and the files that comparisons read; name the models that it was made from."""
    record = read_record(run.folder)
    if record is None or not record.artifacts:
        return
    for folder, made in origins(run.info.inputs, recipe.values["folder"]).values():
        used = model_artifact(folder, made)
        if used is not None:
            page.use_artifact(used)
    for artifact in (model_artifact(run.folder, record), folder_artifact(run.folder, record)):
        if artifact is not None:
            page.log_artifact(artifact)


def _page_of(built: Any) -> WandbRun | None:
    """Return the W&B run behind a logger, None where there is none."""
    page = getattr(built, "_experiment", None)
    return page if isinstance(page, WandbRun) else None
