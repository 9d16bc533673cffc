"""Conditions: from prompts to the tensors a network takes, with a null condition; saved with the map."""

from steerfm.conditions.labels import Labels
from steerfm.conditions.words import CaptionWords

__all__ = ["CaptionWords", "Labels"]
