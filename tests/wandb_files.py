"""Read back what wandb keeps of a run on disk: the records of its .wandb file, and tables and pictures that wait."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32768  # LevelDB's log format, with a header of 7 bytes of wandb's own
HEADER = 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """Yield every record of a .wandb file."""
    data, place, whole = path.read_bytes(), HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + HEADER])
        part = data[place + HEADER : place + HEADER + size]
        whole = part if kind in (FULL, FIRST) else whole + part
        place += HEADER + size
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(whole)
            yield record


def histories(run: Path) -> list[dict[str, Any]]:
    """Return the rows of an offline run's history."""
    (file,) = run.glob("*.wandb")
    rows = [record.history.item for record in records(file) if record.history.item]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows]


def begun(run: Path) -> Any:
    """Return the record that an offline run begins with: name, tags, config."""
    (file,) = run.glob("*.wandb")
    (found,) = (record.run for record in records(file) if record.WhichOneof("record_type") == "run")
    return found


def config(run: Path) -> dict[str, Any]:
    """Return an offline run's config as it was begun with."""
    return {item.key: json.loads(item.value_json) for item in begun(run).config.update}


def artifacts(run: Path) -> dict[str, Any]:
    """Return the artifacts that an offline run logged, by name."""
    (file,) = run.glob("*.wandb")
    return {record.artifact.name: record.artifact for record in records(file) if record.artifact.name}


def tables(kept: Path) -> list[list[dict[str, Any]]]:
    """Return the rows of every table that waits in a run folder's wandb/, by column; wandb keeps some of them twice."""
    staged = {path.read_bytes() for path in kept.glob("data/**/*") if path.is_file()}
    found = [json.loads(data) for data in staged if data.startswith(b"{") and b'"_type": "table"' in data]
    return [[dict(zip(each["columns"], row, strict=True)) for row in each["data"]] for each in found]


def pictures(kept: Path) -> dict[str, bytes]:
    """Return the PNG files that wait in a run folder's wandb/, by the digest under which tables name them."""
    staged = [path.read_bytes() for path in kept.glob("data/**/*") if path.is_file()]
    return {hashlib.sha256(data).hexdigest(): data for data in staged if data.startswith(b"\x89PNG")}
