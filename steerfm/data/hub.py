"""Pictures from a Hugging Face data set: an id on the hub or a folder, at random or as a stream.

Nothing that a data set brings is executed: `datasets` no longer runs scripts, and pictures are decoded by us.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerfm.data.batches import StepDataModule
from steerfm.data.captions import COLUMNS, one_line
from steerfm.data.gallery import Gallery, check_sizes
from steerfm.data.pictures import Frame, Source
from steerfm.data.streams import Entry, Stream
from steerfm.errors import ConfigError, DataError, nearest

log = logging.getLogger(__name__)


class HuggingFaceData(StepDataModule):
    """Batches {"x0": (B, C, H, W) in [-1, 1], "prompt": captions} from a Hugging Face data set; needs `datasets`.

    path_or_id: an id on the hub, a folder written by `save_to_disk`, a folder of parquet files or pictures, or one
    parquet file. name, revision: the data set's configuration and version on the hub. caption_column: texts, lists
    of texts (the first is taken) or class labels (their names); "auto" is the first of text, caption, prompt and
    label that is there, else none; None leaves prompts empty.

    Without streaming, every picture is decoded once at the start, those that cannot be used are skipped and named,
    and every epoch is a new permutation. With streaming, pictures are read as they come, shuffled within
    shuffle_buffer of them, and each process reads the whole stream; a resumed run reads it again up to its place,
    so that it goes on as if it had never stopped. The other arguments are those of `steerfm.data.ImageFolder`.
    Raises DataError for a data set, split or column that is not there.
    """

    def __init__(
        self,
        path_or_id: str | os.PathLike[str],
        split: str = "train",
        image_column: str = "image",
        caption_column: str | None = "auto",
        size: int | Sequence[int] = 64,
        batch_size: int = 64,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        name: str | None = None,
        revision: str | None = None,
        channels: int = 3,
        crop: str = "center",
        flip: bool = False,
        background: str = "white",
        animated: str = "skip",
        max_pixels: int = 2**26,
        cache_gib: float = 2.0,
        validation_size: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(batch_size, validation_size)
        if shuffle_buffer < 1:
            raise ConfigError(f"shuffle_buffer must be at least 1, which does not shuffle, got {shuffle_buffer}.")
        frame = Frame(size, channels, crop, flip, background, animated, max_pixels)
        self.batch_size = batch_size
        self.seed = seed
        self.where = f"{path_or_id} ({split})"
        table = as_stored(load_table(str(path_or_id), split, streaming, name, revision), image_column, self.where)
        columns = _Columns(image_column, *_captions(table, caption_column, self.where))
        if streaming:
            self.pictures = _stream(table, columns, frame, self.where, shuffle_buffer, validation_size)
        else:
            self.pictures = _gallery(table, columns, frame, self.where, cache_gib, validation_size)
            self._identity = f"{path_or_id} {split} {table._fingerprint}"

    @property
    def count(self) -> int:
        """Return how many pictures can be used; not of a stream."""
        return len(self._numbered())

    def batch(self, step: int) -> dict[str, Any]:
        return self.pictures.batch(step, self.batch_size, self.seed)

    def validation_batch(self) -> dict[str, Any] | None:
        return self.pictures.validation_batch()

    def rows(self, index: Iterable[int]) -> dict[str, Any]:
        """Return usable pictures by number, cropped in the centre and not mirrored; not of a stream."""
        return self._numbered().rows(index)

    def fingerprint(self) -> str:
        """Return a digest of the data set's version, captions and framing; not of a stream."""
        return self._numbered().fingerprint(self._identity)

    def _numbered(self) -> Gallery:
        if isinstance(self.pictures, Gallery):
            return self.pictures
        raise DataError(f"{self.where} is a stream, whose pictures have no numbers: use streaming=false.")


@dataclass(frozen=True)
class _Columns:
    """Name the columns of pictures and captions, with what makes a caption of a value."""

    image: str
    caption: str | None
    text: Callable[[Any], str]

    def entry(self, row: dict[str, Any], name: str) -> Entry:
        cell = row[self.image]
        return Entry(lambda: source_of(cell), self.text(row[self.caption]) if self.caption else "", name)


def load_table(path_or_id: str, split: str, streaming: bool, name: str | None, revision: str | None) -> Any:
    """Return a split of a data set on this machine or the hub. Raises DataError where it cannot be had."""
    import datasets

    path = Path(path_or_id)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(path_or_id)
            table = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
            return table.to_iterable_dataset() if streaming else table
        if path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files={split: path_or_id}, split=split, streaming=streaming)
        return datasets.load_dataset(path_or_id, name, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # datasets raises whatever its file systems and readers do
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"The data set {path_or_id} with the split '{split}' cannot be loaded ({reason}): check its name, its "
            "split and the network, or give a local folder."
        ) from error


def as_stored(table: Any, column: str, where: str) -> Any:
    """Return the data set with its pictures as they are stored, so that the size is checked before decoding."""
    import datasets

    if table.features is None:  # streams of some formats learn their columns from their first row
        table = table._resolve_features()
    features = table.features
    if column not in features:
        near = nearest(column, features) or "."
        raise DataError(f"{where} has no column '{column}'{near} Its columns: {', '.join(features)}.")
    kind = features[column]
    if isinstance(kind, datasets.Image):
        return table.cast_column(column, datasets.Image(decode=False))
    stored = isinstance(kind, dict) and "bytes" in kind
    if not stored and getattr(kind, "dtype", "") not in ("binary", "large_binary"):
        raise DataError(f"The column '{column}' of {where} holds {kind}, not pictures: name the one that does.")
    return table


def source_of(cell: Any) -> Source:
    """Return the bytes or the file of one picture; no bytes where the cell is empty."""
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if data is None and path and "://" in path:
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as stream:
            return stream.read()
    if data is None and path:
        return Path(path)
    return data or b""


def _captions(table: Any, column: str | None, where: str) -> tuple[str | None, Callable[[Any], str]]:
    """Return the column of captions and what makes a caption of its values; no column where there is none."""
    import datasets

    features = table.features
    if column == "auto":
        column = next((name for name in (*COLUMNS, "label") if name in features), None)
        log.info("%s: %s", where, f"captions from the column '{column}'" if column else "no captions")
    if column is None:
        return None, one_line
    if column not in features:
        near = nearest(column, features) or "."
        raise DataError(f"{where} has no column '{column}'{near} Its columns: {', '.join(features)}.")
    kind = features[column]
    if isinstance(kind, datasets.ClassLabel):
        classes = [name.replace("_", " ") for name in kind.names]
        return column, lambda value: "" if value in (None, -1) else classes[value]
    if getattr(getattr(kind, "feature", kind), "dtype", "") not in ("string", "large_string"):
        raise DataError(
            f"The column '{column}' of {where} holds {kind}, not captions: name another caption_column, or null."
        )
    return column, _text


def _text(value: str | list[str] | None) -> str:
    if isinstance(value, list):
        value = value[0] if value else ""
    return one_line(value or "")


def _gallery(
    table: Any, columns: _Columns, frame: Frame, where: str, cache_gib: float, validation_size: int
) -> Gallery:
    captions = [columns.text(value) for value in table[columns.caption]] if columns.caption else [""] * len(table)
    return Gallery(
        lambda places: [source_of(cell) for cell in table[list(places)][columns.image]],
        [f"row {row}" for row in range(len(table))],
        captions,
        frame,
        where=where,
        cache_gib=cache_gib,
        validation_size=validation_size,
    )


def _stream(
    table: Any, columns: _Columns, frame: Frame, where: str, shuffle_buffer: int, validation_size: int
) -> Stream:
    held = table.take(validation_size)
    rest = table.skip(validation_size) if validation_size else table  # skipping fixes the order of a set's files

    def epoch(seed: int, number: int) -> Iterator[Entry]:
        rows = rest
        if shuffle_buffer > 1:
            rows = rest.shuffle(seed=seed, buffer_size=shuffle_buffer)
            rows.set_epoch(number)
        return (columns.entry(row, f"row {i} of epoch {number}") for i, row in enumerate(rows))

    def validation() -> Iterator[Entry]:
        return (columns.entry(row, f"row {i}") for i, row in enumerate(held))

    return Stream(epoch, frame, where=where, held=validation)
