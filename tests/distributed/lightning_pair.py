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
    Digits,
    DirectBackprop,
    FlowMap,
    FlowMapTraining,
    Lagrangian,
    LossByInterval,
    Prompts,
    RewardFineTuning,
    SampleGrid,
    Triangle,
)
from steerfm.callbacks import Checkpoints, DurableCheckpoints, GuardRails
from steerfm.cli import main as command_line
from steerfm.conditions import Labels
from steerfm.digits import CAPTIONS
from steerfm.distributed import wait
from steerfm.modules.strategies import Replicated, Sharded
from steerfm.networks.mlp import randomise
from steerfm.objectives import Compositional, IntegralKL, Total

STEPS, RATE = 3, 0.05


def flow_map(dtype: torch.dtype = torch.float64) -> FlowMap:
    network = MLP((1, 8, 8), width=16, depth=1, frequencies=4, num_classes=10)
    randomise(network)
    return FlowMap(network, conditioner=Labels(CAPTIONS)).to(dtype)


def brightness(images: Tensor, prompts: Any) -> Tensor:
    return images.square().mean((1, 2, 3))


def training(dtype: torch.dtype = torch.float64, rate: float = RATE) -> FlowMapTraining:
    objective = Total([Lagrangian(), Compositional("uniform")])  # of 8 rows 5 are on the diagonal: 3 and 2
    return FlowMapTraining(
        flow_map(dtype), objective, Triangle(0.6), optimizer=partial(SGD, lr=rate, momentum=0.5), prompt_dropout=0.3
    )


def distilling(dtype: torch.dtype = torch.float64) -> FlowMapTraining:
    """Return a training whose second step leaves the map out, and trains the map of its samples alone."""
    objective = IntegralKL(flow_map(dtype), flow_map(dtype), every=2)
    return FlowMapTraining(
        flow_map(dtype), objective, Triangle(0.0), optimizer=partial(SGD, lr=RATE, momentum=0.5), prompt_dropout=0.3
    )


def tuning(dtype: torch.dtype = torch.float64, rate: float = RATE, micro_batch: int | None = None) -> RewardFineTuning:
    method, rule = DirectBackprop(2, penalty="path"), Compositional("uniform")
    return RewardFineTuning(
        flow_map(dtype),
        brightness,
        method,
        held_out=[brightness],
        optimizer=partial(SGD, lr=rate, momentum=0.5),
        consistency=rule,
        micro_batch=micro_batch,
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


def trainer(
    folder: Path, name: str, *callbacks: Any, devices: int = 2, strategy: Any = None, steps: int = STEPS, **more: Any
) -> Trainer:
    return Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=devices,
        strategy=strategy or (Replicated() if devices > 1 else "auto"),
        plugins=[DurableCheckpoints()],
        logger=CSVLogger(folder, name="", version=name),
        log_every_n_steps=1,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"gradient_clip_val": 0.2, **more},
    )


def sharded(folder: Path) -> dict[str, Tensor]:
    """Train and tune with shared-out weights; the training is stopped before its last step, and goes on."""
    for steps, path in ((STEPS - 1, None), (STEPS, folder / "kept" / f"step={STEPS - 1:08d}.ckpt")):
        module, ema = training(), EMA(0.5)
        kept = [] if path else [Checkpoints(folder / "kept", STEPS - 1)]
        run = trainer(folder, f"sharded_{steps}", ema, *kept, strategy=Sharded(), steps=steps)
        run.fit(module, data(), ckpt_path=path, weights_only=True)
    if run.global_rank == 0:
        module.save(folder / "sharded_map")
    found = {f"sharded_training/{name}": tensor for name, tensor in module.state_dict().items()}
    found |= {f"sharded_ema/{name}": tensor for name, tensor in ema.average.items()}
    module = tuning()
    trainer(folder, "sharded_tuning", strategy=Sharded()).fit(module, prompts())
    return found | {f"sharded_tuning/{name}": tensor for name, tensor in module.state_dict().items()}


def steer(folder: Path, name: str, *more: str) -> int:
    """Steer through the command line; five pairs, two in a batch."""
    values = ["recipe=digits_steer", f"map={folder / 'map'}", "reward=brightness", "method=tilting", "seeds=5"]
    values += ["method.particles=3", "method.jumps=2", "data.batch_size=2", "reference=null", "held_out={}"]
    values += ["trainer.enable_progress_bar=false", f"name={name}", f"folder={folder / 'runs'}"]
    return command_line(["steer", *values, *more, "trainer.accelerator=cpu"])


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
    module = distilling()
    trainer(folder, "distilling").fit(module, data())
    found |= {f"distilling/{name}": tensor for name, tensor in module.state_dict().items()}
    found |= sharded(folder)
    if run.global_rank == 0:
        flow_map().save(folder / "map")
    wait()
    assert steer(folder, "two", "trainer=ddp", "trainer.devices=2") == 0
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}
    save_file(tensors, folder / f"rank{run.global_rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
