"""Kept draws: made once a prompt, scored once, taken by their weights."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from oracles import gaussian_map
from torch import Tensor
from torch.optim import SGD
from trainers import digit_map, trainer
from tuning import batch

from steerfm import Prompts, RewardFineTuning, WeightedRegression
from steerfm.errors import ConfigError
from steerfm.finetuning.pools import taken

N = 400


def test_each_draw_is_made_and_scored_once() -> None:
    scored = Counter()

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        scored.update(prompts)
        return images.flatten(1).mean(1)

    flow_map = digit_map()
    names = ["a handwritten seven", "a handwritten two"]
    memory: dict = {}
    for step in range(3):
        work = batch(flow_map, reward, prompts=names * 4, step=step, memory=memory)
        taken(work, N, 1)
    assert scored == dict.fromkeys(names, N)


def test_draws_are_taken_by_their_weights_within_their_prompt() -> None:
    """The share of each draw among 40,000 rows, against exp(r / T) over its sum: chi-square, 2 x 20 draws."""
    flow_map = gaussian_map([0.0], 1.0)

    def reward(points: Tensor, prompts: list[str]) -> Tensor:
        return points[:, 0] * torch.tensor([1.0 if prompt == "up" else -1.0 for prompt in prompts])

    work = batch(flow_map, reward, temperature=0.7, prompts=["up", "down"] * 20_000)
    x0, scores, share = taken(work, 20, 1)
    for start, sign in ((0, 1.0), (1, -1.0)):
        values, counts = x0[start::2, 0].unique(return_counts=True)
        draws = work.memory["pools"][work.prompts[start]].x0[:, 0].sort().values
        expected = 20_000 * (sign * draws.double() / 0.7).softmax(0)
        observed = torch.zeros_like(expected)
        observed[torch.searchsorted(draws, values)] = counts.double()
        common = expected > 5
        assert common.sum() > 10
        surprise = float(((observed - expected)[common] ** 2 / expected[common]).sum())
        assert surprise < 60  # 19 degrees of freedom: exceeded four times in 10^6
        weights = expected / 20_000
        assert share[start] == pytest.approx(1 / float(weights.square().sum()) / 20, rel=1e-5)
    assert torch.equal(scores.total, x0[:, 0] * torch.tensor([1.0, -1.0]).repeat(20_000))


def test_the_largest_number_takes_a_draw_that_counts() -> None:
    """A row's number just below one must not fall to the last draw, whose weight is 0 here."""
    flow_map = gaussian_map([0.0], 1.0)
    work = batch(flow_map, lambda points: -1e4 * (points[:, 0] - 0.3).abs(), 64, temperature=1.0)
    work.draws.uniform = lambda count=1: torch.full((64,), 1 - 2**-53, dtype=torch.float64)  # type: ignore[method-assign]
    _, scores, _ = taken(work, 50, 1)
    best = work.memory["pools"][""].scores.total.max()
    assert torch.equal(scores.total, best.expand(64))


def test_kept_draws_follow_from_the_seed_and_not_from_the_step() -> None:
    flow_map = gaussian_map([0.0], 1.0)

    def pool(seed: int, step: int) -> Tensor:
        work = batch(flow_map, lambda points: points[:, 0], 8, seed=seed, step=step)
        taken(work, 32, 1)
        return work.memory["pools"][""].x0

    assert torch.equal(pool(0, 0), pool(0, 9))
    assert not torch.isin(pool(0, 0), pool(1, 0)).any()


def test_the_consistency_works_at_the_draws_of_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sample of the tuned map is drawn for it, and watching the run does not change it."""
    ends = []
    for monitor_every in (1, 100):
        module = RewardFineTuning(
            digit_map(), lambda images: images.mean((1, 2, 3)), WeightedRegression(1, 1, pool=8),
            optimizer=partial(SGD, lr=0.1), monitor_every=monitor_every,
        )  # fmt: skip
        seen: list[Tensor] = []
        rule = module._inconsistency
        monkeypatch.setattr(
            module, "_inconsistency", lambda work, x0, rule=rule, seen=seen: seen.append(x0) or rule(work, x0)
        )
        trainer(tmp_path, 3).fit(module, Prompts(["a handwritten two"], 4))
        kept = module._memory["pools"]["a handwritten two"].x0.flatten(1)
        assert len(seen) == 3 and all((row == kept).all(1).any() for x0 in seen for row in x0.flatten(1))
        ends.append(torch.cat([p.detach().flatten() for p in module.flow_map.parameters()]))
    assert torch.equal(*ends)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match="pool"):
        WeightedRegression(pool=0)
