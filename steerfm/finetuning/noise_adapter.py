"""Noise adapters: learn what noise a frozen map should start from, with a small network before it.

x0 = F(z', 1, 0),   z' = z + dz(z, condition)                                    deterministic
                    z' = mean(condition) + exp(log_variance(condition) / 2) z    stochastic

The map never changes, so that every jump from noise is worth what the base's is, and few jumps stay few. The loss is
-r(x0) + T KL, in noise space:

deterministic  |dz|^2 / 2. Up to E[tr J - log det(1 + J)], J the Jacobian of dz, it is the divergence from N(0, I), so
               that it is exact where dz is constant, as for a linear reward on a Gaussian (dz = c a / T for
               F(z) = m + c z and r = a . x); too narrow otherwise, since nothing keeps z' from contracting.
stochastic     the divergence of N(mean, variance) from N(0, I), in full: exact where the tilted noise is a Gaussian of
               independent numbers for each condition; its spread is too small otherwise (a mean-field posterior).

References: Eyring et al. 2025, arXiv 2508.09968 (noise hypernetworks; the divergence as an L2 penalty); Mammadov et al.
2026, arXiv 2603.07276 (variational flow maps: noise given a measurement; there the map is trained as well).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from steerfm.building import remembered
from steerfm.divergence import squared_norm
from steerfm.errors import ConfigError
from steerfm.finetuning.common import Batch, FineTuning, Moves, Tuned
from steerfm.finetuning.direct import few_jumps_truncated
from steerfm.flow_map import FlowMap, Output
from steerfm.networks.sharing import copy_around
from steerfm.steering.common import check_counts
from steerfm.types import Condition, State, Times, Values, unsqueeze_like


@dataclass(frozen=True)
class NoiseAdapter:
    """Return the same map behind an adapter of its noise, the only part that trains: NoiseAdapter(network)(flow_map).

    An `adapter` of RewardFineTuning, for the method `AdaptedNoise`. network: any of ours, which begin at zero, called
    as network(z, 1, 0, condition); None goes on with the adapter that a map has. stochastic: it is called with zeros in
    place of z and has twice the map's first dimension, mean and log variance. The map that is given stays as it is,
    except that its weights, which both hold, no longer take gradients. Jumps from t = 1 are adapted; velocities, and so
    ODE and SDE samplers, are the base's. Raises ConfigError for a map that is adapted already or is guided by two
    calls, and for a network of another shape.
    """

    network: nn.Module | None = None
    stochastic: bool = False

    def __call__(self, flow_map: FlowMap) -> FlowMap:
        tuned = copy_around(flow_map).requires_grad_(False)
        base = getattr(tuned.network, "_orig_mod", tuned.network)
        if self.network is not None:
            self._check(flow_map, base)
            adapter = self.network.to(flow_map.device, flow_map.dtype)
            base = AdaptedNetwork(base, adapter, stochastic=self.stochastic, output=flow_map.output)
        if not isinstance(base, AdaptedNetwork):
            raise ConfigError("The map has no noise adapter to go on with: write NoiseAdapter(network).")
        base.adapter.requires_grad_(True)
        tuned.network = base
        return tuned

    def _check(self, flow_map: FlowMap, base: nn.Module) -> None:
        if isinstance(base, AdaptedNetwork):
            raise ConfigError("The map has a noise adapter already: write NoiseAdapter() to go on with it.")
        if flow_map.guidance_scale != 1 and not getattr(base, "guidance_input", False):
            raise ConfigError(
                f"A noise adapter cannot stand before guidance by two calls (scale {flow_map.guidance_scale:g}), which "
                "start from different noise: adapt flow_map.with_guidance(1.0), or a map with guidance_input."
            )


class Adapted(NamedTuple):
    """Noise as the base sees it, like z, and its divergence from N(0, I), (B,)."""

    z: State
    divergence: Values


@remembered
class AdaptedNetwork(nn.Module):
    """Put an adapter of the noise before a network of u(x, s, t), or of the denoised D = x - s u; see `NoiseAdapter`.

    u(z, 1, t) = u_base(z', 1, t) + (z' - z) / (t - 1), or D(z, 1, t) = D_base(z', 1, t) - t (z' - z) / (t - 1), so that
    the jump from z lands where the base's from z' does; the base's own for s < 1, and at s = t = 1.
    """

    def __init__(
        self,
        network: nn.Module,
        adapter: nn.Module,
        *,
        stochastic: bool = False,
        output: Output = "average_velocity",
    ) -> None:
        super().__init__()
        self.network, self.adapter, self.stochastic, self.output = network, adapter, stochastic, output
        self.data_shape = tuple(network.data_shape)  # type: ignore[arg-type]
        self.guidance_input = getattr(network, "guidance_input", False)
        first, *rest = self.data_shape
        wanted, got = ((1 + stochastic) * first, *rest), tuple(adapter.data_shape)  # type: ignore[arg-type]
        if got != wanted:
            raise ConfigError(
                f"The noise adapter of a map of {self.data_shape} {'with' if stochastic else 'without'} variances "
                f"needs data_shape {wanted}, got {got}."
            )

    def forward(self, x: State, s: Times, t: Times, condition: Condition | None = None) -> State:
        jumps = (s == 1) & (t < 1)
        if not jumps.any():
            return self.network(x, s, t, condition)
        z = torch.where(unsqueeze_like(jumps, x), self.adapt(x, condition).z, x)
        after = torch.where(jumps, t - 1, -torch.ones_like(t))  # where there is no jump z - x is 0
        share = (-t if self.output == "denoised" else 1) / after
        return self.network(z, s, t, condition) + unsqueeze_like(share, x) * (z - x)

    def adapt(self, z: State, condition: Condition | None = None) -> Adapted:
        """Return the noise that the base starts from in place of z."""
        one, zero = z.new_ones(len(z)), z.new_zeros(len(z))
        if not self.stochastic:
            shift = self.adapter(z, one, zero, condition)
            return Adapted(z + shift, squared_norm(shift) / 2)
        mean, log_variance = self.adapter(torch.cat([0 * z, 0 * z], 1), one, zero, condition).chunk(2, 1)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1) / 2
        return Adapted(mean + (log_variance / 2).exp() * z, divergence)


@remembered
class UntoldNetwork(nn.Module):
    """Let a network that takes no condition stand in a map that has one, for its adapter alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.data_shape = network.data_shape

    def forward(self, x: State, s: Times, t: Times, condition: Condition | None = None) -> State:
        return self.network(x, s, t, None)


def with_conditioner(flow_map: FlowMap, conditioner: nn.Module) -> FlowMap:
    """Return an unconditional map, on the same weights, with a conditioner that an adapter may read and it does not.

    `Pictures`, say: the measurement of an inverse problem. Raises ConfigError for a map that has one.
    """
    if flow_map.conditioner is not None:
        raise ConfigError(f"The map reads its prompts by {type(flow_map.conditioner).__name__} already: use that.")
    told = copy_around(flow_map)
    told.network, told.conditioner = UntoldNetwork(told.network), conditioner
    return told


@dataclass(frozen=True)
class AdaptedNoise(FineTuning):
    """Train a `NoiseAdapter` on the reward of `jumps` jumps from the noise that it returns; biased as it says.

    checkpointing: keep only the states between jumps and work out the rest again. Needs a differentiable reward.
    Raises ConfigError for a map without an adapter.
    """

    needs_gradient: ClassVar[bool] = True

    jumps: int = 1
    checkpointing: bool = False

    def __post_init__(self) -> None:
        check_counts(jumps=self.jumps)

    @property
    def moves(self) -> Moves:
        return "jumps"

    def __call__(self, batch: Batch) -> Tuned:
        """Return the loss -r(x0) + T KL, with the figures "penalty", the KL, and "shift", |z' - z| / sqrt(d)."""
        network = batch.flow_map.network
        if not isinstance(network, AdaptedNetwork):
            raise ConfigError("AdaptedNoise trains a noise adapter: set adapter=NoiseAdapter(network).")
        x1 = batch.normal()
        z, divergence = network.adapt(x1, batch.condition)
        x0 = few_jumps_truncated(batch.flow_map, x1, self.jumps, 0, batch.condition, self.checkpointing)
        scores = batch.scores(x0)
        shift = squared_norm(z - x1).sqrt() / math.sqrt(x1[0].numel())
        figures = {"penalty": divergence, "shift": shift}
        return Tuned(-scores.total + batch.temperature * divergence, x0, scores.total, scores.parts, figures)
