"""Compare runs at equal cost, and show what came out: in the terminal, as one HTML page, in W&B."""

from steerfm.report.compare import Comparison, Pair, compare
from steerfm.report.conclusions import conclusions
from steerfm.report.equal import EqualCost
from steerfm.report.estimates import Estimate
from steerfm.report.page import page
from steerfm.report.rows import Row
from steerfm.report.sources import expand
from steerfm.report.terminal import ComparisonTable, markdown, show
from steerfm.report.wandb import log_comparison
from steerfm.report.write import write_comparison

__all__ = [
    "Comparison",
    "ComparisonTable",
    "EqualCost",
    "Estimate",
    "Pair",
    "Row",
    "compare",
    "conclusions",
    "expand",
    "log_comparison",
    "markdown",
    "page",
    "show",
    "write_comparison",
]
