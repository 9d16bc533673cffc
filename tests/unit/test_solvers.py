"""Solvers of the velocity: their orders, their steps by hand, where they are exact, and the times they take."""

from collections.abc import Callable, Sequence
from math import cos, log, pi

import pytest
import torch
from exact import NAMES, PATHS, exact, gaussian, mixture, numbers, slope
from torch import Tensor

from steerfm.analytic import GaussianMixture, analytic_flow_map
from steerfm.errors import ConfigError
from steerfm.paths import Linear, Path, Trigonometric, VariancePreserving
from steerfm.sampling import few_jumps
from steerfm.solvers import ancestral, ddim, dpm_solver, euler, heun, shares
from steerfm.times import as_grid, karras_grid, shifted_grid, time_grid

every_path = pytest.mark.parametrize("path", PATHS, ids=NAMES)
UNEVEN = [1.0, 0.7, 0.4, 0.1, 0.0]


def never(step: int) -> Tensor:
    raise AssertionError(f"Noise was drawn for step {step}.")


# --- orders ---------------------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize(("method", "order"), [(euler, 1), (ddim, 1), (heun, 2)])
def test_euler_and_ddim_are_of_first_order_and_heun_of_second(path: Path, method: Callable[..., Tensor], order: int):
    flow_map, x1 = exact(mixture(), path), numbers(1, 16, 2)
    truth = few_jumps(flow_map, x1, 1)
    measured = slope(lambda steps: float((method(flow_map, x1, steps) - truth).norm()), 200)
    assert measured == pytest.approx(order, abs=0.05)


@every_path
def test_dpm_solver_is_of_second_order_between_the_ends(path: Path):
    flow_map, x = exact(mixture(), path), numbers(1, 16, 2)
    truth = few_jumps(flow_map, x, [0.9, 0.1])
    measured = slope(lambda steps: float((dpm_solver(flow_map, x, time_grid(steps, 0.9, 0.1)) - truth).norm()), 200)
    assert measured == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=NAMES[:2])
def test_from_end_to_end_dpm_solver_loses_a_logarithm(path: Path):
    """Step k from an end is 1/k in lambda however many there are: the sum of (k h)^2 / k^3 is h^2 log(1/h).

    So n^2 times the error grows by one and the same vector, C log 2, at each doubling. (On the variance-preserving
    path the last step, from sigma of about sqrt(h), is of first order, if small.)
    """
    flow_map, x1 = exact(mixture(), path), numbers(1, 16, 2)
    truth = few_jumps(flow_map, x1, 1)
    scaled = [(dpm_solver(flow_map, x1, n) - truth) * n**2 for n in (100, 200, 400)]
    first, second = scaled[1] - scaled[0], scaled[2] - scaled[1]
    assert float((second - first).norm()) < 0.1 * float(second.norm())


# --- steps by hand --------------------------------------------------------------------------------------------


def test_the_steps_of_euler_and_heun_by_hand():
    flow_map, x1 = exact(mixture(), Linear()), numbers(2, 4, 2)
    half = x1 - flow_map.velocity(x1, 1.0) / 2
    assert torch.allclose(euler(flow_map, x1, 2), half - flow_map.velocity(half, 0.5) / 2, atol=1e-13)
    corrected = x1 - (flow_map.velocity(x1, 1.0) + flow_map.velocity(half, 0.5)) / 4
    assert torch.allclose(heun(flow_map, x1, 2), corrected - flow_map.velocity(corrected, 0.5) / 2, atol=1e-13)


@every_path
def test_a_step_of_ddim_mixes_the_two_means_anew(path: Path):
    flow_map, x = exact(mixture(), path), numbers(3, 4, 2)
    s, t = (torch.full((4,), time, dtype=torch.float64) for time in (0.8, 0.3))
    v = flow_map.velocity(x, s)
    expected = path.interpolate(path.denoised(x, v, s), path.noise(x, v, s), t)
    assert torch.allclose(ddim(flow_map, x, [0.8, 0.3]), expected, atol=1e-12)


@every_path
def test_the_second_step_of_dpm_solver_by_hand(path: Path):
    """With D at 0.8 and 0.5: x / sigma grows by the integral of e^lambda D, D taken half a step ahead."""
    flow_map, x = exact(mixture(), path), numbers(4, 4, 2)
    (alpha, sigma), (alpha_t, sigma_t) = shares(path, 0.5), shares(path, 0.3)
    lambdas = [log(a / b) for a, b in (shares(path, time) for time in (0.8, 0.5, 0.3))]
    middle = ddim(flow_map, x, [0.8, 0.5])
    first, second = flow_map.denoise(x, 0.8), flow_map.denoise(middle, 0.5)
    r = (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])
    ahead = (1 + 1 / (2 * r)) * second - first / (2 * r)
    expected = sigma_t / sigma * middle + sigma_t * (alpha_t / sigma_t - alpha / sigma) * ahead
    assert torch.allclose(dpm_solver(flow_map, x, [0.8, 0.5, 0.3]), expected, atol=1e-12)


@every_path
def test_at_the_ends_dpm_solver_takes_ddims_steps(path: Path):
    """The first and the last step are of first order, and so is the second where the first starts without data."""
    flow_map, x1 = exact(mixture(), path), numbers(5, 4, 2)
    for times in ([1.0, 0.0], [1.0, 0.5, 0.0], [0.9, 0.4]):
        assert torch.allclose(dpm_solver(flow_map, x1, times), ddim(flow_map, x1, times), atol=1e-13)
    gap = (dpm_solver(flow_map, x1, [1.0, 0.6, 0.3, 0.0]) - ddim(flow_map, x1, [1.0, 0.6, 0.3, 0.0])).abs().max()
    assert (gap > 1e-3) if isinstance(path, VariancePreserving) else (gap < 1e-13)
    assert (dpm_solver(flow_map, x1, UNEVEN) - ddim(flow_map, x1, UNEVEN)).abs().max() > 1e-3


# --- where they are exact -------------------------------------------------------------------------------------


def test_ddim_is_euler_on_the_linear_path_alone():
    for path in PATHS:
        flow_map, x1 = exact(mixture(), path), numbers(6, 8, 2)
        gap = (ddim(flow_map, x1, UNEVEN) - euler(flow_map, x1, UNEVEN)).abs().max()
        assert (gap < 1e-13) if isinstance(path, Linear) else (gap > 1e-2)


@every_path
@pytest.mark.parametrize("steps", [1, 2, 5, UNEVEN], ids=str)
def test_a_single_point_is_reached_in_any_number_of_steps(path: Path, steps: int | Sequence[float]):
    """Its posterior mean never changes."""
    flow_map = analytic_flow_map(GaussianMixture([[0.8, -0.5]], [0.0]), path)
    x1, point = numbers(7, 8, 2), torch.tensor([0.8, -0.5], dtype=torch.float64)
    found = [method(flow_map, x1, steps) for method in (ddim, dpm_solver)]
    found.append(ancestral(flow_map, x1, steps, draw=lambda step: numbers(step, 8, 2)))
    for x0 in found:
        assert (x0 - point).abs().max() < 1e-9


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_white_noise_as_data_on_the_trigonometric_path(steps: int):
    """Nothing moves, v = 0: Euler and Heun keep x1; a DDIM step over the angle d shrinks it by cos d."""
    flow_map, x1 = analytic_flow_map(GaussianMixture([[0.0, 0.0]], [1.0]), Trigonometric()), numbers(8, 8, 2)
    assert torch.allclose(euler(flow_map, x1, steps), x1, atol=1e-13)
    assert torch.allclose(heun(flow_map, x1, steps), x1, atol=1e-13)
    assert torch.allclose(ddim(flow_map, x1, steps), cos(pi / 2 / steps) ** steps * x1, atol=1e-13)


@every_path
def test_without_fresh_noise_ancestral_sampling_is_ddim(path: Path):
    flow_map, x1 = exact(mixture(), path), numbers(9, 8, 2)
    assert torch.equal(ancestral(flow_map, x1, 4, draw=never, eta=0.0), ddim(flow_map, x1, 4))


@every_path
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_step_of_ancestral_sampling_has_the_posteriors_variance(path: Path, eta: float):
    """Of x_t given x_s and x0, by Gaussian conditioning: x_s = (alpha_s / alpha_t) x_t + independent noise."""
    flow_map, x, z = exact(gaussian(), path), numbers(10, 8, 2), numbers(11, 8, 2)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = shares(path, 0.8), shares(path, 0.3)
    ratio = alpha_s / alpha_t
    added = sigma_s**2 - (ratio * sigma_t) ** 2
    posterior = 1 / (1 / sigma_t**2 + ratio**2 / added)
    moved = [ancestral(flow_map, x, [0.8, 0.3], draw=lambda step, k=k: k * z, eta=eta) for k in (0.0, 1.0)]
    assert torch.allclose(moved[1] - moved[0], eta * posterior**0.5 * z, atol=1e-12)
    if eta == 1:
        clean = flow_map.denoise(x, 0.8)
        expected = posterior * (alpha_t * clean / sigma_t**2 + ratio * x / added)
        assert torch.allclose(moved[0], expected, atol=1e-12)


def test_single_precision_states_stay_so_and_lose_little():
    for path in PATHS:
        flow_map, x1 = exact(mixture(), path), numbers(12, 8, 2)
        small = exact(mixture(), path).float()
        for method in (euler, heun, ddim, dpm_solver):
            x0 = method(small, x1.float(), 8)
            assert x0.dtype == torch.float32
            assert (x0 - method(flow_map, x1, 8)).abs().max() < 2e-5


# --- times ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [euler, heun, ddim, dpm_solver])
def test_a_number_of_steps_is_their_equal_times(method: Callable[..., Tensor]):
    flow_map, x1 = exact(mixture(), Linear()), numbers(13, 4, 2)
    assert torch.equal(method(flow_map, x1, 5), method(flow_map, x1, time_grid(5)))
    assert (method(flow_map, x1, 5) - method(flow_map, x1, karras_grid(5))).abs().max() > 1e-3


def test_karras_times_have_equal_steps_in_their_root():
    grid = karras_grid(6, rho=3.0, smallest=0.001)
    roots = torch.tensor(grid[:-1], dtype=torch.float64) ** (1 / 3)
    assert torch.allclose(roots.diff(), torch.full((5,), -0.18, dtype=torch.float64))
    assert grid[0] == 1
    assert grid[-2:] == pytest.approx([0.001, 0.0])
    assert karras_grid(1) == [1.0, 0.0]
    assert karras_grid(3, rho=1.0, smallest=0.2) == pytest.approx([1.0, 0.6, 0.2, 0.0])


def test_shifted_times_multiply_the_odds_of_noise():
    equal, grid = time_grid(8), shifted_grid(8, 3.0)
    assert (grid[0], grid[-1]) == (1.0, 0.0)
    for t, shifted in zip(equal[1:-1], grid[1:-1], strict=True):
        assert shifted / (1 - shifted) == pytest.approx(3 * t / (1 - t))
    assert shifted_grid(8, 1.0) == equal
    assert all(shifted_grid(3, shift)[0] == 1.0 for shift in (0.1, 0.3, 1 / 3, 2.7))


@pytest.mark.parametrize(
    "times",
    [[], [1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.1, 0.0], [1.0, -0.1], [1.0, float("nan"), 0.0], [999.0, 0.0]],
    ids=str,
)
def test_times_that_do_not_fall_within_the_unit_interval_are_refused(times: list[float]):
    with pytest.raises(ConfigError, match="two or more that fall from noise, 1, toward data, 0; got"):
        as_grid(times)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: karras_grid(0), "got 0, 7.0 and 0.001"),
        (lambda: karras_grid(3, rho=0.0), "rho > 0"),
        (lambda: karras_grid(3, smallest=2.0), r"smallest in \(0, 1\)"),
        (lambda: shifted_grid(2, -1.0), "shift .* must be positive, got -1.0"),
        (lambda: shifted_grid(0), "at least one step, got 0"),
    ],
)
def test_grids_that_make_no_sense_are_refused(make: Callable[[], list[float]], message: str):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_a_share_of_noise_outside_the_unit_interval_is_refused(eta: float):
    with pytest.raises(ConfigError, match=rf"eta is the share of fresh noise and must lie in \[0, 1\], got {eta}"):
        ancestral(exact(gaussian(), Linear()), numbers(15, 1, 2), 2, draw=never, eta=eta)
