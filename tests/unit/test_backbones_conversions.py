"""The table of time, sign and scale, each row against the step of a scheduler that is told the same answer.

Any function of state and time may stand for a network: what is compared is what a scheduler and we make of its answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steerfm.backbones.conversions import Conversion, conversion_of, grid_of, kind_of
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.paths import Linear, Straight
from steerfm.sampling import few_jumps, renoised
from steerfm.solvers import ancestral, ddim, shares
from steerfm.types import Times, unsqueeze_like

schedulers: Any = pytest.importorskip("diffusers.schedulers")

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAILING: dict[str, Any] = BETAS | {"timestep_spacing": "trailing"}
DDIM = TRAILING | {"clip_sample": False, "set_alpha_to_one": True}
SHAPE = (4, 6, 6)


def answer(x: Tensor, timestep: Tensor) -> Tensor:
    """Stand for a network: a smooth function of what it is told."""
    return torch.tanh(1.3 * x.roll(1, -1) - 0.4 * x) + 0.3 * torch.sin(unsqueeze_like(timestep, x) / 150)


class Answers(nn.Module):
    """Let `answer` be the network of a flow map, through a row of the table."""

    data_shape = SHAPE

    def __init__(self, conversion: Conversion) -> None:
        super().__init__()
        self.conversion = conversion
        self.told: list[float] = []

    def forward(self, x: Tensor, s: Times, t: Times, condition: Any = None) -> Tensor:
        state, timestep = self.conversion.told(x, s)
        self.told.append(float(timestep[0]))
        return self.conversion.average_velocity(answer(state, timestep), x, s)


def map_of(scheduler: Any) -> FlowMap:
    conversion = conversion_of(scheduler)
    return FlowMap(Answers(conversion), path=conversion.path)


def noise(seed: int = 0) -> Tensor:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(seed))


def draws(count: int) -> Callable[[int], Tensor]:
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randn(3, *SHAPE, generator=generator) for _ in range(count)]
    return lambda step: drawn[step]


def scheduled(scheduler: Any, steps: int, random: bool = False, **options: Any) -> Tensor:
    """Run a scheduler from the same noise, told `answer` at its own times."""
    scheduler.set_timesteps(steps, **options)
    x = noise() * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise()
    more = {"generator": torch.Generator().manual_seed(5)} if random else {}
    for k in scheduler.timesteps:
        told = scheduler.scale_model_input(x, k) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(answer(told, k.float().expand(3)), k, x, **more, return_dict=False)[0]
    return x


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(
    "scheduler",
    [
        schedulers.FlowMatchEulerDiscreteScheduler(),
        schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True),
    ],
    ids=["plain", "shifted", "karras"],
)
def test_flows_take_its_steps(scheduler: Any):
    flow_map = map_of(scheduler)
    assert flow_map.path == Linear() and kind_of(scheduler) == "velocity"
    times = grid_of(scheduler, conversion_of(scheduler), 6)
    assert gap(few_jumps(flow_map, noise(), times), scheduled(scheduler, 6)) < 1e-5


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize(
    "scheduler",
    [
        schedulers.DDIMScheduler(**DDIM),
        schedulers.DDIMScheduler(**DDIM, prediction_type="v_prediction"),
        schedulers.DDIMScheduler(**DDIM, prediction_type="sample"),
        schedulers.DDIMScheduler(**DDIM, prediction_type="v_prediction", rescale_betas_zero_snr=True),
        schedulers.EulerDiscreteScheduler(**TRAILING),
        schedulers.EulerDiscreteScheduler(**TRAILING, prediction_type="v_prediction"),
        schedulers.EulerDiscreteScheduler(**TRAILING, prediction_type="v_prediction", rescale_betas_zero_snr=True),
        schedulers.EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace"),
        schedulers.EulerDiscreteScheduler(**TRAILING, use_karras_sigmas=True),
    ],
    ids=["ddim", "ddim-v", "ddim-x0", "ddim-zero", "euler", "euler-v", "euler-zero", "euler-linspace", "euler-karras"],
)
def test_diffusions_take_its_steps(scheduler: Any, steps: int):
    """DDIM is Euler's step of x / alpha, and our path is theirs but for a scale of the states."""
    if steps == 1 and scheduler.config.get("timestep_spacing") == "linspace":
        pytest.skip("its one step starts at the first training step, from hardly any noise")
    theirs = scheduled(scheduler, steps)
    flow_map = map_of(scheduler)
    found = ddim(flow_map, noise(), grid_of(scheduler, conversion_of(scheduler), steps))
    zero = scheduler.config.get("rescale_betas_zero_snr")  # of data at the end, where we leave 2^-12 as Euler's does
    assert gap(found, theirs) < (2e-3 if zero else 1e-5)
    if scheduler.config.get("timestep_spacing") == "trailing" and not scheduler.config.get("use_karras_sigmas"):
        told = flow_map.network.told  # type: ignore[union-attr]
        assert told == scheduler.timesteps.tolist()  # float32 times are still whole steps


@pytest.mark.parametrize("name", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("steps", [1, 4, 30])
def test_times_of_older_pipelines_start_at_noise_too(name: str, steps: int):
    """Theirs, "leading", start short of it: at training step 751 of 1000 where there are four."""
    scheduler = getattr(schedulers, name)(**BETAS, timestep_spacing="leading", steps_offset=1)
    trailing = schedulers.DDIMScheduler(**DDIM)
    conversion = conversion_of(scheduler)
    times = grid_of(scheduler, conversion, steps)
    assert (times[0], times[-1], len(times)) == (1.0, 0.0, steps + 1)
    trailing.set_timesteps(steps)
    assert conversion.step(torch.tensor(times[:-1])).tolist() == trailing.timesteps.tolist()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ancestral_steps_are_euler_ancestral(prediction: str):
    scheduler = schedulers.EulerAncestralDiscreteScheduler(**TRAILING, prediction_type=prediction)
    assert kind_of(scheduler) == ("partial" if prediction == "epsilon" else "velocity")
    theirs = scheduled(scheduler, 4, random=True)
    times = grid_of(scheduler, conversion_of(scheduler), 4)
    assert gap(ancestral(map_of(scheduler), noise(), times, draw=draws(4)), theirs) < 1e-5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_noise_anew_is_lcm(steps: int, prediction: str):
    scheduler = schedulers.LCMScheduler(prediction_type=prediction)
    assert kind_of(scheduler) == "partial"
    theirs = scheduled(scheduler, steps, random=True)
    times = grid_of(scheduler, conversion_of(scheduler), steps)
    assert gap(renoised(map_of(scheduler), noise(), times, draw=draws(steps)), theirs) < 1e-5


@pytest.mark.parametrize(
    "scheduler",
    [
        schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
        schedulers.FlowMatchLCMScheduler(shift=3.0),
    ],
    ids=["stochastic", "lcm"],
)
def test_noise_anew_on_flows(scheduler: Any):
    assert kind_of(scheduler) == "partial"
    theirs = scheduled(scheduler, 4, random=True)
    times = grid_of(scheduler, conversion_of(scheduler), 4)
    assert gap(renoised(map_of(scheduler), noise(), times, draw=draws(4)), theirs) < 1e-5


def test_rows_of_the_table_are_differentiated_in_forward_mode():
    """Objectives of flow maps differentiate along the time; between whole steps the answer is smooth in it."""
    conversion = conversion_of(schedulers.DDIMScheduler(**DDIM))
    x, s = noise().double(), torch.full((3,), 0.4567, dtype=torch.float64)

    def u(s: Tensor) -> Tensor:
        told, timestep = conversion.told(x, s)
        return conversion.average_velocity(answer(told, timestep), x, s)

    exact = torch.func.jvp(u, (s,), (torch.ones_like(s),))[1]
    assert gap((u(s + 1e-6) - u(s - 1e-6)) / 2e-6, exact) < 1e-4


def test_the_boundary_of_consistency_models_keeps_what_has_no_noise():
    """c_skip is 1 and c_out 0 at training step 0: the answer plays no part there."""
    conversion = conversion_of(schedulers.LCMScheduler())
    time = torch.tensor([conversion.times([conversion.ratio(0)])[0]] * 3)
    x = noise()
    x0 = x - unsqueeze_like(time, x) * conversion.average_velocity(noise(1), x, time)
    scaled = x / (conversion.path.alpha(time) ** 2 + conversion.path.sigma(time) ** 2).sqrt()[0]
    assert gap(x0, scaled) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_trigflow_is_scm(steps: int):
    """The transformer's answer to the linear state, turned into F of TrigFlow as SANA-Sprint's paper has it."""
    scheduler = schedulers.SCMScheduler()
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    x = noise() * scheduler.config.sigma_data
    generator = torch.Generator().manual_seed(5)
    denoised = x
    for angle in scheduler.timesteps[:-1]:
        t = float(angle.sin() / (angle.sin() + angle.cos()))
        length = math.hypot(t, 1 - t)
        state = x / scheduler.config.sigma_data * length
        told = answer(state, torch.full((3,), t))
        trig = ((1 - 2 * t) * state + (1 - 2 * t + 2 * t**2) * told) / length * scheduler.config.sigma_data
        x, denoised = scheduler.step(trig, angle, x, generator=generator, return_dict=False)
    conversion = conversion_of(scheduler)
    found = renoised(map_of(scheduler), noise(), grid_of(scheduler, conversion, steps), draw=draws(steps))
    assert gap(found, denoised / scheduler.config.sigma_data) < 1e-5


# --- the path ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [(0.0, 1.0), (0.068, 1.0), (0.068, 0.998)])
def test_a_straight_path_is_read_back(end: tuple[float, float]):
    path, t = Straight(*end), torch.rand(64, dtype=torch.float64) * 0.96 + 0.02
    x0, x1 = torch.randn(2, 64, 3, dtype=torch.float64)
    x, w = path.interpolate(x0, x1, t), path.tangent(x0, x1, t)
    assert torch.allclose(path.denoised(x, w, t), x0, atol=1e-10)
    assert torch.allclose(path.noise(x, w, t), x1, atol=1e-10)
    assert torch.allclose(path.determinant(t), torch.full_like(t, end[1]))
    assert torch.allclose(x - t[:, None] * w, x0, atol=1e-12)  # u to data is the velocity
    assert shares(path, 1.0) == pytest.approx(end) and shares(path, 0.0) == (1.0, 0.0)


@pytest.mark.parametrize("unit_start", [True, False])
def test_times_and_training_steps_are_each_other_s_inverse(unit_start: bool):
    abar = schedulers.DDIMScheduler(**DDIM).alphas_cumprod.double()
    conversion = Conversion("epsilon", ((1 - abar) / abar).sqrt().log(), unit_start)
    times = torch.tensor(conversion.times([conversion.ratio(k) for k in range(1000)]))
    assert conversion.step(times).tolist() == list(range(1000))
    assert times[-1] == 1 and (times.diff() > 0).all()
    between = conversion.step(torch.lerp(times[:-1], times[1:], torch.tensor(0.5)))
    assert ((between - torch.arange(999)) * (torch.arange(1, 1000) - between) > 0).all()
    assert conversion.step(torch.tensor([0.0, 1e-3])).tolist() == [0, 0]  # before the first step it is held


def test_what_has_no_row_is_refused():
    with pytest.raises(ConfigError, match="known, and this one predicts 'noise'"):
        Conversion("noise")  # type: ignore[arg-type]
    continuous = schedulers.EulerDiscreteScheduler(**BETAS, timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(ConfigError, match="no place in"):
        conversion_of(continuous)
    with pytest.raises(ConfigError, match="no place in"):
        conversion_of(schedulers.EDMEulerScheduler())
