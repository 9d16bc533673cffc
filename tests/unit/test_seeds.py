"""Random numbers: what a draw depends on, what it does not depend on, and that it is normal or uniform at all."""

import numpy as np
import pytest
import torch
from exact import within_standard_errors

from steerfm.errors import ConfigError
from steerfm.seeds import STREAMS, generator, noise, torch_generator, uniform

SHAPE = (2, 3)


def test_a_seed_draws_the_same_in_any_batch():
    alone = noise([7], SHAPE)
    assert torch.equal(noise([3, 7, 7, 12], SHAPE)[1:3], torch.cat([alone, alone]))
    torch.manual_seed(1)
    np.random.default_rng(5).random()
    assert torch.equal(noise([7], SHAPE), alone)  # nothing that was drawn before matters


def test_the_first_particles_of_a_large_population_are_those_of_a_small_one():
    small, large = noise([4, 9], SHAPE, particles=2), noise([4, 9], SHAPE, particles=5)
    assert large.shape == (10, *SHAPE)
    assert torch.equal(large.reshape(2, 5, *SHAPE)[:, :2], small.reshape(2, 2, *SHAPE))
    assert torch.equal(small[::2], noise([4, 9], SHAPE))


def test_seeds_streams_steps_and_particles_are_distinct():
    draws = [noise([0, 1, 2, 2**32, 2**32 + 1, 2**63], (50,), particles=2)]
    draws += [noise([1], (50,), stream=stream, step=step) for stream in STREAMS for step in (0, 1, 2)][1:]
    rows = torch.cat(draws)
    close = torch.corrcoef(rows) - torch.eye(len(rows))
    assert close.abs().max() < 0.7  # 50 draws: independent rows stay below 0.6 or so, equal ones have 1


def test_types_and_devices():
    exact, rounded = noise([5], SHAPE, dtype=torch.float64), noise([5], SHAPE)
    assert rounded.dtype == torch.float32
    assert torch.equal(exact.float(), rounded)
    assert uniform([5]).dtype == torch.float64


def test_noise_is_standard_normal():
    """20 000 seeds: mean, variance, fourth moment and the correlation of neighbours within four standard errors."""
    z = noise(range(20_000), (1,), dtype=torch.float64)[:, 0]
    moments = torch.stack([z, z**2, z**3, z**4], 1)
    assert within_standard_errors(moments, torch.tensor([0.0, 1.0, 0.0, 3.0]))
    assert within_standard_errors(z[1:] * z[:-1], 0.0)
    other = noise(range(20_000), (1,), stream="step", dtype=torch.float64)[:, 0]
    assert within_standard_errors(z * other, 0.0)


def test_uniforms_are_uniform_and_depend_on_seed_and_step():
    u = uniform(range(20_000), step=3)
    assert within_standard_errors(torch.cat([u, u**2], 1), torch.tensor([1 / 2, 1 / 3]))
    assert u.min() >= 0
    assert u.max() < 1
    assert torch.equal(uniform([11, 12], step=3), u[11:13])
    assert not torch.equal(uniform([11], step=4), u[11:12])
    assert not torch.equal(uniform([11], stream="select", step=3), u[11:12])
    assert torch.equal(uniform([11, 12], count=3, step=3)[:, :1], u[11:13])
    assert uniform([11, 12], count=3).unique().numel() == 6


def test_torch_generators_tell_all_seeds_streams_and_steps_apart():
    def first(seed: int, stream: str = "training", step: int = 0) -> float:
        return float(torch.rand((), generator=torch_generator(seed, stream, step), dtype=torch.float64))

    keys = [(seed, stream, step) for seed in (0, 1, 2**32) for stream in ("training", "data") for step in range(4)]
    values = [first(*key) for key in keys]
    assert len(set(values)) == len(keys)
    assert first(0) == values[0]


@pytest.mark.parametrize("seed", [-1, 1.5])
def test_a_seed_that_is_no_whole_number_is_refused(seed: float):
    with pytest.raises(ConfigError, match=f"whole number of at least 0, got {seed}"):
        noise([seed], SHAPE)  # type: ignore[list-item]


def test_an_unknown_stream_is_refused():
    with pytest.raises(ConfigError, match="Unknown random stream 'inital'; the streams are initial, step"):
        generator(0, "inital")
