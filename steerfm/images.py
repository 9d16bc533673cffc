"""Pictures: [-1, 1] <-> [0, 1] <-> uint8, resizing that keeps gradients, grids.

Rewards see float pictures in [0, 1], shape (B, C, H, W); networks work in about [-1, 1].
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from steerfm.errors import DataError
from steerfm.files import write_atomic


def to_unit(x: Tensor) -> Tensor:
    """Map [-1, 1] to [0, 1], without clamping."""
    return (x + 1) / 2


def to_model(images: Tensor) -> Tensor:
    """Map [0, 1] to [-1, 1]."""
    return images * 2 - 1


def clamp(images: Tensor) -> Tensor:
    """Clamp to [0, 1] and pass gradients straight through, so that an overshot pixel can still come back."""
    return images + (images.clamp(0, 1) - images).detach()


def to_uint8(images: Tensor) -> np.ndarray:
    """Return pictures (B, C, H, W) in [0, 1] as uint8 arrays (B, H, W, 3); one channel becomes grey RGB.

    Values outside [0, 1] are clamped. Raises DataError for a shape that is not a batch of pictures.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(f"Pictures need the shape (B, 1 or 3, H, W), got {tuple(images.shape)}.")
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def resize(images: Tensor, size: tuple[int, int], method: str = "bicubic") -> Tensor:
    """Resize pictures (B, C, H, W) to `size` = (height, width), antialiased and differentiable, in float32.

    Bicubic stays within 0.0011 of Pillow's; it may overshoot [0, 1] a little (nothing is clamped here).
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images.float()
    with torch.autocast(images.device.type, enabled=False):
        return functional.interpolate(images.float(), size=size, mode=method, antialias=True, align_corners=False)


def grid(images: Tensor, columns: int, padding: int = 1, background: float = 1.0) -> Tensor:
    """Lay pictures (B, C, H, W) out in rows of `columns`; return one picture (C, H', W')."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = images.new_full(
        (channels, rows * (height + padding) + padding, columns * (width + padding) + padding), background
    )
    for i, image in enumerate(images.detach()):
        top = padding + (i // columns) * (height + padding)
        left = padding + (i % columns) * (width + padding)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def encode_png(image: Tensor, scale: int = 1) -> bytes:
    """Return one picture (C, H, W) in [0, 1] as PNG bytes, every pixel drawn `scale` times each way."""
    from PIL import Image

    pixels = to_uint8(image[None])[0]
    picture = Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def save_png(image: Tensor, path: str | Path, scale: int = 1) -> None:
    """Write one picture (C, H, W) in [0, 1] as a PNG file, atomically."""
    write_atomic(Path(path), encode_png(image, scale))
