"""Inverse problems: how likely a measurement y = A(x) + noise is, if the picture is x.

Model: none; A is inpainting, blur, downsampling, compressed sensing or any callable of one's own. Source: the
likelihood of Chung et al. 2023, arXiv 2209.14687, and the operators of Kawar et al. 2022, arXiv 2201.11793. At
temperature 1 the tilted density p(x) exp(r(x)) is the posterior p(x | y), exactly. Preprocessing: none, pictures in
[0, 1]. Range: up to 0; the constant -n/2 log(2 pi sigma^2) is left out. Licence: as steerfm. Memory: that of A.
Fooled by: a sigma smaller than the true noise, which fits the noise; a sigma in model space, where numbers are twice
as large; what A does not see, which is left to the flow map.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from steerfm.errors import RewardError
from steerfm.reward import Reward
from steerfm.rewards._pictures import read_picture
from steerfm.rewards._transformers import read_tensors

Operator = Callable[[Tensor], Tensor]
TRUNCATE = 4.0  # a Gaussian kernel ends after so many of its widths, as scipy's
MATRICES = 2**31  # apart from the seeds of noise: drawn from one seed, the noise would be the matrix's first numbers


class Measurement(Reward):
    """Score the Gaussian log-likelihood of a measurement: -|y - A(x)|^2 / (2 sigma^2), summed over its numbers.

    `operator` is A, from pictures (B, C, H, W) (or points (B, d)) to (B, ...), for all rows alike. Give y itself as
    `measurement`: a tensor, a picture file or a .safetensors file of one tensor; or a clean `picture` (tensor or
    file), of which y = A(picture) + sigma * noise is taken here, with the noise of `seed` (None: without noise).
    `sigma` is the noise's standard deviation in the units of y. Raises RewardError.
    """

    native_range = (-math.inf, 0.0)

    def __init__(
        self,
        operator: Operator,
        sigma: float,
        measurement: Tensor | str | Path | None = None,
        picture: Tensor | str | Path | None = None,
        *,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if not callable(operator):
            raise RewardError(f"The operator of '{self.name}' is a callable, got {operator!r}: write Mask(...), say.")
        if not (sigma > 0 and math.isfinite(sigma)):
            raise RewardError(f"The noise sigma of '{self.name}' must be above 0, got {sigma}.")
        if (measurement is None) == (picture is None):
            raise RewardError(f"'{self.name}' needs either a measurement= or the picture= to be measured: give one.")
        self.operator = operator
        self.sigma = sigma
        self.measurement: Tensor
        if measurement is not None:
            self.register_buffer("measurement", _given(measurement), persistent=False)
        if picture is not None:
            self.register_buffer("measurement", _measured(picture, operator, sigma, seed), persistent=False)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return log p(y | x) without its constant; (B,)."""
        found = self.operator(images)
        if found.shape[1:] != self.measurement.shape:
            raise RewardError(
                f"'{self.name}' measured the shape {tuple(self.measurement.shape)}, and its operator gives "
                f"{tuple(found.shape[1:])} for pictures {tuple(images.shape[1:])}: the sizes and channels must agree."
            )
        gaps = (found - self.measurement.to(found)).flatten(1)
        return -gaps.square().sum(1) / (2 * self.sigma**2)


class Mask:
    """Inpainting: keep the pixels where `mask` is 1, set those to zero where it is 0.

    A tensor (H, W), (1, H, W) or (C, H, W), or a picture file, of which pixels brighter than 1/2 are kept. Give
    `Measurement` the picture, whole or with its hole, as `picture`, so that what stands in the hole is not read.
    """

    def __init__(self, mask: Tensor | str | Path) -> None:
        seen = mask.detach() if isinstance(mask, Tensor) else read_picture(mask, "the mask").mean(0) > 0.5
        if not ((seen == 0) | (seen == 1)).all():
            raise RewardError("A mask holds 1 where a pixel is seen and 0 elsewhere, got other values: threshold it.")
        if not seen.any():
            raise RewardError("The mask hides every pixel, so that nothing is measured: 1 is seen, 0 is hidden.")
        self.seen = seen

    def __call__(self, images: Tensor) -> Tensor:
        """Return the pictures with hidden pixels black; the shape stays. Raises RewardError for another size."""
        if self.seen.shape[-2:] != images.shape[-2:]:
            raise RewardError(
                f"The mask has the size {tuple(self.seen.shape[-2:])} and the pictures {tuple(images.shape[-2:])}: "
                "save it in theirs."
            )
        return images * self.seen.to(images)


def hole(height: int, width: int, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """Return a mask (height, width) that hides rows [first, end) by columns [first, end), and shows the rest."""
    mask = torch.ones(height, width)
    mask[slice(*rows), slice(*columns)] = 0
    return mask


@dataclass(frozen=True)
class GaussianBlur:
    """Blur by a Gaussian of standard deviation `width`, in pixels; beyond the edge the last pixel goes on."""

    width: float

    def __post_init__(self) -> None:
        if not (self.width > 0 and math.isfinite(self.width)):
            raise RewardError(f"The width of a blur is above 0 pixels, got {self.width}.")

    def __call__(self, images: Tensor) -> Tensor:
        """Return the blurred pictures (B, C, H, W)."""
        images = _pictures(images)
        radius = int(TRUNCATE * self.width + 0.5)
        places = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
        kernel = torch.exp(-0.5 * (places / self.width) ** 2)
        kernel = kernel / kernel.sum()
        padded = functional.pad(images.flatten(0, 1)[:, None], (radius,) * 4, mode="replicate")
        rows = functional.conv2d(padded, kernel[None, None, None])
        return functional.conv2d(rows, kernel[None, None, :, None]).view(images.shape)


@dataclass(frozen=True)
class Downsampling:
    """Downsample to the means of blocks of `factor` x `factor` pixels: super-resolution asks for the inverse."""

    factor: int

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise RewardError(f"The factor of a downsampling is at least 1, got {self.factor}.")

    def __call__(self, images: Tensor) -> Tensor:
        """Return pictures (B, C, H / factor, W / factor). Raises RewardError where the factor does not divide."""
        if _pictures(images).shape[2] % self.factor or images.shape[3] % self.factor:
            raise RewardError(f"Blocks of {self.factor} pixels do not divide pictures of {tuple(images.shape[2:])}.")
        return functional.avg_pool2d(images, self.factor)


@dataclass(frozen=True)
class CompressedSensing:
    """Take `count` random projections of all pixels: a matrix of independent N(0, 1 / count), drawn from `seed`.

    The squared length of a picture is kept on average. The matrix holds count x (C H W) numbers, made once.
    """

    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise RewardError(f"Compressed sensing takes at least 1 measurement, got {self.count}.")

    def __call__(self, images: Tensor) -> Tensor:
        """Return the projections of pictures (B, C, H, W) or points (B, d); (B, count)."""
        rows = images.flatten(1)
        return rows @ _gaussian_matrix(self.count, rows.shape[1], self.seed, rows.device).to(rows.dtype).T


@functools.lru_cache(maxsize=4)
def _gaussian_matrix(count: int, size: int, seed: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is kept must be usable with gradients later
        drawn = torch.randn(count, size, generator=torch.Generator().manual_seed(seed ^ MATRICES))
        return (drawn / math.sqrt(count)).to(device)


def _given(measurement: Tensor | str | Path) -> Tensor:
    """Return the measurement as a float32 tensor. Raises RewardError for a file that is missing or holds another."""
    if isinstance(measurement, Tensor):
        return _finite(measurement.detach())
    file = Path(measurement).expanduser()
    if file.suffix != ".safetensors":
        return read_picture(file, "the measurement")
    if not file.is_file():
        raise RewardError(f"There is no file {file}: put the measurement there, or pass another path.")
    tensors = read_tensors(file)
    if len(tensors) != 1:
        raise RewardError(f"{file} should hold one tensor, the measurement; it holds {len(tensors)}: {list(tensors)}.")
    return _finite(next(iter(tensors.values())).float())


def _finite(measurement: Tensor) -> Tensor:
    if not torch.isfinite(measurement).all():
        raise RewardError("The measurement holds numbers that are not finite: leave out what was not measured.")
    return measurement


def _measured(source: Tensor | str | Path, operator: Operator, sigma: float, seed: int | None) -> Tensor:
    """Return a measurement of a clean picture, or point (d,), with the noise of `seed`."""
    if isinstance(source, Tensor) and source.ndim == 1:
        clean = source.detach()
    else:
        clean = read_picture(source, "the picture to be measured")
    with torch.no_grad():
        y = operator(clean[None])[0]
    if seed is None:
        return y
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)
    return y + sigma * noise


def _pictures(images: Tensor) -> Tensor:
    if images.ndim != 4:
        raise RewardError(f"This operator takes pictures (B, C, H, W), got the shape {tuple(images.shape)}.")
    return images
