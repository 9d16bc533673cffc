"""A comparison's W&B Report: kept in its run folder as report.json, and published from there, at once or later."""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from steerfm.errors import RunError, missing_package
from steerfm.files import read_json, write_atomic
from steerfm.report.wandb_run import bounded, first_line, has_key

log = logging.getLogger(__name__)

REPORT = "report.json"
SECONDS_TO_SAVE = 60.0  # the Report itself
SECONDS_TO_SEND = 300.0  # an offline run
WIDTH, HALF, HEIGHT = 24, 12, 12  # of panels, in W&B's units


def keep(folder: Path, plan: dict[str, Any]) -> None:
    """Write a Report's plan, see `steerfm.report.plan`, into a comparison's run folder."""
    write_atomic(folder / REPORT, (json.dumps(plan, indent=2, ensure_ascii=False) + "\n").encode())


def publish(folder: Path, *, project: str = "", entity: str = "") -> str:
    """Save the Report kept in a comparison's run folder in W&B and return its address.

    The comparison's W&B run is sent first where it is offline still. A Report published before is replaced. project and
    entity: those of the run, and the key's, by default. Raises RunError, in one sentence, where nothing is kept, there
    is no key, or W&B cannot be reached or refuses; SteerfmError where the extra `report` is not installed.
    """
    if not (folder / REPORT).is_file():
        raise RunError(f"{folder} holds no W&B Report: compare its runs with report=wandb, which keeps one.")
    plan, workspaces = read_json(folder / REPORT), _workspaces()
    if not has_key():
        raise RunError("W&B needs a key to publish a Report: set WANDB_API_KEY.")
    place = {"project": project or plan["project"], "entity": entity or plan["entity"] or _default_entity()}
    _send_offline(folder, **place)

    def save() -> Any:
        own = {"title": plan["title"], "description": plan["description"], "width": "fluid"}
        made = workspaces.Report(blocks=blocks(plan, **place), **own, **place)
        made.id = plan.get("report", "") if plan.get("published") == place else ""
        return made.save()

    try:
        saved = bounded(SECONDS_TO_SAVE, save)
    except Exception as error:
        raise _refused(error, folder) from error
    keep(folder, {**plan, "published": place, "report": saved.id, "url": saved.url})
    return saved.url


def blocks(plan: dict[str, Any], project: str, entity: str) -> list[Any]:
    """Return a plan's blocks as those of wandb-workspaces."""
    wr = _workspaces()
    made: list[Any] = []
    for block in plan["blocks"]:
        if block["kind"] == "heading":
            made.append(wr.H2(block["text"]))
        elif block["kind"] == "text":
            made.append(wr.MarkdownBlock(block["text"]))
        else:
            sets = [_run_set(each, project, entity) for each in block["runs"]]
            panels = [_panel(each, i, len(block["panels"])) for i, each in enumerate(block["panels"])]
            made.append(wr.PanelGrid(runsets=sets, panels=panels))
    return made


def _run_set(given: dict[str, Any], project: str, entity: str) -> Any:
    """Return a run set; runs that were offline are looked for where the Report is."""
    quoted = ", ".join(f"'{each}'" for each in given["ids"])
    known = bool(given["entity"])
    return _workspaces().Runset(
        name=given["name"],
        project=given["project"] if known else project,
        entity=given["entity"] if known else entity,
        filters=f"ID in [{quoted}]",
    )


def _panel(given: dict[str, Any], place: int, count: int) -> Any:
    """Return a panel; two stand side by side, tables and what is alone take the whole width."""
    wr = _workspaces()
    kind = given["kind"]
    wide = count == 1 or kind in ("table", "media")
    layout = wr.Layout(x=0 if wide or place % 2 else HALF, y=place * HEIGHT, w=WIDTH if wide else HALF, h=HEIGHT)
    if kind == "table":
        return wr.WeavePanelSummaryTable(table_name=given["key"], layout=layout)
    if kind == "media":
        return wr.MediaBrowser(media_keys=given["keys"], num_columns=len(given["keys"]), layout=layout)
    if kind == "lines":
        return wr.LinePlot(title=given["title"], x=given["x"], y=given["keys"], layout=layout)
    if kind == "runs":
        x, y = wr.SummaryMetric(given["x"]), wr.SummaryMetric(given["y"])
        return wr.ScatterPlot(title=f"{given['y']}, the runs", x=x, y=y, layout=layout)
    return wr.CustomChart(
        query={"summaryTable": {"tableKey": given["table"]}},
        chart_name="wandb/scatter/v0",
        chart_fields={"x": given["x"], "y": given["y"]},
        chart_strings={"title": given["title"]},
        layout=layout,
    )


def _workspaces() -> Any:
    """Return wandb-workspaces' module of Reports."""
    try:
        import wandb_workspaces.reports.v2 as reports
    except ImportError as error:
        raise missing_package("wandb-workspaces", "report", "A W&B Report") from error
    return reports


def _default_entity() -> str:
    """Return who the key belongs to."""
    import wandb

    try:
        return str(bounded(SECONDS_TO_SAVE, lambda: wandb.Api().default_entity) or "")
    except Exception as error:
        raise _refused(error, None) from error


def _send_offline(folder: Path, project: str, entity: str) -> None:
    """Send the comparison's offline runs that have not been sent yet."""
    for kept in sorted((folder / "wandb").glob("offline-run-*")):
        if any(kept.glob("*.synced")):
            continue
        asked = [sys.executable, "-m", "wandb", "sync", "--project", project, "--entity", entity, str(kept.resolve())]
        try:
            done = subprocess.run(
                asked, capture_output=True, text=True, timeout=SECONDS_TO_SEND, check=False, cwd=folder
            )
        except subprocess.TimeoutExpired as error:
            raise _refused(error, folder) from error
        if done.returncode or not any(kept.glob("*.synced")):
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            raise _refused(RuntimeError(said[-1] if said else "wandb sync failed"), folder)


def _refused(error: Exception, folder: Path | None) -> RunError:
    """Return the one sentence for a W&B that could not be reached or said no."""
    again = (
        f" To try again: steerfm report publish {shlex.quote(str(folder))}"
        if folder
        else " Look at WANDB_BASE_URL and the key."
    )
    return RunError(f"W&B did not take the Report ({first_line(error)}).{again}")
