"""The oracle itself: exact maps, scores, tilts and values, against quadrature, autograd and closed forms."""

import math
from collections.abc import Callable

import pytest
import torch
from exact import (
    NAMES,
    PATHS,
    column,
    exact,
    gaussian,
    line,
    log_marginal,
    mixture,
    numbers,
    posterior_draws,
    rewards,
    uniforms,
    within_standard_errors,
)
from torch import Tensor
from torch.distributions import MultivariateNormal

from steerfm.analytic import GaussianMixture, QuadraticReward
from steerfm.errors import ConfigError
from steerfm.paths import Linear, Path

every_path = pytest.mark.parametrize("path", PATHS, ids=NAMES)
both_data = pytest.mark.parametrize("data", [gaussian(), mixture()], ids=["gaussian", "mixture"])
every_reward = pytest.mark.parametrize("kind", list(rewards()))


def cases(n: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Return points (n, 2), sources and targets in both directions; some targets are 0, some sources 1."""
    s, t = uniforms(1, n, 0.03, 1.0), uniforms(2, n)
    s[:2], t[2:4] = 1.0, 0.0
    return 1.3 * numbers(3, n, 2), s, t


def derivatives(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return function(x, s, t) (B, d) and its derivatives by x (B, d, d), s and t (B, d); rows are independent."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    rows = [torch.autograd.grad(value[:, i].sum(), leaves, retain_graph=True) for i in range(value.shape[1])]
    by_x, by_s, by_t = (torch.stack(parts, 1) for parts in zip(*rows, strict=True))
    return value.detach(), by_x, by_s, by_t


# --- the flow map ---------------------------------------------------------------------------------------------


@every_path
def test_the_gaussian_map_is_its_closed_form(path: Path):
    """F(x, s, t) = alpha_t m + (spread_t / spread_s)(x - alpha_s m), with spread^2 = alpha^2 c^2 + sigma^2."""
    x, s, t = cases()
    data = gaussian()

    def spread(time: Tensor) -> Tensor:
        return (path.alpha(time) ** 2 * 0.36 + path.sigma(time) ** 2).sqrt()

    centred = x - column(path.alpha(s)) * data.means[0]
    expected = column(path.alpha(t)) * data.means[0] + column(spread(t) / spread(s)) * centred
    assert (exact(data, path).jump(x, s, t) - expected).abs().max() < 1e-12


@every_path
@both_data
def test_the_rules_hold(data: GaussianMixture, path: Path):
    """Compositional, Lagrangian, Eulerian and MeanFlow, with derivatives by reverse mode: below 1e-9."""
    flow_map = exact(data, path)
    x, s, t = cases()
    r = s + uniforms(4, len(s)) * (t - s)
    u, du_dx, du_ds, du_dt = derivatives(flow_map.average_velocity, x, s, t)
    F = x + column(t - s) * u
    assert (flow_map.jump(flow_map.jump(x, s, r), r, t) - F).abs().max() < 1e-9

    end = flow_map.velocity(F, t)
    dF_dt = u + column(t - s) * du_dt
    assert (dF_dt - end).abs().max() < 1e-9
    assert (u - (end - column(t - s) * du_dt)).abs().max() < 1e-9

    v = flow_map.velocity(x, s)
    along = du_ds + torch.einsum("bij,bj->bi", du_dx, v)
    assert (u - (v + column(t - s) * along)).abs().max() < 1e-9
    assert (-u + v + column(t - s) * along).abs().max() < 1e-9  # d/ds F + grad F . v


@every_path
def test_the_average_velocity_over_nothing_is_the_velocity(path: Path):
    flow_map, (x, s, _) = exact(mixture(), path), cases()
    assert (flow_map.average_velocity(x, s, s.clone()) - flow_map.velocity(x, s)).abs().max() < 1e-12


@every_path
@both_data
def test_the_score_is_the_gradient_of_the_marginal(data: GaussianMixture, path: Path):
    x, t, _ = cases()
    x.requires_grad_()
    (score,) = torch.autograd.grad(log_marginal(data, path, x, t).sum(), x)
    error = (exact(data, path).score(x, t) - score).abs() / (1 + score.abs())
    assert error.max() < 1e-9


@every_path
def test_velocity_is_the_mean_tangent_given_the_point(path: Path):
    """Against draws of (x0, x1) that meet in x_s, by independent Gaussian conditioning; four standard errors."""
    data, x_s = mixture(), torch.tensor([0.4, 0.2], dtype=torch.float64)
    for s in (0.3, 0.8):
        draws = posterior_draws(data, path, x_s, s, 20_000, seed=5)
        times = torch.full((20_000,), s, dtype=torch.float64)
        w = path.tangent(draws.x0, draws.x1, times)
        flow_map = exact(data, path)
        assert within_standard_errors(w, flow_map.velocity(x_s[None], s)[0])
        assert within_standard_errors(draws.x0, flow_map.denoise(x_s[None], s)[0])


@every_path
def test_a_map_from_clean_data_inverts_itself(path: Path):
    flow_map = exact(mixture(), path)
    x0, zero, one = numbers(6, 8, 2), torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    x1 = flow_map.jump(x0, zero, one)
    assert (flow_map.jump(x1, one, zero) - x0).abs().max() < 1e-9
    assert torch.isfinite(flow_map.velocity(x0, zero)).all()


def test_noise_is_carried_to_the_mixture():
    """The exact map turns N(0, I) at t = 1 into the data: log-likelihood by the change of variables, no sampling."""
    data, x1 = mixture(), numbers(7, 16, 2)
    ends = torch.ones(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    u, du_dx, _, _ = derivatives(exact(data, Linear()).average_velocity, x1, *ends)
    log_volume = torch.linalg.slogdet(torch.eye(2, dtype=torch.float64) - du_dx).logabsdet
    log_noise = -0.5 * x1.square().sum(1) - math.log(2 * math.pi)
    assert (data.log_prob(x1 - u) + log_volume - log_noise).abs().max() < 1e-9


# --- the mixture ----------------------------------------------------------------------------------------------


def test_density_and_sampling_agree_with_torch_distributions():
    data = mixture()
    x = numbers(8, 32, 2)
    parts = MultivariateNormal(data.means, data.covariances).log_prob(x[:, None])
    assert torch.allclose(data.log_prob(x), (data.weights.log() + parts).logsumexp(1), atol=1e-12)

    draws = data.sample(20_000, torch.Generator().manual_seed(9))
    mean = data.weights @ data.means
    second = torch.einsum("k,kij->ij", data.weights, data.covariances + torch.einsum("ki,kj->kij", *[data.means] * 2))
    assert within_standard_errors(draws, mean)
    assert within_standard_errors(torch.einsum("ni,nj->nij", draws, draws), second)


def test_a_mixture_casts_to_float32():
    small = exact(mixture(), Linear()).float()
    x = numbers(10, 8, 2)
    jumped = small.look_ahead(x.float(), 1.0)
    assert jumped.dtype == small.dtype == torch.float32
    assert (jumped - exact(mixture(), Linear()).look_ahead(x, 1.0)).abs().max() < 1e-5


def test_wrong_covariances_and_weights_are_refused():
    with pytest.raises(ConfigError, match="covariances need the shape"):
        GaussianMixture([[0.0, 0.0]], [1.0, 2.0])
    with pytest.raises(ConfigError, match="positive definite, got one with eigenvalue -1"):
        GaussianMixture([[0.0, 0.0]], torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]))
    for weights in ([1.0], [1.0, -0.5], [0.0, 0.0]):
        with pytest.raises(ConfigError, match="weights need 2 numbers of at least 0"):
            GaussianMixture([[0.0], [1.0]], [1.0, 1.0], weights)


# --- tilts and values -----------------------------------------------------------------------------------------


@every_reward
def test_rewards_are_their_formulas_and_divide_by_a_temperature(kind: str):
    x, reward = numbers(11, 16, 2), rewards()[kind]
    a = torch.tensor([0.7, -1.1], dtype=torch.float64)
    y = torch.tensor([0.5, 0.3], dtype=torch.float64)
    b = torch.tensor([1.2, -0.8], dtype=torch.float64)
    expected = {
        "linear": x @ a,
        "distance": -1.7 / 2 * (x - y).square().sum(1),
        "rank one": -((-0.7 - x @ b) ** 2) / (2 * 0.6**2),
    }[kind]
    assert torch.allclose(reward(x), expected, atol=1e-12)
    assert torch.allclose((reward / 0.2)(x), expected / 0.2, atol=1e-11)


@every_reward
def test_the_tilt_is_the_normalised_product(kind: str):
    """p*(x) = p(x) exp(r(x) / T) / Z at every point, Z by quadrature on a grid whose error is below rounding."""
    data, reward = mixture(), rewards()[kind] / 0.5
    x, weights = plane(data)
    log_z = (data.log_prob(x) + reward(x) + weights.log()).logsumexp(0)
    tilted = data.tilt(reward)
    points = numbers(12, 32, 2)
    assert (tilted.log_prob(points) - (data.log_prob(points) + reward(points) - log_z)).abs().max() < 1e-9


@every_reward
def test_tilts_are_the_closed_formulas(kind: str):
    """MATHS.md, section 2: new weights, means and covariances of round components."""
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.3], [0.4, 1.6]], dtype=torch.float64)
    c2 = torch.tensor([0.5, 0.3, 0.8], dtype=torch.float64)
    w = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    tilted = GaussianMixture(means, c2, w).tilt(rewards()[kind])
    log_w, mu, covariances = closed_tilt(kind, means, c2)
    assert torch.allclose(tilted.weights, (w.log() + log_w).softmax(0), atol=1e-12)
    assert torch.allclose(tilted.means, mu, atol=1e-12)
    assert torch.allclose(tilted.covariances, covariances, atol=1e-12)


def test_the_weights_of_the_known_answer():
    """MATHS.md, section 6: exact weights of the two-dimensional mixture at sigma = 0.2."""
    data = GaussianMixture([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], [0.5, 0.5, 0.5])
    tilted = data.tilt(QuadraticReward.rank_one([1.2, -0.8], -1.0, 0.2))
    assert tilted.weights.tolist() == pytest.approx([0.5716, 0.3665, 0.0619], abs=5e-5)


@every_reward
@every_path
def test_values_in_the_plane_equal_quadrature(path: Path, kind: str):
    """V_t(x) = log of the integral of p(x0) N(x; alpha x0, sigma^2 I) exp r(x0) over that without exp r."""
    data, reward = mixture(), rewards()[kind]
    x, t = 0.8 * numbers(13, 6, 2), torch.tensor([0.35, 0.5, 0.6, 0.8, 0.95, 1.0], dtype=torch.float64)
    x0, weights = plane(data)
    expected = quadrature(data, path, x, t, x0, weights, reward)
    assert (data.value(x, t, reward, path) - expected).abs().max() < 1e-9


@every_path
def test_values_on_the_line_equal_quadrature(path: Path):
    data, t = line(), torch.tensor([0.1, 0.3, 0.6, 0.9, 1.0], dtype=torch.float64)
    x = numbers(14, 5, 1)
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    weights = torch.full_like(grid, 24 / 20_000)
    for reward in (
        QuadraticReward.linear([1.3]),
        QuadraticReward.distance([0.4], 2.0),
        QuadraticReward.rank_one([0.9], 0.5, 0.3),
    ):
        expected = quadrature(data, path, x, t, grid[:, None], weights, reward)
        assert (data.value(x, t, reward, path) - expected).abs().max() < 1e-9


@every_reward
def test_values_are_the_closed_formulas(kind: str):
    """MATHS.md, section 2, on one round component: m and S of the posterior, then three formulas."""
    mu, c2 = torch.tensor([0.8, -0.5], dtype=torch.float64), 0.36
    x, t = numbers(15, 12, 2), uniforms(16, 12, 0.05, 0.95)
    spread = (1 - t) ** 2 * c2 + t**2
    m = mu + column((1 - t) * c2 / spread) * (x - column(1 - t) * mu)
    S = c2 * t**2 / spread
    a, b = torch.tensor([0.7, -1.1], dtype=torch.float64), torch.tensor([1.2, -0.8], dtype=torch.float64)
    y = torch.tensor([0.5, 0.3], dtype=torch.float64)
    expected = {
        "linear": m @ a + S * a.dot(a) / 2,
        "distance": -(1 + 1.7 * S).log() - 1.7 * (m - y).square().sum(1) / (2 * (1 + 1.7 * S)),  # d / 2 = 1
        "rank one": -0.5 * (1 + S * b.dot(b) / 0.36).log() - (-0.7 - m @ b) ** 2 / (2 * (0.36 + S * b.dot(b))),
    }[kind]
    assert (gaussian().value(x, t, rewards()[kind]) - expected).abs().max() < 1e-11


@every_reward
@every_path
def test_the_tilted_velocity_is_the_velocity_less_eta_times_the_value_gradient(path: Path, kind: str):
    """v* = v - eta grad V, and on the linear path E*[x0 | x] - E[x0 | x] = t^2 / (1 - t) grad V."""
    data, reward = mixture(), rewards()[kind] / 0.7
    x, t = numbers(17, 24, 2).requires_grad_(), uniforms(18, 24, 0.05, 0.95)
    (gradient,) = torch.autograd.grad(data.value(x, t, reward, path).sum(), x)
    base, tilted = exact(data, path), exact(data.tilt(reward), path)
    x = x.detach()
    assert (tilted.velocity(x, t) - (base.velocity(x, t) - column(path.eta(t)) * gradient)).abs().max() < 1e-9
    if isinstance(path, Linear):
        gap = tilted.denoise(x, t) - base.denoise(x, t)
        assert (gap - column(t**2 / (1 - t)) * gradient).abs().max() < 1e-9


def plane(data: GaussianMixture) -> tuple[Tensor, Tensor]:
    """Return a square grid (n, 2) that holds all of the mixture, and its cells' areas; exact for smooth densities."""
    axis = torch.linspace(-9, 9, 241, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    return x, torch.full((len(x),), float(axis[1] - axis[0]) ** 2, dtype=torch.float64)


def quadrature(
    data: GaussianMixture,
    path: Path,
    x: Tensor,
    t: Tensor,
    x0: Tensor,
    weights: Tensor,
    reward: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return log E[exp r(x0) | x_t = x] by the trapezium rule over the points x0 (n, d)."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    gaps = (x[:, None] - alpha[:, None, None] * x0).square().sum(2)
    log_joint = data.log_prob(x0) + weights.log() - gaps / (2 * sigma[:, None] ** 2)
    return (log_joint + reward(x0)).logsumexp(1) - log_joint.logsumexp(1)


def closed_tilt(kind: str, mu: Tensor, c2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log weights' change (K,), means and covariances (K, d, d) by the formulas of MATHS.md, section 2."""
    eye = torch.eye(2, dtype=torch.float64)
    if kind == "linear":
        a = torch.tensor([0.7, -1.1], dtype=torch.float64)
        return mu @ a + c2 * a.dot(a) / 2, mu + c2[:, None] * a, c2[:, None, None] * eye
    if kind == "distance":
        strength, y = 1.7, torch.tensor([0.5, 0.3], dtype=torch.float64)
        precision = 1 / c2 + strength
        log_w = -(1 + strength * c2).log() - strength * (mu - y).square().sum(1) / (2 * (1 + strength * c2))
        return log_w, (mu / c2[:, None] + strength * y) / precision[:, None], eye / precision[:, None, None]
    a, y, sigma = torch.tensor([1.2, -0.8], dtype=torch.float64), -0.7, 0.6
    covariances = torch.linalg.inv(eye / c2[:, None, None] + a.outer(a) / sigma**2)
    variance = c2 * a.dot(a) + sigma**2
    log_w = -0.5 * variance.log() - (y - mu @ a) ** 2 / (2 * variance)
    return log_w, torch.einsum("kij,kj->ki", covariances, mu / c2[:, None] + a * y / sigma**2), covariances


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_round_components_have_the_velocity_of_any_others(path: Path):
    """The short way for multiples of the identity, against the eigenbasis of every component."""
    means, weights = numbers(1, 4, 3), [0.1, 0.2, 0.3, 0.4]
    mixture = GaussianMixture(means, [0.5, 1.0, 0.2, 2.0], weights)
    assert mixture.round
    x, t = numbers(2, 50, 3), uniforms(3, 50, 0.01, 1.0)
    short = mixture.velocity(x, t, path)
    mixture.round = False
    assert torch.allclose(short, mixture.velocity(x, t, path), atol=1e-10)
    turned = torch.diag_embed(torch.tensor([[0.5, 0.5, 0.6]] * 4))
    assert not GaussianMixture(means, turned, weights).round
