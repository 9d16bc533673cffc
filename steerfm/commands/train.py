"""`steerfm train`: train a flow map, or the demo's small CLIP."""

from __future__ import annotations

import argparse

from steerfm.commands import fitting


def run(arguments: argparse.Namespace) -> int:
    """Train a flow map, or the demo's small CLIP."""
    return fitting.run(arguments, "train")
