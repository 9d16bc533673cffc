"""Data modules: a batch is a function of (seed, step) alone, so that resuming is exact."""

from steerfm.data.digits import Digits
from steerfm.data.folders import ImageFolder
from steerfm.data.hub import HuggingFaceData
from steerfm.data.latents import Latents, cache_latents
from steerfm.data.points import Points
from steerfm.data.prompts import Prompts, PromptSeeds
from steerfm.data.shape_pairs import ShapePairs
from steerfm.data.shapes import Shapes

__all__ = [
    "Digits",
    "HuggingFaceData",
    "ImageFolder",
    "Latents",
    "Points",
    "PromptSeeds",
    "Prompts",
    "ShapePairs",
    "Shapes",
    "cache_latents",
]
