"""Searches on Gaussians, where what they find has a known distribution, or equals another method's."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from oracles import gaussian_map
from torch import Tensor, nn

from steerfm import BestOfN, FlowMap
from steerfm.errors import ConfigError
from steerfm.paths import Linear, Path, Trigonometric, VariancePreserving
from steerfm.reward import Reward
from steerfm.sampling import few_jumps, prepare, renoised
from steerfm.solvers import noising
from steerfm.steering import BeamSearch, NoiseOptimisation, PathSearch, Steering, SuccessiveHalving, ZeroOrderSearch
from steerfm.steering.argmax import best_rows
from steerfm.steering.zero_order_search import turned
from steerfm.types import Condition

SEARCHES = [SuccessiveHalving(4), BeamSearch(2, 2, 2), PathSearch(2, 2), ZeroOrderSearch(2, 3)]
MAX_OF_4 = (1.0293754, 0.4917152)  # mean and variance of the largest of 4 standard normals


def first(points: Tensor, prompts: Any) -> Tensor:
    return points[:, 0]


class BlackBox(Reward):
    """Has no gradient, and hides where its pictures come from."""

    differentiable = False

    def score(self, images: Tensor, prompts: Any, **metadata: Any) -> Tensor:
        assert not images.requires_grad
        return images.round(decimals=1).flatten(1).sum(1)


def noise(flow_map: FlowMap, seeds: Sequence[int], *key: Any) -> Tensor:
    return prepare(flow_map, [""], seeds).noise(*key)


# --- what all share ---


def test_the_best_rows_are_each_pairs_own() -> None:
    values = torch.tensor([[1.0, 5.0, 3.0], [9.0, 7.0, 8.0]])
    assert best_rows(values, 2).tolist() == [1, 2, 3, 5]
    assert best_rows(values, 3).tolist() == [1, 2, 0, 3, 5, 4]


@pytest.mark.parametrize("method", SEARCHES, ids=lambda method: type(method).__name__)
def test_black_boxes_will_do_and_there_is_no_temperature(method: Steering) -> None:
    out = method(gaussian_map([0.3, -0.2], 0.7), BlackBox(), seeds=[0, 1])
    assert "no temperature" in out.note
    assert out.cost.reward_gradients == 0
    assert out.rewards is not None
    assert torch.equal(out.rewards, out.trace["reward"][:, -1].double())


@pytest.mark.parametrize("method", SEARCHES, ids=lambda method: type(method).__name__)
def test_a_seed_finds_the_same_alone_and_in_company(method: Steering) -> None:
    flow_map, pairs = gaussian_map([0.3, -0.2], 0.7), [("a", 3), ("b", 3), ("a", 8)]

    def reward(points: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([1.0 if prompt == "a" else -1.0 for prompt in prompts]).to(points) * points[:, 0]

    together = method(flow_map, reward, prompts=[p for p, _ in pairs], seeds=[s for _, s in pairs])
    for i, (prompt, seed) in enumerate(pairs):
        alone = method(flow_map, reward, prompts=[prompt], seeds=[seed])
        assert torch.allclose(alone.x0[0], together.x0[i], atol=1e-12)
    assert together.x0[0, 0] > together.x0[1, 0]  # drawn to opposite sides by their own prompts


@pytest.mark.parametrize("kind", [SuccessiveHalving, BeamSearch, PathSearch, ZeroOrderSearch, NoiseOptimisation])
def test_temperatures_are_refused(kind: Any) -> None:
    assert kind(temperature=None).temperature is None
    with pytest.raises(ConfigError, match=rf"{kind.__name__} keeps the best and has no temperature, got 0\.1"):
        kind(temperature=0.1)


def test_wrong_arguments_are_said() -> None:
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: SuccessiveHalving(0), "n must be at least 1, got 0"),
        (lambda: SuccessiveHalving(jumps=0), "jumps must be at least 1, got 0"),
        (lambda: BeamSearch(beams=0), "beams must be at least 1, got 0"),
        (lambda: BeamSearch(gamma=1.5), r"gamma is the share of fresh noise .* got 1\.5"),
        (lambda: BeamSearch(gamma=0), "gamma=0 adds no noise, and the children"),
        (lambda: PathSearch(children=0), "children must be at least 1, got 0"),
        (lambda: PathSearch(up=0.5, down=0.5), r"0 < up < down <= 1, got 0\.5 and 0\.5"),
        (lambda: PathSearch(up=0.0), "0 < up < down"),
        (lambda: PathSearch(down=1.5), "0 < up < down"),
        (lambda: ZeroOrderSearch(neighbours=0), "neighbours must be at least 1, got 0"),
        (lambda: ZeroOrderSearch(similarity=1.0), r"a cosine below 1, got 1\.0"),
        (lambda: ZeroOrderSearch(similarity=math.nan), "got nan"),
        (lambda: ZeroOrderSearch()(gaussian_map([0.0], 1.0), first, seeds=[0]), "needs 2 dimensions, got 1"),
    ]
    for make, message in cases:
        with pytest.raises(ConfigError, match=message):
            make()


# --- successive halving ---


@pytest.mark.parametrize(("n", "calls"), [(1, 1), (2, 2 + 2), (5, 5 + 3 * 2 + 2 * 4 + 8), (16, 5 * 16)])
def test_halving_an_exact_map_is_the_best_of_n(n: int, calls: int) -> None:
    flow_map = gaussian_map([0.3, -0.2], 0.7)
    out = SuccessiveHalving(n)(flow_map, first, seeds=range(20))
    assert torch.allclose(out.x0, BestOfN(n, jumps=1)(flow_map, first, seeds=range(20)).x0, atol=1e-12)
    assert out.cost.network_calls == calls


class Coarse(nn.Module):
    """Two Euler steps are another map than one: u(x, s, t) = s^2 x |x|."""

    data_shape = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.like = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return (s.square())[:, None] * x * x.abs()


def test_halving_judges_each_rung_by_its_own_jumps() -> None:
    """By hand: of 8 noises the 4 best in one jump, of these the 2 best in two, of these the best in four, in eight."""
    flow_map, n, differs = FlowMap(Coarse()), 8, 0
    for seed in range(20):
        left = noise(flow_map, [seed], n)
        for jumps, kept in ((1, 4), (2, 2), (4, 1)):
            left = left[few_jumps(flow_map, left, jumps)[:, 0].argsort(descending=True)[:kept]]
        out = SuccessiveHalving(n)(flow_map, first, seeds=[seed])
        assert torch.equal(out.x0, few_jumps(flow_map, left, 8))
        differs += not torch.equal(out.x0, BestOfN(n, jumps=8)(flow_map, first, seeds=[seed]).x0)
    assert differs > 0


# --- beams and paths ---


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_one_beam_with_one_child_is_the_renoising_sampler(gamma: float) -> None:
    flow_map, seeds = gaussian_map([0.3, -0.2], 0.7), range(5)
    out = BeamSearch(1, 1, steps=5, gamma=gamma)(flow_map, first, seeds=seeds)
    x1 = noise(flow_map, seeds)
    expected = renoised(flow_map, x1, 5, gamma=gamma, draw=lambda i: noise(flow_map, seeds, 1, "step", i))
    assert torch.allclose(out.x0, expected, atol=1e-12)
    assert out.cost.network_calls == (5 if gamma == 1 else 9)


def test_one_step_of_beams_is_the_best_of_n() -> None:
    flow_map = gaussian_map([0.3, -0.2], 0.7)
    out = BeamSearch(3, 4, steps=1)(flow_map, first, seeds=range(9))
    assert torch.equal(out.x0, BestOfN(12, jumps=1)(flow_map, first, seeds=range(9)).x0)


@pytest.mark.parametrize(
    ("method", "rounds"),
    [
        (BeamSearch(1, 4, steps=2), [(0.0, 0.5)]),
        (BeamSearch(1, 4, steps=3, gamma=0.5), [(1 / 3, 2 / 3), (1 / 6, 1 / 3)]),
        (PathSearch(1, 4, up=0.3, down=0.65), [(0.35, 0.65), (0.0, 0.3)]),
        (PathSearch(1, 4, up=0.2, down=0.6), [(0.4, 0.6), (0.0, 0.2)]),
    ],
)
def test_one_beam_on_a_gaussian_has_known_moments(method: Steering, rounds: list[tuple[float, float]]) -> None:
    """On N(0, c^2) look-aheads are c y, y = x_t / std_t. Noised from r to t, y becomes rho y + sqrt(1 - rho^2) e with

    rho = (1 - t) std_r / ((1 - r) std_t), and of 4 children the largest e is kept: mean and variance of the end
    follow from those of the largest of 4. 4000 seeds know both to four standard errors.
    """
    c, seeds = 0.7, 4000

    def std(t: float) -> float:
        return math.sqrt((1 - t) ** 2 * c**2 + t**2)

    mean, variance = MAX_OF_4
    for r, t in rounds:
        rho = (1 - t) * std(r) / ((1 - r) * std(t))
        mean = rho * mean + math.sqrt(1 - rho**2) * MAX_OF_4[0]
        variance = rho**2 * variance + (1 - rho**2) * MAX_OF_4[1]
    y = method(gaussian_map([0.0], c), first, seeds=range(seeds)).x0[:, 0] / c
    assert float(y.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / seeds))
    assert float(y.var()) == pytest.approx(variance, abs=4 * variance * math.sqrt(2.2 / seeds))  # kurtosis 3.2


def test_children_compete_over_all_beams_of_a_pair() -> None:
    """Against each beam keeping its own best child, the best 4 of 16 have a higher mean."""
    flow_map = gaussian_map([0.0], 1.0)
    means = [float(BeamSearch(*k, steps=3)(flow_map, first, seeds=range(500)).x0.mean()) for k in ((4, 4), (1, 4))]
    assert means[0] > means[1] + 4 * math.sqrt(2 * 0.5 / 500)


@pytest.mark.parametrize("path", [Linear(), Trigonometric(), VariancePreserving()], ids=lambda p: type(p).__name__)
def test_noise_keeps_the_paths_marginals(path: Path) -> None:
    """x_r = alpha_r x0 + sigma_r e becomes alpha_t x0, and variances add up to sigma_t^2."""
    for r, t in ((0.0, 0.3), (0.2, 0.5), (0.5, 0.5), (0.3, 1.0)):
        (alpha_r, sigma_r), (alpha_t, sigma_t) = (
            (path.alpha(time), path.sigma(time)) for time in torch.tensor([[r], [t]], dtype=torch.float64)
        )
        kept, std = noising(path, r, t)
        assert torch.allclose(kept * alpha_r, alpha_t)
        assert torch.allclose((kept * sigma_r) ** 2 + std**2, sigma_t**2)


# --- zero-order search ---


def test_neighbours_keep_the_norm_and_have_the_cosine_asked_for() -> None:
    z, other = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    for similarity in (0.95, 0.0, -0.5):
        a, b = z.flatten(1), turned(z, other, similarity).flatten(1)
        assert torch.allclose(b.norm(dim=1), a.norm(dim=1), rtol=1e-12)
        assert torch.allclose(torch.cosine_similarity(a, b), torch.full((6,), similarity, dtype=torch.float64))


def test_neighbours_lead_to_the_best_point_of_the_sphere() -> None:
    """In the plane a neighbour lies acos(c) to either side, so the pivot ends within half of it of the best one."""
    flow_map, seeds, similarity = gaussian_map([0.0, 0.0], 1.0), range(30), 0.95
    out = ZeroOrderSearch(40, 4, similarity)(flow_map, first, seeds=seeds)
    norms = noise(flow_map, seeds).norm(dim=1)
    assert torch.allclose(out.x0.norm(dim=1), norms)
    assert out.rewards is not None
    assert (out.rewards >= norms * math.cos(math.acos(similarity) / 2) - 1e-9).all()
    assert (out.trace["reward"].diff(dim=1) >= 0).all()
    assert out.cost.network_calls == 1 + 40 * 4


def test_a_pivot_stays_where_no_neighbour_is_better() -> None:
    flow_map = gaussian_map([0.3, -0.2], 0.7)
    out = ZeroOrderSearch(5, 3)(flow_map, lambda points: 0 * points.sum(1), seeds=[0, 1])
    assert torch.equal(out.x0, few_jumps(flow_map, noise(flow_map, [0, 1]), 1))
