"""Logging of the libraries that models come with."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

LIBRARIES = ("diffusers", "transformers", "torch.utils._pytree")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries from listing weights of parts that are left out, and how their own parts fit together.

    To be entered after they are imported: diffusers sets its logger's level as it is.
    """
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
