"""Seven rewards in a line of arithmetic each: what one tries first, and what one tests with.

Model: none. Range: see each. Licence: as steerfm. Memory: none. Fooled by: everything that changes the one
number they read; a flat white picture is the brightest of all.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steerfm.errors import RewardError
from steerfm.images import to_uint8
from steerfm.reward import Reward


class Brightness(Reward):
    """Score the mean of all pixels, in [0, 1]."""

    native_range = (0.0, 1.0)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the mean over channels and pixels; (B,)."""
        return _pictures(images, self.name).mean((1, 2, 3))


class Redness(Reward):
    """Score how much the red channel exceeds the mean of green and blue, in [-1, 1]."""

    native_range = (-1.0, 1.0)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return mean(red) - mean(green, blue); (B,). Raises RewardError unless the pictures have 3 channels."""
        if _pictures(images, self.name).shape[1] != 3:
            raise RewardError(f"'{self.name}' needs pictures of 3 channels, got {images.shape[1]}: grey has no colour.")
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


class Contrast(Reward):
    """Score the standard deviation of the grey values (root mean square contrast), in [0, 1/2]."""

    native_range = (0.0, 0.5)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the standard deviation over pixels of the mean over channels; (B,)."""
        grey = _pictures(images, self.name).mean(1)
        return (grey.var((1, 2), unbiased=False) + 1e-12).sqrt()  # 1e-12: a gradient at flat pictures too


class Symmetry(Reward):
    """Score likeness to the mirror image, left for right: minus the mean squared difference, in [-1, 0]."""

    native_range = (-1.0, 0.0)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return -mean((x - mirrored x)^2); (B,)."""
        return -(_pictures(images, self.name) - images.flip(3)).square().mean((1, 2, 3))


class Sharpness(Reward):
    """Score the variance of the Laplacian of the grey values, in [0, 16]: 0 where all is smooth or flat.

    Source: Pertuz et al. 2013, Pattern Recognition 46(5), "Analysis of focus measure operators for shape-from-focus"
    (variance of Laplacian). A differentiable stand-in for the size as a JPEG file; noise is sharpest of all.
    """

    native_range = (0.0, 16.0)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the variance over inner pixels; (B,). Raises RewardError for pictures under 3 pixels."""
        grey = _pictures(images, self.name).mean(1)
        if min(grey.shape[1:]) < 3:
            raise RewardError(f"'{self.name}' needs pictures of at least 3x3 pixels, got {tuple(grey.shape[1:])}.")
        beside = grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] + grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1]
        return (beside - 4 * grey[:, 1:-1, 1:-1]).var((1, 2), unbiased=False)


class Colourfulness(Reward):
    """Score how much colours spread and how far they are from grey: 0 for grey, 0.13 for average, 0.4 for extreme.

    Source: Hasler and Suesstrunk 2003, Proc. SPIE 5007, "Measuring colourfulness in natural images"; their scale
    is 255 times this one.
    """

    native_range = (0.0, 1.17)  # sqrt(1.25 * 1.09): half red, half cyan, nearly

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return sigma + 0.3 mu of red-green and yellow-blue; (B,). Raises RewardError unless there are 3 channels."""
        if _pictures(images, self.name).shape[1] != 3:
            raise RewardError(f"'{self.name}' needs pictures of 3 channels, got {images.shape[1]}: grey has no colour.")
        red, green, blue = images.unbind(1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], 1)
        sigma = (opponents.var((2, 3), unbiased=False).sum(1) + 1e-12).sqrt()  # 1e-12: a gradient at grey pictures too
        mu = (opponents.mean((2, 3)).square().sum(1) + 1e-12).sqrt()
        return sigma + 0.3 * mu


class JPEGSize(Reward):
    """Score the size of the picture as a JPEG file, in kB (1000 bytes): a black box. Negate it for small files.

    Source: Black et al. 2024, arXiv 2305.13301, whose quality is 95 too.
    """

    name = "jpeg_size"
    differentiable = False

    def __init__(self, quality: int = 95, name: str | None = None) -> None:
        super().__init__(name)
        if not 1 <= quality <= 95:
            raise RewardError(f"JPEG quality lies in [1, 95], got {quality}.")
        self.quality = quality

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the file sizes; (B,)."""
        pixels = to_uint8(_pictures(images, self.name))
        return torch.tensor([self._size(picture) for picture in pixels], device=images.device)

    def _size(self, pixels: Any) -> float:
        from PIL import Image

        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, format="JPEG", quality=self.quality)
        return stream.tell() / 1000


def _pictures(images: Tensor, name: str) -> Tensor:
    if images.ndim != 4:
        raise RewardError(f"'{name}' needs pictures (B, C, H, W), got the shape {tuple(images.shape)}.")
    return images
