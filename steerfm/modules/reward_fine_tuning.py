"""Move a flow map toward a reward, and watch what it was not asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from steerfm.divergence import monitor
from steerfm.errors import ConfigError, RewardError, TrainingError
from steerfm.finetuning import DirectBackprop
from steerfm.flow_map import FlowMap
from steerfm.modules.common import Guest, configure, save_averaged, step_generator
from steerfm.reward import Scores, as_reward
from steerfm.reward_adapters import means
from steerfm.saving import describe_flow_map
from steerfm.types import State


class RewardFineTuning(lightning.LightningModule):
    """Fine-tune a flow map toward a reward, on batches {"prompt": list of str}.

    reward: anything that `steerfm.reward.as_reward` takes. method: a method of steerfm.finetuning.
    temperature: the target is p(x0) exp(r(x0) / temperature), positive. held_out: rewards that are logged and
    never optimised. monitor_every: steps between measurements of held-out rewards, of the divergence D from
    the reference and of the semigroup defect. The reference is the map as given here, frozen. Reward, held-out
    rewards and reference stay out of checkpoints and of the optimiser. seed: as in FlowMapTraining.
    """

    def __init__(
        self,
        flow_map: FlowMap,
        reward: Any,
        method: DirectBackprop | None = None,
        temperature: float = 0.1,
        held_out: Sequence[Any] = (),
        optimizer: Callable[..., Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        monitor_every: int = 25,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ConfigError(f"temperature must be positive, got {temperature}: it divides the reward.")
        self.method = method or DirectBackprop()
        self._reward = Guest(as_reward(reward))
        if not self._reward.module.differentiable:
            raise RewardError(
                f"'{self._reward.module.name}' has no gradient, and {type(self.method).__name__} needs one: "
                "steer with best of n instead, or use a differentiable stand-in."
            )
        self._held_out = [Guest(as_reward(r)) for r in held_out]
        self._reference = Guest(flow_map.frozen_copy())
        self.flow_map = flow_map.train().requires_grad_(True)
        self.temperature = temperature
        self.optimizer = optimizer or partial(AdamW, lr=1e-4)
        self.scheduler = scheduler
        self.monitor_every = monitor_every
        self.seed = seed

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        prompts = batch["prompt"]
        generator = step_generator(self, self.seed)
        shape = (len(prompts), *self.flow_map.data_shape)

        def draw(step: int) -> State:
            return torch.randn(shape, generator=generator).to(self.device, self.flow_map.dtype)

        reward = self._reward.on(self.device)
        reference = self._reference.on(self.device, self.flow_map.dtype)
        condition = self.flow_map.encode_prompts(prompts)
        tuned = self.method(self.flow_map, reference, reward, draw(0), prompts, condition, self.temperature, draw)
        loss = tuned.loss.mean()
        if not torch.isfinite(loss):
            raise TrainingError(
                f"The fine-tuning loss is {float(loss)} at step {self.global_step} (mean reward "
                f"{float(tuned.rewards.mean()):.4g}, mean penalty {float(tuned.penalty.mean()):.4g}): lower the "
                "learning rate, or raise the temperature."
            )
        self.log("loss", loss)
        self.log("reward", tuned.rewards.mean(), prog_bar=True)
        self.log("penalty", tuned.penalty.mean(), prog_bar=True)
        self.log_dict(_named("reward", means(Scores(tuned.rewards, tuned.parts))))
        if self.global_step % self.monitor_every == 0:
            self._monitor(tuned.x0.detach(), prompts, condition, generator)
        return loss

    @torch.no_grad()
    def _monitor(self, x0: State, prompts: list[str], condition: Any, generator: torch.Generator) -> None:
        """Log held-out rewards, divergence and semigroup defect at the current samples."""
        images = self.flow_map.decode(x0)
        for guest in self._held_out:
            self.log_dict(_named("held_out", means(guest.on(self.device)(images, prompts))), prog_bar=True)
        measured = monitor(self.flow_map, self._reference.on(self.device), x0, condition, generator)
        self.log_dict(_named("monitor", measured))

    def configure_optimizers(self) -> Any:
        return configure(self.flow_map.parameters(), self.optimizer, self.scheduler)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["flow_map"] = describe_flow_map(self.flow_map)

    def save(self, folder: str | Path) -> Path:
        """Write the tuned flow map into `folder`, with EMA weights where the trainer averages."""
        return save_averaged(self, self.flow_map, folder)


def _named(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{group}/{name}": value for name, value in values.items()}
