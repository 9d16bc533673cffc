"""Captions of the pictures in a folder: from tables, from text files beside them, or from their names."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

from steerfm.data.gallery import listed
from steerfm.errors import DataError

log = logging.getLogger(__name__)

TABLES = ("metadata.jsonl", "metadata.csv", "captions.jsonl", "captions.csv")
COLUMNS = ("text", "caption", "prompt")  # the first of them that a table has
NUMBER = re.compile(
    r"(^|\s+)(\d+|\(\d+\))$"
)  # what tells files of one caption apart: "a red circle 12", "a red circle (3)"


def read_captions(folder: Path, files: Sequence[str], pictures: Sequence[str], how: str) -> list[str]:
    """Return one caption a picture, "" for those that have none.

    files, pictures: paths below `folder`, with slashes. how: "auto" takes the tables in the folder, else the text
    files beside the pictures, else none; "names" reads file names; "none" leaves all empty; anything else is the
    path of a table. Raises DataError for a table that is missing or malformed, or names none of the pictures.
    """
    if how == "none":
        return [""] * len(pictures)
    if how == "names":
        return [from_name(picture) for picture in pictures]
    if how != "auto":
        return _from_tables(folder, [_given(folder, how)], pictures)
    tables = [folder / name for name in files if PurePosixPath(name).name in TABLES]
    if tables:
        return _from_tables(folder, tables, pictures)
    beside = {picture: PurePosixPath(picture).with_suffix(".txt").as_posix() for picture in pictures}
    if set(beside.values()) & set(files):
        return _from_texts(folder, set(files), [beside[picture] for picture in pictures])
    log.info("%s has no captions, so prompts are empty; captions=names reads them off the file names.", folder)
    return [""] * len(pictures)


def from_name(picture: str) -> str:
    """Return what a file's name says, without its number: "a_red_circle_12.png" -> "a red circle"."""
    return NUMBER.sub("", one_line(re.sub(r"[_-]+", " ", PurePosixPath(picture).stem))).strip()


def one_line(text: str) -> str:
    """Return a text with every run of white space made one space."""
    return " ".join(text.split())


def _given(folder: Path, how: str) -> Path:
    for path in (Path(how), folder / how):
        with contextlib.suppress(OSError, ValueError):  # no name of a file at all
            if path.is_file():
                return path
    raise DataError(
        f"There is no table of captions at {how}, nor in {folder}: captions is auto, names, none, or the path of a "
        ".jsonl or .csv file."
    )


def _from_texts(folder: Path, files: set[str], beside: Sequence[str]) -> list[str]:
    return [one_line(_text(folder / name)) if name in files else "" for name in beside]


def _from_tables(folder: Path, tables: Sequence[Path], pictures: Sequence[str]) -> list[str]:
    found: dict[str, tuple[str, str]] = {}  # picture -> caption, and the place it was read from
    for table in tables:
        home, top = table.parent.resolve(), folder.resolve()
        below = home.relative_to(top).as_posix() if home.is_relative_to(top) else ""
        for place, name, caption in _captions(table):
            key = _key(normpath(PurePosixPath(below, name.replace("\\", "/")).as_posix()))
            if key in found:
                raise DataError(f"{name} has two captions, at {found[key][1]} and {place}: keep one of them.")
            found[key] = caption, place
    keys = [_key(picture) for picture in pictures]
    absent = sorted(found.keys() - set(keys))
    source = ", ".join(str(table) for table in tables)
    if len(absent) == len(found):
        raise DataError(
            f"{source} has no caption for any picture in {folder}: file_name must be a path below the table's "
            f"folder, such as {pictures[0]}; got {listed(absent) or 'no rows'}."
        )
    if absent:
        log.warning("%s names %d files that are no pictures in %s: %s", source, len(absent), folder, listed(absent))
    return [found[key][0] if key in found else "" for key in keys]


def _captions(table: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (place, file name, caption) of every row of a table."""
    for line, row in _rows(table):
        place = f"line {line} of {table}"
        column = next((name for name in COLUMNS if name in row), None)
        if column is None or "file_name" not in row:
            got = ", ".join(str(name) for name in row)
            raise DataError(f"A table of captions needs the columns file_name and {COLUMNS[0]}; {place} has {got}.")
        name, caption = row["file_name"], row[column]
        if not isinstance(name, str) or not isinstance(caption, str | None):
            raise DataError(f"file_name and {column} must be texts; {place} has {name!r} and {caption!r}.")
        yield place, name, one_line(caption or "")


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, columns) of a .jsonl or .csv file."""
    lines = io.StringIO(_text(table))  # not splitlines, which would break texts at rarer separators as well
    if table.suffix.lower() == ".csv":
        reader = csv.DictReader(lines)
        try:
            yield from ((reader.line_num, row) for row in reader)
        except csv.Error as error:
            raise DataError(f"Line {reader.line_num} of {table} is no CSV ({error}): correct it.") from error
        return
    if table.suffix.lower() != ".jsonl":
        raise DataError(f"A table of captions is a .jsonl or .csv file, got {table}.")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _object(line, f"Line {number} of {table}")


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is no JSON ({error}): correct it; each line is one object.") from error
    if not isinstance(row, dict):
        raise DataError(f'{place} is no JSON object: write {{"file_name": "a.png", "text": "a red circle"}}.')
    return row


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark before UTF-8
    except (OSError, ValueError) as error:
        raise DataError(f"The captions in {path} cannot be read ({error}): give a text file in UTF-8.") from error


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # file systems and editors write accents in two ways
