"""Written text: how well what a reader reads in a picture agrees with the text that the prompt quotes.

Model: any callable from a picture (PIL, RGB) to a string; none ships, and none is a dependency. Source: the reward of
Liu et al. 2025 (Flow-GRPO), arXiv 2505.05470: 1 - edits / length, at least 0. Preprocessing: uint8 pixels.
Range: 0 to 1. Licence and memory: the reader's. A black box.
Fooled by: the right letters on a ruined picture, whose structure is the first thing to go: add a reward that sees it;
a text that is written twice costs edits, but one in another place does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steerfm.errors import RewardError
from steerfm.images import to_uint8
from steerfm.reward import Reward

DOUBLE = r'"([^"]+)"|“([^”]+)”|«([^»]+)»'
SINGLE = r"(?<!\w)'((?:[^']|(?<=\w)'(?=\w))+)'(?!\w)|(?<!\w)‘((?:[^’]|(?<=\w)’(?=\w))+)’(?!\w)"  # not those of it's
QUOTED = re.compile(f"{DOUBLE}|{SINGLE}")


class OCR(Reward):
    """Score how few edits lead from the text that `reader` reads to the wanted one: 1 for equal, at least 0.

    `reader`: a callable from a PIL picture (RGB) to a string. In a recipe, `reader: {_target_: my_readers.read,
    _partial_: true}` with --trust my_readers. `text` is the wanted one; None takes what each prompt quotes ('a
    sign that says "OPEN"'), joined by spaces where it quotes more. Unless `exact`, case and white space are ignored.
    """

    native_range = (0.0, 1.0)
    differentiable = False

    def __init__(
        self,
        reader: Callable[[Any], str],
        text: str | None = None,
        *,
        exact: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if not callable(reader):
            raise RewardError(
                f"The reader of '{self.name}' is a callable from a PIL picture to a string, got {reader!r}: pass the "
                "function itself, or in a recipe reader: {_target_: my_readers.read, _partial_: true}."
            )
        self.reader, self.text, self.exact = reader, text, exact
        self.needs_prompt = text is None
        if text is not None and not self._folded(text):
            raise RewardError(f"'{self.name}' wants a text to be read, got {text!r}.")

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return max(0, 1 - edits / characters of the wanted text); (B,). Raises RewardError, naming the sample."""
        from PIL import Image

        wanted = [quoted(prompt, self.name) if self.text is None else self.text for prompt in prompts]
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise RewardError(f"'{self.name}' reads pictures (B, 1 or 3, H, W), got the shape {tuple(images.shape)}.")
        read = [self._read(Image.fromarray(pixels), i) for i, pixels in enumerate(to_uint8(images))]
        values = [self._value(*pair) for pair in zip(read, wanted, strict=True)]
        return torch.tensor(values, dtype=torch.float32, device=images.device)

    def _read(self, picture: Any, sample: int) -> str:
        try:
            found = self.reader(picture)
        except Exception as error:
            raise RewardError(f"The reader of '{self.name}' fails on sample {sample}: {error!r}.") from error
        if not isinstance(found, str):
            raise RewardError(
                f"The reader of '{self.name}' gave {type(found).__name__} for sample {sample}: return one string, "
                "such as ' '.join(lines); '' where there is no text."
            )
        return found

    def _value(self, read: str, wanted: str) -> float:
        read, wanted = self._folded(read), self._folded(wanted)
        return max(0.0, 1 - edits(read, wanted) / len(wanted))

    def _folded(self, text: str) -> str:
        return text if self.exact else re.sub(r"\s+", "", text).casefold()


def quoted(prompt: str, name: str = "ocr") -> str:
    """Return what a prompt quotes, in any usual marks, joined by spaces. Raises RewardError where it quotes nothing."""
    found = [next(filter(None, match.groups())).strip() for match in QUOTED.finditer(prompt)]
    if not any(found):
        raise RewardError(f"'{name}' finds no text in quotation marks in '{prompt}': quote it, or pass text=.")
    return " ".join(filter(None, found))


def edits(a: str, b: str) -> int:
    """Return the Levenshtein distance: how many insertions, deletions and substitutions lead from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]
