"""Pairs of pictures of which people said which was better, with held-out pairs whose prompts training never sees."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from steerfm.data.batches import StepBatches, StepDataModule, epoch_indices, own_rows
from steerfm.data.captions import one_line
from steerfm.data.gallery import Gallery, check_sizes
from steerfm.data.hub import as_stored, load_table, source_of
from steerfm.data.pictures import Frame, Source
from steerfm.errors import ConfigError, DataError, nearest
from steerfm.images import to_unit
from steerfm.seeds import generator

log = logging.getLogger(__name__)

KEYS = ("image_a", "image_b", "prompt", "preferred")
WORDS = {"a": 1.0, "b": 0.0, "tie": 0.5}


class Pair(NamedTuple):
    """Hold two pictures by number, their prompt, and the probability with which the first was preferred."""

    a: int
    b: int
    prompt: str
    preferred: float


class PairBatches(StepDataModule):
    """Hand out the batches of `pairs`, which a subclass reads; its __init__ sets batch_size and seed too."""

    pairs: Pairs
    batch_size: int
    seed: int

    @property
    def count(self) -> int:
        """Return how many pairs can be used, held-out ones with them."""
        return len(self.pairs.used)

    def batch(self, step: int) -> dict[str, Any]:
        return self.pairs.batch(step, self.batch_size, self.seed)

    def val_dataloader(self) -> DataLoader | list:
        return self.pairs.held_out_loader(self.batch_size)


class PreferencePairs(PairBatches):
    """Batches {"image_a", "image_b": (B, C, H, W) in [0, 1], "prompt": texts, "preferred": (B,)} of a JSON Lines file.

    A line is {"image_a": path, "image_b": path, "prompt": text, "preferred": "a", "b", "tie" or a number in [0, 1],
    the share of votes for a}; paths are relative to the file. Pictures are decoded once at the start, pairs with
    one that cannot be used are left out and named in the log. In training a and b are swapped at random.
    batch_size: pairs a step, over all processes. size, channels, background, animated, max_pixels, cache_gib: as for
    ImageFolder, cropped in the centre. validation_size: pairs kept from training, a few more where their prompts have
    more: no prompt is in both, and a longer file moves few of them. Raises DataError that names the line.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        size: int | Sequence[int] = 224,
        batch_size: int = 32,
        channels: int = 3,
        background: str = "white",
        animated: str = "skip",
        max_pixels: int = 2**26,
        cache_gib: float = 2.0,
        validation_size: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(batch_size, validation_size)
        frame = Frame(size, channels, background=background, animated=animated, max_pixels=max_pixels)
        self.batch_size, self.seed = batch_size, seed
        names, pairs = read_pairs(Path(file))
        folder = Path(file).parent
        gallery = Gallery(
            lambda places: [folder / names[place] for place in places],
            names,
            [""] * len(names),
            frame,
            where=str(file),
            cache_gib=cache_gib,
        )
        self.pairs = Pairs(gallery, pairs, validation_size)


class HuggingFacePairs(PairBatches):
    """Batches as PreferencePairs gives, from named columns of a Hugging Face data set; needs `datasets`.

    path_or_id, split, name, revision: as for HuggingFaceData. image_a, image_b: columns of pictures; prompt: of texts;
    preferred: of numbers in [0, 1], or "a", "b" and "tie". For yuvalkirstain/pickapic_v2: jpg_0, jpg_1, caption,
    label_0. The other arguments are those of PreferencePairs. Raises DataError that names the row or the column.
    """

    def __init__(
        self,
        path_or_id: str | os.PathLike[str],
        split: str = "train",
        image_a: str = "image_a",
        image_b: str = "image_b",
        prompt: str = "prompt",
        preferred: str = "preferred",
        size: int | Sequence[int] = 224,
        batch_size: int = 32,
        name: str | None = None,
        revision: str | None = None,
        channels: int = 3,
        background: str = "white",
        animated: str = "skip",
        max_pixels: int = 2**26,
        cache_gib: float = 2.0,
        validation_size: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(batch_size, validation_size)
        frame = Frame(size, channels, background=background, animated=animated, max_pixels=max_pixels)
        self.batch_size, self.seed = batch_size, seed
        where = f"{path_or_id} ({split})"
        table = load_table(str(path_or_id), split, False, name, revision)
        for column in (image_a, image_b):
            table = as_stored(table, column, where)
        for column in (prompt, preferred):
            if column not in table.features:
                near = nearest(column, table.features) or "."
                raise DataError(f"{where} has no column '{column}'{near} Its columns: {', '.join(table.features)}.")
        said = zip(table[prompt], table[preferred], strict=True)
        pairs = [
            Pair(2 * row, 2 * row + 1, one_line(text or ""), _preferred(value, f"Row {row} of {where}"))
            for row, (text, value) in enumerate(said)
        ]
        gallery = Gallery(
            _from_columns(table.select_columns([image_a, image_b]), (image_a, image_b)),
            [f"{column} of row {row}" for row in range(len(table)) for column in (image_a, image_b)],
            [""] * (2 * len(table)),
            frame,
            where=where,
            cache_gib=cache_gib,
        )
        self.pairs = Pairs(gallery, pairs, validation_size)


class Pairs:
    """Hand out batches of the pairs whose two pictures a gallery has; `held_out` are kept for validation.

    Raises DataError where no pair is left, ConfigError where validation takes them all.
    """

    def __init__(self, gallery: Gallery, pairs: Sequence[Pair], validation_size: int) -> None:
        self._gallery = gallery
        self._number = {place: number for number, place in enumerate(gallery.used)}
        self.used = [pair for pair in pairs if pair.a in self._number and pair.b in self._number]
        left_out = len(pairs) - len(self.used)
        if left_out:
            log.warning("%s: %d of %d pairs have a picture that cannot be used", gallery.where, left_out, len(pairs))
        if not self.used:
            raise DataError(f"No pair of {gallery.where} has two pictures that can be used: mend those named above.")
        self.held_out, self.training = _split(self.used, validation_size)

    def batch(self, step: int, batch_size: int, seed: int) -> dict[str, Any]:
        """Return this process's rows of the training batch at `step`, half of them with a and b swapped."""
        index = self.training[epoch_indices(len(self.training), step, batch_size, seed)]
        swap = generator(seed, "data", step).random(batch_size) < 0.5  # a network that sees both could learn the place
        own = own_rows(batch_size)
        return self.rows(index[own], swap[own])

    def held_out_loader(self, batch_size: int) -> DataLoader | list:
        """Return the held-out pairs in their order, `batch_size` at a time and all of them in every process."""
        chunks = list(self.held_out.split(batch_size)) if len(self.held_out) else []
        return DataLoader(StepBatches(lambda i: self.rows(chunks[i]), len(chunks)), batch_size=None) if chunks else []

    def rows(self, index: Tensor, swap: np.ndarray | None = None) -> dict[str, Any]:
        """Return pairs by number, those swapped that are told."""
        pairs = [self.used[i] for i in index.tolist()]
        if swap is not None:
            pairs = [swapped(pair) if turn else pair for pair, turn in zip(pairs, swap, strict=True)]
        numbers = [self._number[pair.a] for pair in pairs] + [self._number[pair.b] for pair in pairs]
        a, b = to_unit(self._gallery.rows(numbers)["x0"]).chunk(2)
        preferred = torch.tensor([pair.preferred for pair in pairs])
        return {"image_a": a, "image_b": b, "prompt": [pair.prompt for pair in pairs], "preferred": preferred}


def swapped(pair: Pair) -> Pair:
    """Return the pair with its pictures the other way round, and the preference with them."""
    return Pair(pair.b, pair.a, pair.prompt, 1 - pair.preferred)


def read_pairs(file: Path) -> tuple[list[str], list[Pair]]:
    """Return the pictures that a JSON Lines file names, each once, and its pairs. Raises DataError with the line."""
    numbers: dict[str, int] = {}
    pairs = []
    for place, row in _lines(file):
        missing = next((key for key in KEYS if key not in row), None)
        if missing:
            near = nearest(missing, row)
            raise DataError(f"{place} has no '{missing}'{near or ';'} each line needs {', '.join(KEYS)}.")
        texts = {key: row[key] for key in KEYS[:3]}
        wrong = next((key for key, value in texts.items() if not isinstance(value, str)), None)
        if wrong:
            raise DataError(f"{place} has {texts[wrong]!r} as its {wrong}: write a text in quotes.")
        for key in KEYS[:2]:
            if not _is_file(file.parent / texts[key]):
                raise DataError(
                    f"{place} names {key} {texts[key]}, which is no file: paths are relative to {file.parent}."
                )
        if texts["image_a"] == texts["image_b"]:
            raise DataError(f"{place} compares {texts['image_a']} with itself: remove the line.")
        a, b = (numbers.setdefault(texts[key], len(numbers)) for key in KEYS[:2])
        pairs.append(Pair(a, b, one_line(texts["prompt"]), _preferred(row["preferred"], place)))
    if not pairs:
        raise DataError(f"{file} holds no pairs: write one a line, with {', '.join(KEYS)}.")
    return list(numbers), pairs


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name of a file at all
        return False


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the object of every line that is not empty."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The pairs in {file} cannot be read ({error}): give a JSON Lines file in UTF-8.") from error
    for number, line in enumerate(text.split("\n"), 1):
        place = f"Line {number} of {file}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place} is no JSON ({error}): correct it; each line is one object.") from error
        if not isinstance(row, dict):
            raise DataError(f"{place} is no JSON object: write one with {', '.join(KEYS)}.")
        yield place, row


def _preferred(value: Any, place: str) -> float:
    """Return a preference as the probability of a."""
    if isinstance(value, str) and value in WORDS:
        return WORDS[value]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise DataError(
        f'{place} has {value!r} as its preference: write "a", "b", "tie" or the share of votes for a, in [0, 1].'
    )


def _split(pairs: Sequence[Pair], validation_size: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of held-out and of training pairs; prompts go to either as a whole, in the order of a digest.

    Pairs without a prompt stand each for itself.
    """
    groups: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        groups.setdefault(pair.prompt or f"\n{number}", []).append(number)
    held_out: list[int] = []
    for key in sorted(groups, key=_digest):
        if len(held_out) >= validation_size:
            break
        held_out += groups[key]
    if len(held_out) == len(pairs):
        raise ConfigError(
            f"validation_size={validation_size} leaves none of the {len(pairs)} pairs, of {len(groups)} prompts, to "
            "train on: give fewer, since prompts are held out as a whole."
        )
    kept = set(held_out)
    training = [number for number in range(len(pairs)) if number not in kept]
    return torch.tensor(sorted(held_out), dtype=torch.long), torch.tensor(training)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _from_columns(table: Any, columns: tuple[str, str]) -> Callable[[Sequence[int]], list[Source]]:
    """Return what opens the pictures 2 row and 2 row + 1 of a table with two columns of them."""

    def sources(places: Sequence[int]) -> list[Source]:
        rows = table[[place // 2 for place in places]]
        return [source_of(rows[columns[place % 2]][i]) for i, place in enumerate(places)]

    return sources
