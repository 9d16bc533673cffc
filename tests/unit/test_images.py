"""Pictures: ranges, the straight-through clamp, resizing against Pillow, grids and PNG files."""

import numpy as np
import pytest
import torch
from exact import numbers
from PIL import Image
from torch.nn import functional

from steerfm import images
from steerfm.errors import DataError


def pictures(n: int = 2, channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def test_ranges_go_there_and_back():
    x = numbers(0, 2, 3, 4, 4)
    assert torch.allclose(images.to_model(images.to_unit(x)), x)
    assert images.to_unit(torch.tensor([-1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0.5, 1, 2]


def test_clamping_is_exact_and_passes_gradients_straight_through():
    x = torch.linspace(-40, 40, 10_001, requires_grad=True)
    clamped = images.clamp(x)
    assert torch.equal(clamped.detach(), x.detach().clamp(0, 1))  # to the last bit: rewards may take a logarithm
    clamped.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def test_uint8_goes_there_and_back():
    values = torch.arange(256).reshape(1, 1, 16, 16).float() / 255
    pixels = images.to_uint8(values.expand(2, 3, 16, 16))
    assert pixels.shape == (2, 16, 16, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels[1, :, :, 2].flatten(), np.arange(256))
    assert np.array_equal(images.to_uint8(torch.tensor([[[[-0.5, 0.5, 1.5]]]]))[0, 0, :, 0], [0, 128, 255])


def test_one_channel_becomes_grey():
    pixels = images.to_uint8(pictures(channels=1))
    assert np.array_equal(pixels[..., 0], pixels[..., 1])
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 2, 8, 8), (5, 2)])
def test_what_is_no_batch_of_pictures_is_refused(shape: tuple[int, ...]):
    with pytest.raises(DataError, match=r"shape \(B, 1 or 3, H, W\), got"):
        images.to_uint8(torch.zeros(shape))


@pytest.mark.parametrize(("size", "to"), [(64, (17, 23)), (64, (32, 32)), (20, (50, 41)), (8, (224, 224))])
def test_bicubic_resizing_is_pillow_s(size: int, to: tuple[int, int]):
    """Within 0.0011 of Pillow in floating point (FIELD.md); without antialias it would be off by 0.05."""
    picture = pictures(1, 1, size)
    resized = images.resize(picture, to)[0, 0]
    pillow = Image.fromarray(picture[0, 0].numpy()).resize((to[1], to[0]), Image.Resampling.BICUBIC)
    assert resized.shape == to
    assert (resized - torch.from_numpy(np.array(pillow))).abs().max() < 0.0011
    if size > to[0]:
        careless = functional.interpolate(picture, size=to, mode="bicubic", align_corners=False)[0, 0]
        assert (careless - resized).abs().max() > 0.03


def test_resizing_keeps_gradients_and_works_in_float32():
    picture = pictures().half().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        resized = images.resize(picture, (5, 5))
    assert resized.dtype == torch.float32
    resized.sum().backward()
    assert picture.grad is not None
    assert picture.grad.abs().min() > 0
    assert torch.equal(images.resize(pictures(), (8, 8)), pictures())
    assert images.resize(pictures(), (4, 6), method="bilinear").shape == (2, 3, 4, 6)


def test_a_grid_lays_rows_out_in_order():
    sheet = images.grid(pictures(5, size=4), columns=3, padding=1, background=0.5)
    assert sheet.shape == (3, 2 * 5 + 1, 3 * 5 + 1)
    assert torch.equal(sheet[:, 1:5, 6:10], pictures(5, size=4)[1])
    assert torch.equal(sheet[:, 6:10, 1:5], pictures(5, size=4)[3])
    assert (sheet[:, 6:, 11:] == 0.5).all()  # the place of the sixth
    assert (sheet[:, 0] == 0.5).all()


def test_a_png_reads_back(tmp_path):
    picture = torch.arange(64).reshape(1, 8, 8).float() * 4 / 255
    images.save_png(picture, tmp_path / "new" / "one.png", scale=3)
    read = np.array(Image.open(tmp_path / "new" / "one.png"))
    assert read.shape == (24, 24, 3)
    assert np.array_equal(read[::3, ::3, 0], np.arange(64).reshape(8, 8) * 4)
    assert np.array_equal(read[2::3, 1::3], read[::3, ::3])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["one.png"]
