"""Conditions: from prompts to the tensors a network takes, with a null condition; saved with the map."""

from steerfm.conditions.labels import Labels
from steerfm.conditions.pictures import Pictures
from steerfm.conditions.scene_attributes import SceneAttributes
from steerfm.conditions.text_embeddings import FrozenText
from steerfm.conditions.words import CaptionWords

__all__ = ["CaptionWords", "FrozenText", "Labels", "Pictures", "SceneAttributes"]
