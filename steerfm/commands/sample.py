"""`steerfm sample`: sample a flow map as it is."""

from __future__ import annotations

import argparse

from steerfm.commands import generation


def run(arguments: argparse.Namespace) -> int:
    """Sample a flow map as it is."""
    return generation.run(arguments, "sample")
