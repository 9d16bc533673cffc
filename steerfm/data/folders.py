"""A folder of pictures with captions."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from steerfm.data.batches import StepDataModule
from steerfm.data.captions import read_captions
from steerfm.data.gallery import Gallery, check_sizes, listed
from steerfm.data.pictures import EXTENSIONS, Frame
from steerfm.errors import DataError

log = logging.getLogger(__name__)


class ImageFolder(StepDataModule):
    """Batches {"x0": (B, C, H, W) in [-1, 1], "prompt": captions} from the pictures below a folder.

    Every picture is decoded once at the start; those that cannot be used are skipped and named in the log.
    captions: "auto", "names", "none" or a table's path, see `steerfm.data.captions`. size, channels, crop, flip,
    background, animated, max_pixels: see `steerfm.data.pictures.Frame`. batch_size: pictures a step, over all
    processes. cache_gib: GiB of memory for decoded pictures, in each process; the others are decoded as they are
    needed. validation_size: pictures kept from training for the fixed validation batch; 0 is none.
    Raises DataError for a folder that is missing, empty, or without a usable picture.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        size: int | Sequence[int] = 64,
        captions: str = "auto",
        batch_size: int = 64,
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
        frame = Frame(size, channels, crop, flip, background, animated, max_pixels)
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.seed = seed
        names, texts = _find(self.folder, captions)
        self.gallery = Gallery(
            lambda places: [self.folder / names[place] for place in places],
            names,
            texts,
            frame,
            where=str(self.folder),
            cache_gib=cache_gib,
            validation_size=validation_size,
        )
        bare = [] if captions == "none" else [names[i] for i in self.gallery.used if not texts[i]]
        if 0 < len(bare) < len(self.gallery):
            log.warning("%d pictures in %s have no caption, so their prompt is empty: %s",
                        len(bare), self.folder, listed(bare))  # fmt: skip

    @property
    def count(self) -> int:
        """Return how many pictures can be used."""
        return len(self.gallery)

    def batch(self, step: int) -> dict[str, Any]:
        return self.gallery.batch(step, self.batch_size, self.seed)

    def validation_batch(self) -> dict[str, Any] | None:
        return self.gallery.validation_batch()

    def rows(self, index: Iterable[int]) -> dict[str, Any]:
        """Return usable pictures by number, in the order of their names, cropped in the centre and not mirrored."""
        return self.gallery.rows(index)

    def fingerprint(self) -> str:
        """Return a digest of the pictures, their captions and framing; it looks at sizes and times, not at pixels."""
        stats = [(self.folder / self.gallery.names[place]).stat() for place in self.gallery.used]
        return self.gallery.fingerprint(*(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats))


def _find(folder: Path, captions: str) -> tuple[list[str], list[str]]:
    """Return the pictures below a folder, as sorted paths with slashes, and their captions."""
    files = _files(folder)
    pictures = [name for name in files if PurePosixPath(name).suffix.lower() in EXTENSIONS]
    if not pictures:
        got = f"{len(files)} other files, such as {files[0]}" if files else "nothing"
        raise DataError(f"The folder {folder} holds no pictures, but {got}: give {', '.join(EXTENSIONS)} files.")
    return pictures, read_captions(folder, files, pictures, captions)


def _files(folder: Path) -> list[str]:
    """Return the files below a folder, hidden ones left out (macOS leaves a ._a.png beside every a.png)."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"The folder of pictures {folder} {what}: give the folder that your pictures are in.")

    def refuse(error: OSError) -> None:
        raise DataError(f"The folder {error.filename} cannot be listed ({error.strerror}): mend its rights.")

    found = []
    for top, inner, names in os.walk(folder, onerror=refuse):
        inner[:] = [name for name in inner if not name.startswith(".")]
        below = Path(top).relative_to(folder)
        found += [(below / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)
