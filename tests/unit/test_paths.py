"""Paths: their derivatives against autograd, and what is read off a velocity against the pair that made it."""

import pytest
import torch
from exact import NAMES, PATHS, column, jvp, numbers, uniforms

from steerfm.paths import Linear, Path, Trigonometric, VariancePreserving

every_path = pytest.mark.parametrize("path", PATHS, ids=NAMES)


@every_path
def test_a_path_leads_from_data_to_noise(path: Path):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    left = 0.0066 if isinstance(path, VariancePreserving) else 0.0  # alpha(1) of the usual schedule
    assert path.alpha(ends).tolist() == pytest.approx([1.0, left], abs=1e-4)
    assert path.sigma(ends).tolist() == pytest.approx([0.0, 1.0], abs=1e-4)


@every_path
def test_derivatives_equal_autograd(path: Path):
    t = uniforms(0, 64, 0.001, 1.0).requires_grad_()
    for function, derivative in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        (gradient,) = torch.autograd.grad(function(t).sum(), t)
        assert torch.allclose(derivative(t), gradient, rtol=1e-11, atol=1e-12)
    (gradient,) = torch.autograd.grad((path.sigma(t) ** 2 / 2).sum(), t)
    assert torch.allclose(path.half_variance_dot(t), gradient, rtol=1e-11, atol=1e-12)


@every_path
def test_determinant_and_eta_are_their_definitions(path: Path):
    t = uniforms(1, 64, 0.01, 0.99)
    a, b, da, db = path.alpha(t), path.sigma(t), path.alpha_dot(t), path.sigma_dot(t)
    assert torch.allclose(path.determinant(t), a * db - da * b, rtol=1e-12)
    assert torch.allclose(path.eta(t), b * db - b**2 * da / a, rtol=1e-10)
    assert torch.allclose(path.sigma_determinant(t), b * path.determinant(t), rtol=1e-11)
    assert (path.determinant(t) > 0).all()


@every_path
def test_a_pair_is_read_back_from_its_point_and_its_tangent(path: Path):
    """Given x_t and w of one pair, E[x0 | .] and E[x1 | .] are that pair: two by two algebra, exact."""
    x0, x1, t = numbers(2, 64, 3), numbers(3, 64, 3), uniforms(4, 64, 0.02, 0.98)
    x_t, w = path.interpolate(x0, x1, t), path.tangent(x0, x1, t)
    assert torch.allclose(x_t, column(path.alpha(t)) * x0 + column(path.sigma(t)) * x1)
    assert torch.allclose(path.denoised(x_t, w, t), x0, atol=1e-10)
    assert torch.allclose(path.noise(x_t, w, t), x1, atol=1e-10)
    assert torch.allclose(path.score(x_t, w, t), -x1 / column(path.sigma(t)), atol=1e-8)
    assert torch.allclose(path.velocity(x_t, x0, t), w, atol=1e-9)


@every_path
def test_the_tangent_is_the_derivative_of_the_point(path: Path):
    x0, x1, t = numbers(5, 16, 2), numbers(6, 16, 2), uniforms(7, 16, 0.1, 0.9)
    dx = jvp(lambda time: path.interpolate(x0, x1, time), (t,), (torch.ones_like(t),))
    assert torch.allclose(path.tangent(x0, x1, t), dx, atol=1e-12)


def test_the_linear_path_in_its_closed_forms():
    path, t = Linear(), uniforms(8, 64, 0.01, 0.99)
    x, v = numbers(9, 64, 2), numbers(10, 64, 2)
    assert torch.allclose(path.eta(t), t / (1 - t))
    assert torch.allclose(path.denoised(x, v, t), x - column(t) * v)
    assert torch.allclose(path.noise(x, v, t), x + column(1 - t) * v)
    assert torch.allclose(path.score(x, v, t), -(x + column(1 - t) * v) / column(t))
    assert torch.allclose(path.gentle_noise(t), 2 * t)
    assert torch.allclose(path.memoryless_noise(t, 0.01), 2 * t / (1 - t + 0.01))


def test_variance_is_kept_by_the_two_paths_that_promise_it():
    t = uniforms(11, 64)
    for path in (Trigonometric(), VariancePreserving(), VariancePreserving(0.2, 8.0)):
        assert torch.allclose(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones(64, dtype=torch.float64))
    beta = 0.1 + 19.9 * t  # the variance-preserving diffusion's own: eta = beta / 2
    assert torch.allclose(VariancePreserving().eta(t), beta / 2, rtol=1e-9)


@every_path
def test_memoryless_noise_tends_to_twice_eta_and_is_finite_at_noise(path: Path):
    t = uniforms(12, 32, 0.05, 0.8)
    gaps = [float((path.memoryless_noise(t, h) / (2 * path.eta(t)) - 1).abs().max()) for h in (0.02, 0.01)]
    assert gaps[1] < 0.55 * gaps[0]
    assert torch.isfinite(path.memoryless_noise(torch.ones(1), 0.01)).all()


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_but_the_score_is_finite_at_clean_data(path: Path, dtype: torch.dtype):
    zero, x, v = torch.zeros(4, dtype=dtype), numbers(13, 4, 2).to(dtype), numbers(14, 4, 2).to(dtype)
    for value in (path.sigma_dot(zero), path.eta(zero), path.gentle_noise(zero), path.memoryless_noise(zero, 0.1)):
        assert torch.isfinite(value).all()
    assert torch.isfinite(path.tangent(x, v, zero)).all()
    assert torch.allclose(path.denoised(x, v, zero), x, rtol=4 * torch.finfo(dtype).eps)
