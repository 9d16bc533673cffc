"""Distributional distillation: the map's samples y = F(x_s, s, 0) are judged by where they lie, not by where each goes.

The target time is 0 whatever the time law says, and the source time is `start` where that is given: from start = 1, or
`Anchored(..., start=1.0)`, no data are in y, and other objectives in a Total keep the law's own jumps. What
judges besides the teacher (a flow map of the samples, a critic) is a companion that learns beside the map. Its loss and
the map's are added, and no gradient of one reaches the parameters of the other.

The companion has to keep up with the samples: with `every` = n the map learns at one step in n, the companion at all of
them (two time scales, Yin et al. 2024, arXiv 2405.14867, section 4.2). At the steps between, the map has no gradient,
which DDP has to be told of (`leaves_out`): `steerfm.modules.strategies.Replicated` is, by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.networks import Critic
from steerfm.objectives.flow_matching import flow_matching
from steerfm.objectives.teachers import held
from steerfm.objectives.weights import mean_square
from steerfm.paths import Path
from steerfm.seeds import drawn
from steerfm.types import Condition, State, Times, Values, unsqueeze_like

Weight = Literal["dmd", "kl"]
Game = Literal["hinge", "logistic"]
SMALLEST_ERROR = 1e-3  # the teacher's error divides, and may vanish by chance where there are few dimensions


class Noise(NamedTuple):
    """Hold the level and the noise that samples are seen through: tau (B,), noise (B, *dim)."""

    tau: Times
    noise: State

    def on(self, y: State, path: Path) -> State:
        """Return y_tau = alpha(tau) y + sigma(tau) noise."""
        return path.interpolate(y, self.noise, self.tau)


@dataclass(frozen=True)
class Levels:
    """Draw noise levels tau uniformly from [low, high], within (0, 1)."""

    low: float = 0.02
    high: float = 0.98

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high < 1:
            raise ConfigError(f"Noise levels run from low to high within (0, 1), got {self.low} and {self.high}.")

    def draw(self, like: State, generator: torch.Generator | None) -> Noise:
        """Return one level and one noise for each row of `like`."""
        tau = self.low + (self.high - self.low) * drawn(torch.rand, (len(like),), generator)
        return Noise(tau.to(like), drawn(torch.randn, like.shape, generator).to(like))


def sampled(flow_map: FlowMap, x0: State, x1: State, s: Times, condition: Condition | None = None) -> State:
    """Return the map's samples y = F(x_s, s, 0); shape (B, *dim)."""
    return flow_map.look_ahead(flow_map.path.interpolate(x0, x1, s), s, condition)


def integral_kl(
    y: State,
    noise: Noise,
    teacher: FlowMap,
    fake: FlowMap,
    condition: Condition | None = None,
    weight: Weight = "dmd",
) -> Values:
    """Return half the mean square of y - sg[y - g], whose gradient in y is g over the number of dimensions; (B,).

    g = w (D_fake(y_tau) - D_teacher(y_tau)),  D(x) = E[x0 | x_tau = x],  y_tau = alpha y + sigma noise

    weight = "kl"    w = alpha^2 / sigma^2,  so that g = alpha (score_fake - score_teacher)
    weight = "dmd"   w = 1 / mean |y - D_teacher(y_tau)|, the mean over the dimensions of a sample

    fake: a flow map whose velocity is that of the samples y. Where it is exact, "kl" has the mean gradient of the
    integral over tau of KL(law of y_tau ‖ teacher's law at tau). No gradient reaches the teacher or the fake.

    Reference: Luo et al. 2023, arXiv 2305.18455 (Diff-Instruct: the integral KL and its gradient); Yin et al. 2023,
    arXiv 2311.18828, eq. (8) (DMD; up to a factor alpha).
    """
    with torch.no_grad():
        tau, y_tau = noise.tau, noise.on(y, teacher.path)
        D_fake, D_teacher = (judge.denoise(y_tau, tau, condition) for judge in (fake, teacher))
        if weight == "kl":
            w = (teacher.path.alpha(tau) / teacher.path.sigma(tau)).square()
        else:
            w = 1 / (y - D_teacher).abs().flatten(1).mean(1).clamp_min(SMALLEST_ERROR)
        target = y - unsqueeze_like(w, y) * (D_fake - D_teacher)
    return 0.5 * mean_square(y - target)


def teacher_denoises(y: State, noise: Noise, teacher: FlowMap, condition: Condition | None = None) -> Values:
    """Return alpha(tau) |y - sg D_teacher(y_tau)|^2, the distance to what the teacher makes of the noisy sample; (B,).

    Reference: Sauer et al. 2023, arXiv 2311.17042, the distillation loss of ADD, with the squared error and the
    weight alpha ("exponential").
    """
    with torch.no_grad():
        D_teacher = teacher.denoise(noise.on(y, teacher.path), noise.tau, condition)
    return teacher.path.alpha(noise.tau) * mean_square(y - D_teacher)


def generator_loss(logit: Values, game: Game = "hinge") -> Values:
    """Return what a sample's logit costs the map that made it; (B,).

    hinge: -C(y).  logistic: log(1 + exp(-C(y))), the loss of Goodfellow et al. 2014, arXiv 1406.2661, section 3, that
    does not saturate. Reference of hinge: Lim and Ye 2017, arXiv 1705.02894.
    """
    return -logit if game == "hinge" else functional.softplus(-logit)


def critic_loss(real: Values, made: Values, game: Game = "hinge") -> Values:
    """Return what the logits of a real and of a made sample cost the critic; (B,).

    hinge: max(0, 1 - C(x)) + max(0, 1 + C(y)).  logistic: log(1 + exp(-C(x))) + log(1 + exp(C(y))), whose best critic
    is log p_real / p_made.
    """
    if game == "hinge":
        return functional.relu(1 - real) + functional.relu(1 + made)
    return functional.softplus(-real) + functional.softplus(made)


def steepness(logit: Values, moved: Values, step: float) -> Values:
    """Return ((C(x + step z) - C(x)) / step)^2, on average over z ~ N(0, I) about |grad C(x)|^2; shape (B,).

    logit, moved: what the critic says of x and of x + step z. No second derivative is taken.
    Reference: Lin et al. 2025, arXiv 2501.08316 (the approximated R1, there times step^2); Mescheder et al. 2018,
    arXiv 1801.04406 (R1 itself).
    """
    return ((moved - logit) / step).square()


def critic_of(flow_map: FlowMap) -> Critic:
    """Return a critic that starts as the network of a trained map, which knows the shapes of the data already."""
    return Critic(flow_map.network)


class _TwoTimeScales:
    """An objective whose map learns at one step in `every`, from samples that it makes from time `start`."""

    every: int
    start: float | None

    @property
    def leaves_out(self) -> bool:
        """Whether in some steps the map has no gradient."""
        return self.every > 1

    def _learns(self, step: int) -> bool:
        return step % self.every == 0

    def _check(self) -> None:
        if self.every < 1:
            raise ConfigError(f"The map learns at every 1 step or more, got {self.every}.")
        if self.start is not None and not 0 < self.start <= 1:
            raise ConfigError(f"start lies in (0, 1], or is None for the time law's, got {self.start}.")

    def _samples(
        self, flow_map: FlowMap, x0: State, x1: State, s: Times, condition: Condition | None, step: int
    ) -> State:
        """Return the map's samples, with a gradient where it learns at this step."""
        source = s if self.start is None else torch.full_like(s, self.start)
        with torch.set_grad_enabled(self._learns(step) and torch.is_grad_enabled()):
            return sampled(flow_map, x0, x1, source, condition)


@dataclass(frozen=True)
class IntegralKL(_TwoTimeScales):
    """Diff-Instruct (weight "kl") and DMD's matching of distributions (weight "dmd"), see `integral_kl`.

    teacher: any map with a velocity, guided where it is guided. fake: a flow map, best a second copy of the teacher,
    that learns the velocity of the samples by flow matching at the same levels; it is never guided. every: the map
    learns from this at one step in so many, and at all steps from what stands beside it, in a Total or on the diagonal.
    start: source time of the samples, in (0, 1]; None takes the time law's. levels: of the noise.
    DMD's regression to the ends of the teacher's own paths is another objective, in a Total: Lagrangian with the
    teacher, for example.
    """

    teacher: FlowMap
    fake: FlowMap
    weight: Weight = "dmd"
    every: int = field(default=5, kw_only=True)
    start: float | None = field(default=None, kw_only=True)
    levels: Levels = field(default=Levels(), kw_only=True)

    def __post_init__(self) -> None:
        if self.weight not in ("dmd", "kl"):
            raise ConfigError(f"weight is 'dmd' or 'kl', got '{self.weight}'.")
        self._check()
        if self.fake is self.teacher:
            raise ConfigError("The fake learns and the teacher is frozen: give the fake a copy, got one map for both.")
        if self.fake.path != self.teacher.path:
            raise ConfigError(
                f"Fake and teacher are compared at the same noisy points and need one path, got {self.fake.path} and "
                f"{self.teacher.path}."
            )

    def __call__(
        self,
        flow_map: FlowMap,
        x0: State,
        x1: State,
        s: Times,
        t: Times,
        condition: Condition | None = None,
        generator: torch.Generator | None = None,
        step: int = 0,
    ) -> Values:
        y = self._samples(flow_map, x0, x1, s, condition, step)
        fake = self.fake.with_guidance(1.0)  # it describes the samples as they are
        tau, noise = self.levels.draw(y, generator)
        fitting = flow_matching(fake, y.detach(), noise, tau, condition)
        if not self._learns(step):
            return fitting
        return fitting + integral_kl(y, self.levels.draw(y, generator), self.teacher, fake, condition, self.weight)


@dataclass(frozen=True)
class Adversarial(_TwoTimeScales):
    """A critic tells the map's samples from data; the map learns to pass for data.

    critic: called as critic(x, tau, condition) -> (B,), such as `Critic` around a network. game: "hinge" or "logistic",
    see `generator_loss`. noised: both are seen through noise of these levels, which keeps their supports overlapping,
    else clean, tau = 0. every: steps for each of the map's. start: source time of the samples, in (0, 1]; None takes
    the time law's. penalty: half of it times the critic's steepness is added at data and at samples, by differences of
    `step`, see `steepness`; it has to shrink with the square of the smallest distance that the critic must tell apart.
    With a `TeacherDenoises` in a Total it is ADD.

    Reference: Sauer et al. 2023, arXiv 2311.17042 (ADD: hinge, clean, R1 at data); Wang et al. 2022, arXiv 2206.02262
    (Diffusion-GAN: noised); Huang et al. 2025, arXiv 2501.05441 (why the penalty stands at both).
    """

    critic: nn.Module
    game: Game = "hinge"
    noised: bool = True
    every: int = field(default=1, kw_only=True)
    start: float | None = field(default=None, kw_only=True)
    penalty: float = field(default=1.0, kw_only=True)
    step: float = field(default=0.01, kw_only=True)
    levels: Levels = field(default=Levels(), kw_only=True)

    def __post_init__(self) -> None:
        if self.game not in ("hinge", "logistic"):
            raise ConfigError(f"game is 'hinge' or 'logistic', got '{self.game}'.")
        self._check()
        if self.penalty < 0 or not self.step > 0:
            raise ConfigError(f"penalty is 0 or more and step above 0, got {self.penalty} and {self.step}.")

    def __call__(
        self,
        flow_map: FlowMap,
        x0: State,
        x1: State,
        s: Times,
        t: Times,
        condition: Condition | None = None,
        generator: torch.Generator | None = None,
        step: int = 0,
    ) -> Values:
        y = self._samples(flow_map, x0, x1, s, condition, step)
        judging = self._judging(flow_map.path, x0, y.detach(), condition, generator)
        if not self._learns(step):
            return judging
        made, tau = self._seen(y, flow_map.path, generator)
        with held(self.critic):
            return judging + generator_loss(self.critic(made, tau, condition), self.game)

    def _judging(
        self, path: Path, x0: State, y: State, condition: Condition | None, generator: torch.Generator | None
    ) -> Values:
        """Return the critic's own loss; (B,)."""
        views = [self._seen(x, path, generator) for x in (x0, y)]
        logits = [self.critic(x, tau, condition) for x, tau in views]
        real, made = logits
        loss = critic_loss(real, made, self.game)
        if self.penalty:
            for (x, tau), logit in zip(views, logits, strict=True):
                z = drawn(torch.randn, x.shape, generator).to(x)
                moved = self.critic(x + self.step * z, tau, condition)
                loss = loss + self.penalty / 2 * steepness(logit, moved, self.step)
        return loss

    def _seen(self, x: State, path: Path, generator: torch.Generator | None) -> tuple[State, Times]:
        """Return the samples as the critic sees them, and their noise levels."""
        if not self.noised:
            return x, torch.zeros(len(x), dtype=x.dtype, device=x.device)
        noise = self.levels.draw(x, generator)
        return noise.on(x, path), noise.tau


@dataclass(frozen=True)
class TeacherDenoises:
    """Each sample lies where the teacher would denoise it to, see `teacher_denoises`; ADD's second term.

    Alone it makes samples blurred, each a mean of what the teacher finds likely.
    """

    teacher: FlowMap
    levels: Levels = field(default=Levels(), kw_only=True)

    def __call__(
        self,
        flow_map: FlowMap,
        x0: State,
        x1: State,
        s: Times,
        t: Times,
        condition: Condition | None = None,
        generator: torch.Generator | None = None,
        step: int = 0,
    ) -> Values:
        y = sampled(flow_map, x0, x1, s, condition)
        return teacher_denoises(y, self.levels.draw(y, generator), self.teacher, condition)
