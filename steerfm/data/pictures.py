"""One picture from bytes to pixels: refused before it can do harm, with the right colours, framed to one size.

Whatever is wrong with a picture is an `Unusable` with the reason, so that whoever reads many can skip and name it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from steerfm import images
from steerfm.errors import ConfigError, DataError, nearest

EXTENSIONS = (".png", ".apng", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # no format that runs another program, as EPS
THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes without holding Python's lock
MAX_SIDE = 16_384  # pixels; what is longer is a scroll or a bomb
BYTES_PER_PIXEL = 8  # four channels of 16 bits: a file may not be larger than its largest picture uncompressed

Source = Path | bytes
Pixels = np.ndarray  # (C, H, W) uint8


class Unusable(Exception):
    """Say why one picture cannot be used; whoever reads many skips it and names it."""


@dataclass(frozen=True)
class Frame:
    """Say how pictures are read and brought to one size.

    size: one number, or height and width. channels: 3, or 1 for grey. The shorter side is fitted (bicubic,
    antialiased) and the longer one cropped: crop "center", or "random" anew at every step. flip: mirror half of
    the training pictures. background: a colour name or #rrggbb behind transparent pixels. animated: "skip", or
    "first" for the first frame or page. max_pixels: a larger picture is never decoded. Raises ConfigError.
    """

    size: int | Sequence[int]
    channels: int = 3
    crop: str = "center"
    flip: bool = False
    background: str = "white"
    animated: str = "skip"
    max_pixels: int = 2**26

    def __post_init__(self) -> None:
        shape = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        if len(shape) != 2 or min(shape) < 1:
            raise ConfigError(f"size is one number or [height, width], each at least 1, got {self.size}.")
        if self.channels not in (1, 3):
            raise ConfigError(f"channels is 3, or 1 for grey, got {self.channels}.")
        for name, choices in (("crop", ("center", "random")), ("animated", ("skip", "first"))):
            value = getattr(self, name)
            if value not in choices:
                near = nearest(value, choices) or "."
                raise ConfigError(f"{name} is '{choices[0]}' or '{choices[1]}', got '{value}'{near}")
        if shape[0] * shape[1] > self.max_pixels:
            raise ConfigError(f"max_pixels={self.max_pixels} is fewer than the {shape[0]}x{shape[1]} asked for.")
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ConfigError(f"background is a colour such as white or #808080, got '{self.background}'.") from error
        object.__setattr__(self, "size", (int(shape[0]), int(shape[1])))

    @property
    def shape(self) -> tuple[int, int]:
        """Return (height, width)."""
        return self.size  # type: ignore[return-value]

    def read(self, source: Source) -> Pixels:
        """Return a picture's pixels, (C, H, W) uint8; for random crops before cropping, so one side may be longer.

        Raises Unusable for a picture that is damaged, too large or of an unknown kind, and DataError where the
        system cannot read the file at all: another process might, and the two would train on different data.
        """
        data = _bytes(source, self.max_pixels * BYTES_PER_PIXEL)
        try:
            with self._opened(data) as image:
                upright = ImageOps.exif_transpose(image)
                wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
            flat = _flat(_eight_bits(upright) if wide else upright, self.background)
            fitted = self._fit(flat.convert("L") if self.channels == 1 else flat)
        except (Unusable, MemoryError):
            raise
        except UnidentifiedImageError as error:
            raise Unusable("not a picture") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise Unusable(f"too large: {error}") from error
        except Exception as error:  # what a damaged file makes Pillow raise is anybody's guess
            raise Unusable(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from error
        pixels = np.array(fitted)
        return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def stack(self, pictures: Sequence[Pixels], draws: np.ndarray | None = None) -> Tensor:
        """Return pictures as one tensor (B, C, H, W) float32 in [-1, 1].

        draws: (B, 3) uniform numbers in [0, 1) that place the crop (top, left) and decide on flipping; without
        them the crop is central and nothing is flipped.
        """
        if draws is None:
            draws = np.tile((0.5, 0.5, 1.0), (len(pictures), 1))
        chosen = [self._cut(picture, *draw) for picture, draw in zip(pictures, draws, strict=True)]
        return images.to_model(torch.from_numpy(np.stack(chosen)).float() / 255)

    def _opened(self, data: bytes) -> Image.Image:
        """Return the picture behind the bytes with its header checked, not yet decoded."""
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > self.max_pixels:
            raise Unusable(f"too large: {width}x{height} pixels, more than max_pixels={self.max_pixels}")
        if max(width, height) > MAX_SIDE:
            raise Unusable(f"too large: {width}x{height} pixels, a side longer than {MAX_SIDE}")
        several = getattr(image, "n_frames", 1) > 1 and image.format != "MPO"  # a camera's JPEG with a preview
        if several and self.animated == "skip":
            raise Unusable("animated or of several pages; animated=first takes the first")
        if image.format in ("JPEG", "MPO"):  # decoded at a half, quarter or eighth, if that is twice what is asked for
            image.draft(image.mode, (2 * max(self.shape), 2 * max(self.shape)))
        if image.format == "PNG":  # its checksums find what decoding may not
            image.verify()
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        return image

    def _fit(self, image: Image.Image) -> Image.Image:
        """Return the picture resized to cover the frame; cropped too, unless crops are random."""
        height, width = self.shape
        scale = min(image.width / width, image.height / height)
        if self.crop == "random":
            covering = max(width, round(image.width / scale)), max(height, round(image.height / scale))
            if covering[0] * covering[1] > self.max_pixels:
                raise Unusable(f"too long and narrow: {image.width}x{image.height} pixels")
            return image.resize(covering, Image.Resampling.BICUBIC)
        left, top = max(0.0, (image.width - width * scale) / 2), max(0.0, (image.height - height * scale) / 2)
        box = (left, top, image.width - left, image.height - top)
        return image.resize((width, height), Image.Resampling.BICUBIC, box=box)

    def _cut(self, picture: Pixels, top: float, left: float, mirror: float) -> Pixels:
        height, width = self.shape
        y = int(top * (picture.shape[1] - height + 1))
        x = int(left * (picture.shape[2] - width + 1))
        cut = picture[:, y : y + height, x : x + width]
        return cut[:, :, ::-1] if self.flip and mirror < 0.5 else cut


def read_all(frame: Frame, sources: Sequence[Source]) -> list[Pixels | Unusable]:
    """Return each picture's pixels, or why it cannot be used, in order; several are decoded at a time."""

    def attempt(source: Source) -> Pixels | Unusable:
        try:
            return frame.read(source)
        except Unusable as reason:
            return reason

    if len(sources) < 2:
        return [attempt(source) for source in sources]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(attempt, sources))


def _bytes(source: Source, limit: int) -> bytes:
    if isinstance(source, bytes):
        size, data = len(source), source
    else:
        try:
            size = source.stat().st_size
            data = b"" if size > limit else source.read_bytes()
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"The picture {source} cannot be read ({reason}): mend its rights or remove it.") from error
    if size > limit:
        raise Unusable(f"too large: a file of {size} bytes, more than {limit}")
    if size == 0:
        raise Unusable("empty")
    return data


def _flat(image: Image.Image, background: str) -> Image.Image:
    """Return the picture in 8-bit RGB, on the background where it is transparent."""
    if image.mode in ("I", "F"):
        raise Unusable(f"the range of its numbers is unknown (Pillow's mode {image.mode})")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, ImageColor.getrgb(background))
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a 16-bit grey picture with 8 bits; Pillow's own conversion makes all above 255 white."""
    values: Any = np.asarray(image).astype(np.float32)
    return Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))
