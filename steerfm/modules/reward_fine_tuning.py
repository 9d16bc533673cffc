"""Move a flow map toward a reward, keep it a flow map, and watch what it was not asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from steerfm.callbacks.skip_non_finite import non_finite
from steerfm.divergence import monitor
from steerfm.errors import ConfigError, RewardError
from steerfm.finetuning import Batch, DirectBackprop, FineTuning, Tuned
from steerfm.finetuning.common import without_gradient
from steerfm.finetuning.noise_adapter import with_conditioner
from steerfm.flow_map import FlowMap, declared
from steerfm.modules.common import Followers, Guest, batches_so_far, configure, rows_of, save_averaged, step_generator
from steerfm.networks.sharing import copy_around
from steerfm.objectives import Compositional
from steerfm.objectives.teachers import parts_of
from steerfm.reward import Reward, Scores, as_reward
from steerfm.reward_adapters import means
from steerfm.reward_algebra import TimeLimit
from steerfm.sampling import few_jumps
from steerfm.saving import describe_flow_map
from steerfm.seeds import RowDraws, shares
from steerfm.times import Anchored, TimeLaw, Triangle
from steerfm.types import State, Values

log = logging.getLogger(__name__)


class RewardFineTuning(lightning.LightningModule):
    """Fine-tune a flow map toward a reward, on batches {"prompt": list of str}, with more where the method asks.

    reward: anything that `steerfm.reward.as_reward` takes; None for methods that learn from pairs. method: a method of
    steerfm.finetuning. temperature: the target is p(x0) exp(r(x0) / temperature), positive. held_out: rewards that are
    logged and never optimised. consistency: an objective that brings the jumps to where the velocity has gone, on the
    tuned map's own samples, or on draws of the target where the method has any, with weight consistency_weight and
    intervals from `times`, off the diagonal; by default `Compositional()` for methods that move the velocity alone,
    unless the map has nothing else; None is none. jumps: in which samples are drawn for it and for the monitor, where
    the method draws none. adapter: makes the map that is tuned from the one given, and says which of its parameters
    are; all by default. monitor_every: steps between measurements of held-out rewards, of the divergence D from the
    reference and of the semigroup defect. micro_batch: pictures decoded and scored at once, fewer where memory runs
    out. reward_timeout: seconds that a reward may take for a batch (`reward_algebra.TimeLimit`). The reference is the
    map as given here, frozen; weights that the adapter freezes are held once. Reward, held-out rewards and reference
    stay out of checkpoints and of the optimiser. seed: of all noise, which depends on (seed, batch, row) and not on the
    number of processes.
    """

    def __init__(
        self,
        flow_map: FlowMap,
        reward: Any = None,
        method: FineTuning | None = None,
        temperature: float = 0.1,
        held_out: Sequence[Any] = (),
        optimizer: Callable[..., Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        monitor_every: int = 25,
        seed: int = 0,
        *,
        consistency: Callable[..., Values] | Literal["auto"] | None = "auto",
        consistency_weight: float = 1.0,
        times: TimeLaw | None = None,
        jumps: int = 4,
        adapter: Callable[[FlowMap], FlowMap] | None = None,
        micro_batch: int | None = None,
        reward_timeout: float | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ConfigError(f"temperature must be positive, got {temperature}: it divides the reward.")
        self.method = method or DirectBackprop()
        if not isinstance(self.method, FineTuning):
            raise ConfigError(
                f"{type(method).__name__} is no method of steerfm.finetuning: take one of those, such as "
                "AdjointMatching, or sample with it by 'steerfm steer'."
            )
        limited = partial(TimeLimit, seconds=reward_timeout) if reward_timeout is not None else as_reward
        self._reward = None if reward is None else Guest(limited(reward))
        self._check_reward()
        self._held_out = [Guest(limited(r)) for r in held_out]
        given, self._made_in = copy_around(flow_map), flow_map.dtype
        self.flow_map = flow_map.train().requires_grad_(True) if adapter is None else adapter(flow_map.train())
        if given.conditioner is None and self.flow_map.conditioner is not None:
            given = with_conditioner(given, self.flow_map.conditioner)  # which it does not read
        self._reference = Guest(copy_around(given, [p for p in given.parameters() if not p.requires_grad]))
        self.temperature = temperature
        jumps_apart = not declared(flow_map.network, "velocity_only", False)
        auto = Compositional() if self.method.moves == "velocity" and jumps_apart else None
        self.consistency = auto if consistency == "auto" else consistency
        self.consistency_weight = consistency_weight
        self.times = times or Anchored(Triangle(diagonal=0.0))
        if self.times.diagonal_rows(100):
            raise ConfigError("The velocity is the method's to move: the times of consistency need diagonal=0.")
        parts = parts_of({"method": self.method, "consistency": self.consistency})
        self._teachers = [Guest(teacher) for teacher in parts.teachers]
        self.companions = nn.ModuleDict(parts.companions)
        self._followers = Followers(self.companions.modules(), self.flow_map)
        self.optimizer = optimizer or partial(AdamW, lr=1e-4)
        self.scheduler = scheduler
        self.monitor_every = monitor_every
        self.seed = seed
        self.jumps = jumps
        self.micro_batch = micro_batch
        self._halved: list[int] = []  # micro-batches that steps have come down to for want of memory
        self._memory: dict[str, Any] = {}  # what the method keeps from step to step

    @property
    def reward(self) -> Reward | None:
        """The reward that is optimised, on the module's device; None for methods that learn from pairs."""
        return None if self._reward is None else self._reward.on(self.device)

    @property
    def held_out(self) -> list[Reward]:
        """The rewards that are watched and never optimised, on the module's device."""
        return [guest.on(self.device) for guest in self._held_out]

    @property
    def reference(self) -> FlowMap:
        """The map as it was given, frozen, on the module's device and in the tuned map's type."""
        as_made = self.flow_map.dtype == self._made_in  # shared weights of several types stay as they are
        return self._reference.on(self.device, None if as_made else self.flow_map.dtype)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        work = self._batch(batch)
        tuned = self.method(work)
        loss = tuned.loss.mean()
        x0 = None if tuned.x0 is None else tuned.x0.detach()
        self.log("loss", loss, sync_dist=True)
        if tuned.rewards is not None:
            self.log("reward", tuned.rewards.mean(), prog_bar=True, sync_dist=True)
            self.log_dict(_named("reward", means(Scores(tuned.rewards, tuned.parts))), sync_dist=True)
        self.log_dict({name: values.detach().mean() for name, values in tuned.figures.items()}, sync_dist=True)
        if self.consistency is not None:
            clean = tuned.target
            if clean is None:
                clean = x0 = self._drawn(work) if x0 is None else x0
            gap = self._inconsistency(work, clean[:: len(clean) // len(work.prompts)])
            self.log("consistency", gap, sync_dist=True)
            loss = loss + self.consistency_weight * gap
        self._require_finite(loss, tuned)
        if self.global_step % self.monitor_every == 0:
            self._monitor(self._drawn(work) if x0 is None else x0, work)
        return loss

    def _batch(self, batch: dict[str, Any]) -> Batch:
        """Return what the method works with: everything on the device, the noise of these rows."""
        prompts, rows = batch["prompt"], rows_of(batch)
        return Batch(
            flow_map=self.flow_map,
            reference=self.reference,
            reward=self.reward,  # type: ignore[arg-type]
            prompts=prompts,
            condition=self.flow_map.encode_prompts(prompts),
            temperature=self.temperature,
            draws=RowDraws(self.seed, batches_so_far(self), rows),
            generator=step_generator(self, self.seed, rows),
            step=self.global_step,
            micro_batch=self.micro_batch,
            halved=self._halved,
            seed=self.seed,
            memory=self._memory,
            data=batch,
        )

    @torch.no_grad()
    def _drawn(self, work: Batch) -> State:
        """Return samples of the tuned map, one a row."""
        return few_jumps(self.flow_map, work.normal(), self.jumps, work.condition)

    def _inconsistency(self, work: Batch, x0: State) -> Tensor:
        """Return the mean loss of the consistency rule on noisy states of x0."""
        assert self.consistency is not None
        total, own, source = shares(len(x0), work.generator)
        s, t = (each[own].to(x0) for each in self.times(total, source, self.global_step))
        x1 = work.normal()
        return self.consistency(
            self.flow_map, x0, x1, s, t, work.condition, work.generator, self.global_step
        ).mean()  # fmt: skip

    @torch.no_grad()
    def _monitor(self, x0: State, work: Batch) -> None:
        """Log held-out rewards, divergence and semigroup defect at the current samples."""
        count = len(x0) // len(work.prompts)
        prompts = [prompt for prompt in work.prompts for _ in range(count)]
        images = self.flow_map.decode(x0)
        for held_out in self.held_out:
            self.log_dict(_named("held_out", means(held_out(images, prompts))), prog_bar=True, sync_dist=True)
        measured = monitor(self.flow_map, work.reference, x0, work.times(count), work.generator)
        self.log_dict(_named("monitor", measured), sync_dist=True)

    def _require_finite(self, loss: Tensor, tuned: Tuned) -> None:
        if torch.isfinite(loss):
            return
        figures = {"reward": tuned.rewards} | tuned.figures
        known = [
            f"mean {name} {float(values.detach().mean()):.4g}" for name, values in figures.items() if values is not None
        ]
        fact = f"The fine-tuning loss is {float(loss.detach())} at step {self.global_step} ({', '.join(known)})"
        non_finite(self, fact, "lower the learning rate, or raise the temperature")

    def _check_reward(self) -> None:
        name = type(self.method).__name__
        if self._reward is None and self.method.needs_reward:
            raise RewardError(f"{name} needs a reward, got None: pass any callable (images, prompts) -> (B,) numbers.")
        if self._reward is not None and self.method.needs_gradient and not self._reward.module.differentiable:
            raise RewardError(
                f"'{self._reward.module.name}' has no gradient, and {name} needs one. Use {without_gradient()}, which "
                "do not; steer with best of n; or use a differentiable stand-in."
            )

    def on_fit_start(self) -> None:
        for teacher in self._teachers:
            teacher.on(self.device)

    def on_train_start(self) -> None:
        self._stop_in_time()  # a run that was killed after its last step makes no more of them
        needed, planned = self.method.steps, self.trainer.max_steps
        if needed is not None and 0 <= planned < needed:
            log.warning(
                "%s reaches its temperature after %d steps, and this run ends after %d: raise trainer.max_steps, or "
                "let the method take fewer.",
                type(self.method).__name__,
                needed,
                planned,
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._followers.follow(self.flow_map, self.global_step + 1)  # before any callback writes a checkpoint

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._stop_in_time()

    def _stop_in_time(self) -> None:
        if self.method.steps is not None and self.global_step >= self.method.steps:
            self.trainer.should_stop = True

    def configure_optimizers(self) -> Any:
        return configure(self.parameters(), self.optimizer, self.scheduler)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["flow_map"] = describe_flow_map(self.flow_map)

    def save(self, folder: str | Path) -> Path:
        """Write the tuned flow map into `folder`, with EMA weights where the trainer averages."""
        return save_averaged(self, self.flow_map, folder)


def _named(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{group}/{name}": value for name, value in values.items()}
