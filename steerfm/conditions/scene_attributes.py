"""What a caption of shapes says, parsed into attributes: a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from steerfm.building import remembered
from steerfm.shape_captions import BEFORE, read
from steerfm.shapes import COLORS, MOST_OBJECTS, SHAPES, SIZES
from steerfm.types import Condition

ANY = ""  # an attribute that the caption leaves open is number 0, and so is an object that it does not ask for
OBJECT = ((ANY, *SHAPES), (ANY, *COLORS), (ANY, *SIZES))
PLACES = (ANY, *BEFORE)


@remembered
class SceneAttributes(nn.Module):
    """Turn captions of shapes into what they say, Condition(slots=(B, 10) long): a named baseline, not a text encoder.

    It is told by a parser what the caption means, so it can read nothing but the language of
    `steerfm.shape_captions`, and a map with it says nothing about learning from free text. It bounds from above what
    one that reads words can reach. Slots: shape, colour and size of each of three objects, then the place of the
    first from the second; 0 says nothing. All zeros, and the empty prompt, are the null condition. Networks read them
    with `SlotEncoder(SceneAttributes.values)`.
    """

    values = (*(len(names) for names in OBJECT * MOST_OBJECTS), len(PLACES))  # how many each slot may have

    def __init__(self) -> None:
        super().__init__()

    def forward(self, prompts: Sequence[str]) -> Condition:
        """Return the condition of B captions. Raises DataError, naming the word, for one that cannot be parsed."""
        condition = self.null(len(prompts))
        for i, prompt in enumerate(prompts):
            if prompt.strip():
                condition["slots"][i] = torch.tensor(_slots(prompt))
        return condition

    def null(self, n: int) -> Condition:
        """Return the null condition for n samples: nothing is asked for."""
        return Condition({"slots": torch.zeros(n, len(self.values), dtype=torch.long)})


def _slots(caption: str) -> list[int]:
    description = read(caption)
    slots = [
        names.index(attribute)
        for wanted in description.objects
        for names, attribute in zip(OBJECT, (wanted.shape, wanted.color, wanted.size), strict=True)
    ]
    slots += [0] * (len(OBJECT) * MOST_OBJECTS - len(slots))
    return [*slots, PLACES.index(description.place)]
