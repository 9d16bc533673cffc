"""Guard rails on the exact Gaussian map: what they log, when they stop and what they keep, worked out by hand."""

import csv
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from oracles import GaussianNetwork, gaussian_map
from PIL import Image
from torch import Tensor
from torch.optim import SGD
from trainers import copied, digit_map, equal, trainer

from steerfm import EMA, DirectBackprop, FlowMap, FlowMapTraining, Points, Prompts, RewardFineTuning
from steerfm.analytic import QuadraticReward
from steerfm.callbacks import GuardRails
from steerfm.callbacks.course import Course, Measurement
from steerfm.callbacks.guard_rails import FIRST_SEED, evaluating, spread
from steerfm.digits import CAPTIONS
from steerfm.divergence import EARLIEST
from steerfm.errors import ConfigError
from steerfm.metrics.tuned import FixedSamples, opinions, small_pixels
from steerfm.objectives import Compositional
from steerfm.reward import Scores, as_reward
from steerfm.seeds import noise, torch_generator

MEAN, SCALE, A, RATE, SAMPLES, EVERY = (0.3, -0.2), 0.7, (0.8, -0.5), 0.1, 32, 2
AIM = [m + 6 * RATE * a for m, a in zip(MEAN, A, strict=True)]  # where six steps lead


def tuning(held_out: Any = None) -> RewardFineTuning:
    """Return a fine-tuning whose every step moves the mean by RATE * A: the reward is A . x, the penalty nothing."""
    method = DirectBackprop(1, penalty="sample")
    aim = QuadraticReward.distance(AIM, 2.0)  # -|x - AIM|^2
    held_out = [aim] if held_out is None else held_out
    module = RewardFineTuning(
        gaussian_map(MEAN, SCALE),
        QuadraticReward.linear(A),
        method,
        1e-12,
        held_out=held_out,
        optimizer=partial(SGD, lr=RATE),
    )
    network(module.flow_map).scale.requires_grad_(False)
    return module


def network(flow_map: FlowMap) -> GaussianNetwork:
    assert isinstance(flow_map.network, GaussianNetwork)
    return flow_map.network


def rails(**more: Any) -> GuardRails:
    return GuardRails(EVERY, SAMPLES, jumps=2, **more)


def fixed_noise() -> Tensor:
    return noise(range(FIRST_SEED, FIRST_SEED + SAMPLES), (2,), dtype=torch.float64)


def rows_after(steps: float) -> Tensor:
    """Return the fixed samples after so many optimiser steps, m + steps RATE a + c z."""
    mean = torch.tensor(MEAN, dtype=torch.float64) + steps * RATE * torch.tensor(A, dtype=torch.float64)
    return mean + SCALE * fixed_noise()


def judged(steps: float) -> list[float]:
    """Return each fixed sample's held-out reward after so many steps."""
    return [-sum((x - y) ** 2 for x, y in zip(row.tolist(), AIM, strict=True)) for row in rows_after(steps)]


def fall_in_errors(then: int, now: int) -> float:
    """Return by how many standard errors the held-out reward fell between two steps."""
    gaps = [b - a for a, b in zip(judged(then), judged(now), strict=True)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
    return -mean / math.sqrt(variance / len(gaps))


def test_stops_where_the_reward_and_the_held_out_reward_part_and_keeps_the_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    means = {step: sum(judged(step)) / SAMPLES for step in range(0, 31, EVERY)}
    peak = max(means, key=lambda step: means[step])
    parted = [step for step in means if step > peak and fall_in_errors(peak, step) > 2]
    assert (peak, parted[:2]) == (6, [10, 12])
    module, guard = tuning(), rails()
    with caplog.at_level(logging.INFO, "steerfm"):
        run = trainer(tmp_path, 30, guard)
        run.fit(module, Prompts([""], 8))
    assert run.global_step == parted[1]
    assert guard.course.best is not None and guard.course.best.step == peak
    won = (parted[1] - peak) * RATE * sum(a * a for a in A)
    said = f"Stopped at step {parted[1]}: since step {peak} the reward has risen by {won:.3g}, and the held-out "
    assert f"{said}rewards have fallen by " in caplog.text
    assert f"The map has its last weights, of step {parted[1]}. Held-out rewards were highest at step 6" in caplog.text
    for flow_map, steps in ((module.flow_map, parted[1]), (FlowMap.load(tmp_path / "map_best", network=bare()), 6)):
        reached = torch.tensor(MEAN) + steps * RATE * torch.tensor(A)
        assert torch.allclose(network(flow_map).mean, reached.double(), atol=1e-6)


def bare() -> GaussianNetwork:
    return GaussianNetwork((0.0, 0.0), 1.0)


def logged(folder: Path) -> dict[int, dict[str, float]]:
    with (folder / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("guard/reward")]
    return {
        int(row["step"]): {name[6:]: float(row[name]) for name in row if name.startswith("guard/") and row[name]}
        for row in rows
    }


def test_figures_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    guard, logger = rails(patience=None), CSVLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, 5, guard, logger=logger)
    run.fit(tuning(), Prompts([""], 8))
    found = logged(tmp_path)
    assert list(found) == [0, 2, 4, 5]
    z = fixed_noise()
    distances = SCALE * torch.cdist(z, z)
    width = float(distances.sum() / SAMPLES / (SAMPLES - 1))
    eigenvalues = torch.linalg.eigvalsh((-((distances / width) ** 2) / 2).exp() / SAMPLES).clamp_min(1e-300)
    generator = torch_generator(FIRST_SEED, "validation")
    torch.randn(SAMPLES, 2, generator=generator)
    t = (EARLIEST + (1 - EARLIEST) * torch.rand(SAMPLES, generator=generator)).double()
    for step, figures in found.items():
        moved = step * RATE * torch.tensor(A, dtype=torch.float64)
        x = rows_after(step)
        # v - v_ref = -t d / sigma_t^2 for a shift d of the mean
        share = (1 - EARLIEST) * (1 - t) * t / (((1 - t) * SCALE) ** 2 + t**2) ** 2
        assert figures == pytest.approx(
            {
                "reward": float((x @ torch.tensor(A).double()).mean()),
                "reward/quadratic_reward": float((x @ torch.tensor(A).double()).mean()),
                "held_out/quadratic_reward": sum(judged(step)) / SAMPLES,
                "divergence": float(share.mean() * moved.square().sum()),
                "semigroup_defect": 0,
                "jump_gap": 0,
                "diversity": 1,
                "vendi": float((-eigenvalues * eigenvalues.log()).sum().exp()),
                "frechet": float(moved.square().sum()),
            },
            rel=1e-5,
            abs=1e-6,
        )
    assert {name[6:]: float(v) for name, v in run.callback_metrics.items() if "guard/" in name} == pytest.approx(
        found[5], rel=1e-6, abs=1e-12
    )


def test_resumed_is_as_never_interrupted(tmp_path: Path) -> None:
    whole, stopped, resumed = rails(), rails(), rails()
    module = tuning()
    trainer(tmp_path / "whole", 30, whole).fit(module, Prompts([""], 8))
    run = trainer(tmp_path / "cut", 10, stopped)
    run.fit(tuning(), Prompts([""], 8))
    run.save_checkpoint(tmp_path / "cut.ckpt")
    again = tuning()
    run = trainer(tmp_path / "cut", 30, resumed)
    run.fit(again, Prompts([""], 8), ckpt_path=tmp_path / "cut.ckpt", weights_only=True)
    assert run.global_step == 12
    assert equal(again.state_dict(), module.state_dict())
    assert same(resumed.state_dict(), whole.state_dict())
    assert (tmp_path / "cut/map_best/flow_map.safetensors").read_bytes() == (
        tmp_path / "whole/map_best/flow_map.safetensors"
    ).read_bytes()
    run.save_checkpoint(tmp_path / "over.ckpt")  # of a run that was stopped, and killed before it was finished
    run = trainer(tmp_path / "over", 30, rails())
    run.fit(tuning(), Prompts([""], 8), ckpt_path=tmp_path / "over.ckpt", weights_only=True)
    assert run.global_step == 12


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_another_fit_begins_anew(tmp_path: Path) -> None:
    guard, alone = rails(), rails()
    trainer(tmp_path, 30, guard).fit(tuning(), Prompts([""], 8))
    trainer(tmp_path, 4, guard).fit(tuning(), Prompts([""], 8))
    trainer(tmp_path, 4, alone).fit(tuning(), Prompts([""], 8))
    assert same(guard.state_dict(), alone.state_dict())


def test_the_best_is_kept_if_asked_for_with_its_average(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Steps of RATE A each, averaged by EMA's recurrence: which average was best, and that it is saved as such."""
    module, guard, ema = tuning(), rails(keep="best", patience=None), EMA(0.5)
    with caplog.at_level(logging.INFO, "steerfm"):
        trainer(tmp_path, 30, ema, guard).fit(module, Prompts([""], 8))
    average, average_at = 0.0, {0: 0.0}
    for step in range(1, 31):
        decay = min(0.5, (1 + step) / (10 + step))
        average_at[step] = average = decay * average + (1 - decay) * step
    means = {step: sum(judged(at)) / SAMPLES for step, at in average_at.items() if step % EVERY == 0}
    best = max(means, key=lambda step: means[step])
    assert 6 <= best <= 10
    assert f"The map has the weights of step {best} of 30, whose held-out rewards were highest" in caplog.text
    assert not (tmp_path / "map_best").exists()
    saved = FlowMap.load(module.save(tmp_path / "map"), network=bare())
    assert saved.weights == "ema"
    for flow_map in (saved, module.flow_map):
        reached = torch.tensor(MEAN).double() + average_at[best] * RATE * torch.tensor(A).double()
        assert torch.allclose(network(flow_map).mean, reached, atol=1e-6)


def test_the_best_lies_within_the_largest_divergence(tmp_path: Path) -> None:
    """D grows like the square of the shift: a bound between those of steps 2 and 4 leaves step 2."""
    free, bounded = rails(patience=None), rails(patience=None)
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, 8, free, logger=logger).fit(tuning(), Prompts([""], 8))
    found = logged(tmp_path)
    bounded.course.largest_divergence = (found[2]["divergence"] + found[4]["divergence"]) / 2
    trainer(tmp_path, 8, bounded).fit(tuning(), Prompts([""], 8))
    assert bounded.course.best is not None and bounded.course.best.step == 2
    assert free.course.best is not None and free.course.best.step == 6


def test_held_out_rewards_weigh_alike_whatever_their_scale(tmp_path: Path) -> None:
    guard = rails(patience=None)
    aims = [QuadraticReward.distance(AIM, 2.0), QuadraticReward.distance(AIM, 200.0)]
    trainer(tmp_path, 1, guard).fit(tuning(aims), Prompts([""], 8))
    rows = torch.tensor(judged(0), dtype=torch.float64)
    assert torch.allclose(guard.course.front[0].held_out, (rows / rows.std()).expand(2, SAMPLES), rtol=1e-9)


# --- the course ---


def measured(step: int, reward: float | None, held_out: list[float], divergence: float = 0.0) -> Measurement:
    rows = torch.tensor(held_out, dtype=torch.float64)[None]
    return Measurement(step, None if reward is None else torch.full((rows.shape[1],), reward), rows, divergence)


def test_parting_has_to_last() -> None:
    course = Course(tolerance=2.0, patience=2)
    course.take(measured(0, 0.0, [0.0, 1.0]))
    rows = {1: [1.0, 2.0], 2: [0.4, 1.5], 3: [0.9, 2.05], 4: [0.4, 1.5], 5: [0.4, 1.4]}
    found = []
    for step, held_out in rows.items():
        best = course.take(measured(step, float(step), held_out))
        found.append((best, course.parted, course.over))
    # falls from step 1: 0.55 +- 0.05, then none beyond the error, then 0.55 +- 0.05 and 0.6 +- 0
    assert found == [(True, 0, False), (False, 1, False), (False, 0, False), (False, 1, False), (False, 2, True)]
    assert not Course(patience=None, parted=9).over


def followed(*measurements: tuple[float | None, float]) -> list[tuple[int, int | None]]:
    """Return how often a course had parted after each (reward, held-out reward), and since which step."""
    course, found = Course(), []
    for step, (reward, held_out) in enumerate(measurements):
        course.take(measured(step, reward, [held_out, held_out + 1]))
        found.append((course.parted, course.rival.step if course.rival else None))
    return found


def test_a_fall_of_both_is_no_hacking() -> None:
    """As while the learning rate is high: a map gets worse and better again, its reward with it."""
    assert followed((0, 0.0), (4, 0.8), (3, 0.7), (2, 0.6), (5, 0.9)) == [(0, None), (0, 0), (0, 0), (0, 0), (0, 1)]


def test_held_out_rewards_that_were_higher_for_less_reward_are_hacking() -> None:
    # at a ceiling of 4, 3.9 is less than the peak's, but an earlier map had 2 and was better
    assert followed((0, 0.0), (2, 0.8), (4, 0.9), (3.9, 0.6), (3.9, 0.5))[3:] == [(1, 1), (2, 1)]
    assert followed((0, 0.5), (1, 0.4), (2, 0.3)) == [(0, None), (1, 0), (2, 0)]  # from the base on
    assert followed((0, 0.5), (-1, 0.4), (-2, 0.3))[1:] == [(0, None), (0, None)]  # nothing is won, and nothing hacked


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_without_a_reward_a_fall_is_enough(nothing: float | None) -> None:
    rows = followed((nothing, 0.0), (nothing, 1.0), (nothing, 0.5), (nothing, 0.8))
    assert rows == [(0, None), (0, 0), (1, 1), (2, 1)]


def test_a_course_keeps_what_a_later_map_may_have_to_answer_to() -> None:
    course = Course()
    for step, (reward, held_out) in enumerate([(0, 0.0), (2, 0.8), (4, 0.9), (3, 0.85), (1, 0.9), (5, 0.7)]):
        course.take(measured(step, float(reward), [held_out, held_out + 1]))
    assert [each.step for each in course.front] == [0, 4]  # 4 has as much for less reward as 2, and more than 1 and 3
    again = Course()
    again.restore(course.state())
    now = measured(6, 6.0, [0.5, 1.5])
    assert not course.take(now) and not again.take(now)
    assert course.parted == again.parted == 2
    assert course.rival is not None and again.rival is not None and course.rival.step == again.rival.step == 4


def test_without_held_out_rewards_nothing_is_best() -> None:
    course = Course()
    assert not course.take(Measurement(0, torch.ones(3), torch.empty(0, 3), 0.0))
    assert course.best is None and course.front == [] and not course.over


def test_abstentions_are_compared_on_what_both_saw() -> None:
    course = Course()
    course.take(measured(0, 0.0, [1.0, 1.0, math.nan, 5.0]))
    assert course.take(measured(1, 1.0, [2.0, 2.0, -9.0, math.nan]))  # 1 and 1 better; its silence wins nothing
    assert not course.take(measured(2, 2.0, [math.nan] * 4))
    assert course.best is not None and course.best.step == 1 and course.parted == 0


def test_rewards_count_in_units_of_their_spread_and_silence_is_nan() -> None:
    assert float(spread(torch.tensor([1.0, math.nan, 3.0]))) == pytest.approx(math.sqrt(2))
    assert [float(spread(torch.tensor(rows))) for rows in ([2.0, 2.0], [math.nan, 3.0], [math.nan])] == [1, 1, 1]
    parts = {"a": torch.tensor([math.nan, 1.0]), "b": torch.tensor([math.nan, math.nan])}
    assert same(opinions(Scores(torch.tensor([0.0, 1.0]), parts)), torch.tensor([math.nan, 1.0]).double())


# --- pictures, and what a black box does ---


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


class Judge:
    """A black box that has no opinion of bright pictures."""

    differentiable, abstains, name = False, True, "judge"

    def __call__(self, images: Tensor) -> Tensor:
        values = images.detach().amax((1, 2, 3))
        return torch.where(images.mean((1, 2, 3)) < 0.5, values, torch.nan)


def digits_tuning(held_out: Any = (), seed: int = 0) -> RewardFineTuning:
    optimizer = partial(SGD, lr=0.5)
    method = DirectBackprop(2, penalty="path")
    return RewardFineTuning(digit_map(seed=seed), brightness, method, held_out=held_out, optimizer=optimizer)


def test_training_goes_as_without_guard_rails(tmp_path: Path) -> None:
    plain, guarded = digits_tuning(), digits_tuning([as_reward(Judge(), "judge"), as_reward(brightness, "light")])
    data = Prompts(CAPTIONS, 4)
    trainer(tmp_path, 3).fit(plain, data)
    trainer(tmp_path, 3, GuardRails(1, 8, CAPTIONS[:2])).fit(guarded, data)
    assert equal(copied(plain.state_dict()), copied(guarded.state_dict()))


def test_a_map_is_measured_in_evaluation_mode_and_every_part_goes_back_to_its_own() -> None:
    flow_map = digit_map().train()
    flow_map.network.time.eval()  # type: ignore[union-attr,operator]
    with evaluating(flow_map):
        assert not any(module.training for module in flow_map.modules())
    modes = {name: module.training for name, module in flow_map.named_modules()}
    assert modes["network"] and modes[""] and not modes["network.time"]


def test_pictures_show_the_base_above_the_present(tmp_path: Path) -> None:
    guard = GuardRails(2, 6, CAPTIONS[:3], columns=4, scale=1, patience=None)
    module = digits_tuning([as_reward(Judge(), "judge")])
    trainer(tmp_path, 3, guard).fit(module, Prompts(CAPTIONS, 4))
    files = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in files] == ["guard_0000000.png", "guard_0000002.png", "guard_0000003.png"]
    sheets = [torch.tensor(list(Image.open(path).convert("L").tobytes())).reshape(19, 37) for path in files]
    assert torch.equal(sheets[0][:9], sheets[0][9:18]) and torch.equal(sheets[0][:9], sheets[2][:9])
    assert not torch.equal(sheets[2][1:9], sheets[2][10:18])
    names = {"mean", "contrast", "clamped", "vendi", "held_out/judge/abstained"}
    assert {f"guard/{name}" for name in names} <= set(module.trainer.callback_metrics)


def test_distance_is_to_data_where_they_are_given(tmp_path: Path) -> None:
    data = torch.full((5, 1, 8, 8), 0.5)
    guard = GuardRails(9, 4, CAPTIONS[:2], data=data, features=lambda images: images.mean((2, 3)))
    trainer(tmp_path, 1, guard).fit(digits_tuning(), Prompts(CAPTIONS, 4))
    assert guard.base is not None
    values = guard.base.features.flatten()
    expected = float((values.mean() - 0.75) ** 2 + values.var())  # the data's variance is zero
    fixed = guard.fixed.of_samples(guard.base, guard.base, guard.real)
    assert fixed["frechet"] == pytest.approx(expected, rel=1e-9)


def test_fixed_samples_do_not_depend_on_how_they_are_batched() -> None:
    flow_map, other = digit_map(), digit_map(seed=3)
    reward = as_reward(brightness)
    together, apart = (FixedSamples(CAPTIONS[:3], 7, 5, 2, batch_size=size) for size in (64, 3))
    a, b = together.draw(flow_map, reward, [reward]), apart.draw(flow_map, reward, [reward])
    assert torch.allclose(a.x0, b.x0, atol=1e-6)
    assert a.reward is not None and b.reward is not None
    assert torch.allclose(a.reward.total, b.reward.total) and torch.allclose(a.held_out[0].total, b.held_out[0].total)
    base = together.draw(other)
    inner, outer = together.of_map(flow_map, other, a, base), together.of_samples(a, base)
    assert outer == pytest.approx(apart.of_samples(b, base), rel=1e-4)
    assert inner["jump_gap"] == pytest.approx(apart.of_map(flow_map, other, b, base)["jump_gap"], rel=1e-4)
    by_prompt = [torch.pdist(a.features[[i for i in range(7) if i % 3 == k]]).mean() for k in range(3)]
    before = [torch.pdist(base.features[[i for i in range(7) if i % 3 == k]]).mean() for k in range(3)]
    assert outer["diversity"] == pytest.approx(float(sum(by_prompt) / sum(before)), rel=1e-9)
    assert small_pixels(torch.rand(2, 3, 64, 48)).shape == (2, 3 * 32 * 24)


def test_wrong_arguments_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every and patience count from 1, got every=0 and patience=2"):
        GuardRails(every=0)
    with pytest.raises(ConfigError, match="keep is 'last' or 'best', got 'first'"):
        GuardRails(keep="first")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="two samples or more of every prompt, got 3 samples of 2 prompts"):
        GuardRails(samples=3, prompts=["a", "b"])
    with pytest.raises(ConfigError, match="keep='best' needs a held-out reward to choose by, got none"):
        trainer(tmp_path, 1, rails(keep="best")).fit(tuning([]), Prompts([""], 8))
    module = FlowMapTraining(digit_map(), Compositional())
    with pytest.raises(ConfigError, match=r"GuardRails watches a module's reference, .* FlowMapTraining has none"):
        trainer(tmp_path, 1, rails()).fit(module, Points("ring", 8, validation_size=0))
