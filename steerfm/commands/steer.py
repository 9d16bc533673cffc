"""`steerfm steer`: steer the sampling of a flow map with a reward."""

from __future__ import annotations

import argparse

from steerfm.commands import generation


def run(arguments: argparse.Namespace) -> int:
    """Steer the sampling of a flow map with a reward."""
    return generation.run(arguments, "steer")
