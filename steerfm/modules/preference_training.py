"""Learn a reward from preferences between two pictures, and save it as one to be used like any other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from steerfm.callbacks.ema import averaged
from steerfm.callbacks.skip_non_finite import non_finite
from steerfm.errors import CheckpointError, ConfigError
from steerfm.files import write_atomic
from steerfm.modules.common import configure
from steerfm.preferences import agreement, bradley_terry, calibration_error, centring, log_likelihood
from steerfm.types import Values

JSON_NAME, WEIGHTS_NAME = "preference.json", "preference.safetensors"
PROBES = ("a red fox", "two boats", "snow", "")  # prompts of the pictures of noise that a saved reward is tried on


class PreferenceTraining(lightning.LightningModule):
    """Learn a reward from pairs {"image_a", "image_b" in [0, 1], "prompt": list of str, "preferred": (B,)}.

    network: gives rewards (B,) for pictures and prompts, and has head, learnt, take, describe and load, as
    steerfm.rewards.preference.PreferenceNetwork. centring: the coefficient of (r_a + r_b)^2 in the loss, which puts
    the rewards' zero where the pairs are; 0.01 is usual, 0 leaves it open. optimizer, scheduler: as in
    FlowMapTraining; tower_rate: the learning rate of all but `network.head`, as a share of the head's, which starts
    from nothing where the tower was pretrained. What is saved is what had the highest log-likelihood on held-out
    pairs, the last where there are none. Every process validates on all of them. Checkpoints hold what is learnt, and
    the best, and no frozen weights.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[..., Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        *,
        centring: float = 0.0,
        tower_rate: float = 0.01,
    ) -> None:
        super().__init__()
        if not tower_rate > 0:
            raise ConfigError(f"tower_rate is a positive share of the head's learning rate, got {tower_rate}.")
        if centring < 0:
            raise ConfigError(f"centring is a coefficient of at least 0, got {centring}.")
        self.network: Any = network
        self.optimizer = optimizer or partial(AdamW, lr=1e-3)
        self.scheduler = scheduler
        self.centring = centring
        self.tower_rate = tower_rate
        self.best: dict[str, Any] = {}  # {"learnt": tensors, "held_out": figures}
        self._judged: list[tuple[Values, Values, Values]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        a, b = self.rewards(batch)
        preferred = batch["preferred"]
        loss = (bradley_terry(a, b, preferred) + self.centring * centring(a, b)).mean()
        if not torch.isfinite(loss):
            non_finite(self, f"The loss of preferences is {float(loss.detach())} at step {self.global_step}")
        self.log("loss", loss, prog_bar=True)
        self.log("accuracy", agreement(a, b, preferred).nanmean().nan_to_num(0.5), prog_bar=True)
        return loss

    def rewards(self, batch: Mapping[str, Any]) -> tuple[Values, Values]:
        """Return the rewards of the first and of the second pictures of a batch's pairs; (B,) each."""
        images, prompts = torch.cat([batch["image_a"], batch["image_b"]]), list(batch["prompt"])
        a, b = self.network(images, prompts + prompts).chunk(2)
        return a, b

    def on_validation_epoch_start(self) -> None:
        self._judged = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._judged.append((*self.rewards(batch), batch["preferred"]))

    def on_validation_epoch_end(self) -> None:
        if not self._judged:
            return
        figures = _figures(*(torch.cat(values).float() for values in zip(*self._judged, strict=True)))
        for name, value in figures.items():
            self.log(f"validation/{name}", value, prog_bar=name == "accuracy")
        sanity = self.trainer.sanity_checking
        if not sanity and figures["log_likelihood"] > self.best.get("held_out", {}).get("log_likelihood", -torch.inf):
            held_out = {"step": self.global_step, "pairs": sum(len(each[2]) for each in self._judged), **figures}
            self.best = {"learnt": _copies(self.network.learnt()), "held_out": held_out}

    def configure_optimizers(self) -> Any:
        head = {id(parameter) for parameter in self.network.head.parameters()}
        tower = [parameter for parameter in self.network.parameters() if id(parameter) not in head]
        return configure(self.network.parameters(), self.optimizer, self.scheduler, tower, self.tower_rate)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        learnt = {f"network.{name}" for name in self.network.learnt()}
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in learnt}
        checkpoint["best"] = self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]
        self.best = checkpoint["best"]

    def save(self, folder: str | Path) -> Path:
        """Write the best reward into `folder`, and return it once it was loaded from there and gave the same rewards.

        `Preference(folder)` loads it. Without held-out pairs it is the last one, with EMA weights where there are
        some. Raises RunError where the folder cannot be written, CheckpointError where the rewards differ.
        """
        folder = Path(folder)
        with averaged(self):
            last = _copies(self.network.learnt())
        chosen = self.best.get("learnt", last)
        described = {**self.network.describe(), "held_out": self.best.get("held_out")}
        write_atomic(folder / WEIGHTS_NAME, serialise(chosen))
        write_atomic(folder / JSON_NAME, json.dumps(described, indent=2).encode())
        self._compare(folder, chosen)
        return folder

    @torch.no_grad()
    def _compare(self, folder: Path, chosen: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError unless the saved network gives the rewards of this one with what was chosen."""
        images = torch.rand(len(PROBES), 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(self.device)
        own = _copies(self.network.learnt())
        self.network.take(chosen)
        expected = self.network(images, PROBES)
        self.network.take(own)
        found = self.network.load(folder).to(self.device)(images, PROBES)
        if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
            raise CheckpointError(
                f"What was saved in {folder} gives other rewards than what was trained, by up to "
                f"{float((found - expected).abs().max()):.3g}: do not use it, and report how it was trained."
            )


def _figures(a: Values, b: Values, preferred: Values) -> dict[str, float]:
    """Return how good rewards are on held-out pairs; accuracy is 0.5 where all of them are ties."""
    return {
        "log_likelihood": float(log_likelihood(a, b, preferred).mean()),
        "accuracy": float(agreement(a, b, preferred).nanmean().nan_to_num(0.5)),
        "calibration_error": float(calibration_error(a, b, preferred)),
    }


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
