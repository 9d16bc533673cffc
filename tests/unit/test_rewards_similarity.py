"""Likeness to a reference: SSIM against scipy, LPIPS against torchmetrics, features against timm and transformers."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter
from tiny_image_models import assert_same_pipeline, natural, pil, save_backbone, save_timm, save_transformers
from torch import Tensor

from steerfm import config
from steerfm.errors import RewardError
from steerfm.reward import check
from steerfm.rewards.similarity import BACKBONES, LPIPS, SSIM, FeatureSimilarity, image_features

SIZES = [(64, 64), (48, 100), (131, 90)]
REFERENCE = natural(1, 40, 48, seed=9)[0]


def score(reward, images: Tensor) -> Tensor:
    return reward(images, [""] * len(images)).total


def refused(said: str):
    return pytest.raises(RewardError, match=said)


def faults(reward, images: Tensor) -> list[str]:
    return [finding.message for finding in check(reward, images, list("abcdefgh")[: len(images)]) if finding.fault]


def assert_slope(reward, images: Tensor, step: float) -> None:
    """Compare the gradient along another picture with a central difference, in float64."""
    direction = natural(len(images), *images.shape[2:], seed=5).double() - 0.5
    leaf = images.double().requires_grad_(True)
    (slope,) = torch.autograd.grad(score(reward, leaf).sum(), leaf)
    with torch.no_grad():
        up, down = (score(reward, images.double() + sign * step * direction) for sign in (1, -1))
    assert torch.allclose((slope * direction).sum((1, 2, 3)), (up - down) / (2 * step), rtol=1e-3, atol=1e-6)


# SSIM


def ssim_of(x: np.ndarray, y: np.ndarray) -> float:
    """Return the mean structural similarity of pictures (C, H, W): Wang et al. 2004, eq. (13), window by window."""

    def window(z: np.ndarray) -> np.ndarray:
        return gaussian_filter(z, (0, 1.5, 1.5), mode="mirror", truncate=3.5)

    mx, my = window(x), window(y)
    vx, vy, cov = window(x * x) - mx**2, window(y * y) - my**2, window(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def test_ssim_is_the_papers():
    images = torch.cat([natural(3, 40, 48), (REFERENCE + 0.1 * torch.randn(2, 3, 40, 48)).clamp(0, 1)])
    expected = [ssim_of(x.double().numpy(), REFERENCE.double().numpy()) for x in images]
    assert score(SSIM(REFERENCE), images).tolist() == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.3
    assert float(score(SSIM(REFERENCE), REFERENCE[None])) == pytest.approx(1)


def test_ssim_of_one_picture_has_a_batch():
    assert score(SSIM(REFERENCE[:1]), natural(1, 40, 48)[:, :1]).shape == (1,)


def test_ssim_has_a_gradient_and_passes_the_check():
    assert_slope(SSIM(REFERENCE), natural(2, 40, 48), 1e-4)
    assert faults(SSIM(REFERENCE), natural(4, 40, 48)) == []


def test_references_come_from_files(tmp_path):
    pil(REFERENCE[None])[0].save(tmp_path / "colour.png")
    Image.fromarray(np.full((40, 48), 128, dtype=np.uint8)).save(tmp_path / "grey.png")
    images = natural(2, 40, 48)
    assert torch.allclose(score(SSIM(tmp_path / "colour.png"), images), score(SSIM(REFERENCE), images), atol=1e-6)
    assert score(SSIM(tmp_path / "grey.png"), images[:, :1]).shape == (2,)


def test_references_that_do_not_fit_are_named(tmp_path):
    with refused(r"reference of 'ssim' has the shape \(3, 40, 48\) and the pictures are \(1, 8, 8\)"):
        score(SSIM(REFERENCE), torch.rand(2, 1, 8, 8))
    with refused("at least 6 pixels, got \\(4, 4\\)"):
        score(SSIM(torch.rand(1, 4, 4)), torch.rand(2, 1, 4, 4))
    with refused(r"is one picture \(1 or 3, H, W\), got the shape \(1, 3, 40, 48\)"):
        SSIM(REFERENCE[None])
    with refused(r"lies in \[0, 1\], got values in \[-1, "):
        SSIM(2 * REFERENCE - 1)
    with refused("no file .*none.png: put the reference of 'ssim' there"):
        SSIM(tmp_path / "none.png")


# LPIPS


@pytest.fixture(scope="module")
def alex(tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    save_backbone(path)
    return path


@pytest.mark.parametrize("name", BACKBONES)
def test_lpips_is_torchmetrics(tmp_path, name):
    from torchmetrics.functional.image.lpips import _LPIPS

    save_backbone(tmp_path / "weights.pth", name)
    saved = torch.load(tmp_path / "weights.pth", weights_only=True)
    theirs = _LPIPS(net=name, pnet_rand=True).eval()  # type: ignore[arg-type]
    own = theirs.net.state_dict()
    theirs.net.load_state_dict({key: saved["features." + re.sub(r"^slices?\.?\d+\.", "", key)] for key in own})
    images = natural(3, 40, 48)
    with torch.no_grad():
        expected = -theirs(images, REFERENCE.expand(3, -1, -1, -1), normalize=True).flatten()
    found = score(LPIPS(REFERENCE, tmp_path / "weights.pth", name), images)
    assert torch.allclose(found, expected, rtol=1e-4)
    assert expected.max() < -0.01


def test_lpips_of_the_reference_is_zero_and_grey_is_read_as_colour(alex):
    reward = LPIPS(REFERENCE, alex)
    assert score(reward, REFERENCE[None]).tolist() == [0.0]
    grey = natural(2, 40, 48)[:, :1]
    wide = score(LPIPS(REFERENCE[:1].expand(3, -1, -1), alex), grey.expand(-1, 3, -1, -1))
    assert torch.allclose(score(LPIPS(REFERENCE[:1], alex), grey), wide, rtol=1e-5)


def test_lpips_has_a_gradient_and_passes_the_check(alex):
    assert_slope(LPIPS(REFERENCE, alex).double(), natural(2, 40, 48), 1e-6)
    assert faults(LPIPS(REFERENCE, alex), natural(4, 40, 48)) == []


def test_lpips_takes_safetensors(tmp_path, alex):
    save_file(torch.load(alex, weights_only=True), tmp_path / "weights.safetensors")
    images = natural(1, 40, 48)
    assert torch.equal(
        score(LPIPS(REFERENCE, tmp_path / "weights.safetensors"), images), score(LPIPS(REFERENCE, alex), images)
    )


def test_lpips_refuses_other_weights(tmp_path, alex):
    tensors = torch.load(alex, weights_only=True)
    with refused(r"no weights at .*: download https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"):
        LPIPS(REFERENCE, tmp_path / "none.pth")
    with refused("no backbone 'alexx'; did you mean 'alex'"):
        LPIPS(REFERENCE, alex, "alexx")
    with refused("does not hold torchvision's vgg16"):
        LPIPS(REFERENCE, alex, "vgg")
    torch.save({key: value for key, value in tensors.items() if key != "features.3.bias"}, tmp_path / "partial.pth")
    with refused("does not hold torchvision's alexnet .*3.bias"):
        LPIPS(REFERENCE, tmp_path / "partial.pth")
    torch.save({**tensors, "head.weight": torch.zeros(1)}, tmp_path / "more.pth")
    with refused("does not hold torchvision's alexnet \\('head.weight' is none of its keys\\)"):
        LPIPS(REFERENCE, tmp_path / "more.pth")
    (tmp_path / "cut.pth").write_bytes(alex.read_bytes()[:5000])
    with refused("cut.pth cannot be loaded"):
        LPIPS(REFERENCE, tmp_path / "cut.pth")
    with refused("at least 32 pixels"):
        score(LPIPS(REFERENCE[:, :16], alex), natural(1, 16, 48))


# Features


def test_the_cosine_is_that_of_the_features():
    def features(images: Tensor) -> Tensor:
        return torch.stack([images.mean((1, 2, 3)), images[:, 0].mean((1, 2))], 1)

    images = natural(4, 20, 20)
    x, y = features(images), features(REFERENCE[None])
    expected = torch.nn.functional.cosine_similarity(x, y)
    assert torch.allclose(score(FeatureSimilarity(REFERENCE, features), images), expected)
    with refused("features of 'feature_similarity' are a callable, got 'dino'"):
        FeatureSimilarity(REFERENCE, "dino")  # type: ignore[arg-type]
    with refused(r"Features are \(1, D\) for 1 pictures, got \(1, 3, 40, 48\)"):
        FeatureSimilarity(REFERENCE, lambda images: images)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return save_timm(tmp_path_factory.mktemp("timm") / "vit")


@pytest.mark.parametrize("size", SIZES)
def test_features_are_timms(vit, size):
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    model = timm.create_model(f"local-dir:{vit}", pretrained=True, num_classes=0).eval()
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    images = natural(4, *size)
    assert_same_pipeline(image_features(vit), images, torch.stack([transform(x) for x in pil(images)]), model)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["Dinov2Model", "Dinov2ForImageClassification"])
def test_features_are_transformers(tmp_path, size, kind):
    from transformers import BitImageProcessor, Dinov2Model

    folder = save_transformers(tmp_path / "dino", kind)
    model, processor = Dinov2Model.from_pretrained(folder).eval(), BitImageProcessor.from_pretrained(folder)
    images = natural(4, *size)
    pixels = torch.cat([processor(picture, return_tensors="pt").pixel_values for picture in pil(images)])

    def class_token(prepared: Tensor) -> Tensor:
        return model(prepared).pooler_output  # after the last norm

    assert_same_pipeline(image_features(folder), images, pixels, class_token)


def test_features_have_a_gradient_and_pass_the_check(vit):
    reward = FeatureSimilarity(REFERENCE, image_features(vit))
    images = 0.25 + 0.5 * natural(3, 40, 48)  # nothing is clamped, where gradients are passed on as if it were not
    direction = natural(3, 40, 48, seed=5) - 0.5
    leaf = images.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(score(reward, leaf).sum(), leaf)
    step = 1e-3
    with torch.no_grad():
        up, down = (score(reward, images + sign * step * direction) for sign in (1, -1))
    assert torch.allclose((slope * direction).sum((1, 2, 3)), (up - down) / (2 * step), rtol=0.05, atol=2e-3)
    assert faults(reward, natural(4, 40, 48)) == []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        blurred = score(reward, images)
    assert torch.equal(blurred, score(reward, images))


def test_features_that_are_not_there_are_named(tmp_path):
    folder = save_timm(tmp_path / "vit")
    tensors = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in tensors.items() if key != "pos_embed"}, folder / "model.safetensors")
    with refused("do not fit 'test_vit' .*pos_embed"):
        image_features(folder)
    (folder / "model.safetensors").unlink()
    with refused("has no model.safetensors"):
        image_features(folder)
    with refused("config.json of 'facebook/dinov2-small' is not on this machine and cannot be downloaded: put it"):
        image_features("facebook/dinov2-small", cache_dir=tmp_path / "cache")


def test_the_recipes_build_it(workplace, alex, vit):
    pil(natural(1, 40, 40))[0].save(workplace / "photo.png")
    given = {
        "ssim": [],
        "lpips": [f"reward.weights={alex}"],
        "dino": [f"reward.features.model={vit}"],
    }
    for name, overrides in given.items():
        lines = ["recipe=digits_steer", "map=none", f"reward={name}", "reward.reference=photo.png", *overrides]
        assert score(config.compose("steer", lines).build("reward"), natural(2, 40, 40)).shape == (2,)
