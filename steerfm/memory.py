"""What is done where memory runs out: rows that stand for themselves go in smaller micro-batches."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

T = TypeVar("T")

ON_CPU = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error is that of a device, or of the machine, without memory left."""
    said = isinstance(error, RuntimeError) and any(text in str(error) for text in ON_CPU)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def in_micro_batches(
    function: Callable[[int, int], T], rows: int, size: int | None, what: str
) -> tuple[list[T], int | None]:
    """Return function(start, stop) of micro-batch after micro-batch of the rows, and the size that memory bore.

    size: rows at once, all by default. A micro-batch for which memory runs out is halved and made again, down to
    single rows; so the rows have to be independent of each other. what: is done with them, for the log.
    """
    found, start = [], 0
    while start < rows:
        stop = min(start + (size or rows), rows)
        try:
            result = function(start, stop)
        except (RuntimeError, MemoryError) as error:
            if stop - start == 1 or not out_of_memory(error):
                raise
            size = (stop - start + 1) // 2
            log.warning(
                "Out of memory when %s %d rows at once (%s): going on with %d, as micro_batch=%d does from the start.",
                what, stop - start, what_was_asked(error), size, size,
            )  # fmt: skip
        else:
            found.append(result)
            start = stop
            continue
        if torch.cuda.is_available():  # only here, where the error no longer holds on to its tensors
            torch.cuda.empty_cache()
    return found, size


def what_was_asked(error: BaseException) -> str:
    """Return how much memory was asked for where none was left, or what the error says first."""
    found = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
    return found[0] if found else first_sentence(error)


def first_sentence(error: BaseException) -> str:
    """Return what an error says first, without a trailing full stop; its type where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")
