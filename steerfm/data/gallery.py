"""A gallery: the usable pictures of a set, each decoded once before training, and what was wrong with the others.

Decoding everything first is what keeps a batch a function of (seed, step): a picture that turns out damaged in the
middle of training would have to be replaced there and then. What was decoded is kept while it fits into memory; the
rest is decoded again as it is needed, to the same pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from steerfm.data.batches import epoch_indices, own_rows
from steerfm.data.pictures import Frame, Pixels, Source, Unusable, read_all
from steerfm.errors import ConfigError, DataError
from steerfm.seeds import generator, torch_generator

log = logging.getLogger(__name__)

NAMED = 10  # pictures that a report names before it counts
CHUNK = 256  # pictures that are read at once

_Item = TypeVar("_Item")


class Gallery:
    """Hold the usable pictures of a set with their captions, and hand out batches of them.

    sources: places -> files or bytes. names: what each picture is called in reports. captions: one a picture.
    where: the set's name in reports. cache_gib: GiB of memory for decoded pictures, in each process.
    validation_size: pictures that are kept from training for validation, the same for every seed.
    Raises DataError where no picture can be used, ConfigError where validation takes them all.
    """

    def __init__(
        self,
        sources: Callable[[Sequence[int]], list[Source]],
        names: Sequence[str],
        captions: Sequence[str],
        frame: Frame,
        *,
        where: str,
        cache_gib: float = 2.0,
        validation_size: int = 0,
    ) -> None:
        self._sources = sources
        self.names, self.captions = names, captions
        self.frame = frame
        self.where = where
        self.used: list[int] = []
        self.skipped: dict[str, str] = {}  # name -> reason
        self._kept: dict[int, Pixels] = {}
        self._scan(cache_gib * 2**30)
        self._report()
        self.validation, self.training = divided(len(self.used), validation_size)

    def __len__(self) -> int:
        return len(self.used)

    def batch(self, step: int, batch_size: int, seed: int) -> dict[str, Any]:
        """Return this process's rows of the training batch at `step`."""
        index = self.training[epoch_indices(len(self.training), step, batch_size, seed)]
        draws = generator(seed, "data", step).random((batch_size, 3))
        own = own_rows(batch_size)
        return self._rows(index[own].tolist(), draws[own])

    def validation_batch(self) -> dict[str, Any] | None:
        """Return the pictures kept for validation; None where there are none."""
        return self.rows(self.validation.tolist()) if len(self.validation) else None

    def rows(self, index: Iterable[int]) -> dict[str, Any]:
        """Return usable pictures by number, cropped in the centre and not mirrored."""
        return self._rows(list(index), None)

    def fingerprint(self, *parts: str) -> str:
        """Return a digest of what the gallery shows: names, captions, framing, and whatever else it is told."""
        shown = [[self.names[i], self.captions[i]] for i in self.used]
        return hashlib.sha256(json.dumps([shown, repr(self.frame), *parts]).encode()).hexdigest()

    def _rows(self, index: list[int], draws: Any) -> dict[str, Any]:
        places = [self.used[i] for i in index]
        missing = sorted({place for place in places if place not in self._kept})
        found = dict(zip(missing, read_all(self.frame, self._sources(missing)), strict=True))
        bad = [self.names[place] for place, pixels in found.items() if isinstance(pixels, Unusable)]
        if bad:
            raise DataError(f"{bad[0]} in {self.where} was good before and is damaged now: restore it and resume.")
        pictures: list[Any] = [self._kept[place] if place in self._kept else found[place] for place in places]
        return {"x0": self.frame.stack(pictures, draws), "prompt": [self.captions[place] for place in places]}

    def _scan(self, room: float) -> None:
        for chunk in progress(list(_chunks(len(self.names))), f"Checking {len(self.names)} pictures"):
            for place, result in zip(chunk, read_all(self.frame, self._sources(chunk)), strict=True):
                if isinstance(result, Unusable):
                    self.skipped[self.names[place]] = str(result)
                    continue
                self.used.append(place)
                room -= result.nbytes
                if room >= 0:
                    self._kept[place] = result

    def _report(self) -> None:
        total, problems = len(self.names), [f"{name} ({reason})" for name, reason in self.skipped.items()]
        if not self.used:
            raise DataError(
                f"None of the {total} pictures in {self.where} can be used: {listed(problems)}. "
                "Give pictures that an ordinary viewer opens, such as PNG, JPEG or WebP files."
            )
        kept = f"{len(self._kept)} of them stay decoded in memory"
        if problems:
            used = len(self.used)
            log.warning(
                "%s: used %d of %d pictures; skipped %d: %s",
                self.where, used, total, len(problems), listed(problems),
            )  # fmt: skip
        log.info("%s: %d pictures, %s", self.where, len(self.used), kept)


def listed(items: Sequence[str]) -> str:
    """Return the first few items and the number of the others."""
    more = f", and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return ", ".join(items[:NAMED]) + more


def progress(items: Sequence[_Item], title: str) -> Iterable[_Item]:
    """Yield the items and draw a bar on a terminal that shows steerfm's log."""
    console = Console(stderr=True)
    quiet = not (console.is_terminal and log.isEnabledFor(logging.INFO))
    return track(items, title, console=console, disable=quiet, transient=True)


def check_sizes(batch_size: int, validation_size: int) -> None:
    """Raise ConfigError for a batch without samples or a validation batch of fewer than none."""
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
    if validation_size < 0:
        raise ConfigError(f"validation_size must be at least 0, got {validation_size}.")


def divided(size: int, validation_size: int) -> tuple[Tensor, Tensor]:
    """Return the sorted numbers of the samples for validation and for training."""
    if validation_size >= size:
        raise ConfigError(
            f"validation_size={validation_size} leaves none of the {size} usable pictures to train on: give fewer."
        )
    order = torch.randperm(size, generator=torch_generator(0, "validation"))
    return order[:validation_size].sort().values, order[validation_size:].sort().values


def _chunks(count: int) -> Iterator[range]:
    return (range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))
