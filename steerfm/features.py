"""Embeddings of pictures: what Fréchet and kernel distances, precision, Vendi score and similarity rewards look at.

Any callable from pictures (B, C, H, W) in [0, 1] to vectors (B, D) is a feature network. A distance is as blind as
its features: figures of two networks, or of two ways of resizing, never compare.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from steerfm.errors import CheckpointError, DataError
from steerfm.images import resize

INCEPTION_FILE = "inception_v3_google-0cc3c7bd.pth"
INCEPTION_SOURCE = f"https://download.pytorch.org/models/{INCEPTION_FILE}"
INCEPTION_SIZE, INCEPTION_CLASSES, INCEPTION_FEATURES = 299, 1000, 2048
SLACK = 1e-3  # how far outside [0, 1] rounding may take a pixel


class Features(Protocol):
    """Embed pictures (B, C, H, W) in [0, 1], or points (B, d), as vectors (B, D), each on its own."""

    def __call__(self, images: Tensor, /) -> Tensor: ...


def pixels(images: Tensor) -> Tensor:
    """Return the pictures themselves as vectors (B, C * H * W): the feature network when there is none."""
    return images.flatten(1)


class NetworkFeatures(nn.Module):
    """Embed pictures by a network, frozen and in evaluation mode; gradients still reach the pictures.

    network: a module that takes (B, C, H, W) and returns (B, D), or (B, D, h, w) whose places are averaged. The
    pictures are resized to `size` (height, width) if given, bilinear and antialiased, repeated to three channels if
    grey and `channels` is 3, then (x - mean) / std by channel. They are moved to the network's device, and
    computed in float32 whatever autocast says.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        size: tuple[int, int] | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        channels: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.size = size
        self.channels = channels
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> NetworkFeatures:
        """Stay in evaluation mode, whatever the module that holds this one does."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings of pictures in [0, 1]; (B, D)."""
        x = images.to(self.mean.device, torch.float32)
        if self.channels == 3 and x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if self.channels is not None and x.shape[1] != self.channels:
            raise DataError(f"This feature network needs pictures of {self.channels} channels, got {x.shape[1]}.")
        if self.size is not None:
            x = resize(x, self.size, "bilinear")
        with torch.autocast(x.device.type, enabled=False):
            found = self.network((x - self.mean) / self.std)
        return found.mean((2, 3)) if found.ndim == 4 else found


@torch.no_grad()
def extract(features: Features, images: Tensor, batch_size: int = 256) -> Tensor:
    """Return the embeddings (N, D) of all pictures (N, C, H, W) in [0, 1], in float64 on the CPU.

    Points (N, d) of any range pass too. Raises DataError for no pictures, for pictures in model space, and for
    embeddings that are not (B, D) or not finite.
    """
    if images.ndim < 2 or len(images) == 0 or batch_size < 1:
        raise DataError(
            f"Features need pictures (N, C, H, W) and a batch size, got {tuple(images.shape)}, {batch_size}."
        )
    if images.ndim == 4:
        _check_range(images)
    return torch.cat([_embed(features, batch) for batch in images.split(batch_size)])


def _check_range(images: Tensor) -> None:
    low, high = (float(bound) for bound in images.aminmax())
    if not (low >= -SLACK and high <= 1 + SLACK):
        raise DataError(
            f"Features see pictures in [0, 1], got values in [{low:g}, {high:g}]: decode them, flow_map.decode(x0)."
        )


def _embed(features: Features, batch: Tensor) -> Tensor:
    found = features(batch)
    if found.ndim != 2 or len(found) != len(batch):
        raise DataError(f"A feature network returns ({len(batch)}, D) for {len(batch)} rows, got {tuple(found.shape)}.")
    if not bool(found.isfinite().all()):
        raise DataError("A feature network returned values that are not finite, for pictures that are: check it.")
    return found.double().cpu()


def inception(path: str | Path, device: torch.device | str = "cpu") -> NetworkFeatures:
    """Return torchvision's Inception v3, up to its 2048 pooled features, with weights from a local file.

    path: torchvision's own `inception_v3_google-0cc3c7bd.pth` (IMAGENET1K_V1), or the same tensors as safetensors.
    Pictures become 299 x 299, bilinear and antialiased, in [-1, 1]. Nothing is downloaded. A file is loaded once
    and shared by all who ask for it on one device.

    **Not the published FID.** There are two conventions: published figures use the weights that TensorFlow
    released on 2015-12-05, whose network (1008 classes, other pooling layers) torch-fidelity and pytorch-fid
    rebuild; these here are torchvision's port with 1000 classes. Distances are of the same kind and order runs
    alike, but the numbers do not equal published ones. Raises CheckpointError for a file that is missing, damaged
    or of the other network.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(
            f"There are no Inception weights at {file}: download {INCEPTION_SOURCE} (104 MB) on a machine with a "
            "network, put the file where you like, and pass its path."
        )
    return _inception(file.resolve(), file.stat().st_mtime_ns, str(device))


@functools.lru_cache(maxsize=2)
def _inception(file: Path, changed: int, device: str) -> NetworkFeatures:
    from torchvision.models import inception_v3

    tensors = _read_tensors(file)
    _check_inception(tensors, file)
    network = inception_v3(weights=None, aux_logits=False, transform_input=False, init_weights=False)
    needed = {name: tensors[name] for name in network.state_dict() if name in tensors}  # without the auxiliary head
    try:
        network.load_state_dict(needed)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file} does not hold torchvision's Inception v3 ({reason}): use {INCEPTION_FILE}."
        ) from error
    network.fc = nn.Identity()  # type: ignore[assignment]
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    return NetworkFeatures(network, size=size, mean=(0.5,), std=(0.5,), channels=3).to(device)


def _read_tensors(file: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a safetensors file, or of a torch file that holds nothing but tensors."""
    try:
        found: Any = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}): download it again from {INCEPTION_SOURCE}.") from error
    except Exception as error:  # what a damaged file makes torch's reader raise is anybody's guess
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{file} is damaged or holds more than tensors ({reason}): download it again from {INCEPTION_SOURCE}."
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{file} holds no table of tensors: use {INCEPTION_FILE} as torchvision publishes it.")
    return found


def _check_inception(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Refuse the weights of the published FID's network, whose names and shapes fit but for the last layer."""
    head = tensors.get("fc.weight")
    shape = None if head is None else tuple(head.shape)
    if shape != (INCEPTION_CLASSES, INCEPTION_FEATURES):
        raise CheckpointError(
            f"{file} does not hold torchvision's Inception v3: its 'fc.weight' should be "
            f"{(INCEPTION_CLASSES, INCEPTION_FEATURES)}, got {shape}. Use {INCEPTION_SOURCE}; weights with 1008 "
            "classes belong to the published FID's network, which torch-fidelity rebuilds."
        )
