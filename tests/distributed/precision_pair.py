"""Accumulated batches and bfloat16 on two gloo processes: run as `python -m distributed.precision_pair FOLDER`.

Lightning starts the second process. DDP and FSDP2 make the same runs, and the test makes them on one process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from distributed import lightning_pair
from distributed.lightning_pair import RATE
from lightning import Callback
from safetensors.torch import save_file
from torch import Tensor

from steerfm import EMA, Digits
from steerfm.callbacks import Checkpoints
from steerfm.distributed import whole, world
from steerfm.flow_map import FlowMap
from steerfm.modules.strategies import Replicated, Sharded

STEPS, ACCUMULATE = 2, 2
STRATEGIES = {"ddp": Replicated, "fsdp": Sharded}


class Case(NamedTuple):
    """Say what is trained, of which type its weights are made, and how a step is computed."""

    kind: str
    dtype: torch.dtype = torch.float64
    precision: str = "32-true"  # Lightning's default, which leaves float64 as it is
    micro_batch: int | None = None
    rate: float = RATE
    accumulate: int = ACCUMULATE


SLOW, FAST = 2e-3, 1.0  # by their clipped steps weights in bfloat16 would hardly move, and move far beyond rounding
CASES = {
    "training": Case("training"),
    "tuning": Case("tuning", micro_batch=1),
    "training_mixed": Case("training", torch.float32, "bf16-mixed", rate=SLOW),
    "tuning_mixed": Case("tuning", torch.float32, "bf16-mixed", micro_batch=1, rate=SLOW),
    "training_true": Case("training", torch.float32, "bf16-true", rate=FAST),
    "tuning_true": Case("tuning", torch.float32, "bf16-true", micro_batch=1, rate=FAST),
}
RESUMED = "tuning_mixed"


class Losses(Callback):
    """Keep the loss of every batch, over all processes."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(trainer.callback_metrics["loss"].double())


def compute(case: Case, folder: Path, steps: int = STEPS, resume: Path | None = None, **more: Any) -> dict[str, Tensor]:
    """Return weights, their averages, momenta and velocities after some steps, and the loss of every batch.

    A checkpoint before the last step is left in `folder`.
    """
    scored: list[int] = []
    if case.kind == "training":
        module = lightning_pair.training(case.dtype, case.rate)
        data: Any = lightning_pair.data() if case.dtype == torch.float64 else Digits(8, validation_size=4)
    else:
        module, data = lightning_pair.tuning(case.dtype, case.rate, case.micro_batch), lightning_pair.prompts()
        assert module.reward is not None
        module.reward.register_forward_pre_hook(lambda _, inputs: scored.append(len(inputs[0])))
    ema, losses, keep = EMA(0.5), Losses(), Checkpoints(folder, STEPS - 1)
    settings = {"precision": case.precision, "accumulate_grad_batches": case.accumulate, "gradient_clip_val": None}
    run = lightning_pair.trainer(folder, "log", ema, losses, keep, steps=steps, **settings, **more)
    run.fit(module, data, ckpt_path=resume, weights_only=True)
    found = {f"weights/{name}": tensor for name, tensor in module.state_dict().items()}
    found |= {f"ema/{name}": tensor for name, tensor in ema.average.items()}
    states = run.optimizers[0].state_dict()["state"]
    found |= {f"momentum/{number}": whole(state["momentum_buffer"]) for number, state in states.items()}
    found["losses"], found["velocity"] = torch.stack(losses.seen), velocity(module.flow_map)
    found["scored"] = torch.tensor(max(scored, default=0))
    return found


@torch.no_grad()
def velocity(flow_map: FlowMap) -> Tensor:
    """Return what a map predicts once it was trained, in its own type."""
    x = torch.linspace(-1, 1, 64, dtype=flow_map.dtype).reshape(1, 1, 8, 8)
    return flow_map.velocity(x, 0.5, flow_map.encode_prompts([""]))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for strategy, kind in STRATEGIES.items():
        for name, case in CASES.items():
            made = {name: compute(case, folder / strategy / name, strategy=kind())}
            if name == RESUMED:
                kept = folder / strategy / name / f"step={STEPS - 1:08d}.ckpt"
                made[f"{name}_resumed"] = compute(case, folder / "resumed", resume=kept, strategy=kind())
            found |= {f"{strategy}/{run}/{key}": t for run, tensors in made.items() for key, t in tensors.items()}
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}
    save_file(tensors, folder / f"rank{world()[0]}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
