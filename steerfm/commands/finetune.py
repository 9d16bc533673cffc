"""`steerfm finetune`: fine-tune a flow map toward a reward."""

from __future__ import annotations

import argparse

from steerfm.commands import fitting


def run(arguments: argparse.Namespace) -> int:
    """Fine-tune a flow map toward a reward."""
    return fitting.run(arguments, "finetune")
