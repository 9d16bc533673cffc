"""The contrastive objective of CLIP where several samples share a caption, and how the pictures it sees are changed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from steerfm.types import Images, Indices, Values


def contrastive(
    images: Tensor, texts: Tensor, image_groups: Indices, text_groups: Indices, scale: Tensor | float
) -> tuple[Values, Values]:
    """Return each picture's loss (B,) and each text's (M,), of embeddings (B, D) and (M, D) of length one.

    -1/|P(i)| sum_{p in P(i)} log softmax_p(scale <image_i, text_p>), P(i) the texts of the picture's group, and the
    same with texts and pictures exchanged. Several pictures of one caption are so each other's positives; counted
    as negatives, as plain InfoNCE would, they would push equal pictures apart (ten captions in a batch of 128).
    With every group once it is the loss of CLIP. Every picture needs a text of its group and the reverse.

    Reference: Radford et al. 2021, arXiv 2103.00020, figure 3; Khosla et al. 2020, arXiv 2004.11362, eq. (2).
    """
    logits = scale * images @ texts.T
    positive = (image_groups[:, None] == text_groups[None, :]).to(logits)
    per_image = -(positive * logits.log_softmax(1)).sum(1) / positive.sum(1)
    per_text = -(positive * logits.log_softmax(0)).sum(0) / positive.sum(0)
    return per_image, per_text


def augment(images: Images, noise: float, shift: int, fade: float, generator: torch.Generator) -> Images:
    """Return pictures in [0, 1], each moved, faded and made noisy by its own random amounts; (B, C, H, W).

    shift: half of the pictures move by up to so many pixels each way, black comes in. fade: intensities are
    multiplied by 1 - fade to 1 + fade. noise: the standard deviation is uniform on [0, noise]. With noise a
    network learns from blurred evidence too, and its gradient in the pixels points along the strokes.
    """
    column = (len(images), 1, 1, 1)
    moved = torch.where(_uniform(column, images, generator) < 0.5, _shifted(images, shift, generator), images)
    faded = moved * (1 + fade * (2 * _uniform(column, images, generator) - 1))
    gaussian = torch.randn(images.shape, generator=generator).to(images)
    return (faded + noise * _uniform(column, images, generator) * gaussian).clamp(0, 1)


def attacked(images: Images, loss: Callable[[Images], Tensor], distance: float, generator: torch.Generator) -> Images:
    """Return pictures in [0, 1], each pixel moved by at most `distance` to where `loss` is higher; (B, C, H, W).

    One step of 1.25 distance along the gradient's sign, from a random start, cut off at `distance`. loss: of a batch,
    a scalar. A network trained on these has no invisible pattern to be fooled with, and its gradient points at what a
    picture shows. Reference: Wong et al. 2020, arXiv 2001.03994, algorithm 3; Santurkar et al. 2019, arXiv 1906.09453.
    """
    start = distance * (2 * _uniform(tuple(images.shape), images, generator) - 1)
    moved = (images + start).clamp(0, 1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(moved), moved)
    step = (start + 1.25 * distance * gradient.sign()).clamp(-distance, distance)
    return (images + step).clamp(0, 1).detach()


def _shifted(images: Images, shift: int, generator: torch.Generator) -> Images:
    count, channels, height, width = images.shape
    padded = functional.pad(images, (shift,) * 4)
    offsets = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator).to(images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    samples = torch.arange(count, device=images.device)[:, None, None, None]
    layers = torch.arange(channels, device=images.device)[:, None, None]
    return padded[samples, layers, rows[:, None, :, None], columns[:, None, None, :]]


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator).to(like)
