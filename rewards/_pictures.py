"""Pictures that a reward is given beside those it scores: references, masks and measurements, from tensors or files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from steerfm.errors import RewardError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # no format that runs another program, as EPS
GREY = ("1", "L")
SLACK = 1e-3  # how far outside [0, 1] rounding may take a pixel


def read_picture(source: Tensor | str | Path, what: str) -> Tensor:
    """Return a picture (1 or 3, H, W) in [0, 1], float32, on the CPU; a grey file has one channel.

    `what` names it in errors: "the reference of 'ssim'". Raises RewardError for another shape or range, and for a
    file that is missing, damaged or no picture.
    """
    found = source.detach().float().cpu() if isinstance(source, Tensor) else _read(Path(source).expanduser(), what)
    if found.ndim != 3 or found.shape[0] not in (1, 3) or found.numel() == 0:
        raise RewardError(f"{_upper(what)} is one picture (1 or 3, H, W), got the shape {tuple(found.shape)}.")
    low, high = (float(bound) for bound in found.aminmax())
    if not (low >= -SLACK and high <= 1 + SLACK):
        raise RewardError(f"{_upper(what)} lies in [0, 1], got values in [{low:g}, {high:g}]: decode it first.")
    return found.clamp(0, 1)


def same_size(reference: Tensor, images: Tensor, what: str) -> Tensor:
    """Return the reference (C, H, W) as one of `images` (B, C, H, W). Raises RewardError for another shape."""
    if images.ndim != 4 or images.shape[1:] != reference.shape:
        raise RewardError(
            f"{_upper(what)} has the shape {tuple(reference.shape)} and the pictures are {tuple(images.shape[1:])}: "
            "save it in their size and with as many channels."
        )
    return reference.to(images)


def _read(file: Path, what: str) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    if not file.is_file():
        raise RewardError(f"There is no file {file}: put {what} there, or pass another path.")
    try:
        with Image.open(file, formats=FORMATS) as image:
            pixels = _pixels(image)
    except UnidentifiedImageError as error:
        raise RewardError(f"{file} is no picture, and {what} is one: give one of {', '.join(FORMATS)}.") from error
    except Exception as error:  # what a damaged file makes Pillow raise is anybody's guess
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RewardError(f"{file} cannot be read as {what} ({reason}): save it again.") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _pixels(image: Image.Image) -> np.ndarray:
    """Return a picture (H, W, 1 or 3) in [0, 1], upright and without its transparency."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        return np.asarray(upright).astype(np.float32)[..., None] / 65535
    if upright.mode in ("I", "F"):
        raise ValueError(f"the range of its numbers is unknown, Pillow's mode {upright.mode}")
    flat = upright.convert("L" if upright.mode in GREY else "RGB")
    return np.asarray(flat).astype(np.float32).reshape(flat.height, flat.width, -1) / 255


def _upper(what: str) -> str:
    return what[:1].upper() + what[1:]
