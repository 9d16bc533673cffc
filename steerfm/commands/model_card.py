"""What must be known of an exported model, as the README.md of its folder."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from steerfm.backbones.diffusers import equal_sigmas
from steerfm.backbones.export_check import parts_left_out
from steerfm.backbones.lora import LoRANetwork
from steerfm.backbones.pipeline_files import PipelineFiles
from steerfm.flow_map import FlowMap, declared
from steerfm.runs import Run

FIGURES = ("reward", "held_out", "monitor")  # of metrics.json, by their first word


def model_card(
    source: str | Path, files: PipelineFiles, flow_map: FlowMap, gap: float, jumps: int | None = None
) -> str:
    """Return the card: what it began as, how it was tuned and toward what, what it reached, how it is loaded.

    source: the map, or the run that saved it, whose recipe and figures then stand in the card. gap: the largest
    difference of a pixel from plain diffusers. jumps: that it was bound to, if any.
    """
    run = _run_of(Path(source))
    head: dict[str, Any] = {"library_name": "diffusers", "base_model": files.source, "tags": ["steerfm", "flow map"]}
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", f"# {_title(files, flow_map, jumps)}", ""]
    lines += [f"Tuned by steerfm {version('steerfm')} from `{files.source}`{_revision(files)}.", ""]
    if run is not None:
        lines += ["## How it was tuned", "", *_recipe(run.config), "", "## What it reached", "", *_figures(run), ""]
    lines += ["## How it is loaded", "", "```python", *_loading(files, flow_map, jumps), "```", ""]
    lines += [f"Plain diffusers painted the same pictures from these files, within {gap:.1e} of a pixel in [0, 1].", ""]
    return "\n".join(lines)


def _run_of(source: Path) -> Run | None:
    """Return the run that a map lies in, or is; None for a map elsewhere."""
    found = next((folder for folder in (source, source.parent) if (folder / "run.json").is_file()), None)
    return None if found is None else Run.open(found)


def _title(files: PipelineFiles, flow_map: FlowMap, jumps: int | None) -> str:
    if jumps is not None:
        return f"{Path(files.source).name} in {jumps} jumps"
    kind = "LoRA" if isinstance(flow_map.network, LoRANetwork) else "weights"
    return f"{Path(files.source).name}: {kind} tuned toward a reward"


def _revision(files: PipelineFiles) -> str:
    return f", revision {files.revision}" if files.revision else ""


def _recipe(config: Mapping[str, Any]) -> list[str]:
    """Return reward, method, temperature and steps as a list."""
    module, trainer = config.get("module") or {}, config.get("trainer") or {}
    said = {
        "reward": _named(config.get("reward") or module.get("reward")),
        "method": _named(config.get("method") or module.get("method")),
        "temperature": module.get("temperature"),
        "adapter": _named(config.get("adapter") or module.get("adapter")),
        "optimiser steps": trainer.get("max_steps"),
    }
    return [f"- {name}: {value}" for name, value in said.items() if value not in (None, "")] or ["- not kept"]


def _named(node: Any) -> str:
    """Return a part of a recipe in one line: its class and its plain values."""
    if not isinstance(node, Mapping):
        return "" if node is None else str(node)
    plain = [
        f"{key}={value}" for key, value in node.items() if key != "_target_" and not isinstance(value, (dict, list))
    ]
    name = str(node.get("_target_", "")).rpartition(".")[2]
    return f"{name}({', '.join(plain)})"


def _figures(run: Run) -> list[str]:
    """Return the last figures of the tuning as a table; held-out ones were never optimised."""
    known = {key: value for key, value in run.read_metrics().items() if key.partition("/")[0] in FIGURES}
    if not known:
        return ["No figures were kept."]
    rows = [f"| {key} | {value:.4g} |" for key, value in known.items() if isinstance(value, (int, float))]
    return ["| figure | value |", "| :-- | --: |", *rows, "", f"Tuning took {run.info.seconds:.0f} s."]


def _loading(files: PipelineFiles, flow_map: FlowMap, jumps: int | None) -> list[str]:
    """Return the lines that load it into plain diffusers."""
    left_out = "".join(f", {part}=None" for part in parts_left_out(files))
    source = [f'pipeline = DiffusionPipeline.from_pretrained("{files.source}"{left_out})']
    if isinstance(flow_map.network, LoRANetwork) and jumps is None:
        return [
            "from diffusers import DiffusionPipeline",
            "",
            *source,
            'pipeline.load_lora_weights("path/to/this/folder")',
            *_ip_adapter(flow_map),
        ]
    family: Any = declared(flow_map.network, "family")
    kind = type(declared(flow_map.network, "model")).__name__
    load = f'pipeline.{family.network} = {kind}.from_pretrained("path/to/this/folder", subfolder="{family.network}")'
    lines = [f"from diffusers import {kind}, DiffusionPipeline", "", *source, load, *_ip_adapter(flow_map)]
    if jumps is None:
        return lines
    sigmas = ", ".join(f"{sigma:.6g}" for sigma in equal_sigmas(jumps))
    length = getattr(flow_map.conditioner, "length", None)
    more = "" if length is None else f", max_sequence_length={length}"
    return [*lines, f"pipeline(prompt, sigmas=[{sigmas}], guidance_scale=1.0{more})  # and no other number of steps"]


def _ip_adapter(flow_map: FlowMap) -> list[str]:
    """Return the lines that load the map's IP-Adapter, which stays where it is."""
    adapter: Any = declared(flow_map.network, "ip_adapter")
    if not adapter:
        return []
    folder, name = Path(adapter.file).parent, Path(adapter.file).name
    return [
        f'pipeline.load_ip_adapter("{folder}", subfolder="", weight_name="{name}")',
        f"pipeline.set_ip_adapter_scale({adapter.scale})",
    ]
