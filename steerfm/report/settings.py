"""In what the recipes of compared runs differ, value by value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steerfm.report.columns import NOTHING
from steerfm.report.sources import Source

BESIDE_THE_POINT = ("name", "label", "inputs", "folder")  # every run has its own
LONGEST = 120  # letters of a value


def different_settings(sources: Sequence[Source]) -> list[tuple[str, list[str]]]:
    """Return (dotted key, its value in each run) of every value that is not the same in all."""
    flat = [dict(_flat(source.config)) for source in sources]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [(key, [settings.get(key, NOTHING) for settings in flat]) for key in keys if key not in BESIDE_THE_POINT]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(value: Any, key: str = "") -> list[tuple[str, str]]:
    """Return (dotted key, text) of every value inside nested dictionaries; lists stay whole."""
    if isinstance(value, Mapping) and value:
        return [pair for name, item in value.items() for pair in _flat(item, f"{key}.{name}" if key else str(name))]
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return [(key, text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")]
