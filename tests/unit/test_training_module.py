"""The Lightning modules through a real Trainer on the CPU: they learn, they resume, they keep guests out."""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from trainers import copied, digit_map, equal, point_map, trainer

from steerfm import (
    EMA,
    MLP,
    BestOfN,
    Digits,
    DirectBackprop,
    FlowMap,
    FlowMapTilting,
    FlowMapTraining,
    LookAheadGuidance,
    Points,
    Prompts,
    RewardFineTuning,
    SteeredSampling,
    digits,
)
from steerfm.callbacks.ema import averaged
from steerfm.conditions import Labels
from steerfm.data import PromptSeeds
from steerfm.errors import ConfigError, RewardError, TrainingError
from steerfm.networks.unet import UNet
from steerfm.objectives import Compositional, Eulerian, Lagrangian
from steerfm.reward import Reward, as_reward
from steerfm.times import Triangle


class Brightness(Reward):
    """Mean of the pixels, through a frozen layer that must not be saved or trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 1)

    def score(self, images: Tensor, prompts: Any, **metadata: Any) -> Tensor:
        return images.flatten(1).mean(1) + 0 * self.layer(images.flatten(1))[:, 0]


def right(points: Tensor, prompts: Any) -> Tensor:
    return points[:, 0]


def flow_training(**more: Any) -> FlowMapTraining:
    return FlowMapTraining(
        digit_map(),
        Compositional("uniform"),
        Triangle(0.5, both=True),
        optimizer=partial(AdamW, lr=1e-2),
        scheduler=partial(CosineAnnealingLR, T_max=6),
        **more,
    )


def fine_tuning(**more: Any) -> RewardFineTuning:
    return RewardFineTuning(
        digit_map(),
        Brightness(),
        DirectBackprop(2, penalty="path"),
        optimizer=partial(AdamW, lr=1e-2),
        scheduler=partial(CosineAnnealingLR, T_max=6),
        monitor_every=2,
        **more,
    )


MODULES = {
    "training": (flow_training, lambda: Digits(16, validation_size=8)),
    "fine_tuning": (fine_tuning, lambda: Prompts(["a handwritten seven", "a handwritten two", ""], 8)),
}


@pytest.mark.parametrize("kind", MODULES)
def test_training_moves_weights_and_is_deterministic(kind: str, tmp_path: Path) -> None:
    make, data = MODULES[kind]
    start = copied(make().state_dict())
    ends = []
    for seed in (0, 0, 1):
        module = make(seed=seed)
        torch.manual_seed(torch.seed())  # nothing may hang on the global generator
        trainer(tmp_path, 3).fit(module, data())
        ends.append(copied(module.state_dict()))
    assert all(not torch.equal(start[name], ends[0][name]) for name in start if "table" not in name)
    assert equal(ends[0], ends[1])
    assert not equal(ends[0], ends[2])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", MODULES)
def test_resuming_equals_never_having_stopped(kind: str, accumulate: int, tmp_path: Path) -> None:
    make, data = MODULES[kind]

    def fit(folder: str, steps: int, resume: Path | None = None) -> tuple[Any, EMA]:
        module, ema = make(), EMA(0.9)
        keep = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=3, save_top_k=-1, monitor=None)
        settings = {"gradient_clip_val": 0.5, "accumulate_grad_batches": accumulate, "val_check_interval": 2}
        run = trainer(tmp_path, steps, ema, keep, **settings)
        run.fit(module, data(), ckpt_path=resume, weights_only=True)
        assert run.global_step == steps
        return module, ema

    straight, straight_ema = fit("straight", 6)
    killed = tmp_path / "straight" / "step=3.ckpt"  # what a run killed on its way to step 6 has left
    fit("short", 3)
    ended = tmp_path / "short" / "step=3.ckpt"  # what a run that was to end at step 3 has left
    for checkpoint in (killed, ended):
        module, ema = fit("resumed", 6, checkpoint)
        assert equal(module.state_dict(), straight.state_dict())
        assert equal(ema.average, straight_ema.average)
        optimizers = [m.trainer.optimizers[0].state_dict() for m in (module, straight)]
        for one, other in zip(*(o["state"].values() for o in optimizers), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)
        assert optimizers[0]["param_groups"][0]["lr"] == optimizers[1]["param_groups"][0]["lr"]


def test_checkpoint_holds_raw_and_average_and_no_guest(tmp_path: Path) -> None:
    held_out = Brightness()
    module, ema = fine_tuning(held_out=[held_out]), EMA(0.5)
    keep = ModelCheckpoint(tmp_path, "last")
    run = trainer(tmp_path, 4, ema, keep)
    run.fit(module, Prompts([""], 4))
    assert all(name.startswith("flow_map.") for name in module.state_dict())
    assert len(list(module.parameters())) == len(list(module.flow_map.parameters()))
    groups = run.optimizers[0].param_groups
    optimised = {id(p) for group in groups for p in group["params"]}
    assert optimised == {id(p) for p in module.flow_map.parameters()}

    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert equal(checkpoint["state_dict"], module.state_dict())
    assert equal(checkpoint["callbacks"]["EMA"]["average"], ema.average)
    loaded, raw = FlowMap.load(tmp_path / "last.ckpt"), FlowMap.load(tmp_path / "last.ckpt", weights="raw")
    assert (loaded.weights, raw.weights) == ("ema", "raw")
    assert equal(raw.state_dict(), module.flow_map.state_dict())
    with averaged(module) as taken:
        assert taken == "ema"
        assert equal(loaded.state_dict(), module.flow_map.state_dict())
    assert not equal(loaded.state_dict(), raw.state_dict())


def test_saved_map_is_the_average_and_says_so(tmp_path: Path) -> None:
    module = fine_tuning()
    run = trainer(tmp_path, 3, EMA(0.5))
    run.fit(module, Prompts([""], 4))
    raw = copied(module.flow_map.state_dict())
    saved = FlowMap.load(module.save(tmp_path / "map"))
    assert saved.weights == "ema"
    assert not equal(saved.state_dict(), raw)
    assert equal(module.flow_map.state_dict(), raw)
    assert FlowMap.load(module.flow_map.save(tmp_path / "other")).weights == "raw"  # what it holds now


def test_reference_stays_and_is_its_own(tmp_path: Path) -> None:
    flow_map = digit_map()
    start = copied(flow_map.state_dict())
    module = RewardFineTuning(flow_map, Brightness(), optimizer=partial(AdamW, lr=1e-2))
    trainer(tmp_path, 2).fit(module, Prompts([""], 4))
    reference = module._reference.module
    assert equal(reference.state_dict(), start)
    assert not any(p.requires_grad for p in reference.parameters())
    assert not equal(module.flow_map.state_dict(), start)


class Explosive(nn.Module):
    """Gives a NaN on one sample from its third call on."""

    def __init__(self) -> None:
        super().__init__()
        self.data_shape = (2,)
        self.layer = nn.Linear(2, 2)
        self.calls = 0

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        self.calls += 1
        bad = torch.zeros_like(x)
        bad[1] = float("nan") if self.calls > 2 else 0.0
        return self.layer(x) + bad


def test_nan_guard_names_loss_step_and_interval(tmp_path: Path) -> None:
    module = FlowMapTraining(FlowMap(Explosive()), Compositional(), Triangle(1.0))
    with pytest.raises(TrainingError, match=r"'flow_matching' is nan at step 2 .* s = (0\.\d{4}), t = \1 \(1 of 8"):
        trainer(tmp_path, 9).fit(module, Points("ring", 8, validation_size=0))
    module = FlowMapTraining(FlowMap(Explosive()), Compositional(), Triangle(0.0))
    with pytest.raises(TrainingError, match=r"'Compositional' is nan at step 0 for the interval s = .*lower the"):
        trainer(tmp_path, 9).fit(module, Points("ring", 8, validation_size=0))


def test_nan_reward_names_part_and_sample(tmp_path: Path) -> None:
    def broken(points: Tensor, prompts: Any) -> Tensor:
        return points[:, 0] / (torch.arange(len(points)) != 2)

    module = RewardFineTuning(point_map(), as_reward(right) + broken)
    with pytest.raises(RewardError, match=r"'broken' gave -?(inf|nan) for sample 2"):
        trainer(tmp_path, 2).fit(module, Prompts([""], 4))


def test_an_abstention_is_left_out_of_the_means(tmp_path: Path) -> None:
    class OfSome(Reward):
        abstains = True

        def __init__(self, silent: int, name: str) -> None:
            super().__init__(name)
            self.silent = silent

        def score(self, images: Tensor, prompts: Any, **metadata: Any) -> Tensor:
            return (2 + 0 * images[:, 0]).masked_fill(torch.arange(len(images)) < self.silent, torch.nan)

    module = RewardFineTuning(point_map(), as_reward(right) + OfSome(1, "some"), held_out=[OfSome(4, "none")])
    run = trainer(tmp_path, 1)
    run.fit(module, Prompts([""], 4))
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    assert (found["reward/some"], found["reward/some/abstained"]) == (2.0, 0.25)
    assert found["held_out/none/abstained"] == 1.0
    assert "held_out/none" not in found
    assert "reward/right/abstained" not in found
    assert found["reward"] == pytest.approx(found["reward/right"] + 0.75 * 2)


def test_gradient_method_refuses_a_black_box_reward() -> None:
    class Box(Brightness):
        differentiable = False

    with pytest.raises(
        RewardError,
        match=r"'box' has no gradient, and DirectBackprop needs one. Use .*NegativeAware, PolicyGradient.*best of n",
    ):
        RewardFineTuning(digit_map(), Box())
    with pytest.raises(ConfigError, match=r"temperature must be positive, got 0: it divides the reward"):
        RewardFineTuning(digit_map(), Brightness(), temperature=0)


@pytest.mark.parametrize("objective", [Compositional(), Lagrangian(), Eulerian()])
def test_validation_is_fixed_and_leaves_training_alone(objective: Any, tmp_path: Path) -> None:
    module = FlowMapTraining(digit_map(), objective, Triangle(0.5), optimizer=partial(SGD, lr=1e-3))
    data = Digits(16, validation_size=32)
    run = trainer(tmp_path, 2, EMA(0.5))
    first, second = (run.validate(module, data, verbose=False)[0] for _ in range(2))
    assert first == second
    assert set(first) == {"validation/flow_matching", "validation/consistency"}
    run.fit(module, data)
    with_validation = copied(module.state_dict())
    module = FlowMapTraining(digit_map(), objective, Triangle(0.5), optimizer=partial(SGD, lr=1e-3))
    trainer(tmp_path, 2, EMA(0.5)).fit(module, Digits(16, validation_size=0))
    assert equal(with_validation, module.state_dict())


def test_training_is_counted_in_steps(tmp_path: Path) -> None:
    module = FlowMapTraining(digit_map())
    with pytest.raises(ConfigError, match=r"set trainer\.max_steps"):
        trainer(tmp_path, -1, max_epochs=1).fit(module, Digits(4))


class Recorder(FlowMapTraining):
    """Keeps the batches it was given, and the times it drew."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        output = super().training_step(batch, batch_idx)
        self.seen = [*getattr(self, "seen", []), batch["x0"]]
        self.times_seen = [*getattr(self, "times_seen", []), output["s"]]
        return output


def test_accumulated_batches_are_all_new(tmp_path: Path) -> None:
    module, data, ema = Recorder(digit_map(), Compositional()), Digits(8, validation_size=0), EMA(0.5)
    trainer(tmp_path, 3, ema, accumulate_grad_batches=2).fit(module, data)
    assert ema.updates == 3
    assert len(module.seen) == 6
    assert all(torch.equal(seen, data.batch(step)["x0"]) for step, seen in enumerate(module.seen))
    assert len({float(s[0]) for s in module.times_seen}) == 6  # noise and times are new in each of them too


def test_rule_diagonal_times_and_weighting_are_told_what_is_theirs(tmp_path: Path) -> None:
    """The training step, and of every row its own times and condition."""
    told: dict[str, list[Any]] = {"rule": [], "diagonal": [], "times": [], "weighting": []}

    def telling(name: str) -> Any:
        def objective(flow_map, x0, x1, s, t, condition: Any = None, generator=None, step=0):
            told[name].append((step, s, t, condition["label"]))
            return flow_map.velocity(x0, s, condition).flatten(1).square().mean(1)

        return objective

    class Telling(Triangle):
        def __call__(self, n: int, generator: Any = None, step: int = 0) -> Any:
            told["times"].append(step)
            return super().__call__(n, generator, step)

    def weighting(losses: Tensor, s: Tensor, t: Tensor) -> Tensor:
        told["weighting"].append((s, t))
        return losses

    module = FlowMapTraining(
        digit_map(), telling("rule"), Telling(0.25), weighting, partial(SGD, lr=0.1),
        prompt_dropout=0.0, diagonal=telling("diagonal"),
    )  # fmt: skip
    data = Digits(8, validation_size=0)
    trainer(tmp_path, 2).fit(module, data)
    assert told["times"] == [0, 1]
    for step, (s, t) in enumerate(told["weighting"]):
        assert torch.equal(s[:2], t[:2]) and (t[2:] < s[2:]).all()
        condition = module.flow_map.encode_prompts(data.batch(step)["prompt"])
        assert condition is not None
        for name, rows in (("diagonal", slice(2)), ("rule", slice(2, None))):
            at, *found = told[name][step]
            assert at == step
            assert all(torch.equal(a, b[rows]) for a, b in zip(found, (s, t, condition["label"]), strict=True))


def test_diagonal_first_then_everything(tmp_path: Path) -> None:
    shares = []

    class Watched(FlowMapTraining):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
            out = super().training_step(batch, batch_idx)
            shares.append(float((out["s"] == out["t"]).float().mean()))
            return out

    module = Watched(point_map(), Compositional(), Triangle(0.25), flow_matching_steps=2)
    trainer(tmp_path, 4).fit(module, Points("ring", 16, validation_size=0))
    assert shares == [1.0, 1.0, 0.25, 0.25]


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_prompt_dropout_puts_the_null_class(dropout: float, expected: float) -> None:
    module = FlowMapTraining(digit_map(), prompt_dropout=dropout)
    condition = module._condition(["a handwritten two"] * 4000, torch.Generator().manual_seed(0))
    assert condition is not None
    share = float((condition["label"] == 10).float().mean())
    assert abs(share - expected) <= 4 * (dropout * (1 - dropout) / 4000) ** 0.5  # four standard errors
    with pytest.raises(ConfigError, match="prompt_dropout is a share"):
        FlowMapTraining(digit_map(), prompt_dropout=1.5)


def test_a_map_that_samples_with_guidance_is_trained_without(tmp_path: Path) -> None:
    ends = []
    for scale in (1.0, 3.0):
        flow_map = digit_map()
        flow_map.guidance_scale = scale
        module = FlowMapTraining(flow_map, Compositional(), optimizer=partial(SGD, lr=0.1))
        trainer(tmp_path, 2).fit(module, Digits(8, validation_size=0))
        assert module.flow_map.guidance_scale == scale
        ends.append(copied(module.state_dict()))
    assert equal(*ends)


def test_guidance_is_learnt_once_flow_matching_alone_is_over(tmp_path: Path) -> None:
    """The first step is the same with and without it, the second is not."""
    ends = []
    for guidance, steps in ((1.0, 1), (3.0, 1), (1.0, 2), (3.0, 2)):
        module = FlowMapTraining(
            digit_map(), Compositional(), flow_matching_steps=1, guidance=guidance, optimizer=partial(SGD, lr=0.1)
        )
        trainer(tmp_path, steps).fit(module, Digits(8, validation_size=0))
        ends.append(copied(module.state_dict()))
    assert equal(ends[0], ends[1]) and not equal(ends[2], ends[3])
    with pytest.raises(ConfigError, match="guidance is 1 or more"):
        FlowMapTraining(digit_map(), guidance=0.5)
    with pytest.raises(ConfigError, match="guidance is 1 or more"):
        FlowMapTraining(digit_map(), guidance=())
    with pytest.raises(ConfigError, match="guidance is 1 or more"):
        FlowMapTraining(digit_map(), guidance=2.0, prompt_dropout=0.0)
    with pytest.raises(ConfigError, match="takes is not guided"):
        FlowMapTraining(digit_map(), Eulerian(), guidance=2.0)
    with pytest.raises(ConfigError, match="guidance_input=True"):
        FlowMapTraining(digit_map(), guidance=(1.0, 4.0))
    with pytest.raises(ConfigError, match="needs a conditioner"):
        FlowMapTraining(point_map(), guidance=2.0)


def test_noise_is_normal_and_new_and_flow_matching_alone_draws_its_own_times(tmp_path: Path) -> None:
    """Means, variances and the correlation of two steps' noise are within four standard errors."""
    drawn = []

    def diagonal(flow_map, x0, x1, s, t, condition: Any = None, generator=None, step=0):
        drawn.append((x1, s, t))
        return flow_map.velocity(x0, s, condition).flatten(1).square().mean(1)

    class Fixed(Triangle):
        def one(self, n: int, generator: Any = None) -> Tensor:
            return torch.full((n,), 0.25)

    module = FlowMapTraining(
        digit_map(),
        Compositional(),
        Fixed(1.0),
        flow_matching_steps=1,
        diagonal=diagonal,
        optimizer=partial(SGD, lr=0.1),
    )
    trainer(tmp_path, 2).fit(module, Digits(256, validation_size=0))
    (first, s, t), (second, later, _) = drawn
    assert (s == 0.25).all() and (t == 0.25).all() and len(later.unique()) > 200
    error = first.numel() ** -0.5
    for x1 in (first, second):
        assert abs(float(x1.mean())) < 4 * error and abs(float(x1.var()) - 1) < 4 * 2**0.5 * error
    assert abs(float((first * second).mean())) < 4 * error


def test_scales_are_drawn_evenly_in_their_logarithm_once_flow_matching_alone_is_over(tmp_path: Path) -> None:
    low, high, told = 2.0, 32.0, []

    def diagonal(flow_map, x0, x1, s, t, condition: Any = None, generator=None, step=0):
        told.append(condition.tensors.get("guidance"))
        return flow_map.velocity(x0, s, condition).flatten(1).square().mean(1)

    network = MLP((1, 8, 8), width=16, depth=1, frequencies=4, num_classes=10, guidance_input=True)
    module = FlowMapTraining(
        FlowMap(network, conditioner=Labels(digits.CAPTIONS)), Compositional(), Triangle(1.0), flow_matching_steps=1,
        guidance=(low, high), diagonal=diagonal, optimizer=partial(SGD, lr=0.1),
    )  # fmt: skip
    trainer(tmp_path, 2).fit(module, Digits(512, validation_size=0))
    first, second = told
    assert first is None and low <= second.min() < second.max() <= high
    middle, spread = math.log(low * high) / 2, math.log(high / low) / 12**0.5
    assert abs(float(second.log().mean()) - middle) < 4 * spread / 512**0.5  # four standard errors


def test_unet_with_classes_trains_and_is_tuned(tmp_path: Path) -> None:
    network = UNet((1, 8, 8), channels=(8, 8), num_classes=10, attention_heads=2, groups=2, frequencies=4)
    flow_map = FlowMap(network, conditioner=Labels(digit_map().conditioner.classes))  # type: ignore[union-attr]
    start = copied(flow_map.state_dict())
    module = FlowMapTraining(flow_map.eval(), Lagrangian(), Triangle(0.5, both=True), optimizer=partial(AdamW, lr=1e-2))
    run = trainer(tmp_path, 3)
    run.fit(module, Digits(8, validation_size=8))
    assert flow_map.training  # a loaded map comes in evaluation mode
    moved = [name for name in start if not torch.equal(start[name], flow_map.state_dict()[name])]
    assert len(moved) == len(start)
    tuning = RewardFineTuning(flow_map, Brightness(), DirectBackprop(2, penalty="noise"))
    trainer(tmp_path, 2).fit(tuning, Prompts(["a handwritten seven"], 4))


def test_sampling_predicts_pairs_with_held_out_values(tmp_path: Path) -> None:
    flow_map = digit_map()
    methods = [LookAheadGuidance(4, 0.1), BestOfN(3, 1)]
    for method in methods:
        module = SteeredSampling(
            flow_map, method, reward=Brightness(), held_out=[lambda images: images.mean((1, 2, 3))]
        )
        assert list(module.state_dict()) == [f"flow_map.{name}" for name in flow_map.state_dict()]
        data = PromptSeeds(["a handwritten two", "a handwritten six"], seeds=3, batch_size=4)
        batches: Any = trainer(tmp_path, -1).predict(module, data)
        assert [len(batch) for batch in batches] == [4, 2]
        assert [seed for batch in batches for seed in batch.seeds] == [0, 1, 2, 0, 1, 2]
        alone = method(flow_map, Brightness(), prompts=["a handwritten six"], seeds=[2])
        assert torch.allclose(batches[1].x0[1], alone.x0[0], atol=1e-5)
        assert torch.allclose(batches[0].held_out["<lambda>"], batches[0].rewards, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_trains_tunes_and_samples(precision: Any, tmp_path: Path) -> None:
    ema = EMA(0.999)
    for make, data in MODULES.values():
        module = make()
        trainer(tmp_path, 2, ema, precision=precision).fit(module, data())
        assert {tensor.dtype for tensor in ema.average.values()} == {torch.float32}  # steps of a thousandth count
    for method in (LookAheadGuidance(2), BestOfN(2, 1), FlowMapTilting(2, 2)):
        sampling = SteeredSampling(digit_map(), method, reward=Brightness())
        batches: Any = trainer(tmp_path, -1, precision=precision).predict(sampling, PromptSeeds(seeds=2))
        assert batches[0].rewards.dtype == torch.float32
        assert batches[0].rewards.isfinite().all()


def test_unclamped_rewards_are_given_where_pixels_were_clamped(tmp_path: Path) -> None:
    flow_map = digit_map()
    with torch.no_grad():
        flow_map.network.leave.bias.fill_(-3.0)  # type: ignore[union-attr]
    module = SteeredSampling(flow_map, reward=Brightness())
    samples = module.predict_step({"prompt": ["", ""], "seed": [0, 1]})
    assert samples.rewards_unclamped is not None
    assert samples.rewards is not None
    assert samples.images.max() <= 1
    assert torch.allclose(samples.rewards_unclamped, ((samples.x0 + 1) / 2).mean((1, 2, 3)), atol=1e-5)
    assert (samples.rewards_unclamped > samples.rewards).all()


def test_nothing_to_train_is_said() -> None:
    module = FlowMapTraining(digit_map().requires_grad_(False))
    with pytest.raises(ConfigError, match=re.escape("Nothing can be trained")):
        module.configure_optimizers()
