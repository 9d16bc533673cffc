"""Samplers of a flow map: few jumps, jumps with fresh noise, and the reverse-time SDE with its shared step.

In reverse time tau = 1 - t the path's marginals are those of dx = -v dtau, and of
dx = (-v + g^2/2 score) dtau + g dW for any g >= 0 (MATHS: Song et al. 2021, arXiv 2011.13456, appendix D).
Solvers of the velocity alone are in steerfm.solvers; `Unsteered` runs them all.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steerfm import seeds as seeding
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap, as_times
from steerfm.paths import Path
from steerfm.reward import as_reward
from steerfm.solvers import ancestral, check_share, ddim, dpm_solver, euler, heun, noising
from steerfm.times import as_grid
from steerfm.types import Condition, Cost, Samples, State, Times, Values, unsqueeze_like

Noise = Literal["memoryless", "gentle"]
SamplerName = Literal["jumps", "renoised", "euler", "heun", "ddim", "dpm_solver", "ancestral", "sde"]


def few_jumps(flow_map: FlowMap, x1: State, jumps: int | Sequence[float], condition: Condition | None = None) -> State:
    """Return x0 by `jumps` equal jumps from noise, or by jumps between given times; one network call each."""
    x = x1
    for s, t in itertools.pairwise(as_grid(jumps)):
        x = flow_map.jump(x, s, t, condition)
    return x


def renoised(
    flow_map: FlowMap,
    x1: State,
    jumps: int | Sequence[float],
    condition: Condition | None = None,
    *,
    draw: Callable[[int], State],
    gamma: float = 1.0,
) -> State:
    """Return x0 by jumps past each next time t, to (1 - gamma) t, and fresh noise back to t; one network call each.

    gamma: in [0, 1]; 1 looks ahead to data each time, as consistency models do, 0 is `few_jumps`. With the exact
    map every gamma keeps the path's marginals. `draw(jump)` gives that jump's noise; the last adds none.
    Reference: Song et al. 2023, arXiv 2303.01469, algorithm 1 (gamma = 1); Zheng et al. 2024, arXiv 2402.19159
    (TCD), for gamma, which Kim et al. 2023, arXiv 2310.02279 (CTM), count otherwise: they jump to where sigma / alpha
    is sqrt(1 - gamma^2) of what it is at t.
    """
    check_share("gamma", gamma)
    x = x1
    for i, (s, t) in enumerate(itertools.pairwise(as_grid(jumps))):
        r = (1 - gamma) * t
        x = flow_map.jump(x, s, r, condition)
        if r < t:
            kept, std = noising(flow_map.path, r, t)
            x = kept * x + std * draw(i)
    return x


class Step(NamedTuple):
    """One step of an SDE: the new state, the mean and standard deviation it was drawn with, its log-density."""

    x_next: State
    mean: State
    std: Times
    log_prob: Values


def sde_step(x: State, drift: State, g2: Times, dtau: float, noise: State) -> Step:
    """Take one Euler-Maruyama step x + drift dtau + sqrt(g2 dtau) noise of reverse time.

    g2: (B,), the squared diffusion. log_prob: of x_next under N(mean, std^2), summed over dimensions; 0 where
    std is 0. Shared by steering, adjoint matching and policy gradients.
    """
    mean = x + drift * dtau
    std = (g2 * dtau).sqrt()
    x_next = mean + unsqueeze_like(std, x) * noise
    return Step(x_next, mean, std, gaussian_log_prob(x_next, mean, std))


def gaussian_log_prob(x: State, mean: State, std: Times) -> Values:
    """Return log N(x; mean, std^2 I), summed over dimensions, (B,); 0 where std is 0."""
    d = x[0].numel()
    positive = torch.where(std > 0, std, torch.ones_like(std))
    gap = ((x - mean) / unsqueeze_like(positive, x)).flatten(1)
    log_prob = -0.5 * (gap**2).sum(1) - d * positive.log() - 0.5 * d * math.log(2 * math.pi)
    return torch.where(std > 0, log_prob, torch.zeros_like(log_prob))


def squared_noise(path: Path, t: Times, step: float, noise: Noise) -> Times:
    """Return g^2 at t: "memoryless" 2 eta (linear: 2 t / (1 - t + step)), or "gentle" 2 eta alpha (linear: 2 t)."""
    if noise == "memoryless":
        return path.memoryless_noise(t, step)
    if noise == "gentle":
        return path.gentle_noise(t)
    raise ConfigError(f"noise is 'memoryless' or 'gentle', got '{noise}'.")


def reverse_drift(path: Path, x: State, v: State, t: Times, g2: Times) -> State:
    """Return -v + g^2/2 score, the drift in reverse time that keeps the path's marginals; t > 0."""
    return -v + unsqueeze_like(g2 / 2, x) * path.score(x, v, t)


def sde(
    flow_map: FlowMap,
    x1: State,
    steps: int | Sequence[float],
    condition: Condition | None = None,
    *,
    draw: Callable[[int], State],
    noise: Noise = "memoryless",
) -> State:
    """Return x0 by the reverse-time SDE; one network call a step. `draw(step)` gives that step's noise.

    The last step adds no noise: at t = 0 the path ends on data.
    """
    x = x1
    for i, (s, t) in enumerate(itertools.pairwise(as_grid(steps))):
        times = as_times(s, x)
        g2 = squared_noise(flow_map.path, times, s - t, noise)
        drift = reverse_drift(flow_map.path, x, flow_map.velocity(x, times, condition), times, g2)
        x = sde_step(x, drift, g2 if t > 0 else torch.zeros_like(g2), s - t, draw(i)).x_next
    return x


@dataclass(frozen=True)
class Unsteered:
    """Sample the flow map as it is: the baseline that every method is compared with.

    sampler: "jumps" or "renoised" of the map; "euler", "heun", "ddim", "dpm_solver", "ancestral" or "sde" (memoryless)
    of its velocity. steps: jumps or steps of equal size, or their times, falling from 1 to 0. gamma, of "renoised",
    and eta, of "ancestral": the share of fresh noise, in [0, 1]. Same interface as a steering method; a reward is
    only evaluated.
    """

    sampler: SamplerName = "jumps"
    steps: int | Sequence[float] = 4
    gamma: float = 1.0
    eta: float = 1.0

    def __post_init__(self) -> None:
        if self.sampler not in get_args(SamplerName):
            names = ", ".join(f"'{name}'" for name in get_args(SamplerName))
            raise ConfigError(f"sampler is one of {names}; got '{self.sampler}'.")
        times = as_grid(self.steps)
        if (times[0], times[-1]) != (1, 0):
            raise ConfigError(f"A sample's times fall from noise, 1, to data, 0; got {times}: add what is missing.")
        check_share("gamma", self.gamma)
        check_share("eta", self.eta)

    @torch.no_grad()
    def __call__(
        self,
        flow_map: FlowMap,
        reward: Any = None,
        *,
        prompts: Sequence[str] = ("",),
        seeds: Sequence[int] = (0,),
        condition: Condition | None = None,
    ) -> Samples:
        task = prepare(flow_map, prompts, seeds, condition)
        with measure(flow_map, None, len(task.seeds)) as cost:
            x0 = self._function(task.step_noise)(flow_map, task.noise(), self.steps, task.condition)
        return finish(flow_map, task, x0, reward, cost())

    def _function(self, draw: Callable[[int], State]) -> Callable[..., State]:
        return {
            "jumps": few_jumps,
            "renoised": partial(renoised, draw=draw, gamma=self.gamma),
            "euler": euler,
            "heun": heun,
            "ddim": ddim,
            "dpm_solver": dpm_solver,
            "ancestral": partial(ancestral, draw=draw, eta=self.eta),
            "sde": partial(sde, draw=draw),
        }[self.sampler]


class Task(NamedTuple):
    """What is to be sampled: one (prompt, seed) pair a row, with its condition; like: no rows, as states are."""

    prompts: list[str]
    seeds: list[int]
    condition: Condition | None
    like: State

    def noise(self, particles: int = 1, stream: str = "initial", step: int = 0) -> State:
        """Return noise keyed by (seed, particle, stream, step), (B * particles, *dim); a pair's are neighbours."""
        shape, dtype, device = self.like.shape[1:], self.like.dtype, self.like.device
        keys: dict[str, Any] = {"particles": particles, "stream": stream, "step": step}
        return seeding.noise(self.seeds, shape, **keys, dtype=dtype, device=device)

    def step_noise(self, step: int) -> State:
        """Return the noise of one SDE step."""
        return self.noise(1, "step", step)


def prepare(
    flow_map: FlowMap,
    prompts: Sequence[str],
    seeds: Sequence[int],
    condition: Condition | None = None,
) -> Task:
    """Pair prompts with seeds (either may have length one), and encode them.

    condition: given instead of encoding the prompts, one row a pair. Raises ConfigError where the lengths do not
    fit.
    """
    if isinstance(prompts, str):
        raise ConfigError(f"prompts is a list of strings, got the string '{prompts}': write ['{prompts}'].")
    prompts, seeds = list(prompts), [seeding.whole(seed) for seed in seeds]
    n = max(len(prompts), len(seeds))
    if min(len(prompts), len(seeds)) == 0 or len(prompts) not in (1, n) or len(seeds) not in (1, n):
        raise ConfigError(f"Prompts and seeds are paired one to one: got {len(prompts)} prompts, {len(seeds)} seeds.")
    prompts, seeds = prompts * (n // len(prompts)), seeds * (n // len(seeds))
    if condition is None:
        condition = flow_map.encode_prompts(prompts)
    elif len(condition) != n:
        raise ConfigError(f"The condition needs one row a (prompt, seed) pair, {n}, got {len(condition)}.")
    like = torch.empty((0, *flow_map.data_shape), dtype=flow_map.dtype, device=flow_map.device)
    return Task(prompts, seeds, condition, like)


def finish(flow_map: FlowMap, task: Task, x0: State, reward: Any, cost: Cost, **more: Any) -> Samples:
    """Decode x0, score it once (not charged to the cost) and return the samples; reward: as `as_reward` takes it."""
    with torch.no_grad():
        images = flow_map.decode(x0)
        scores = None if reward is None else as_reward(reward)(images, task.prompts)
    samples = Samples(x0.detach(), images, task.prompts, task.seeds, cost, **more)
    return samples if scores is None else replace(samples, rewards=scores.total, parts=scores.parts)


def decoded(flow_map: FlowMap, x0: State) -> Tensor:
    """Return the pictures; a network that decodes keeps nothing for the backward pass and decodes again there."""
    if isinstance(flow_map.codec, nn.Module) and torch.is_grad_enabled():
        return checkpoint(flow_map.decode, x0, use_reentrant=False)  # type: ignore[return-value]
    return flow_map.decode(x0)


@contextmanager
def measure(
    flow_map: FlowMap, reward: nn.Module | None, returned: int, others: Sequence[FlowMap] = ()
) -> Iterator[Callable[[], Cost]]:
    """Count what happens inside the block, per returned sample; call the yielded function for the Cost.

    Every row through the map's network, and those of other maps, counts one, every row back through it two; every
    scored picture one reward call, every back-propagated one a reward gradient. Recomputed forward passes count, as
    they cost.
    """
    counts = {"network": 0, "calls": 0, "gradients": 0}

    def add(key: str, rows: int) -> None:
        counts[key] += rows

    def network_hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
        add("network", len(output))
        if output.requires_grad:
            output.register_hook(lambda gradient: add("network", 2 * len(gradient)))

    def reward_hook(module: nn.Module, arguments: Any, scores: Any) -> None:
        add("calls", len(scores.total))
        if scores.total.requires_grad:
            scores.total.register_hook(lambda gradient: add("gradients", len(gradient)))

    networks = dict.fromkeys(each.network for each in (flow_map, *others))
    handles = [network.register_forward_hook(network_hook) for network in networks]
    if reward is not None:
        handles.append(reward.register_forward_hook(reward_hook))
    start = _finished(flow_map.device)
    try:
        yield lambda: Cost(
            counts["network"] / returned,
            counts["calls"] / returned,
            counts["gradients"] / returned,
            (_finished(flow_map.device) - start) / returned,
        )
    finally:
        for handle in handles:
            handle.remove()


def _finished(device: torch.device) -> float:
    """Return the time, in seconds, when all work given to the device is done; a GPU answers before it is."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
