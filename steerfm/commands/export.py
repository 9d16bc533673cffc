"""`steerfm export`: a tuned pretrained map in diffusers' own files, tried in plain diffusers before it is done."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from steerfm.backbones import export_diffusers, merged, unquantised
from steerfm.backbones.export_check import painting_gap
from steerfm.backbones.hub import push
from steerfm.backbones.lora import LoRANetwork
from steerfm.commands import common
from steerfm.commands.model_card import model_card
from steerfm.errors import ConfigError
from steerfm.files import write_atomic
from steerfm.flow_map import FlowMap, declared

log = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Export a map; 0 where plain diffusers paints what the map paints."""
    common.show_log()
    folder = Path(arguments.to)
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise ConfigError(f"{folder} is a file or holds some already: name an empty folder, or one that is not there.")
    flow_map = unquantised(FlowMap.load(arguments.map))
    files = declared(flow_map.network, "files")
    if files is None:
        raise ConfigError(f"{arguments.map} is no map of a pretrained pipeline: such a map is exported by its save().")
    has_lora = isinstance(flow_map.network, LoRANetwork)
    flow_map = merged(flow_map) if arguments.merged and has_lora else flow_map
    export_diffusers(flow_map, folder, arguments.jumps)
    gap = painting_gap(flow_map, folder, files, arguments.jumps)
    write_atomic(folder / "README.md", model_card(arguments.map, files, flow_map, gap, arguments.jumps).encode())
    common.say(f"Exported to {folder}; plain diffusers paints the same from it (largest difference {gap:.1e}).")
    if arguments.push:
        common.say(f"Published {push(folder, arguments.push, arguments.public)}")
    return 0
