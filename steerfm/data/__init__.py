"""Data modules: a batch is a function of (seed, step) alone, so that resuming is exact."""

from steerfm.data.digits import Digits
from steerfm.data.folders import ImageFolder
from steerfm.data.hub import HuggingFaceData
from steerfm.data.latents import Latents, cache_latents
from steerfm.data.points import Points
from steerfm.data.preference_pairs import HuggingFacePairs, PreferencePairs
from steerfm.data.prompts import Prompts, PromptSeeds
from steerfm.data.shape_pairs import ShapePairs
from steerfm.data.shape_preferences import ShapePreferences
from steerfm.data.shapes import Shapes

__all__ = [
    "Digits",
    "HuggingFaceData",
    "HuggingFacePairs",
    "ImageFolder",
    "Latents",
    "Points",
    "PreferencePairs",
    "PromptSeeds",
    "Prompts",
    "ShapePairs",
    "ShapePreferences",
    "Shapes",
    "cache_latents",
]
