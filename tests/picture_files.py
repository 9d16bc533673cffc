"""Files of pictures, made as they are needed, shared by the tests of what reads them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from steerfm.data import batches


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    """Let the data modules believe that they run in process `rank` of `count`."""
    monkeypatch.setattr(batches, "world", lambda: (rank, count))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noisy(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def coloured(folder: Path, count: int, side: int = 4) -> Path:
    """Write pictures a000.png, a001.png, ...; picture i is grey of the level i."""
    return write(folder, {f"a{i:03}.png": encoded(Image.new("L", (side, side), i), "PNG") for i in range(count)})


def levels(x0: Tensor) -> list[int]:
    """Return the grey level of each picture of one colour."""
    return [round(float(value)) for value in (x0.mean((1, 2, 3)) + 1) * 127.5]
