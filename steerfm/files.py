"""Write files so that a crash never leaves half of one, and hold a folder so that two processes never share it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import yaml

from steerfm.errors import RunError

try:
    import fcntl
except ImportError:  # Windows has no fcntl; folders are not locked there
    fcntl = None

log = logging.getLogger(__name__)

LOCK_NAME = ".lock"
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # the lock is written, and in a folder that was sent it may lead to any file
MOST_BYTES = 2**31  # of a text
LARGEST = 1e100  # of a number that was read: squares and sums of it fit a float too
MOST_LEVELS = 100  # of YAML, one inside the other
MOST_NODES = 1_000_000  # of YAML, with every alias written out
_held: dict[Path, int] = {}  # the folders that this process holds, and the open lock file of each


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `data` to `path`: either all of it is there afterwards, or what was there before.

    Without `durable` the bytes are not flushed to disk, which is much faster for thousands of small files, and only a
    power failure could lose them. Raises RunError if the folder cannot be written or the disk is full.
    """
    with replacing(path, durable=durable) as stream:
        stream.write(data)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file in `path`'s folder that takes its place in one step when the block ends without an error.

    File and folder are flushed to disk where it is to be `durable`. Raises RunError as `write_atomic` does.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        temporary.replace(path)
        if durable:
            _flush_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Flush a folder's own entries, so that a new name in it outlives a power failure; not every system lets us."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> RunError:
    """Return the one sentence for a file or folder that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        fix = "free some space and run the same command again; what was saved before is untouched"
    elif error.errno == errno.ENAMETOOLONG:
        fix = "choose a shorter name"
    else:
        fix = "choose another folder, or change its permissions"
    return RunError(f"Cannot write {path} ({error.strerror or error}): {fix}.")


def read_text(path: Path, errors: str = "strict") -> str:
    """Return the text of a file. Raises OSError also for a pipe or a device, which may never end, and a huge file."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
        raise OSError(errno.EINVAL, f"it is no file of at most {MOST_BYTES} bytes")
    return path.read_text(encoding="utf-8", errors=errors)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; RunError if it is missing, unreadable or something else."""
    try:
        data = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(data, dict):
        raise damaged(path, "it holds no JSON object")
    return data


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in `path`, of what JSON has too; RunError if it is missing, unreadable or something else."""
    try:
        text = read_text(path)
        check_yaml(text)
        data = yaml.safe_load(text)
        json.dumps(data)
    except (OSError, ValueError, TypeError, OverflowError, yaml.YAMLError) as error:
        raise damaged(path, error) from error
    if not isinstance(data, dict | None):
        raise damaged(path, "it holds no mapping")
    return data or {}


def is_number(value: Any) -> TypeGuard[float]:
    """Say whether a value that was read is a finite number of a size that can be reckoned with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def check_yaml(text: str) -> None:
    """Raise ValueError for YAML that is nested too deeply, or would be too large with its aliases written out."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
            sizes[anchor or ""] = size
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, MOST_NODES)  # an alias of what it stands in never ends
        elif isinstance(event, yaml.ScalarEvent):
            size = sizes[event.anchor or ""] = 1
        open_nodes[-1] = (open_nodes[-1][0], open_nodes[-1][1] + size)
        if len(open_nodes) > MOST_LEVELS:
            raise ValueError(f"it is nested more than {MOST_LEVELS} deep")
        if open_nodes[-1][1] >= MOST_NODES:
            raise ValueError(f"it has more than {MOST_NODES} entries with its aliases written out")


def damaged(path: Path, reason: object) -> RunError:
    """Return the one sentence for a file of a run folder that cannot be read."""
    lines = str(reason).splitlines() or ["no reason given"]
    return RunError(f"{path} cannot be read ({lines[0]}): restore it, or move its run folder away and run again.")


def file_fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, or of a folder's visible file names and bytes; 64 hex digits."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        listing = [(p.relative_to(path).as_posix(), file_fingerprint(p)) for p in files]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in `folder`, which the caller holds."""
    for path in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
        path.unlink(missing_ok=True)


def lock_folder(folder: Path) -> None:
    """Make `folder` if needed and hold it for this process, until `unlock_folder` or the process ends.

    The lock belongs to the process, not to the file: it ends with the process however that ends, so that
    nothing stale is ever left, and processes forked from this one do not inherit it.
    Raises RunError if somebody else holds the folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken_by = holder(folder)
        if taken_by:
            raise RunError(
                f"The run folder {folder} is in use by {taken_by}: wait until that ends, or choose another name."
            )
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | NO_LINK, 0o644)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        _take(descriptor)
    except OSError as error:
        os.close(descriptor)
        raise RunError(
            f"The run folder {folder} was taken by another process just now: choose another name."
        ) from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _held[folder.resolve()] = descriptor


def unlock_folder(folder: Path) -> None:
    """Let go of `folder`; nothing happens if this process does not hold it."""
    descriptor = _held.pop(folder.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)  # closing releases the lock


def holder(folder: Path) -> str:
    """Return who holds `folder`, such as "process 4711 on node3", or "" when nobody does."""
    if folder.resolve() in _held:  # looking at the file would release our own lock when it is closed
        return f"this very process ({os.getpid()})"
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | NO_LINK)
    except OSError:
        return ""
    try:
        _take(descriptor)
    except OSError:
        return os.read(descriptor, 200).decode(errors="replace") or "another process"
    finally:
        os.close(descriptor)
    return ""


def _take(descriptor: int) -> None:
    """Lock an open file at once; raise OSError if another process has it."""
    if fcntl is None:
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning("This file system has no locks: do not start two runs of one name at the same time.")
