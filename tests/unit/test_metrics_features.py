"""Feature networks: any callable, a frozen network, and Inception weights from a file made here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import inception_v3
from torchvision.transforms import functional

from steerfm import features, metrics
from steerfm.errors import CheckpointError, DataError
from steerfm.features import NetworkFeatures, extract, inception, pixels


def pictures(n: int = 5, channels: int = 3, size: int = 8) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))


class Convolution(nn.Module):
    """A small network with a part that depends on the batch while training."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_pixels_are_the_default_network() -> None:
    x = pictures()
    found = extract(pixels, x, batch_size=2)
    assert found.dtype == torch.float64
    assert torch.equal(found, x.flatten(1).double())
    points = torch.randn(6, 2)
    assert torch.equal(extract(pixels, points), points.double())


def test_any_callable_is_a_feature_network() -> None:
    x, sizes = pictures(), []

    def colour(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return images.mean((2, 3))

    found = extract(colour, x.requires_grad_(), batch_size=2)
    assert sizes == [2, 2, 1]
    assert not found.requires_grad
    assert torch.allclose(found, x.detach().mean((2, 3)).double())
    assert metrics.frechet_distance(found, found) == pytest.approx(0, abs=1e-9)


def test_network_is_frozen_and_its_features_depend_on_no_neighbour() -> None:
    network = NetworkFeatures(Convolution())
    holder = nn.Sequential(network).train()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in holder.parameters())
    x = pictures()
    assert torch.allclose(extract(network, x, 5), extract(network, x, 1), atol=1e-6)
    inner = network.network(x)
    assert torch.allclose(extract(network, x), inner.mean((2, 3)).double(), atol=1e-6)  # places are averaged


def test_network_sees_normalised_pictures_of_its_size() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    network = NetworkFeatures(nn.Flatten(), size=(4, 4), mean=mean, std=std, channels=3)
    x = pictures()
    expected = functional.normalize(functional.resize(x, [4, 4], antialias=True), list(mean), list(std))
    assert torch.allclose(network(x), expected.flatten(1), atol=1e-5)
    grey = pictures(channels=1)
    assert torch.equal(network(grey), network(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(DataError, match="3 channels, got 2"):
        network(pictures(channels=2))


def test_gradients_reach_the_pictures_in_float32_under_autocast() -> None:
    network = NetworkFeatures(Convolution())
    x = pictures().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(x)
    assert found.dtype == torch.float32
    found.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("images", "network", "said"),
    [
        (pictures() * 2 - 1, pixels, r"in \[0, 1\]"),
        (pictures() * math.nan, pixels, r"in \[0, 1\]"),
        (pictures()[:0], pixels, "need pictures"),
        (pictures(), lambda x: x, "returns"),
        (pictures(), lambda x: x.flatten(1)[:1], "returns"),
        (pictures(), lambda x: x.flatten(1).log() * 0 / 0, "not finite"),
    ],
)
def test_unfit_input_is_one_sentence(images: Tensor, network, said: str) -> None:
    with pytest.raises(DataError, match=said):
        extract(network, images)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """Return a file like torchvision's own, with an auxiliary head, and the network it was saved from."""
    torch.manual_seed(0)
    network = inception_v3(weights=None, aux_logits=True, transform_input=True, init_weights=False).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= math.sqrt(6)  # from torch's default to He's scale, so that the signal gets through
    path = tmp_path_factory.mktemp("inception") / features.INCEPTION_FILE
    torch.save(network.state_dict(), path)
    return path, network


def test_inception_is_torchvisions(weights: tuple[Path, nn.Module]) -> None:
    """Against torchvision's network with its own ImageNet normalisation, which it undoes itself."""
    path, network = weights
    found = inception(path)
    x = pictures(2, size=32)
    ours = extract(found, x)
    assert ours.shape == (2, features.INCEPTION_FEATURES)
    resized = functional.resize(x, [299, 299], antialias=True)
    normalised = functional.normalize(resized, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    pooled: list[Tensor] = []
    network.avgpool.register_forward_hook(lambda module, inputs, output: pooled.append(output.flatten(1)))  # type: ignore[union-attr]
    with torch.no_grad():
        network(normalised)
    assert float((pooled[0][0] - pooled[0][1]).abs().max()) > 1e-3 * float(pooled[0].abs().max())
    assert torch.allclose(ours, pooled[0].double(), atol=1e-4 * float(pooled[0].abs().max()))
    assert inception(str(path)) is found  # loaded once, shared


def test_inception_of_another_file_is_refused(weights: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, _ = weights
    with pytest.raises(CheckpointError, match=r"download https://download.pytorch.org.*inception_v3_google"):
        inception(tmp_path / "absent.pth")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        inception(cut)
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match="damaged"):
        inception(tmp_path / "cut.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="no table of tensors"):
        inception(tmp_path / "list.pth")
    save_file({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "published.safetensors")
    with pytest.raises(CheckpointError, match=r"got \(1008, 2048\).*torch-fidelity"):
        inception(tmp_path / "published.safetensors")
    save_file({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match="Missing key"):
        inception(tmp_path / "part.safetensors")
