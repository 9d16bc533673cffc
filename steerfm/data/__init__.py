"""Data modules: points, digits, prompts. A batch is a function of (seed, step) alone, so that resuming is exact."""

from steerfm.data.digits import Digits
from steerfm.data.points import Points
from steerfm.data.prompts import Prompts, PromptSeeds

__all__ = ["Digits", "Points", "PromptSeeds", "Prompts"]
