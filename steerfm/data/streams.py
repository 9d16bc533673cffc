"""Batches from a stream: rows that can only be read in order, again from the start.

Step n has the rows n B .. (n + 1) B - 1 of an endless stream of shuffled epochs, usable or not, so that its place is
found without decoding. The place of a broken picture is taken by the next usable one of the same global batch: by
the same one after resuming, and with any number of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np

from steerfm.data.batches import own_rows
from steerfm.data.pictures import Frame, Pixels, Source, Unusable, read_all
from steerfm.errors import DataError
from steerfm.seeds import generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """Hold one row of a stream: what opens its picture, its caption, and its name in reports."""

    source: Callable[[], Source]
    caption: str
    name: str


class Stream:
    """Hand out batches of a stream of pictures.

    epoch: (seed, number) -> the entries of that shuffled epoch. held: entries that no epoch has, for validation.
    where: the set's name in reports.
    """

    def __init__(
        self,
        epoch: Callable[[int, int], Iterable[Entry]],
        frame: Frame,
        *,
        where: str,
        held: Callable[[], Iterable[Entry]] = tuple,
    ) -> None:
        self.frame = frame
        self.where = where
        self.skipped = 0  # broken pictures that this process has met
        self._epoch, self._held = epoch, held
        self._entries: Iterator[Entry] = iter(())
        self._next: tuple[int, int, int] | None = None  # the batch that the entries stand before

    def batch(self, step: int, batch_size: int, seed: int) -> dict[str, Any]:
        """Return this process's rows of the training batch at `step`.

        The step after the last one costs nothing but itself, any other reads the stream again up to its place.
        """
        if self._next != (step, batch_size, seed):
            if step:
                log.info("%s: reading the stream again up to row %d", self.where, step * batch_size)
            self._entries = islice(self._endless(seed), step * batch_size, None)
        entries = list(islice(self._entries, batch_size))
        self._next = step + 1, batch_size, seed
        draws = generator(seed, "data", step).random((batch_size, 3))
        own = own_rows(batch_size)
        return self._rows(entries, range(batch_size)[own], draws[own])

    def validation_batch(self) -> dict[str, Any] | None:
        """Return the entries kept for validation; None where there are none."""
        entries = list(self._held())
        return self._rows(entries, range(len(entries)), None) if entries else None

    def _endless(self, seed: int) -> Iterator[Entry]:
        for number in count():
            entry = None
            for entry in self._epoch(seed, number):
                yield entry
            if entry is None:
                raise DataError(f"{self.where} has no pictures to train on: check its split and validation_size.")

    def _rows(self, entries: Sequence[Entry], places: Sequence[int], draws: np.ndarray | None) -> dict[str, Any]:
        found = dict(zip(places, self._read([entries[place] for place in places]), strict=True))
        chosen = [self._usable(entries, place, found) for place in places]
        pictures: list[Any] = [found[place] for place in chosen]
        return {"x0": self.frame.stack(pictures, draws), "prompt": [entries[place].caption for place in chosen]}

    def _usable(self, entries: Sequence[Entry], place: int, found: dict[int, Pixels | Unusable]) -> int:
        """Return the first place from `place` on, and round again, whose picture can be used; reads what it must."""
        for candidate in (*range(place, len(entries)), *range(place)):
            if candidate not in found:
                found[candidate] = self._read([entries[candidate]])[0]
            if not isinstance(found[candidate], Unusable):
                return candidate
        name, reason = entries[place].name, found[place]
        raise DataError(
            f"None of the {len(entries)} pictures of a batch of {self.where} can be used, such as {name} ({reason}): "
            "check the column of pictures, or make batch_size larger."
        )

    def _read(self, entries: Sequence[Entry]) -> list[Pixels | Unusable]:
        results = read_all(self.frame, [entry.source() for entry in entries])
        for entry, result in zip(entries, results, strict=True):
            if isinstance(result, Unusable):
                self._skip(entry.name, result)
        return results

    def _skip(self, name: str, reason: Unusable) -> None:
        self.skipped += 1
        if self.skipped & (self.skipped - 1) == 0:  # the first, second, fourth, eighth, ...
            log.warning("%s: skipped %d pictures so far, now %s (%s)", self.where, self.skipped, name, reason)
