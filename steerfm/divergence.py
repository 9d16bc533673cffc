"""How far a tuned flow map has moved from its reference: in velocity, along noisy paths, and in noise space.

All of them sum over the dimensions of model space; a mean would be off by the number of pixels.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from steerfm.flow_map import FlowMap
from steerfm.sampling import squared_noise
from steerfm.times import time_grid
from steerfm.types import Condition, State, Times, Values

EARLIEST = 0.02  # below this time (1 - t) / t magnifies rounding more than it measures


def squared_norm(x: State) -> Values:
    """Return the squared norm over all but the first dimension, (B,)."""
    return x.flatten(1).square().sum(1)


def velocity_divergence(
    flow_map: FlowMap, reference: FlowMap, x0: State, x1: State, t: Times, condition: Condition | None = None
) -> Values:
    """Return one draw of D = E_t (alpha / (sigma d)) |v - v_ref|^2 at re-noised samples x_t; (B,).

    x0: samples of the tuned map, x1: fresh noise, t: uniform on [EARLIEST, 1]. Linear path: (1 - t) / t. Its
    mean equals KL(tuned | reference) when u(x, t, t) is the velocity of those samples; report the semigroup
    defect beside it. Reference: Girsanov on the memoryless SDE, where g^2 = 2 eta.
    """
    path = flow_map.path
    x_t = path.interpolate(x0, x1, t)
    gap = squared_norm(flow_map.velocity(x_t, t, condition) - reference.velocity(x_t, t, condition))
    return (1 - EARLIEST) * gap * path.alpha(t) / (path.sigma(t) * path.determinant(t))


def girsanov(path_v: State, reference_v: State, g2: Times, eta: Times, dtau: float) -> Values:
    """Return one step's share of KL = 1/2 integral |drift gap|^2 / g^2 dtau; (B,).

    Drifts are -v + g^2/2 score(v), so that their gap is -(1 + g^2 / (2 eta)) (v - v_ref); -2 (v - v_ref) at
    memoryless g. g2 must be positive.
    """
    factor = (1 + g2 / (2 * eta)) ** 2
    return 0.5 * factor * squared_norm(path_v - reference_v) / g2 * dtau


def noise_shift(reference: FlowMap, x0: State, x0_reference: State, jumps: int, condition: Condition | None) -> State:
    """Return the shift in noise space that makes the reference jump to x0 in place of x0_reference; like x0.

    Both are carried back to noise by the reference's own jumps from t = 0 to 1, so that directions in which
    the reference cannot be inverted cancel and an unchanged sample has shift 0. The reference must have been
    trained in both directions (times with both=True).
    """
    return encode(reference, x0, jumps, condition) - encode(reference, x0_reference, jumps, condition)


def encode(flow_map: FlowMap, x0: State, jumps: int, condition: Condition | None = None) -> State:
    """Return the noise that clean x0 comes from, by `jumps` jumps from t = 0 to t = 1."""
    x = x0
    grid = time_grid(jumps, 0.0, 1.0)
    for s, t in itertools.pairwise(grid):
        x = flow_map.jump(x, s, t, condition)
    return x


def semigroup_defect(
    flow_map: FlowMap, x_s: State, s: Times, r: Times, t: Times, condition: Condition | None = None
) -> Values:
    """Return |F(F(x, s, r), r, t) - F(x, s, t)|, the Euclidean gap between two jumps and one; (B,)."""
    in_two = flow_map.jump(flow_map.jump(x_s, s, r, condition), r, t, condition)
    return squared_norm(in_two - flow_map.jump(x_s, s, t, condition)).sqrt()


def memoryless(flow_map: FlowMap, t: Times, step: float) -> tuple[Times, Times]:
    """Return (g^2, eta) of the memoryless SDE with step `step`, both finite at t = 1."""
    g2 = squared_noise(flow_map.path, t, step, "memoryless")
    eta = flow_map.path.sigma(t) * flow_map.path.determinant(t) / flow_map.path.alpha(t).clamp_min(1e-12)
    return g2, eta


def monitor(
    flow_map: FlowMap,
    reference: FlowMap,
    x0: State,
    condition: Condition | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return the mean divergence D and the mean semigroup defect of the tuned map at its own samples x0.

    A partial map has neither: it knows no velocity and no jump to where another could start.
    """
    if flow_map.partial:
        return {}
    x1 = torch.randn(x0.shape, generator=generator).to(x0)
    t = EARLIEST + (1 - EARLIEST) * torch.rand(len(x0), generator=generator).to(x0)
    divergence = velocity_divergence(flow_map, reference, x0, x1, t, condition)
    one, half, zero = (torch.full_like(t, value) for value in (1.0, 0.5, 0.0))
    defect = semigroup_defect(flow_map, x1, one, half, zero, condition)
    return {"divergence": divergence.mean(), "semigroup_defect": defect.mean()}
