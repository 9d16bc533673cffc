"""Time, sign and scale: what a published model is told of a state x_t, and how its answer becomes u; one table.

| prediction   | path       | told: state, time        | answers                       | u                           |
|--------------|------------|--------------------------|-------------------------------|-----------------------------|
| flow         | `Linear`   | x, 1000 t                | x1 - x0                       | the answer                  |
| trigflow     | `Linear`   | x, t                     | (x - F(x, t, 0)) / t          | the answer                  |
| epsilon      | `Straight` | c x, the training step k | E[x1]                         | alpha' E[x0] + sigma' E[x1] |
| v_prediction | `Straight` | c x, k                   | c (alpha E[x1] - sigma E[x0]) | the same                    |
| sample       | `Straight` | c x, k                   | E[x0]                         | the same                    |

The last three are trained on y = sqrt(abar_k) x0 + sqrt(1 - abar_k) x1 at whole steps k. Only the ratio
r_k = sqrt((1 - abar_k) / abar_k) of noise to data matters, since a state may be scaled at will: here it is scaled
onto the straight path, whose ratio sigma(t) / alpha(t) rises with t too, so that each t has its k (between whole steps
log r is interpolated; beyond the ends the nearest is held) and c = 1 / sqrt(alpha^2 + sigma^2) leads back to y. A path
that is tabulated in k would serve as well, but on the straight one u = (x - E[x0]) / t is both the velocity and the
average velocity to data, every conversion is free of differences of a table, and one step to data is one step whatever
the schedule. The path ends where the schedule does, at the ratio of its last step: in (1 / r, 1) if the scheduler
starts from y = noise times sqrt(1 - abar), as Euler's with "trailing" or "linspace" spacing do, and in
(sqrt(abar), sqrt(1 - abar)) if from y = noise.

TrigFlow's state cos(a) x0 + sin(a) x1 lies on the linear path when divided by cos(a) + sin(a), with t = sin(a) /
(cos(a) + sin(a)); SANA-Sprint's transformer takes just that state and that t, and what its pipeline makes of the answer
for the SCM scheduler (cos(a) y - sin(a) F) is x - t times the answer. `boundary` is the weighting of latent consistency
models, c_skip y + c_out E[x0], which is y itself where there is no noise.

References: Ho, Jain, Abbeel 2020, arXiv 2006.11239 (abar); Salimans and Ho 2022, arXiv 2202.00512 (v); Lu and Song
2024, arXiv 2410.11081 (TrigFlow); Luo et al. 2023, arXiv 2310.04378 (latent consistency models); Chen et al. 2025,
arXiv 2503.09641 (SANA-Sprint).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from steerfm.errors import ConfigError
from steerfm.paths import Linear, Path, Straight
from steerfm.types import State, Times, unsqueeze_like

Prediction = Literal["flow", "trigflow", "epsilon", "v_prediction", "sample"]
Kind = Literal["velocity", "partial"]

TRAINING_STEPS = 1000  # flows are told 1000 t, whatever else their schedulers count
LARGEST_RATIO = 2.0**12  # of noise to data, where the last step holds no data at all; diffusers' Euler takes the same
WHOLE = 0.01  # a step this near a whole one is that one, which float32 times miss by less
SIGMA_DATA = 0.5  # of the boundary of latent consistency models
SMALLEST = 1e-6  # sigma that is divided by


@dataclass(frozen=True, eq=False)
class Conversion:
    """Convert one model's input and answer; the rows of the table.

    log_ratios: (K,), float64, log r_k of each training step, rising; None for flows. unit_start: whether the scheduler
    starts from y = noise. boundary: the scaling of k in c_skip and c_out, None without them. whole: whether a flow is
    told its 1000 t cut down to whole numbers, as diffusers' DPM-Solver cuts them.
    """

    prediction: Prediction
    log_ratios: Tensor | None = None
    unit_start: bool = True
    boundary: float | None = None
    whole: bool = False
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            known = ", ".join(get_args(Prediction))
            raise ConfigError(f"Models that predict {known} are known, and this one predicts '{self.prediction}'.")
        path: Path = Linear()
        if self.log_ratios is not None:
            last = float(self.log_ratios[-1].exp())
            length = (1 + last**2) ** 0.5
            path = Straight(1 / length, last / length) if self.unit_start else Straight(1 / last, 1.0)
        object.__setattr__(self, "path", path)

    def told(self, x: State, s: Times) -> tuple[State, Times]:
        """Return the state and the time that the model is told; (B, *dim) and (B,)."""
        if self.prediction == "flow":
            timestep = TRAINING_STEPS * s
            return x, (timestep + WHOLE).floor() if self.whole else timestep
        if self.prediction == "trigflow":
            return x, s
        return unsqueeze_like(self._scale(s), x) * x, self.step(s)

    def average_velocity(self, answer: Tensor, x: State, s: Times) -> State:
        """Return u of the model's answer to x at s: the velocity, or the average velocity to data; like x."""
        if self.prediction in ("flow", "trigflow"):
            return answer
        x0, x1 = self._ends(answer, x, s)
        if self.boundary is not None:
            x0 = self._bounded(x0, x, s)
            x1 = self._noise(x0, x, s)
        path = self.path
        return unsqueeze_like(path.alpha_dot(s), x) * x0 + unsqueeze_like(path.sigma_dot(s), x) * x1

    def step(self, s: Times) -> Times:
        """Return the training step k of a time, between whole ones too; (B,)."""
        logs = self.logs().to(s.device)
        path, times = self.path, s.double()
        log_ratio = (path.sigma(times) / path.alpha(times)).log().clamp(logs[0], logs[-1])
        above = torch.searchsorted(logs, log_ratio).clamp(1, len(logs) - 1)
        low, high = logs[above - 1], logs[above]
        step = above - 1 + (log_ratio - low) / (high - low)
        whole = step.round()
        return torch.where((step - whole).abs() < WHOLE, whole, step).to(s)

    def times(self, ratios: Sequence[float]) -> list[float]:
        """Return the times at which sigma / alpha of the path are these, at most 1."""
        path = self.path
        assert isinstance(path, Straight)
        found = [ratio / (path.end_sigma + ratio * (1 - path.end_alpha)) for ratio in ratios]
        return [1.0 if t > 1 - 1e-7 else t for t in found]

    def ratio(self, step: float) -> float:
        """Return r_k of a whole training step."""
        return float(self.logs()[int(step)].exp())

    def logs(self) -> Tensor:
        """Return log r_k of each training step; only diffusions have any."""
        assert self.log_ratios is not None
        return self.log_ratios

    def _scale(self, s: Times) -> Times:
        return (self.path.alpha(s) ** 2 + self.path.sigma(s) ** 2).rsqrt()

    def _ends(self, answer: Tensor, x: State, s: Times) -> tuple[State, State]:
        """Return E[x0] and E[x1] of the answer."""
        alpha, sigma = unsqueeze_like(self.path.alpha(s), x), unsqueeze_like(self.path.sigma(s), x)
        if self.prediction == "epsilon":
            return (x - sigma * answer) / alpha, answer
        if self.prediction == "sample":
            return answer, self._noise(answer, x, s)
        c = unsqueeze_like(self._scale(s), x)
        return c * (c * alpha * x - sigma * answer), c * (c * sigma * x + alpha * answer)

    def _noise(self, x0: State, x: State, s: Times) -> State:
        alpha, sigma = unsqueeze_like(self.path.alpha(s), x), unsqueeze_like(self.path.sigma(s), x)
        return (x - alpha * x0) / sigma.clamp_min(SMALLEST)

    def _bounded(self, x0: State, x: State, s: Times) -> State:
        """Return c_skip y + c_out E[x0] (Luo et al. 2023, with k scaled as diffusers' LCMScheduler scales it)."""
        k = (self.boundary or 0.0) * self.step(s)
        squares = k**2 + SIGMA_DATA**2
        c_skip, c_out = SIGMA_DATA**2 / squares, k / squares.sqrt()
        return unsqueeze_like(c_skip * self._scale(s), x) * x + unsqueeze_like(c_out, x) * x0


def conversion_of(scheduler: Any) -> Conversion:
    """Return the row of the table that a diffusers scheduler stands for. Raises ConfigError for one without a row."""
    config, name = scheduler.config, type(scheduler).__name__
    if name == "SCMScheduler":
        return Conversion("trigflow")
    if name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction":
        return Conversion("flow", whole=not name.startswith("FlowMatch"))
    if getattr(scheduler, "alphas_cumprod", None) is None or config.get("timestep_type") == "continuous":
        raise ConfigError(f"The scheduler {name} has no place in steerfm.backbones.conversions: save the pipeline with "
                          "one of flow matching, or one with alphas_cumprod and whole training steps.")  # fmt: skip
    abar = scheduler.alphas_cumprod.double().cpu()
    ratios = ((1 - abar) / abar).sqrt().clamp_max(LARGEST_RATIO)
    start = float(getattr(scheduler, "init_noise_sigma", 1.0))
    return Conversion(
        config.get("prediction_type", "epsilon"),
        ratios.log(),
        unit_start=abs(start / float(ratios[-1]) - 1) > 1e-3,
        boundary=float(config["timestep_scaling"]) if name == "LCMScheduler" else None,
    )


def kind_of(scheduler: Any) -> Kind:
    """Return "partial" for consistency models and one-step distilled models, "velocity" for all others.

    A distilled model is told by an Euler scheduler with "trailing" steps and plain noise prediction, as SD-Turbo and
    SDXL-Turbo have it: their files say no more than that.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if name in ("LCMScheduler", "SCMScheduler", "FlowMatchLCMScheduler") or config.get("stochastic_sampling"):
        return "partial"  # their schedulers jump to data and add noise anew
    distilled = (
        name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
        and config.get("timestep_spacing") == "trailing"
        and config.get("prediction_type") == "epsilon"
    )
    return "partial" if distilled else "velocity"


def grid_of(scheduler: Any, conversion: Conversion, steps: int, **options: Any) -> list[float]:
    """Return the times of a scheduler's own steps, falling, with 0 at the end.

    options: of its set_timesteps, such as `original_inference_steps` of LCM's. The scheduler is not changed. Steps with
    "leading" spacing start short of noise: in their place are "trailing" ones (Lin et al. 2023, arXiv 2305.08891,
    table 2).
    """
    leading = conversion.log_ratios is not None and scheduler.config.get("timestep_spacing") == "leading"
    if leading and conversion.boundary is None:
        count = len(conversion.logs())
        trailing = [round(count * (1 - i / steps)) - 1 for i in range(steps)]
        return [*conversion.times([conversion.ratio(step) for step in trailing]), 0.0]
    scheduler = type(scheduler).from_config(scheduler.config)
    if conversion.prediction == "trigflow":
        options.setdefault("intermediate_timesteps", 1.3 if steps == 2 else None)
    scheduler.set_timesteps(**({"num_inference_steps": steps} | options))
    times = _stepped(scheduler, conversion)
    return [*dict.fromkeys(1.0 if t > 1 - 1e-7 else t for t in times), 0.0]  # some list a step of two calls twice


def _stepped(scheduler: Any, conversion: Conversion) -> list[float]:
    """Return the times at which a scheduler that was told its steps calls the network."""
    if conversion.prediction == "trigflow":
        angles = scheduler.timesteps.double()
        return (angles.sin() / (angles.sin() + angles.cos())).clamp(0, 1).tolist()[:-1]
    if conversion.prediction == "flow":
        return scheduler.sigmas.tolist()[:-1]
    if getattr(scheduler, "sigmas", None) is not None:
        return conversion.times([min(ratio, LARGEST_RATIO) for ratio in scheduler.sigmas.tolist()[:-1]])
    return conversion.times([conversion.ratio(step) for step in scheduler.timesteps.tolist()])
