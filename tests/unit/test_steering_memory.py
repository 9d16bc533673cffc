"""What steering holds in memory at once: one micro-batch, however many particles and steps there are."""

from typing import Any

import pytest
from torch import Tensor

from steerfm import FlowMap, FlowMapTilting, LookAheadGuidance, NoiseSampling, SequentialMonteCarlo, UNet
from steerfm.networks.mlp import randomise
from steerfm.reward_check import peak_memory
from steerfm.steering import NoiseOptimisation, Steering

STATE = 4 * 16 * 16  # bytes of one


def left(images: Tensor, prompts: Any) -> Tensor:
    return images[..., :8].mean((1, 2, 3))


def unet() -> FlowMap:
    network = UNet((1, 16, 16), channels=(8, 16), blocks=1)
    randomise(network, 0.05)
    return FlowMap(network)


def peak(method: Steering) -> int:
    """Return the most bytes of tensors alive at once in a run."""
    flow_map = unet()
    return peak_memory(lambda: method(flow_map, left, seeds=[0]), flow_map.device)


def options(kind: type[Steering], particles: int, steps: int) -> dict[str, Any]:
    if kind is NoiseSampling:
        return {"particles": particles, "warm_up": steps, "iterations": steps}
    if kind is SequentialMonteCarlo:
        return {"particles": particles, "steps": steps, "twisted": True}
    return {"particles": particles, "jumps": steps}


@pytest.mark.parametrize("kind", [FlowMapTilting, NoiseSampling, SequentialMonteCarlo])
def test_memory_is_that_of_a_micro_batch(kind: type[Steering]) -> None:
    """A particle more takes a few states of its own, of 1 kB, and none of what the network keeps of a row, 75 kB."""
    few, many = (peak(kind(**options(kind, n, 2), micro_batch=2)) for n in (4, 64))
    assert many - few < 60 * 16 * STATE
    assert peak(kind(**options(kind, 64, 2))) - few > 60 * 60 * STATE  # without micro-batches


@pytest.mark.parametrize("kind", [FlowMapTilting, NoiseSampling, SequentialMonteCarlo])
def test_memory_does_not_grow_with_the_steps(kind: type[Steering]) -> None:
    few, many = (peak(kind(**options(kind, 4, n))) for n in (3, 12))
    assert many < 1.1 * few


def test_guidance_keeps_one_step() -> None:
    few, many = (peak(LookAheadGuidance(n)) for n in (3, 12))
    assert many < 1.1 * few
    through = peak(LookAheadGuidance(3, through="identity"))
    assert through < 0.6 * few  # nothing is kept for a backward pass through the network


def test_ascent_through_the_last_jump_keeps_one_jump() -> None:
    few, many = (peak(NoiseOptimisation(n, 2, last=1)) for n in (2, 8))
    assert many < 1.1 * few
    assert peak(NoiseOptimisation(8, 2)) > 3 * many  # without it every jump is kept
