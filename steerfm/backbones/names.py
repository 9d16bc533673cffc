"""Names of layers and parameters, by pattern."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from steerfm.errors import ConfigError, nearest

SHOWN = 12  # names in an error


def matching(patterns: str | Sequence[str], names: Sequence[str], kind: str) -> list[str]:
    """Return the names that match one of the patterns ("blocks.*.up"), in their order.

    Raises ConfigError for a pattern that matches none; kind: what the names are of, for the error.
    """
    asked = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in asked:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > SHOWN else "")
            raise ConfigError(f"No {kind} is called '{pattern}'{nearest(pattern, names) or '.'} There are: {shown}.")
    if not asked:
        raise ConfigError(f"No {kind} was chosen: give one pattern or more, such as '*'.")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in asked)]
