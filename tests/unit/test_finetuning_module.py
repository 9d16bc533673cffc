"""RewardFineTuning with every method: it goes on where it stopped to the bit, runs in bfloat16, and keeps its word."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import AdamW
from trainers import digit_map, equal, trainer

from steerfm import (
    EMA,
    AdjointMatching,
    BestOfN,
    DirectBackprop,
    DirectPreference,
    LeapAlign,
    NegativeAware,
    PolicyGradient,
    Prompts,
    RewardAdaptive,
    RewardDistillation,
    RewardFeedback,
    RewardFineTuning,
    SteeredSampling,
    TiltMatching,
    ValueMatching,
    WeightedRegression,
    finetuning,
)
from steerfm.data.batches import StepDataModule
from steerfm.errors import ConfigError, RewardError, TrainingError
from steerfm.finetuning import FineTuning
from steerfm.objectives import Lagrangian, SelfAverage
from steerfm.steering import Glass
from steerfm.times import Triangle

METHODS: dict[str, FineTuning] = {
    "path": DirectBackprop(2, checkpointing=True),
    "noise": DirectBackprop(2, "random", penalty="noise"),
    "sample": DirectBackprop(2, 1, penalty="sample", renoised=1),
    "reward_feedback": RewardFeedback(2),
    "leap_align": LeapAlign(3),
    "adjoint_matching": AdjointMatching(4, matched=2),
    "weighted_regression": WeightedRegression(1, 2),
    "weighted_regression_pool": WeightedRegression(1, 2, pool=6),
    "tilt_matching": TiltMatching(1, 2),
    "reward_adaptive": RewardAdaptive(1, 2),
    "value_matching": ValueMatching(2, Glass(2), levels=2, jumps=1),
    "negative_aware": NegativeAware(0.3, 2.0, rounds=4, every=2, jumps=1),
    "policy_gradient": PolicyGradient(3, every=2),
    "reward_distillation": RewardDistillation(jumps=1),
    "preferences": DirectPreference(2),
}


class Pairs(StepDataModule):
    """Pairs of random pictures, of which the first is always better."""

    def batch(self, step: int) -> dict[str, Any]:
        a, b = torch.rand(2, 8, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        return {"prompt": ["a handwritten seven"] * 8, "image_a": a, "image_b": b, "preferred": torch.ones(8)}


def contrast(images: Tensor, prompts: Any) -> Tensor:
    return images.std((1, 2, 3))


def module(name: str, **more: Any) -> RewardFineTuning:
    method = METHODS[name]
    reward = contrast if method.needs_reward else None
    return RewardFineTuning(
        digit_map(), reward, method, 0.3, optimizer=partial(AdamW, lr=1e-2), monitor_every=3, jumps=1, **more
    )


def data(name: str) -> Any:
    return Pairs() if name == "preferences" else Prompts(["a handwritten seven", "a handwritten two"], 2, 4)


def test_every_method_is_tried_here() -> None:
    kinds = {getattr(finetuning, name) for name in finetuning.__all__}
    methods = {kind for kind in kinds if issubclass(kind, FineTuning) and kind is not FineTuning}
    untried = methods - {type(method) for method in METHODS.values()}
    assert {kind.__name__ for kind in untried} <= OTHERWISE


OTHERWISE = {"AdaptedNoise"}  # needs an adapter, and is tried with it


@pytest.mark.parametrize("name", METHODS)
def test_resuming_equals_never_having_stopped(name: str, tmp_path: Path) -> None:
    def fit(folder: str, resume: Path | None = None) -> tuple[RewardFineTuning, EMA]:
        made, ema = module(name), EMA(0.9)
        keep = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=3, save_top_k=-1, monitor=None)
        trainer(tmp_path, 5, ema, keep).fit(made, data(name), ckpt_path=resume, weights_only=True)
        return made, ema

    straight, straight_ema = fit("straight")
    resumed, ema = fit("resumed", tmp_path / "straight" / "step=3.ckpt")
    assert equal(resumed.state_dict(), straight.state_dict())
    assert equal(ema.average, straight_ema.average)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_in_bfloat16(name: str, tmp_path: Path) -> None:
    made = module(name)
    start = {n: p.detach().clone() for n, p in made.flow_map.named_parameters()}
    trainer(tmp_path, 2, precision="bf16-mixed").fit(made, data(name))
    moved = [not torch.equal(p, start[n]) for n, p in made.flow_map.named_parameters()]
    assert sum(moved) > len(moved) / 2
    assert all(torch.isfinite(p).all() for p in made.flow_map.parameters())


def test_micro_batches_of_the_reward_change_no_gradient(tmp_path: Path) -> None:
    ends = []
    for micro_batch in (None, 3):
        made = module("sample", micro_batch=micro_batch)
        trainer(tmp_path, 1).fit(made, data("sample"))
        ends.append(torch.cat([p.detach().flatten() for p in made.flow_map.parameters()]))
    assert torch.allclose(ends[0], ends[1], atol=1e-6)


def test_methods_that_move_the_velocity_bring_the_jumps_after(tmp_path: Path) -> None:
    assert module("tilt_matching").consistency is not None
    assert module("sample").consistency is None
    assert module("tilt_matching", consistency=None).consistency is None
    made = module("adjoint_matching", consistency=Lagrangian(teacher=SelfAverage(0.5)))
    trainer(tmp_path, 2).fit(made, data("adjoint_matching"))
    assert float(made.trainer.callback_metrics["consistency"]) > 0
    assert made.companions  # the average is kept in checkpoints
    with pytest.raises(ConfigError, match="the times of consistency need diagonal=0"):
        module("tilt_matching", times=Triangle(0.5))


def test_a_run_of_rounds_ends_after_the_last(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = RewardFineTuning(digit_map(), contrast, NegativeAware(0.3, 2.0, rounds=2, every=2, jumps=1), jumps=1)
    run = trainer(tmp_path, 50)
    run.fit(made, data("negative_aware"))
    assert run.global_step == 4
    assert "reaches its temperature" not in caplog.text
    trainer(tmp_path, 3).fit(made, data("negative_aware"))
    assert "NegativeAware reaches its temperature after 4 steps, and this run ends after 3" in caplog.text


def test_steering_and_tuning_are_not_taken_for_each_other() -> None:
    with pytest.raises(ConfigError, match=r"BestOfN is no method of steerfm.finetuning: take one of those"):
        RewardFineTuning(digit_map(), contrast, BestOfN())  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"TiltMatching tunes a map and draws no samples: run it by 'steerfm finetune'"
    ):
        SteeredSampling(digit_map(), TiltMatching())  # type: ignore[arg-type]


def test_a_missing_reward_and_a_loss_that_is_not_finite_are_named(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="TiltMatching needs a reward, got None"):
        RewardFineTuning(digit_map(), None, TiltMatching())
    made = RewardFineTuning(digit_map(), contrast, DirectBackprop(1, penalty="sample"), 1e38, monitor_every=1000)
    with torch.no_grad():
        made.flow_map.network.leave.bias.fill_(1e30)  # type: ignore[union-attr]
    with pytest.raises(TrainingError, match=r"loss is (inf|nan) at step 0 \(mean reward .*mean penalty.*lower the"):
        trainer(tmp_path, 1).fit(made, data("sample"))


def test_figures_and_parts_are_logged(tmp_path: Path) -> None:
    made = module("tilt_matching", held_out=[contrast])
    trainer(tmp_path, 1).fit(made, data("tilt_matching"))
    found = made.trainer.callback_metrics
    assert {"loss", "reward", "reward/contrast", "effective_share", "consistency", "held_out/contrast"} <= set(found)
    assert {"monitor/divergence", "monitor/semigroup_defect"} <= set(found)
