"""Likeness to a reference picture: in structure (SSIM), as people see it (LPIPS), or by features such as DINO's.

Model and source: SSIM, Wang et al. 2004, IEEE Trans. Image Processing 13(4), by torchmetrics, without a network.
LPIPS, Zhang et al. 2018, arXiv 1801.03924, github.com/richzhang/PerceptualSimilarity: the published linear weights
come with torchmetrics, the backbone's from a file of torchvision. DINO, Caron et al. 2021, arXiv 2104.14294, and
DINOv2, Oquab et al. 2023, arXiv 2304.07193, by timm or transformers. Preprocessing: none for SSIM and LPIPS, the
model's own for features, in float32, differentiable. Range: SSIM -1 to 1; LPIPS (negated) up to 0, about -0.7 for
unlike pictures; a cosine -1 to 1. Licence: Apache-2.0 (torchmetrics, DINO), BSD-2 (LPIPS), BSD-3 (torchvision).
Memory: none for SSIM; 10 MB for LPIPS "alex", 60 MB for "vgg", 3 MB for "squeeze"; 90 MB for DINO ViT-S.
Fooled by: SSIM, blur that keeps edges, and shifts of one pixel punish; LPIPS and DINO, patterns only networks see.
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from steerfm.errors import RewardError, nearest
from steerfm.reward import Reward
from steerfm.rewards import _image_models
from steerfm.rewards._pictures import read_picture, same_size
from steerfm.rewards._transformers import explained, read_tensors

SMALLEST = {"ssim": 6, "lpips": 32}  # pixels: what the window, and the pooling of the smallest feature map, need
# For each backbone: torchvision's name, its published file, and the layers after which features are compared.
BACKBONES = {
    "alex": ("alexnet", "alexnet-owt-7be5be79.pth", (1, 4, 7, 9, 11)),
    "vgg": ("vgg16", "vgg16-397923af.pth", (3, 8, 15, 22, 29)),
    "squeeze": ("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth", (1, 4, 7, 9, 10, 11, 12)),
}
SOURCE = "https://download.pytorch.org/models/"
# LPIPS's own normalisation of pictures in [-1, 1]
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class SSIM(Reward):
    """Score the structural similarity to a reference, in [-1, 1]; equal pictures score 1.

    `reference`: a tensor (C, H, W) in [0, 1] or a picture file, of the size and channels of the pictures. The window
    is a Gaussian of 1.5 pixels, the constants are 0.01 and 0.03, as in the paper.
    """

    native_range = (-1.0, 1.0)

    def __init__(self, reference: Tensor | str | Path, name: str | None = None) -> None:
        super().__init__(name)
        self.reference: Tensor
        self.register_buffer("reference", read_picture(reference, f"the reference of '{self.name}'"), persistent=False)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the mean of the local similarities; (B,). Raises RewardError for another size."""
        from torchmetrics.functional.image import structural_similarity_index_measure

        reference = same_size(self.reference, images, f"the reference of '{self.name}'")
        _check_size(images, SMALLEST["ssim"], self.name)
        references = reference.expand(images.shape)
        similarity: Any = structural_similarity_index_measure(images, references, data_range=1.0, reduction="none")
        return similarity.reshape(len(images))


class LPIPS(Reward):
    """Score minus the perceptual distance to a reference: 0 for equal pictures, lower for others.

    `reference` as for SSIM, at least 32 pixels each way; grey pictures are read as colour. `weights`: the file that
    torchvision publishes for the backbone ("alex", "vgg" or "squeeze"), such as alexnet-owt-7be5be79.pth, or the
    same tensors as safetensors; only its features are read, the classifier is dropped. Raises RewardError.
    """

    native_range = (-math.inf, 0.0)

    def __init__(
        self, reference: Tensor | str | Path, weights: str | Path, backbone: str = "alex", name: str | None = None
    ) -> None:
        super().__init__(name)
        if backbone not in BACKBONES:
            raise RewardError(
                f"'{self.name}' has no backbone '{backbone}'{nearest(backbone, BACKBONES) or '.'} "
                f"It has: {', '.join(BACKBONES)}."
            )
        self.layers = _backbone(backbone, Path(weights).expanduser())
        self.ends = BACKBONES[backbone][2]
        self.heads = nn.ParameterList(_heads(backbone))
        self.reference: Tensor
        self.register_buffer("reference", read_picture(reference, f"the reference of '{self.name}'"), persistent=False)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return minus the distance of Zhang et al. 2018, eq. (1); (B,). Raises RewardError for another size."""
        reference = same_size(self.reference, images, f"the reference of '{self.name}'")
        _check_size(images, SMALLEST["lpips"], self.name)
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                wanted = self._maps(reference[None])
            maps = zip(self.heads, self._maps(images), wanted, strict=True)
            distances = [(head * (found - there).square()).sum(1).mean((1, 2)) for head, found, there in maps]
        return -torch.stack(distances).sum(0)

    def _maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps (B, K, h, w) of pictures in [0, 1], of length one at every place."""
        shift, scale = (images.new_tensor(values).view(-1, 1, 1) for values in (SHIFT, SCALE))
        x = (2 * images.expand(-1, 3, -1, -1) - 1 - shift) / scale
        maps = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.ends:
                maps.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return maps


class FeatureSimilarity(Reward):
    """Score the cosine between the features of a picture and those of a reference, in [-1, 1].

    `features`: any callable from pictures (B, C, H, W) in [0, 1] to vectors (B, D), such as `image_features` (DINO)
    or those of steerfm.features. `reference`: a tensor (C, H, W) in [0, 1] or a picture file of any size.
    """

    native_range = (-1.0, 1.0)

    def __init__(
        self, reference: Tensor | str | Path, features: Callable[[Tensor], Tensor], name: str | None = None
    ) -> None:
        super().__init__(name)
        if not callable(features):
            raise RewardError(f"The features of '{self.name}' are a callable, got {features!r}: see image_features.")
        self.features = features
        picture = read_picture(reference, f"the reference of '{self.name}'")
        self.embedded: Tensor
        with torch.inference_mode(False), torch.no_grad():
            self.register_buffer("embedded", _embed(features, picture[None]), persistent=False)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the cosine of each picture; (B,)."""
        embedded = _embed(self.features, images)
        return (embedded * self.embedded.to(embedded)).sum(1)


def image_features(model: str | Path, cache_dir: str | Path | None = None) -> _image_models.ImageModel:
    """Return the features of a model of timm or transformers: "facebook/dinov2-small", another hub id, or a folder.

    A module from pictures (B, 1 or 3, H, W) in [0, 1] to (B, D), with the model's own preprocessing: for `extract` in
    steerfm.features too. `cache_dir` is the hub's cache. Raises RewardError where the model cannot be loaded.
    """
    return _image_models.load_features(model, cache_dir)


def _embed(features: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return features of length one; (B, D). Raises RewardError for another shape."""
    found = features(images)
    if found.ndim != 2 or len(found) != len(images):
        raise RewardError(f"Features are ({len(images)}, D) for {len(images)} pictures, got {tuple(found.shape)}.")
    return functional.normalize(found, dim=1)


def _check_size(images: Tensor, smallest: int, name: str) -> None:
    if min(images.shape[2:]) < smallest:
        raise RewardError(f"'{name}' needs pictures of at least {smallest} pixels, got {tuple(images.shape[2:])}.")


def _backbone(name: str, weights: Path) -> nn.Sequential:
    """Return the feature layers of a network of torchvision, from its published file; the classifier is dropped."""
    import torchvision

    builder, file, ends = BACKBONES[name]
    if not weights.is_file():
        raise RewardError(
            f"There are no weights at {weights}: download {SOURCE}{file} where you like and pass weights=FILE."
        )
    with torch.device("meta"):  # the classifier, which is not read, is the largest part
        layers = getattr(torchvision.models, builder)(weights=None).features[: ends[-1] + 1]
    prefix = "features."
    tensors = {key: value for key, value in read_tensors(weights).items() if not key.startswith("classifier.")}
    strange = [key for key in tensors if not key.startswith(prefix)]
    found = {key.removeprefix(prefix): value for key, value in tensors.items()}
    try:
        layers.load_state_dict(found, assign=True)
    except RuntimeError as error:
        reason = f"'{strange[0]}' is none of its keys" if strange else " ".join(str(error).split())[:300]
        raise RewardError(f"{weights} does not hold torchvision's {builder} ({reason}): use {SOURCE}{file}.") from error
    return layers.float().eval()


def _heads(backbone: str) -> list[Tensor]:
    """Return the published weights of each feature map's channels, (K, 1, 1), that come with torchmetrics."""
    resource = importlib.resources.files("torchmetrics.functional.image") / "lpips_models" / f"{backbone}.pth"
    with importlib.resources.as_file(resource) as file, explained(file):
        tensors = read_tensors(file)
        return [tensors[f"lin{i}.model.1.weight"][0] for i in range(len(BACKBONES[backbone][2]))]
