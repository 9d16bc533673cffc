"""Train a flow map: flow matching on the diagonal, a consistency rule off it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from steerfm.conditions.guidance import with_scale
from steerfm.conditions.sight import sight
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.modules.common import (
    Followers,
    Guest,
    configure,
    require_finite,
    rows_of,
    save_averaged,
    step_generator,
)
from steerfm.modules.compiling import Compiler, name_of
from steerfm.objectives import Lagrangian, Uniform
from steerfm.objectives.flow_matching import flow_matching
from steerfm.objectives.teachers import parts_of
from steerfm.saving import describe_flow_map
from steerfm.seeds import drawn, rows_between, shares, torch_generator
from steerfm.times import TimeLaw, Triangle
from steerfm.types import Condition, State, Times, Values

Objective = Callable[..., Values]


class FlowMapTraining(lightning.LightningModule):
    """Learn a flow map from data, on batches {"x0": (B, *dim), "prompt": list of str}.

    objective: called as objective(flow_map, x0, x1, s, t, condition, generator, step) -> (B,), on the rows off the
    diagonal; rows with s = t learn the velocity, by flow matching or by `diagonal`, which is called alike. Teachers
    in their fields are frozen and follow to the device, other modules there are trained and kept in checkpoints
    (`steerfm.objectives.teachers`). times: the law of (s, t). weighting: (losses, s, t) -> (B,), what is averaged and
    minimised. flow_matching_steps: at first all rows are on the diagonal, for so many steps.
    prompt_dropout: share of prompts replaced by the null condition, so that the map also samples freely.
    guidance: scale of classifier-free guidance that the map learns, as `flow_matching` says, once
    flow_matching_steps are over; 1 is none. (low, high): each row learns a scale between them, drawn evenly in its
    logarithm, and a network built with guidance_input reads it. It needs prompt_dropout.
    optimizer, scheduler: partials, of parameters and of the optimiser (stepped every step). companion_rate: the
    learning rate of what the objective trains beside the map, a fake or a critic, as a multiple of the map's.
    seed: of all noise in training, which depends on (seed, batch, row) and not on the number of processes. sighted:
    every row is told a noisy state x_t of its own x0, t uniform on [0, 1], so that the map learns to draw x0 given x_t
    (`steerfm.conditions.sight`). compile: work the losses out by torch.compile, in training alone; what it cannot do,
    or does wrong, runs as it is, and a log line says so.
    """

    def __init__(
        self,
        flow_map: FlowMap,
        objective: Objective | None = None,
        times: TimeLaw | None = None,
        weighting: Callable[[Values, Tensor, Tensor], Values] | None = None,
        optimizer: Callable[..., Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        flow_matching_steps: int = 0,
        prompt_dropout: float = 0.1,
        guidance: float | Sequence[float] = 1.0,
        seed: int = 0,
        diagonal: Objective | None = None,
        compile: bool = False,
        *,
        sighted: bool = False,
        companion_rate: float = 1.0,
    ) -> None:
        super().__init__()
        if not companion_rate > 0:
            raise ConfigError(
                f"companion_rate is a positive multiple of the map's learning rate, got {companion_rate}."
            )
        if not 0 <= prompt_dropout <= 1:
            raise ConfigError(f"prompt_dropout is a share and must lie in [0, 1], got {prompt_dropout}.")
        scales = _guidance_range(guidance, flow_map, prompt_dropout, objective, diagonal)
        if sighted and max(scales) > 1:
            raise ConfigError(
                "A map that is told what to see learns no guidance with it: guidance=1, or sighted=False."
            )
        self.flow_map = flow_map.train()
        self.objective = objective or Lagrangian()
        self.times = times or Triangle()
        self.diagonal = diagonal
        self.weighting = weighting or Uniform()
        parts = parts_of({"objective": self.objective, "diagonal": diagonal})
        self._teachers = [Guest(teacher) for teacher in parts.teachers]
        self.companions = nn.ModuleDict(parts.companions)
        if companion_rate != 1 and not any(p.requires_grad for p in self.companions.parameters()):
            raise ConfigError(
                f"companion_rate={companion_rate:g} is the rate of what learns beside the map, and with "
                f"{type(self.objective).__name__} nothing does: leave it out."
            )
        self.leaves_out = parts.leaves_out
        self._followers = Followers(self.modules(), self.flow_map)
        self.optimizer = optimizer or partial(AdamW, lr=3e-4)
        self.scheduler = scheduler
        self.companion_rate = companion_rate
        self.flow_matching_steps = flow_matching_steps
        self.prompt_dropout = prompt_dropout
        self.guidance = scales
        self.seed = seed
        self.sighted = sighted
        self._compiler = Compiler(self.parameters) if compile else None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        generator = step_generator(self, self.seed, rows_of(batch))
        losses, s, t = self.losses(batch, generator, self.global_step < self.flow_matching_steps)
        loss = self.weighting(losses, s, t).mean()
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return {"loss": loss, "losses": losses.detach(), "s": s, "t": t}

    def on_fit_start(self) -> None:
        for teacher in self._teachers:
            teacher.on(self.device)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._followers.follow(self.flow_map, self.global_step + 1)  # before any callback writes a checkpoint

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        with torch.enable_grad():  # finite where training is; forward mode does not mind
            losses, s, t = self.losses(batch, torch_generator(self.seed, "validation"), False)
        diagonal = s == t
        for name, rows in (("flow_matching", losses[diagonal]), ("consistency", losses[~diagonal])):
            if len(rows):
                self.log(f"validation/{name}", rows.detach().mean(), batch_size=len(rows), sync_dist=True)

    def losses(
        self, batch: dict[str, Any], generator: torch.Generator, diagonal_only: bool
    ) -> tuple[Values, Tensor, Tensor]:
        """Return the unweighted loss of each row and its times; `require_finite` sees to those that are not finite."""
        x0, flow_map = batch["x0"], self.flow_map.with_guidance(1.0)  # guidance is for sampling
        x1 = drawn(torch.randn, x0.shape, generator).to(x0)
        batch_rows = shares(len(x0), generator)
        total, own, source = batch_rows
        s, t = (times[own].to(x0) for times in self.times(total, source, self.global_step))
        first = total if diagonal_only else self.times.diagonal_rows(total)
        rows = batch_rows.before(first)
        if diagonal_only:
            t = s = self.times.one(total, source)[own].to(x0)
        condition = self._condition(batch["prompt"], generator)
        if condition is not None and getattr(flow_map.network, "guidance_input", False) and not self._starting:
            condition = self._with_scales(condition, generator)
        if self.sighted:
            condition = self._with_sight(condition, x0, generator)
        losses = []
        if rows:
            on = slice(rows)
            with rows_between(generator, 0, first):
                losses.append(self._on_diagonal(flow_map, x0[on], x1[on], s[on], _rows(condition, on), generator))
            require_finite(self, losses[-1], "flow_matching", s[on], t[on])
        if rows < len(x0):
            off = slice(rows, None)
            inputs = (flow_map, x0[off], x1[off], s[off], t[off], _rows(condition, off))
            with rows_between(generator, first, total):
                losses.append(self._run(self.objective, *inputs, generator, self.global_step))
            require_finite(self, losses[-1], name_of(self.objective), s[off], t[off])
        return torch.cat(losses), s, t

    def _on_diagonal(
        self, flow_map: FlowMap, x0: State, x1: State, t: Times, condition: Condition | None, generator: torch.Generator
    ) -> Values:
        if self.diagonal is not None:
            return self._run(self.diagonal, flow_map, x0, x1, t, t, condition, generator, self.global_step)
        return self._run(flow_matching, flow_map, x0, x1, t, condition, 1.0 if self._starting else self.guidance[0])

    @property
    def _starting(self) -> bool:
        return self.global_step < self.flow_matching_steps

    def _with_scales(self, condition: Condition, generator: torch.Generator) -> Condition:
        low, high = self.guidance
        return with_scale(condition, low * (high / low) ** drawn(torch.rand, (len(condition),), generator))

    def _with_sight(self, condition: Condition | None, x0: State, generator: torch.Generator) -> Condition:
        t = drawn(torch.rand, (len(x0),), generator).to(x0)
        x_t = self.flow_map.path.interpolate(x0, drawn(torch.randn, x0.shape, generator).to(x0), t)
        return sight(self.flow_map.path, x_t, t, condition)

    def _run(self, function: Objective, *arguments: Any) -> Values:
        if self._compiler is None or not self.training:  # validation has shapes of its own, and few batches
            return function(*arguments)
        return self._compiler(function, *arguments)

    def _condition(self, prompts: list[str], generator: torch.Generator) -> Condition | None:
        condition = self.flow_map.encode_prompts(prompts)
        if condition is None or self.prompt_dropout == 0:
            return condition
        keep = drawn(torch.rand, (len(prompts),), generator) >= self.prompt_dropout
        null = self.flow_map.conditioner.null(len(prompts)).to(self.device)  # type: ignore[union-attr,operator]
        return condition.where(keep, null)

    def configure_optimizers(self) -> Any:
        apart = self.companions.parameters()
        return configure(self.parameters(), self.optimizer, self.scheduler, apart, self.companion_rate)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["flow_map"] = describe_flow_map(self.flow_map)

    def save(self, folder: str | Path) -> Path:
        """Write the flow map into `folder`, with EMA weights where the trainer averages."""
        return save_averaged(self, self.flow_map, folder)


def _rows(condition: Condition | None, rows: slice) -> Condition | None:
    return None if condition is None else condition.select(rows)


def _guidance_range(
    guidance: float | Sequence[float],
    flow_map: FlowMap,
    prompt_dropout: float,
    objective: Objective | None,
    diagonal: Objective | None,
) -> tuple[float, float]:
    """Return the least and greatest scale that is learnt. Raises ConfigError where these parts cannot learn it."""
    scales = (guidance, guidance) if isinstance(guidance, int | float) else tuple(guidance)
    told, guided = getattr(flow_map.network, "guidance_input", False), max(scales, default=1) > 1
    free = prompt_dropout > 0 and flow_map.conditioner is not None
    if len(scales) != 2 or not 1 <= scales[0] <= scales[1] or (guided and not free):
        raise ConfigError(
            "guidance is 1 or more, or (low, high) in that order, and above 1 it needs a conditioner and "
            f"prompt_dropout above 0: got {guidance}."
        )
    if scales[0] < scales[1] and not told:
        raise ConfigError(f"guidance={guidance} needs a network built with guidance_input=True: or give one scale.")
    if diagonal is not None and guided and not told:
        raise ConfigError("guidance is learnt by flow matching: with a diagonal of your own, guide its teacher.")
    if guided and getattr(objective, "velocity", None) == "tangent":
        raise ConfigError(
            f"guidance={guidance} is learnt on the diagonal, and the tangent that {type(objective).__name__} takes "
            "is not guided: use velocity='self', or another rule."
        )
    return scales
