"""The rewards in a line of arithmetic, by values worked out by hand, and the judge of digits."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, laplace

from steerfm import digits
from steerfm.errors import RewardError
from steerfm.images import to_unit
from steerfm.reward import check
from steerfm.rewards.digit_judge import DigitJudge
from steerfm.rewards.simple import Brightness, Colourfulness, Contrast, JPEGSize, Redness, Sharpness, Symmetry

PICTURE = torch.tensor([[[0.1, 0.3], [0.5, 0.9]], [[0.0, 0.2], [0.4, 0.6]], [[1.0, 0.0], [0.0, 1.0]]])[None]
DIFFERENTIABLE = [Brightness, Redness, Contrast, Symmetry, Sharpness, Colourfulness]

NAMES = ("brightness", "redness", "contrast", "symmetry", "sharpness", "colourfulness", "jpeg_size")


def value(reward, images: torch.Tensor) -> list[float]:
    return reward(images, [""] * len(images)).total.tolist()


def test_brightness_is_the_mean():
    assert value(Brightness(), PICTURE) == pytest.approx([(1.8 + 1.2 + 2.0) / 12])


def test_redness_is_red_less_the_mean_of_the_others():
    assert value(Redness(), PICTURE) == pytest.approx([1.8 / 4 - (1.2 + 2.0) / 8])


def test_contrast_is_the_standard_deviation_of_grey():
    grey = np.array([1.1, 0.5, 0.9, 2.5]) / 3
    assert value(Contrast(), PICTURE) == pytest.approx([grey.std()])
    checkerboard = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[None, None]
    assert value(Contrast(), checkerboard) == pytest.approx([0.5])


def test_contrast_of_a_flat_picture_has_a_finite_gradient():
    images = torch.full((1, 1, 4, 4), 0.3, requires_grad=True)
    Contrast()(images, [""]).total.sum().backward()
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()


def test_symmetry_is_minus_the_squared_gap_to_the_mirror_image():
    gaps = [0.2**2, 0.4**2, 0.2**2, 0.2**2, 1.0, 1.0]  # each row of each channel, twice
    assert value(Symmetry(), PICTURE) == pytest.approx([-sum(gaps) / 6])
    assert value(Symmetry(), torch.cat([PICTURE, PICTURE.flip(3)], 3)) == [0.0]


def test_sharpness_is_the_variance_of_scipys_laplacian():
    images = torch.rand(2, 3, 7, 9)
    inner = [laplace(x.mean(0).double().numpy())[1:-1, 1:-1].var() for x in images]
    assert value(Sharpness(), images) == pytest.approx(inner, rel=1e-4)
    checkerboard = (torch.arange(6)[:, None] + torch.arange(6)) % 2
    assert value(Sharpness(), checkerboard[None, None].float()) == [16.0]
    blurred = torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, 1, 1)))
    assert value(Sharpness(), blurred)[0] < 0.1 * inner[0]


def test_colourfulness_is_hasler_and_suesstrunks():
    red, green, blue = PICTURE[0].flatten(1).double().numpy()
    rg, yb = red - green, (red + green) / 2 - blue
    expected = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
    assert value(Colourfulness(), PICTURE) == pytest.approx([expected])
    assert value(Colourfulness(), PICTURE[:, :1].expand(-1, 3, -1, -1)) == pytest.approx([0], abs=1e-5)
    extreme = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])[None]  # half red, half cyan
    assert value(Colourfulness(), extreme) == pytest.approx([1.25**0.5])


def test_colourfulness_of_a_grey_picture_has_a_finite_gradient():
    images = torch.full((1, 3, 4, 4), 0.3, requires_grad=True)
    Colourfulness()(images, [""]).total.sum().backward()
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()


@pytest.mark.parametrize("reward", DIFFERENTIABLE)
def test_gradients_match_differences(reward):
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reward()(x, ["", ""]).total, (images,))


@pytest.mark.parametrize("reward", [*DIFFERENTIABLE, JPEGSize])
def test_they_pass_their_own_check(reward):
    faults = [f for f in check(reward(), torch.rand(4, 3, 8, 8), list("abcd")) if f.fault]
    assert faults == []


@pytest.mark.parametrize("reward", [*DIFFERENTIABLE, JPEGSize])
def test_names_are_what_one_types(reward):
    assert reward().name in NAMES
    assert reward(name="mine").name == "mine"


@pytest.mark.parametrize("reward", [*DIFFERENTIABLE, JPEGSize, DigitJudge])
def test_points_are_no_pictures(reward):
    with pytest.raises(RewardError, match=r"\(B, C, .*got the shape \(3, 2\)"):
        reward()(torch.rand(3, 2), list("abc"))


@pytest.mark.parametrize("reward", [Redness, Colourfulness])
def test_grey_has_no_colour(reward):
    with pytest.raises(RewardError, match=f"'{reward().name}' needs pictures of 3 channels, got 1"):
        reward()(torch.rand(2, 1, 8, 8), ["", ""])


def test_sharpness_needs_inner_pixels():
    with pytest.raises(RewardError, match=r"at least 3x3 pixels, got \(2, 9\)"):
        Sharpness()(torch.rand(2, 1, 2, 9), ["", ""])


def test_jpeg_size_is_pillows():
    images = torch.rand(3, 3, 16, 24)
    sizes = []
    for image in images:
        stream = io.BytesIO()
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(stream, format="JPEG", quality=95)
        sizes.append(len(stream.getvalue()) / 1000)
    assert value(JPEGSize(), images) == pytest.approx(sizes)


def test_jpeg_size_of_noise_exceeds_that_of_a_flat_grey_picture():
    noise, flat = value(JPEGSize(), torch.stack([torch.rand(1, 32, 32), torch.full((1, 32, 32), 0.5)]))
    assert noise > 1.3 * flat > 0
    assert value(JPEGSize(quality=10), torch.rand(1, 1, 32, 32))[0] < noise


def test_jpeg_size_is_declared_a_black_box():
    assert not JPEGSize().differentiable
    with pytest.raises(RewardError, match="quality"):
        JPEGSize(quality=0)


def test_the_judge_knows_scans_that_it_never_saw():
    scans = digits.load("reward")
    judge = DigitJudge(7)
    p = judge.probabilities(to_unit(scans.x0))
    own = p.gather(1, scans.labels[:, None])
    assert (judge.labels(to_unit(scans.x0)) == scans.labels).float().mean() >= 0.97
    assert own.mean() >= 0.95
    assert p[scans.labels == 7, 7].mean() >= 0.93
    assert p[scans.labels != 7, 7].mean() <= 0.01


def test_the_judge_is_sure_as_often_as_it_is_right():
    scans = digits.load("reward")
    confidence, labels = DigitJudge().probabilities(to_unit(scans.x0)).max(1)
    assert abs(confidence.mean() - (labels == scans.labels).float().mean()) <= 0.03


def test_the_judge_is_not_sure_of_noise_or_of_an_empty_page():
    p = DigitJudge().probabilities(torch.cat([torch.rand(200, 1, 8, 8), torch.zeros(1, 1, 8, 8)]))
    assert p.max() < 0.6


def test_the_judge_returns_its_digits_column():
    images = to_unit(digits.load("reward").x0[:5])
    p = DigitJudge().probabilities(images)
    assert torch.equal(DigitJudge(3)(images, [""] * 5).total, p[:, 3])
    assert p.sum(1).tolist() == pytest.approx([1.0] * 5)


def test_the_judge_reads_colour_and_overshot_pictures_as_grey_in_range():
    images = to_unit(digits.load("reward").x0[:5])
    judge = DigitJudge()
    assert torch.allclose(judge.probabilities(images), judge.probabilities(images.expand(-1, 3, -1, -1)), atol=1e-5)
    beyond = torch.where(images == 1, 1.7, images)
    assert torch.equal(judge.probabilities(images), judge.probabilities(beyond))


def test_the_judge_refuses_what_it_cannot_read():
    with pytest.raises(RewardError, match="one of 0 to 9, got 10"):
        DigitJudge(10)
    with pytest.raises(RewardError, match=r"\(B, C, 8, 8\), got the shape \(1, 1, 32, 32\)"):
        DigitJudge()(torch.rand(1, 1, 32, 32), [""])
    broken = torch.rand(3, 1, 8, 8)
    broken[2, 0, 4, 4] = float("nan")
    with pytest.raises(RewardError, match="not finite, sample 2"):
        DigitJudge()(broken, [""] * 3)
