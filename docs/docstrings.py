"""Docstrings as they are written here, prose with `code` in it, turned into the reStructuredText that autodoc reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

SPAN = re.compile(r"``(.+?)``|`([^`]+)`", re.DOTALL)
SPECIAL = re.compile(r"([\\*|_<>])")
INDENTED = re.compile(r" {4,}\S")
LIST = re.compile(r"[-*] |\d+\. ")


def as_rest(lines: Iterable[str], homes: Mapping[str, str]) -> list[str]:
    """Return a docstring's lines as reStructuredText in which every character stands for itself.

    Blocks indented by four spaces or more become literal ones, `code` becomes a literal, and a single `Name` among
    `homes` (name -> documented path) becomes a link.
    """
    found: list[str] = []
    for block in "\n".join(lines).split("\n\n"):
        rows = block.splitlines()
        if rows and all(INDENTED.match(row) for row in rows):
            found += ["::", "", *rows, ""]
        else:
            found += [*_prose(block, homes).splitlines(), ""]
    return found


def _prose(text: str, homes: Mapping[str, str]) -> str:
    written, end = "", 0
    for span in SPAN.finditer(text):
        written += _plain(text[end : span.start()])
        written += ("\\ " if written[-1:].isalnum() else "") + _code(" ".join((span[1] or span[2]).split()), homes)
        end = span.end()
        written += "\\ " if text[end : end + 1].isalnum() else ""
    return written + _plain(text[end:])


def _code(code: str, homes: Mapping[str, str]) -> str:
    return f":py:obj:`{code} <{homes[code]}>`" if code in homes else f"``{code}``"


def _plain(text: str) -> str:
    """Return text with the signs escaped that reStructuredText reads as mark-up, but for lists."""
    lines = text.split("\n")
    kept = [LIST.match(line) if i else None for i, line in enumerate(lines)]
    return "\n".join(
        (m[0] + _escaped(line[m.end() :])) if m else _escaped(line) for m, line in zip(kept, lines, strict=True)
    )


def _escaped(text: str) -> str:
    return SPECIAL.sub(r"\\\1", text)
