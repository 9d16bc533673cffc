"""Inverse problems: the operators against scipy and numpy, the likelihood against exact posteriors on Gaussians."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from torch import Tensor

from steerfm import config
from steerfm.analytic import GaussianMixture, QuadraticReward
from steerfm.errors import RewardError
from steerfm.reward import check
from steerfm.rewards.inverse import CompressedSensing, Downsampling, GaussianBlur, Mask, Measurement, hole

SIDE = 4
HALF = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]])
OPERATORS = {
    "mask": Mask(HALF),
    "blur": GaussianBlur(0.8),
    "downsampling": Downsampling(2),
    "compressed sensing": CompressedSensing(5, seed=3),
}
every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_pictures(points: Tensor) -> Tensor:
    return points.view(-1, 1, SIDE, SIDE)


def matrix(operator) -> Tensor:
    """Return the matrix of a linear operator, column by column."""
    units = as_pictures(torch.eye(SIDE**2, dtype=torch.float64))
    return operator(units).flatten(1).T


def quadratic(A: Tensor, y: Tensor, sigma: float) -> QuadraticReward:
    """Return -|y - A x|^2 / (2 sigma^2) as a quadratic form."""
    return QuadraticReward(A.T @ A / sigma**2, A.T @ y / sigma**2, -y.dot(y) / (2 * sigma**2))


def score(reward: Measurement, images: Tensor) -> Tensor:
    return reward(images, [""] * len(images)).total


# The likelihood


@every_operator
def test_it_is_the_quadratic_of_its_matrix(operator):
    y = operator(pictures(1, seed=1))[0]
    images = pictures(6)
    expected = quadratic(matrix(operator), y.flatten(), 0.3)(images.flatten(1))
    assert torch.allclose(score(Measurement(operator, 0.3, y), images), expected, atol=1e-9)


@every_operator
def test_the_tilt_of_a_gaussian_is_the_posterior(operator):
    """Against p(x | y) by conditioning the joint Gaussian of x and y, which shares nothing with the tilt's formula."""
    root = numbers(2, SIDE**2, SIDE**2) / SIDE
    m, C, sigma = numbers(3, SIDE**2), root @ root.T + 0.1 * torch.eye(SIDE**2, dtype=torch.float64), 0.4
    A, y = matrix(operator), operator(pictures(1, seed=4))[0]
    gain = C @ A.T @ torch.linalg.inv(A @ C @ A.T + sigma**2 * torch.eye(len(A), dtype=torch.float64))
    posterior = m + gain @ (y.flatten() - A @ m)
    prior = GaussianMixture(m[None], C[None])
    tilted = prior.tilt(quadratic(A, y.flatten(), sigma))
    assert torch.allclose(tilted.means[0], posterior, atol=1e-8)
    assert torch.allclose(tilted.covariances[0], C - gain @ A @ C, atol=1e-8)
    x = posterior[None].clone().requires_grad_(True)
    density = prior.log_prob(x) + score(Measurement(operator, sigma, y), as_pictures(x))
    (slope,) = torch.autograd.grad(density.sum(), x)
    assert slope.abs().max() < 1e-7  # the posterior's mean is its mode


def test_weighted_draws_of_a_mixture_are_the_posterior():
    prior = GaussianMixture([[-1.0, 0.5], [1.0, -0.3]], [0.3, 0.5], [0.4, 0.6])
    operator, sigma, y = CompressedSensing(1, seed=1), 0.7, torch.tensor([0.9], dtype=torch.float64)
    A = operator(torch.eye(2, dtype=torch.float64)).T
    tilted = prior.tilt(quadratic(A, y, sigma))
    x = prior.sample(20_000, torch.Generator().manual_seed(0))
    weights = score(Measurement(operator, sigma, y), x).softmax(0)
    mean = weights @ x
    error = ((weights**2) @ (x - mean) ** 2).sqrt()
    assert ((mean - tilted.weights @ tilted.means).abs() < 4 * error).all()
    assert error.max() < 0.02


@every_operator
def test_gradients_match_differences(operator):
    reward = Measurement(operator, 0.5, operator(pictures(1, seed=1))[0])
    assert torch.autograd.gradcheck(lambda x: score(reward, x), (pictures(2).requires_grad_(True),))


@every_operator
def test_it_passes_the_check(operator):
    reward = Measurement(operator, 0.5, picture=pictures(1, seed=1)[0])
    findings = check(reward, pictures(5).float(), list("abcde"))
    assert [finding.message for finding in findings if finding.fault] == []


# What is measured


def test_a_clean_picture_is_measured_with_noise():
    operator, sigma = CompressedSensing(4000, seed=0), 0.2
    clean = pictures(1)[0].float()
    reward = Measurement(operator, sigma, picture=clean, seed=0)
    noise = (reward.measurement - operator(clean[None])[0]) / sigma
    assert abs(float(noise.mean())) < 4 / 4000**0.5
    assert float(noise.var()) == pytest.approx(1, abs=4 * (2 / 4000) ** 0.5)
    again, other = (Measurement(operator, sigma, picture=clean, seed=seed).measurement for seed in (0, 1))
    assert torch.equal(reward.measurement, again)
    assert not torch.allclose(reward.measurement, other, atol=sigma)
    drawn = operator(torch.eye(SIDE**2).view(-1, 1, SIDE, SIDE)).T.flatten()[:4000]
    assert abs(float(noise @ drawn / drawn.norm())) < 5  # one seed does not give the noise the matrix's numbers


@every_operator
def test_without_noise_the_picture_itself_scores_best(operator):
    clean = pictures(1)[0].float()
    reward = Measurement(operator, 0.1, picture=clean, seed=None)
    assert score(reward, clean[None]).tolist() == [0.0]
    assert score(reward, pictures(3, seed=5).float()).max() < -0.1


def test_what_stands_in_the_hole_is_not_read():
    whole = pictures(1)[0].float()
    holed = torch.where(HALF == 1, whole, 1.0)
    rewards = [Measurement(Mask(HALF), 0.1, picture=picture, seed=None) for picture in (whole, holed)]
    images = pictures(3, seed=5).float()
    assert torch.equal(score(rewards[0], images), score(rewards[1], images))


# Operators


def test_a_hole_hides_a_rectangle():
    shown = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 1]])
    assert torch.equal(hole(4, 3, [1, 3], [2, 3]), shown)
    assert torch.equal(Mask(hole(4, 3, [1, 3], [2, 3]))(torch.ones(1, 2, 4, 3)), shown.expand(1, 2, 4, 3))


def test_the_mask_keeps_every_channel():
    images = torch.rand(2, 3, SIDE, SIDE)
    assert torch.equal(Mask(HALF)(images), images * HALF)


@pytest.mark.parametrize("width", [0.5, 1.3, 4.0])
def test_the_blur_is_scipys(width):
    images = torch.rand(2, 3, 9, 12, dtype=torch.float64)
    theirs = gaussian_filter(images.numpy(), (0, 0, width, width), mode="nearest", truncate=4.0)
    assert np.abs(GaussianBlur(width)(images).numpy() - theirs).max() < 1e-12


def test_downsampling_takes_the_means_of_blocks():
    images = torch.rand(2, 3, 6, 9, dtype=torch.float64)
    blocks = images.view(2, 3, 2, 3, 3, 3).mean((3, 5))
    assert torch.allclose(Downsampling(3)(images), blocks)


def test_projections_keep_lengths_on_average():
    images = pictures(1).float()
    A = matrix(CompressedSensing(2000, seed=0))
    assert float(A.square().sum(0).mean()) == pytest.approx(1, abs=4 * (2 / 2000 / SIDE**2) ** 0.5)
    assert torch.equal(CompressedSensing(7, seed=2)(images), CompressedSensing(7, seed=2)(images))
    assert not torch.allclose(CompressedSensing(7, seed=2)(images), CompressedSensing(7, seed=1)(images))


def test_a_matrix_made_in_inference_mode_takes_gradients_later():
    operator = CompressedSensing(3, seed=11)
    with torch.inference_mode():
        operator(pictures(1))
    images = pictures(1).requires_grad_(True)
    operator(images).square().sum().backward()
    assert images.grad is not None


# Files


def save_grey(picture: Tensor, path) -> None:
    Image.fromarray((picture[0] * 255).round().to(torch.uint8).numpy()).save(path)


def test_measurements_come_from_files(tmp_path):
    levels = (pictures(1)[0].float() * 255).round() / 255
    save_grey(levels, tmp_path / "y.png")
    save_file({"y": levels.contiguous()}, tmp_path / "y.safetensors")
    save_grey(HALF[None].float(), tmp_path / "mask.png")
    images = pictures(3, seed=1).float()
    expected = score(Measurement(GaussianBlur(1.0), 0.2, levels), images)
    for file in ("y.png", "y.safetensors"):
        assert torch.allclose(score(Measurement(GaussianBlur(1.0), 0.2, tmp_path / file), images), expected, rtol=1e-5)
    assert torch.equal(Mask(tmp_path / "mask.png")(images), Mask(HALF)(images))


def test_the_recipes_build_it(workplace):
    save_grey(pictures(1)[0].float(), workplace / "picture.png")
    save_grey(HALF[None].float(), workplace / "mask.png")
    given = {
        "inpainting": ["reward.picture=picture.png", "reward.operator.mask=mask.png"],
        "deblurring": ["reward.measurement=picture.png"],
        "super_resolution": ["reward.measurement=picture.png"],
        "compressed_sensing": ["reward.picture=picture.png"],
    }
    for name, overrides in given.items():
        lines = ["recipe=digits_steer", "map=none", f"reward={name}", *overrides]
        reward = config.compose("steer", lines).build("reward")
        images = torch.rand(2, 1, 16, 16) if name == "super_resolution" else pictures(2).float()
        assert score(reward, images).shape == (2,)


def refused(said: str):
    return pytest.raises(RewardError, match=said)


def test_files_that_are_none_are_named(tmp_path):
    (tmp_path / "y.png").write_bytes(b"no picture")
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "two.safetensors")
    save_file({"y": torch.tensor([0.0, float("nan")])}, tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "two.safetensors").read_bytes()[:-3])
    for file, said in {
        "none.png": "no file .*none.png: put the measurement there",
        "none.safetensors": "no file .*none.safetensors: put the measurement there",
        "y.png": "y.png is no picture, and the measurement is one",
        "two.safetensors": r"one tensor, the measurement; it holds 2: \['a', 'b'\]",
        "nan.safetensors": "not finite: leave out",
        "cut.safetensors": "cut.safetensors cannot be loaded",
    }.items():
        with refused(said):
            Measurement(GaussianBlur(1.0), 0.1, tmp_path / file)


def test_a_picture_that_is_cut_short_is_refused(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "y.png")
    (tmp_path / "y.png").write_bytes((tmp_path / "y.png").read_bytes()[:500])
    with refused("y.png cannot be read as the measurement"):
        Measurement(GaussianBlur(1.0), 0.1, tmp_path / "y.png")


def test_wrong_arguments_are_refused():
    y = torch.zeros(1, SIDE, SIDE)
    for make, said in [
        (lambda: Measurement("blur", 0.1, y), "operator .* is a callable, got 'blur'"),  # type: ignore[arg-type]
        (lambda: Measurement(GaussianBlur(1.0), 0.0, y), "sigma .* must be above 0, got 0.0"),
        (lambda: Measurement(GaussianBlur(1.0), 0.1), "either a measurement= or the picture="),
        (lambda: Measurement(GaussianBlur(1.0), 0.1, y, y), "either a measurement= or the picture="),
        (lambda: Measurement(GaussianBlur(1.0), 0.1, picture=2 * y - 1), r"in \[0, 1\], got values in \[-1, -1\]"),
        (lambda: GaussianBlur(0.0), "above 0 pixels, got 0.0"),
        (lambda: Downsampling(0), "at least 1, got 0"),
        (lambda: CompressedSensing(0), "at least 1 measurement, got 0"),
        (lambda: Mask(torch.full((2, 2), 0.5)), "holds 1 where a pixel is seen and 0 elsewhere"),
        (lambda: Mask(torch.zeros(2, 2)), "hides every pixel"),
    ]:
        with refused(said):
            make()


def test_shapes_that_do_not_fit_are_named():
    y, points = torch.zeros(1, SIDE, SIDE), torch.rand(2, 5)
    with refused(r"measured the shape \(1, 4, 4\), and its operator gives \(3, 4, 4\)"):
        score(Measurement(GaussianBlur(1.0), 0.1, y), torch.rand(2, 3, SIDE, SIDE))
    with refused(r"The mask has the size \(4, 4\) and the pictures \(8, 8\)"):
        score(Measurement(Mask(HALF), 0.1, y), torch.rand(2, 1, 8, 8))
    with refused(r"Blocks of 3 pixels do not divide pictures of \(4, 4\)"):
        score(Measurement(Downsampling(3), 0.1, y), torch.rand(2, 1, SIDE, SIDE))
    with refused(r"takes pictures \(B, C, H, W\), got the shape \(2, 5\)"):
        score(Measurement(GaussianBlur(1.0), 0.1, y), points)
