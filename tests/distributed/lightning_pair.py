"""Lightning's DDP on two gloo processes: run as `python lightning_pair.py FOLDER`; Lightning starts the second."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import SGD

from steerfm import (
    EMA,
    MLP,
    BestOfN,
    Digits,
    DirectBackprop,
    FlowMap,
    FlowMapTraining,
    Lagrangian,
    LossByInterval,
    Prompts,
    PromptSeeds,
    RewardFineTuning,
    SampleGrid,
    SteeredSampling,
    Triangle,
)
from steerfm.callbacks import GuardRails
from steerfm.conditions import Labels
from steerfm.digits import CAPTIONS
from steerfm.networks.mlp import randomise
from steerfm.objectives import Compositional, Total

STEPS, RATE = 3, 0.05


def flow_map() -> FlowMap:
    network = MLP((1, 8, 8), width=16, depth=1, frequencies=4, num_classes=10)
    randomise(network)
    return FlowMap(network, conditioner=Labels(CAPTIONS)).double()


def brightness(images: Tensor, prompts: Any) -> Tensor:
    return images.square().mean((1, 2, 3))


def training() -> FlowMapTraining:
    objective = Total([Lagrangian(), Compositional("uniform")])  # of 8 rows 5 are on the diagonal: 3 and 2
    return FlowMapTraining(flow_map(), objective, Triangle(0.6), optimizer=partial(SGD, lr=RATE), prompt_dropout=0.3)


def tuning() -> RewardFineTuning:
    method, rule = DirectBackprop(2, penalty="path"), Compositional("uniform")
    return RewardFineTuning(
        flow_map(), brightness, method, held_out=[brightness], optimizer=partial(SGD, lr=RATE), consistency=rule
    )


def rails() -> GuardRails:
    return GuardRails(every=2, samples=4, prompts=CAPTIONS[:2], keep="best")


class Doubled(Digits):
    """Digits in float64, where sums in any order agree."""

    def batch(self, step: int) -> dict[str, Any]:
        batch = super().batch(step)
        return batch | {"x0": batch["x0"].double()}

    def validation_batch(self) -> dict[str, Any] | None:
        batch = super().validation_batch()
        return batch and batch | {"x0": batch["x0"].double()}


def data() -> Doubled:
    return Doubled(8, validation_size=4)


def prompts() -> Prompts:
    return Prompts(CAPTIONS, prompts_per_step=4, samples_per_prompt=2)


def pairs() -> PromptSeeds:
    return PromptSeeds(CAPTIONS[:2], seeds=3, batch_size=2)


def trainer(folder: Path, name: str, *callbacks: Any, devices: int = 2) -> Trainer:
    return Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=CSVLogger(folder, name="", version=name),
        log_every_n_steps=1,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found, ema = {}, EMA(0.5)
    module = training()
    # 8 rows on two processes at a log every step: some bands are empty on one of them only
    run = trainer(
        folder, "training", ema, LossByInterval((0.1, 0.2, 0.3, 0.4, 0.6, 1.0)), SampleGrid(every=2, columns=2)
    )
    run.fit(module, data())
    found |= {f"training/{name}": tensor for name, tensor in module.state_dict().items()}
    found |= {f"ema/{name}": tensor for name, tensor in ema.average.items()}
    module = tuning()
    guard = rails()
    trainer(folder, "tuning", guard).fit(module, prompts())
    found |= {f"tuning/{name}": tensor for name, tensor in module.state_dict().items()}
    found |= {f"guard/{name}": tensor for name, tensor in guard.weights.items()}
    sampler = SteeredSampling(flow_map(), BestOfN(2, 1, 0.1), brightness)
    batches: Any = trainer(folder, "sampling").predict(sampler, pairs())
    found["own/seeds"] = torch.tensor([seed for batch in batches for seed in batch.seeds])
    found["own/x0"] = torch.cat([batch.x0 for batch in batches])
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}
    save_file(tensors, folder / f"rank{run.global_rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
