"""Data modules: a batch is a function of (seed, step) alone, each epoch sees every sample once, processes share it."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainers import trainer

from steerfm import Digits, Points, Prompts, PromptSeeds, digits
from steerfm.data import batches
from steerfm.data.batches import StepDataModule, epoch_indices, own_rows
from steerfm.data.digits import digit_picture, digit_scans
from steerfm.data.points import KINDS, point_cloud
from steerfm.data.prompts import read_prompts
from steerfm.errors import ConfigError, DataError


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    """Let the data modules believe that they run in process `rank` of `count`."""
    monkeypatch.setattr(batches, "world", lambda: (rank, count))
    monkeypatch.setattr("steerfm.distributed.world", lambda: (rank, count))


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (7, 7), (5, 12), (1, 3), (1797, 128)])
def test_every_epoch_holds_every_index_once(size: int, batch_size: int) -> None:
    epochs = 3
    steps = math.ceil(epochs * size / batch_size)
    stream = torch.cat([epoch_indices(size, step, batch_size, seed=5) for step in range(steps)])
    orders = stream[: epochs * size].reshape(epochs, size)
    assert all(sorted(order.tolist()) == list(range(size)) for order in orders)
    if size > 5:
        assert not torch.equal(orders[0], orders[1])
        assert not torch.equal(epoch_indices(size, 0, size, seed=5), epoch_indices(size, 0, size, seed=6))


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: Digits(12, seed=seed),
        lambda seed: Points("moons", 12, seed=seed),
        lambda seed: Prompts(["a", "b", "c", "d", "e"], 12, seed=seed),
    ],
    ids=["digits", "points", "prompts"],
)
def test_batches_depend_on_seed_and_step_and_are_divided(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(batch: dict[str, Any]) -> list[Any]:
        x0 = batch["x0"].flatten(1).tolist() if "x0" in batch else [()] * len(batch["prompt"])
        return list(zip(x0, batch["prompt"], strict=True))

    whole = [flat(make(3).batch(step)) for step in range(3)]
    assert whole == [flat(make(3).batch(step)) for step in range(3)]
    assert whole[0] != whole[1]
    for seed in (4, 3 + 2**12, 3 + 2**32):  # torch's own seeding forgets all but 32 bits
        assert whole != [flat(make(seed).batch(step)) for step in range(3)]
    shares = []
    for rank in range(3):
        pretend(monkeypatch, rank, 3)
        shares.append(flat(make(3).batch(1)))
    assert [row for rows in zip(*shares, strict=True) for row in rows] == whole[1]


def test_uneven_division_names_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 1, 3)
    with pytest.raises(ConfigError, match=r"batch_size .* divisible by their number: got 16 for 3"):
        Digits(16).batch(0)
    with pytest.raises(ConfigError, match=r"prompts_per_step .* got 8 for 3"):
        Prompts(["a"], 8).batch(0)
    assert list(range(6)[own_rows(6)]) == [1, 4]


def test_loader_begins_where_the_trainer_stands(tmp_path: Path) -> None:
    data = Points("ring", 4, validation_size=3)
    with pytest.raises(ConfigError, match=r"set trainer\.max_steps, for example 1000"):
        data.train_dataloader()
    data.trainer = run = trainer(tmp_path, 3, accumulate_grad_batches=2)
    assert [len(batch["x0"]) for batch in data.train_dataloader()] == [4] * 6
    run.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = 2
    run.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 2
    assert run.global_step in (2, 4)
    left = list(data.train_dataloader())
    expected = [data.batch(step)["x0"] for step in range(2 * run.global_step, 6)]
    assert all(torch.equal(batch["x0"], x0) for batch, x0 in zip(left, expected, strict=True))


def test_validation_is_one_fixed_batch_apart_from_training() -> None:
    points = Points("moons", 16, validation_size=16)
    (first,), (second,) = list(points.val_dataloader()), list(points.val_dataloader())
    assert torch.equal(first["x0"], second["x0"])
    assert not torch.equal(first["x0"], points.batch(0)["x0"])
    assert Points("moons", 16, validation_size=0).val_dataloader() == []
    assert Digits(16, validation_size=0).val_dataloader() == []
    (held,) = list(Digits(16, validation_size=5).val_dataloader())
    assert held["x0"].shape == (5, 1, 8, 8)
    with pytest.raises(NotImplementedError):
        StepDataModule().batch(0)


def modes(points: Tensor) -> Tensor:
    centres = torch.tensor([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]])
    return torch.cdist(points, centres).argmin(1)


def test_points_lie_where_their_kind_says() -> None:
    n = 20_000  # shares of squares and modes are within four standard errors, 4 sqrt(p (1 - p) / n) <= 0.015
    clouds = {kind: point_cloud(kind, n) for kind in KINDS}
    assert all(cloud.shape == (n, 2) for cloud in clouds.values())

    board = clouds["checkerboard"]
    column, row = ((board + 1) * 2).floor().long().unbind(1)
    assert board.abs().max() <= 1
    assert ((column + row) % 2 == 0).all()
    squares = Counter(zip(column.tolist(), row.tolist(), strict=True))
    assert len(squares) == 8
    assert all(abs(count / n - 1 / 8) < 0.01 for count in squares.values())

    radius = clouds["ring"].norm(dim=1)
    assert abs(float(radius.mean()) - 0.8) < 4 * 0.05 / n**0.5
    assert abs(float(radius.std()) - 0.05) < 0.002
    assert clouds["ring"].mean(0).abs().max() < 4 * 0.8 / (2 * n) ** 0.5

    x, y = (clouds["moons"] * 1.5 + torch.tensor([0.5, 0.25])).unbind(1)
    upper, lower = (x**2 + y**2).sqrt() - 1, ((x - 1) ** 2 + (y - 0.5) ** 2).sqrt() - 1
    assert torch.minimum(upper.abs(), lower.abs()).max() < 5 * 0.05 * 1.5  # noise 0.05 on the scaled points
    assert abs(float((upper.abs() < lower.abs()).float().mean()) - 0.5) < 0.05  # the moons cross, so not sharper

    drawn = clouds["mixture"]
    shares = torch.stack([(modes(drawn) == k).float().mean() for k in range(3)])
    assert (shares - 1 / 3).abs().max() < 0.015
    within = drawn - 3.0 * (modes(drawn)[:, None] - 1)
    assert (within.T.cov() - 0.5 * torch.eye(2)).abs().max() < 0.02
    assert torch.equal(point_cloud("ring", 5), point_cloud("ring", 5))


def test_unknown_points_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"kind 'moon'; did you mean 'moons'\? Kinds: checkerboard, moons"):
        Points("moon")
    with pytest.raises(ConfigError, match=r"kind 'spirals'\. Kinds: "):
        point_cloud("spirals")


def test_digits_are_real_scans_with_captions() -> None:
    data = Digits(64, split="reward", seed=1)
    batch = data.batch(0)
    assert batch["x0"].shape == (64, 1, 8, 8)
    assert batch["x0"].min() >= -1
    assert batch["x0"].max() <= 1
    scans = digits.load("reward")
    rows = {scan.numpy().tobytes(): caption for scan, caption in zip(scans.x0, scans.captions, strict=True)}
    assert all(
        rows[scan.numpy().tobytes()] == prompt for scan, prompt in zip(batch["x0"], batch["prompt"], strict=True)
    )
    assert set(Digits(4, captions=False).batch(0)["prompt"]) == {""}
    assert len(digit_scans()) == 1797
    assert torch.equal(2 * digit_picture(5, "judge") - 1, digit_scans(split="judge")[5])
    assert len(digit_scans(7, "reward")) + len(digit_scans(7, "judge")) == len(digit_scans(7)) == 179
    for kind in (Digits, lambda size: Points("ring", size)):
        with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
            kind(0)


def test_prompts_are_neighbours_and_come_round(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\n  a blue square \n", encoding="utf-8")
    data = Prompts(path, prompts_per_step=2, samples_per_prompt=3)
    prompts = data.batch(0)["prompt"]
    assert Counter(prompts) == {"a red circle": 3, "a blue square": 3}
    assert prompts[:3] == [prompts[0]] * 3
    assert read_prompts([""]) == [""]


@pytest.mark.parametrize("bad", ["missing.txt", "empty.txt", "binary.txt"])
def test_unreadable_prompts_are_said(bad: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"There are no prompts|cannot be read .* one a line"):
        Prompts(tmp_path / bad)
    with pytest.raises(DataError, match="There are no prompts"):
        Prompts([])
    with pytest.raises(ConfigError, match="prompts_per_step=0 and samples_per_prompt=1"):
        Prompts(["a"], prompts_per_step=0)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_every_prompt_meets_every_seed_once(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [(prompt, seed) for prompt in ("a", "b", "c") for seed in (4, 7)]
    found = []
    for rank in range(4):  # six pairs over four processes: shares differ by at most one
        pretend(monkeypatch, rank, 4)
        loader = PromptSeeds(["a", "b", "c"], seeds=[4, 7], batch_size=batch_size).predict_dataloader()
        for batch in loader:
            assert len(batch["prompt"]) <= batch_size
            found += list(zip(batch["prompt"], batch["seed"], strict=True))
    assert found == expected
    with pytest.raises(ConfigError, match="at least one seed"):
        PromptSeeds(["a"], seeds=0)
