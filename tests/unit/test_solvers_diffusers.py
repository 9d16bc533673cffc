"""Baseline samplers against diffusers' schedulers, both fed by one exact velocity.

Any path is a variance-preserving one but for a scale: y = x / scale with scale^2 = alpha^2 + sigma^2 has the shares
alpha / scale and sigma / scale, so that schedulers made for diffusion take all of ours. Those that agree to 1e-5
only hold their sigmas, and most their states, in float32 whatever they are given.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from exact import NAMES, PATHS, exact, gaussian, mixture, numbers
from torch import Tensor

from steerfm.flow_map import FlowMap
from steerfm.paths import Linear, Path
from steerfm.sampling import few_jumps, renoised
from steerfm.solvers import ancestral, ddim, dpm_solver, euler, heun, shares
from steerfm.times import karras_grid, shifted_grid, time_grid

schedulers: Any = pytest.importorskip("diffusers.schedulers")

every_path = pytest.mark.parametrize("path", PATHS, ids=NAMES)
TOP = 0.99  # schedulers divide by alpha, which is 0 at t = 1 on two of our paths
TRAINED = [TOP * (i + 1) / 1000 for i in range(1000)]  # the time of each training step; data stands before the first
FROM_DATA = [TOP * i / 1000 for i in range(1001)]  # for those whose training step 0 is where sampling ends


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def same_noise(count: int) -> tuple[torch.Generator, Callable[[int], Tensor]]:
    """Return a generator for a scheduler, and what it is going to draw for each step."""
    drawn = torch.Generator().manual_seed(5)
    noises = [torch.randn(16, 2, generator=drawn, dtype=torch.float64) for _ in range(count)]
    return torch.Generator().manual_seed(5), lambda step: noises[step]


# --- schedulers of flows: the linear path, as it is -----------------------------------------------------------


def flow(scheduler: Any, x: Tensor, predict: Callable[[Tensor, float, float], Tensor], **options: Any) -> Tensor:
    """Run a scheduler of flows from x; predict(x, s, t) gives it the velocity of the step from s to t."""
    sigmas = scheduler.sigmas.tolist()
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(predict(x, sigmas[i], sigmas[i + 1]), timestep, x, **options, return_dict=False)[0]
    return x


def linear() -> tuple[FlowMap, Tensor, Callable[[Tensor, float, float], Tensor]]:
    flow_map = exact(mixture(), Linear())
    return flow_map, numbers(1, 16, 2), lambda x, s, t: flow_map.velocity(x, s)


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"use_karras_sigmas": True}], ids=str)
def test_euler_agrees(options: dict[str, Any]):
    flow_map, x1, velocity = linear()
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(8)
    theirs = flow(scheduler, x1, velocity)
    assert gap(euler(flow_map, x1, scheduler.sigmas.tolist()), theirs) < 1e-5
    assert gap(ddim(flow_map, x1, scheduler.sigmas.tolist()), theirs) < 1e-5


def test_time_grids_agree():
    """Their equal times stop at 0.001 before they go to 0; equal ones are given."""
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=time_grid(8)[:-1])
    assert scheduler.sigmas.tolist() == pytest.approx(shifted_grid(8, 3.0), abs=1e-6)
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(8)
    assert scheduler.sigmas.tolist() == pytest.approx(karras_grid(8), abs=1e-6)


@pytest.mark.parametrize("steps", [2, 8])
def test_heun_agrees(steps: int):
    """Their step is two calls, the last one's second left out as ours is; sigmas are listed once a call."""
    flow_map, x1, _ = linear()
    scheduler = schedulers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    x = x1
    for timestep in scheduler.timesteps:
        x = scheduler.step(flow_map.velocity(x, float(timestep) / 1000), timestep, x, return_dict=False)[0]
    grid = sorted(set(scheduler.sigmas.tolist()), reverse=True)
    assert len(grid) == steps + 1
    assert gap(heun(flow_map, x1, grid), x) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 8, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm_solver_agrees_on_flows(steps: int, shift: float):
    flow_map, x1, velocity = linear()
    scheduler = schedulers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction", lower_order_final=True
    )
    scheduler.set_timesteps(steps)
    theirs = flow(scheduler, x1, velocity)
    assert gap(dpm_solver(flow_map, x1, scheduler.sigmas.tolist()), theirs) < 1e-5


def test_few_jumps_agree():
    flow_map, x1, _ = linear()
    scheduler = schedulers.FlowMapEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    theirs = flow(scheduler, x1, flow_map.average_velocity)
    assert gap(few_jumps(flow_map, x1, shifted_grid(4, 3.0)), theirs) < 1e-9


def test_noise_anew_agrees_on_flows():
    """The look-ahead is given as x - sigma u(x, sigma, 0), which their scheduler takes for the clean picture."""
    flow_map, x1, _ = linear()
    scheduler = schedulers.FlowMatchLCMScheduler()
    scheduler.set_timesteps(4)
    generator, draw = same_noise(4)
    theirs = flow(scheduler, x1, lambda x, s, t: flow_map.average_velocity(x, s, 0.0), generator=generator)
    assert gap(renoised(flow_map, x1, scheduler.sigmas.tolist(), draw=draw), theirs) < 1e-5


# --- schedulers of diffusions: every path, rescaled -----------------------------------------------------------


def scale(path: Path, t: float) -> float:
    return math.hypot(*shares(path, t))


def diffusion(kind: str, path: Path, times: Sequence[float], **options: Any) -> Any:
    """Return a scheduler whose training step i stands at times[i] of the path, with the shares in float64.

    Their own shares are the product of a thousand float32 factors: right, to 1e-4.
    """
    kept = torch.tensor([(shares(path, t)[0] / scale(path, t)) ** 2 for t in times], dtype=torch.float64)
    betas = 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    scheduler = getattr(schedulers, kind)(num_train_timesteps=len(times), trained_betas=betas.tolist(), **options)
    assert torch.allclose(scheduler.alphas_cumprod.double(), kept, rtol=1e-4)
    scheduler.alphas_cumprod = kept
    return scheduler


def epsilon(flow_map: FlowMap, x: Tensor, t: float) -> Tensor:
    """Return E[x1 | x_t], which diffusers calls the epsilon prediction."""
    return flow_map.path.noise(x, flow_map.velocity(x, t), torch.full((len(x),), t, dtype=x.dtype))


def denoise_by(
    scheduler: Any, flow_map: FlowMap, x: Tensor, times: Sequence[float], options: Callable[[int], Any]
) -> Tensor:
    """Run a scheduler of diffusions in y = x / scale, from x at times[0] to data."""
    path = flow_map.path
    y = x / scale(path, times[0])
    for i, (t, timestep) in enumerate(zip(times[:-1], scheduler.timesteps, strict=True)):
        prediction = epsilon(flow_map, y * scale(path, t), t)
        y = scheduler.step(prediction, timestep, y, **options(i), return_dict=False)[0]
    return y


@every_path
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_ddim_agrees(path: Path, steps: int):
    flow_map, x, times = exact(mixture(), path), numbers(1, 16, 2), time_grid(steps, TOP, 0.0)
    scheduler = diffusion("DDIMScheduler", path, TRAINED, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    theirs = denoise_by(scheduler, flow_map, x, times, lambda i: {})
    assert gap(ddim(flow_map, x, times), theirs) < 1e-9


@every_path
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_agrees_with_ddim_at_the_same_eta(path: Path, eta: float):
    flow_map, x, times = exact(mixture(), path), numbers(1, 16, 2), time_grid(5, TOP, 0.0)
    scheduler = diffusion("DDIMScheduler", path, TRAINED, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(5)

    def draw(step: int) -> Tensor:
        return numbers(100 + step, 16, 2)

    theirs = denoise_by(scheduler, flow_map, x, times, lambda i: {"eta": eta, "variance_noise": draw(i)})
    assert gap(ancestral(flow_map, x, times, draw=draw, eta=eta), theirs) < 1e-9


@every_path
def test_ancestral_agrees_with_euler_ancestral(path: Path):
    """Theirs works in x / alpha, where the noise is sigma / alpha, and brings it to y itself."""
    flow_map, x, times = exact(mixture(), path), numbers(1, 16, 2), time_grid(10, TOP, 0.0)
    scheduler = diffusion("EulerAncestralDiscreteScheduler", path, TRAINED, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    generator, draw = same_noise(10)
    z = x / shares(path, TOP)[0]
    for t, timestep in zip(times[:-1], scheduler.timesteps, strict=True):
        prediction = epsilon(flow_map, scheduler.scale_model_input(z, timestep) * scale(path, t), t)
        z = scheduler.step(prediction, timestep, z, generator=generator, return_dict=False)[0]
    assert gap(ancestral(flow_map, x, times, draw=draw), z) < 1e-5


@every_path
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_dpm_solver_agrees(path: Path, steps: int):
    flow_map, x, times = exact(mixture(), path), numbers(1, 16, 2), time_grid(steps, TOP, 0.0)
    scheduler = diffusion("DPMSolverMultistepScheduler", path, TRAINED, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    theirs = denoise_by(scheduler, flow_map, x, times, lambda i: {})
    assert gap(dpm_solver(flow_map, x, times), theirs) < 1e-5


@every_path
def test_noise_anew_agrees_with_consistency_models(path: Path):
    """Theirs adds a share of the state to be right at its step 0; the scaling makes that 1e-17 elsewhere."""
    flow_map, x, steps = exact(gaussian(), path), numbers(1, 16, 2), [1000, 600, 200]
    scheduler = diffusion("LCMScheduler", path, FROM_DATA, prediction_type="sample", timestep_scaling=1e6)
    scheduler.set_timesteps(timesteps=steps)
    generator, draw = same_noise(3)
    y = x / scale(path, TOP)
    for timestep in scheduler.timesteps:
        t = FROM_DATA[int(timestep)]
        clean = flow_map.look_ahead(y * scale(path, t), t)
        y = scheduler.step(clean, timestep, y, generator=generator, return_dict=False)[0]
    assert gap(renoised(flow_map, x, [*(FROM_DATA[i] for i in steps), 0.0], draw=draw), y) < 1e-9


@every_path
@pytest.mark.parametrize("gamma", [0.25, 0.5])
def test_noise_anew_agrees_with_trajectory_consistency(path: Path, gamma: float):
    """Theirs is given the epsilon that takes it where the map jumps, (1 - gamma) of the next training step."""
    flow_map, x, steps = exact(gaussian(), path), numbers(1, 16, 2), [1000, 600, 200]
    scheduler = diffusion("TCDScheduler", path, FROM_DATA)
    scheduler.set_timesteps(timesteps=steps)
    generator, draw = same_noise(3)
    times = [*(FROM_DATA[i] for i in steps), 0.0]
    y = x / scale(path, TOP)
    for s, t, timestep in zip(times[:-1], times[1:], scheduler.timesteps, strict=True):
        state, r = y * scale(path, s), (1 - gamma) * t
        (alpha_s, sigma_s), (alpha_r, sigma_r) = shares(path, s), shares(path, r)
        jump = flow_map.jump(state, s, r)
        prediction = (alpha_r / alpha_s * state - jump) / (alpha_r * sigma_s / alpha_s - sigma_r)
        y = scheduler.step(prediction, timestep, y, eta=gamma, generator=generator, return_dict=False)[0]
    assert gap(renoised(flow_map, x, times, draw=draw, gamma=gamma), y) < 1e-9
