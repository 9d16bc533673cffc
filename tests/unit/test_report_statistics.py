"""What comparisons conclude on synthetic runs whose differences are known: intervals, equal cost, and no difference."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from made_runs import make_runs

from steerfm import report
from steerfm.errors import RunError
from steerfm.report import equal, estimates
from steerfm.runs import Run
from steerfm.types import Cost, Samples

TRIALS = 300


def made(
    root: Path,
    name: str,
    rewards: np.ndarray,
    *,
    prompts: list[str] | None = None,
    judge: np.ndarray | None = None,
    calls: float = 1.0,
    label: str = "",
) -> None:
    """Make a finished run of points with these rewards (prompts, seeds)."""
    rewards = np.atleast_2d(rewards)
    names = prompts or [f"prompt {i}" if len(rewards) > 1 else "" for i in range(len(rewards))]
    total = rewards.size
    held_out = {} if judge is None else {"judge": torch.from_numpy(np.asarray(judge, dtype=np.float64).ravel())}
    x = torch.zeros(total, 2)
    samples = Samples(
        x0=x,
        images=x,
        prompts=[prompt for prompt in names for _ in range(rewards.shape[1])],
        seeds=[seed for _ in names for seed in range(rewards.shape[1])],
        cost=Cost(calls, 1, 0, 0.001 * calls),
        rewards=torch.from_numpy(rewards.ravel()),
    )
    with Run.start(name, command="sample", config={"name": name}, recipe="made", label=label or name, root=root) as run:
        run.write_samples(samples, held_out=held_out)


def covered(share: float, trials: int = TRIALS) -> bool:
    """Say whether a share of intervals that hold the truth is 95%, within three standard errors."""
    return abs(share - 0.95) <= 3 * (0.95 * 0.05 / trials) ** 0.5


@pytest.mark.parametrize("size", [10, 60])
def test_intervals_hold_the_truth_as_often_as_they_say(size: int) -> None:
    draws = np.random.default_rng(size).normal(size=(TRIALS, size))
    hits = [found.covers_zero for i, x in enumerate(draws) if (found := estimates.estimate(x, seed=i))]
    assert covered(float(np.mean(hits)))


def test_samples_of_one_prompt_are_not_independent() -> None:
    """Prompts differ in difficulty: resampled one by one, their samples promise far too much of other prompts."""
    generator = np.random.default_rng(0)
    prompts = [f"{i}" for i in range(40) for _ in range(4)]
    hits = {True: 0, False: 0}
    for i in range(TRIALS):
        x = (generator.normal(size=(40, 1)) + 0.5 * generator.normal(size=(40, 4))).ravel()
        for whole in hits:
            found = estimates.estimate(x, prompts if whole else (), seed=i)
            hits[whole] += bool(found and found.covers_zero)
    assert covered(hits[True] / TRIALS)
    assert hits[False] / TRIALS < 0.85


def test_few_prompts_are_not_resampled() -> None:
    x = np.random.default_rng(0).normal(size=36)
    few = [f"{i % 9}" for i in range(36)]
    assert estimates.estimate(x, few) == estimates.estimate(x)
    assert estimates.estimate(x, [f"{i % 10}" for i in range(36)]) != estimates.estimate(x)
    holes = np.where(np.arange(36) == 3, np.nan, x)
    assert estimates.estimate(holes, [f"{i}" for i in range(36)]) == estimates.estimate(np.delete(x, 3))


def test_paired_differences_find_what_is_there_and_nothing_else(tmp_path: Path) -> None:
    """Seeds' own spread, shared by both runs, is thirty times the difference, and does not hide it."""
    generator = np.random.default_rng(1)
    base = 30 * generator.normal(size=(20, 10))
    made(tmp_path, "base", base)
    made(tmp_path, "better", base + 1 + 0.5 * generator.normal(size=base.shape))
    made(tmp_path, "other", base + 0.5 * generator.normal(size=base.shape))
    better, other = report.compare(["base", "better", "other"], root=tmp_path).pairs
    assert not better.within_noise and better.difference.mean == pytest.approx(1, abs=3 * 0.5 / 200**0.5)
    assert other.within_noise
    assert better.difference.low is not None and better.difference.high is not None
    assert better.difference.high - better.difference.low == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.4)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_best_of_n_is_the_mean_over_all_choices(n: int) -> None:
    generator = np.random.default_rng(n)
    rewards, values = generator.normal(size=(2, 5))
    choices = [max(chosen, key=lambda i: rewards[i]) for chosen in itertools.combinations(range(5), n)]
    assert equal.best_of(n, rewards, values) == pytest.approx(np.mean(values[choices]))
    assert equal.best_of(n, rewards, rewards) == pytest.approx(np.mean(rewards[choices]))


@pytest.mark.parametrize("prompts", [1, 12])
def test_at_equal_cost_the_best_of_the_base_is_what_best_of_n_gives(tmp_path: Path, prompts: int) -> None:
    generator = np.random.default_rng(prompts)
    base, pool = generator.normal(size=(prompts, 200)), generator.normal(size=(prompts, 100, 8))
    made(tmp_path, "base", base, judge=base + generator.normal(size=base.shape))
    best = np.take_along_axis(pool, pool.argmax(-1, keepdims=True), -1)[..., 0]
    made(tmp_path, "best", best, judge=best + generator.normal(size=best.shape), calls=8)
    made(tmp_path, "cheap", best, judge=best + generator.normal(size=best.shape), calls=1.9)
    made(tmp_path, "dear", best, judge=best, calls=64)
    found = {each.label: each for each in report.compare(["base", "best", "cheap", "dear"], root=tmp_path).equal_cost}
    assert set(found) == {"best", "dear"}, "a run that costs less than twice the first has no best of n to beat"
    assert found["best"].n == 8
    for each in found["best"].differences.values():
        assert each.low is not None and each.high is not None
        assert abs(each.mean) < 3 / 1.96 * (each.high - each.low) / 2, "no difference beyond three standard errors"
    dear = found["dear"].differences
    assert found["dear"].n == 64 and dear["reward"].mean < -0.7  # 1.42 for eight, about 2.35 for 64
    if prompts > 1:
        assert not dear["reward"].covers_zero and not dear["held_out.judge"].covers_zero
    else:
        assert dear["reward"].low is None, "200 samples say little of how far the best of 64 may be off"


def test_intervals_of_the_best_of_n_hold_the_truth() -> None:
    hits = 0
    for i in range(TRIALS):
        generator = np.random.default_rng(i)
        first, other = generator.normal(size=100), generator.normal(size=(60, 8)).max(1)
        hits += equal._difference([(first, first, other)], 8).covers_zero
    assert 0.89 < hits / TRIALS < 0.98, "the jackknife of an extreme is a little short at ten samples for each of n"


def test_the_jackknife_leaves_each_sample_out_in_turn() -> None:
    rewards, values = np.random.default_rng(0).normal(size=(2, 9))
    kept = [np.arange(9) != i for i in range(9)]
    left = np.array([equal.best_of(3, rewards[keep], values[keep]) for keep in kept])
    assert equal.jackknife(3, rewards, values) == pytest.approx(8 / 9 * np.square(left - left.mean()).sum())


def test_of_equal_rewards_none_is_preferred() -> None:
    rewards, values = np.array([0.0, 1.0, 1.0, 1.0]), np.array([9.0, 1.0, 2.0, 6.0])
    assert equal.best_of(4, rewards, values) == pytest.approx(3)
    assert equal.best_of(2, rewards, values) == equal.best_of(2, rewards, values[[0, 3, 1, 2]])
    assert equal.best_of(3, np.ones(5), np.arange(5.0)) == pytest.approx(2)


def test_a_value_that_is_missing_is_left_out_at_equal_cost(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    base, judge = generator.normal(size=(2, 1, 200))
    judge[0, 3] = np.nan
    made(tmp_path, "base", base, judge=judge)
    made(tmp_path, "dear", base + 1, judge=judge, calls=2.9)
    made(tmp_path, "blind", np.full((1, 4), np.nan), calls=4)
    (found,) = report.compare(["base", "dear", "blind"], root=tmp_path).equal_cost
    assert set(found.differences) == {"reward", "held_out.judge"} and found.n == 2 and not found.is_equal
    assert (
        "Against the best of 2 samples of base, at 2 of its 2.9 times: reward"
        in report.conclusions(report.compare(["base", "dear"], root=tmp_path))[0]
    )


def test_who_leads_is_said_with_care(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    base = generator.normal(size=(1, 40))
    made(tmp_path, "base", base, judge=base)
    made(tmp_path, "lucky", np.ones((1, 1)), judge=np.full((1, 1), 9.0))
    made(tmp_path, "more", np.concatenate([base, base + 9], 1), judge=np.concatenate([base - 0.2, base + 9], 1))
    said = report.conclusions(report.compare(["base", "lucky", "more"], root=tmp_path))
    leader = next(text for text in said if text.startswith("Highest"))
    assert leader == "Highest judge, held out: more, though not on the 40 (prompt, seed) pairs in common with base."


def test_labels_written_from_the_right_leave_figures_in_order(tmp_path: Path) -> None:
    made(tmp_path, "base", np.arange(9.0))
    made(tmp_path, "other", np.arange(9.0) + 1, label="טוב")
    said = report.conclusions(report.compare(["base", "other"], root=tmp_path))
    assert said[0].startswith("\u2068טוב\u2069 against base: reward +1")


def test_what_cannot_be_told_at_equal_cost_is_said(tmp_path: Path) -> None:
    made(tmp_path, "base", np.zeros((2, 4)))
    made(tmp_path, "dear", np.ones((2, 4)), calls=16)
    comparison = report.compare(["base", "dear"], root=tmp_path)
    assert comparison.equal_cost[0].note == "needs 16 samples for each prompt, base has 4"
    assert any("would give cannot be told: needs 16 samples" in said for said in report.conclusions(comparison))
    assert report.compare(["base", "dear"], root=tmp_path, x="reward_calls").equal_cost == ()


def test_conclusions_say_what_was_gained_hacked_and_within_noise(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    base = generator.normal(size=(20, 10))

    def near(x: np.ndarray) -> np.ndarray:
        return x + 0.1 * generator.normal(size=x.shape)

    made(tmp_path, "base", base, judge=near(base))
    made(tmp_path, "same", near(base), judge=near(base), calls=3)
    made(tmp_path, "good", near(base) + 1, judge=near(base) + 1)
    made(tmp_path, "greedy", near(base) + 2, judge=near(base) + 0.5)
    made(tmp_path, "broken", near(base) + 3, judge=near(base) - 1)
    said = report.conclusions(report.compare(["base", "same", "good", "greedy", "broken"], root=tmp_path))
    text = "\n".join(said)
    assert said[0].startswith("same against base: reward ") and said[0].partition(". ")[0].count("(within noise)") == 2
    assert "at 3 times the network calls" in said[0]
    assert ". Against the best of 3 samples of base, at equal network calls: reward -" in said[0]
    assert "good against base: reward +1.0" in text and "at the same network calls" in text
    assert "Its reward rises while judge, held out, falls: it is hacked." in next(s for s in said if "broken ag" in s)
    assert re.search(r"Highest judge, held out: good, \+0\.(48|49|50|51)\d* ± 0\.0\d+ above greedy", text)
    assert "greedy hacks its reward, held against good: reward +" in text
    assert "good hacks" not in text and "same hacks" not in text


def test_many_runs_are_told_in_few_sentences(tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    base = generator.normal(size=(10, 8))
    for i in range(14):
        noisy = base + 0.1 * generator.normal(size=base.shape)
        made(tmp_path, f"run {i}", noisy + 0.5 * i, judge=noisy - 0.5 * i)
    said = report.conclusions(report.compare([f"run {i}" for i in range(14)], root=tmp_path))
    assert len(said) == 2 and said[0].startswith("Highest judge, held out: run 0, +0.5")
    assert said[1].endswith(" and 8 more hack the reward, held against run 0.")


def test_samples_that_are_alike_are_named(tmp_path: Path) -> None:
    make_runs(tmp_path)
    said = report.conclusions(report.compare(["base", "best-of-16", "fine-tuned--T---0-01"], root=tmp_path))
    alike = [text for text in said if "as diverse as" in text]
    assert (
        len(alike) == 1
        and alike[0].startswith("fine-tuned, T = 0.01")
        and "25% as diverse as the real data" in alike[0]
    )


def test_runs_that_lead_together_are_named_together(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    base = generator.normal(size=(20, 10))
    for name in ("base", "one", "two"):
        shift = 0 if name == "base" else 1
        made(tmp_path, name, base, judge=base + shift + 0.1 * generator.normal(size=base.shape))
    said = report.conclusions(report.compare(["base", "one", "two"], root=tmp_path))
    assert "whose difference is within noise" in said[-1] and "one" in said[-1] and "two" in said[-1]


def test_a_sweep_s_folder_and_patterns_name_their_runs(tmp_path: Path) -> None:
    for n in (16, 2):
        made(tmp_path, f"sweep/n-{n}", np.ones((1, 3)))
    made(tmp_path, "base", np.ones((1, 3)))
    (tmp_path / "empty").mkdir()
    assert report.expand(["base", "sweep"], tmp_path) == ["base", "sweep/n-2", "sweep/n-16"]
    assert report.expand([tmp_path / "sweep", "sweep/n-16"], tmp_path) == ["sweep/n-2", "sweep/n-16"]
    assert report.expand("b*", tmp_path) == ["base"]
    assert [row.label for row in report.compare(["base", "sweep"], root=tmp_path).rows] == [
        "base",
        "sweep/n-2",
        "sweep/n-16",
    ]
    for wrong in ("empty", "c*"):
        with pytest.raises(RunError, match=r"No run with samples in .*name runs, a folder of runs, or a pattern"):
            report.expand([wrong], tmp_path)
    with pytest.raises(RunError, match=r"did you mean 'base'"):
        report.compare(["bass"], root=tmp_path)
