"""Laws of (s, t) and time grids: shares are exact, moments within four standard errors of n = 40 000 draws."""

import pytest
import torch
from exact import within_standard_errors

from steerfm.errors import ConfigError
from steerfm.times import Anchored, LogitNormal, Triangle, time_grid

N = 40_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("law", [Triangle, LogitNormal])
def test_the_diagonal_has_its_share_and_leads_the_batch(law: type[Triangle] | type[LogitNormal]):
    for share, rows in ((0.0, 0), (0.25, 16), (0.75, 48), (1.0, 64)):
        times = law(diagonal=share)
        s, t = times(64, seeded())
        assert times.diagonal_rows(64) == rows
        assert torch.equal(s[:rows], t[:rows])
        assert (t[rows:] < s[rows:]).all()


def test_the_triangle_is_uniform():
    """Off the diagonal s and t are the larger and the smaller of two uniforms, on it one uniform."""
    s, t = Triangle(diagonal=0.0)(N, seeded(1))
    assert within_standard_errors(torch.stack([s, t, s - t, s * t], 1), torch.tensor([2 / 3, 1 / 3, 1 / 3, 1 / 4]))
    below = ((s < 0.5) & (t < 0.5)).float()
    assert within_standard_errors(below, 0.25)  # a quarter of the triangle's area
    s, t = Triangle(diagonal=1.0)(N, seeded(2))
    assert within_standard_errors(torch.stack([s, s**2], 1), torch.tensor([1 / 2, 1 / 3]))


def test_logit_normal_times_have_normal_logits():
    s, t = LogitNormal(mean=-0.4, std=1.5, diagonal=0.5)(2 * N, seeded(3))
    on, off = torch.logit(s[:N]), torch.stack([torch.logit(s[N:]), torch.logit(t[N:])])
    assert within_standard_errors(torch.stack([on, (on + 0.4) ** 2], 1), torch.tensor([-0.4, 1.5**2]))
    gap = 2 * 1.5 / torch.pi**0.5  # E max - E min of two normals
    assert within_standard_errors(torch.stack([off.sum(0) / 2, off[0] - off[1]], 1), torch.tensor([-0.4, gap]))


def test_single_times_are_those_of_the_diagonal():
    """Their means and mean squares, of the logits for LogitNormal."""
    s = Triangle().one(N, seeded(3))
    assert within_standard_errors(torch.stack([s, s**2], 1), torch.tensor([1 / 2, 1 / 3]))
    logits = LogitNormal(mean=0.6, std=1.4).one(N, seeded(4)).logit()
    assert within_standard_errors(torch.stack([logits, logits**2], 1), torch.tensor([0.6, 0.6**2 + 1.4**2]))


def test_anchored_pairs_start_at_noise_and_end_at_data_in_their_shares():
    law = LogitNormal(diagonal=0.25)
    anchored = Anchored(law, start=0.4, end=0.1)
    s, t = anchored(N, seeded(6))
    (plain_s, plain_t), on = law(N, seeded(6)), anchored.diagonal_rows(N)
    assert on == law.diagonal_rows(N)
    assert torch.equal(s[:on], plain_s[:on]) and torch.equal(t[:on], plain_t[:on])
    starts, ends = s[on:] == 1, t[on:] == 0
    assert starts.float().mean() == pytest.approx(0.4, abs=0.02)
    assert ends.float().mean() == pytest.approx(0.1, abs=0.02)
    assert (starts & ends).float().mean() == pytest.approx(0.04, abs=0.01)
    assert torch.equal(s[on:][~starts], plain_s[on:][~starts]) and torch.equal(t[on:][~ends], plain_t[on:][~ends])
    assert torch.equal(anchored.one(50, seeded(1)), law.one(50, seeded(1)))
    for wrong in ({"start": 1.5}, {"end": -0.1}):
        with pytest.raises(ConfigError, match="probability"):
            Anchored(law, **wrong)


@pytest.mark.parametrize("law", [Triangle(0.0, both=True), LogitNormal(diagonal=0.0, both=True)])
def test_both_directions_are_drawn_alike(law: Triangle | LogitNormal):
    s, t = law(N, seeded(4))
    assert within_standard_errors((s < t).float(), 0.5)
    assert within_standard_errors(s - t, 0.0)


@pytest.mark.parametrize("law", [Triangle(), LogitNormal()])
def test_a_law_draws_from_its_generator_alone(law: Triangle | LogitNormal):
    first, second, other = law(32, seeded(5)), law(32, seeded(5)), law(32, seeded(6))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    for times in first:
        assert times.is_contiguous()
        assert times.min() >= 0
        assert times.max() <= 1


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_the_unit_interval_is_refused(share: float):
    for law in (Triangle, LogitNormal):
        with pytest.raises(ConfigError, match=f"must lie in \\[0, 1\\], got {share}"):
            law(diagonal=share)


@pytest.mark.parametrize("steps", [1, 3, 7, 49, 1000])
def test_a_grid_has_exact_ends_and_equal_steps(steps: int):
    grid = time_grid(steps)
    assert len(grid) == steps + 1
    assert grid[0] == 1.0
    assert grid[-1] == 0.0
    assert torch.tensor(grid).diff().tolist() == pytest.approx([-1 / steps] * steps, abs=1e-6)
    assert time_grid(2, 0.0, 1.0) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("steps", [0, -3])
def test_a_grid_without_steps_is_refused(steps: int):
    with pytest.raises(ConfigError, match="at least one step"):
        time_grid(steps)
