"""The data module of shapes: a batch is a function of (seed, step), and what it holds is true."""

from __future__ import annotations

import hashlib

import pytest
import torch

from steerfm.data import batches
from steerfm.data.shapes import Shapes, shape_picture, shape_pictures, shape_prompts
from steerfm.errors import ConfigError
from steerfm.metrics.prompt_following import prompt_following
from steerfm.shape_captions import read
from steerfm.shapes import UNSEEN, is_held_out, parse


def test_batches_depend_on_seed_and_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = Shapes(12, seed=3).batch(5), Shapes(12, seed=3).batch(5), Shapes(12, seed=4).batch(5)
    assert torch.equal(first["x0"], again["x0"])
    assert first["prompt"] == again["prompt"] != other["prompt"]
    assert first["prompt"] != Shapes(12, seed=3).batch(6)["prompt"]
    assert first["x0"].shape == (12, 3, 32, 32)
    assert (first["x0"].min(), first["x0"].dtype) == (-1, torch.float32)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(batches, "world", lambda rank=rank: (rank, 2))
        shares.append(Shapes(12, seed=3).batch(5))
    for rank, share in enumerate(shares):
        assert torch.equal(share["x0"], first["x0"][rank::2])
        assert share["prompt"] == first["prompt"][rank::2]


def test_batches_never_change() -> None:
    """Maps that ship were trained on these captions and scenes."""
    batch = Shapes(64, seed=3).batch(7)
    assert hashlib.sha256("\n".join(batch["prompt"]).encode()).hexdigest()[:16] == "ec68d0fcdc4eb1bd"
    assert float(batch["x0"].double().sum()) == pytest.approx(-174663.5727, abs=0.01)


@pytest.mark.parametrize("split", ["train", "held_out", "unseen"])
def test_captions_are_true_of_their_pictures(split: str) -> None:
    batch = Shapes(300, split=split).batch(0)
    assert prompt_following((batch["x0"] + 1) / 2, batch["prompt"]).correct.mean == 1
    seen = {(item.color, item.shape) for scene in parse((batch["x0"] + 1) / 2) for item in scene}
    assert bool(seen & UNSEEN) == (split == "unseen")


def test_no_picture_of_validation_is_trained_on() -> None:
    """Single objects are of one kind in both splits: only the stream of random numbers tells them apart."""
    data = Shapes(batch_size=256, count=1, validation_size=64)
    validation = data.validation_batch()
    assert validation is not None
    assert torch.cdist(validation["x0"].flatten(1), data.batch(0)["x0"].flatten(1)).min() > 0.1


def test_counts_sizes_and_wordings() -> None:
    batch = Shapes(20, size=48, count=3, wordings=False).batch(0)
    assert batch["x0"].shape == (20, 3, 48, 48)
    assert all(len(read(prompt).objects) == 3 for prompt in batch["prompt"])
    assert not any(" that " in prompt for prompt in batch["prompt"])


def test_validation_prompts_and_pictures_are_fixed_and_held_out() -> None:
    data = Shapes(4, validation_size=6)
    (first,), (second,) = list(data.val_dataloader()), list(data.val_dataloader())
    assert torch.equal(first["x0"], second["x0"])
    assert len(first["prompt"]) == 6
    assert Shapes(4, validation_size=0).val_dataloader() == []
    assert shape_prompts(30) == shape_prompts(30) != shape_prompts(30, seed=1)
    assert torch.equal(shape_pictures(9), shape_pictures(30)[:9])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch_size": 0}, "batch_size of at least 1"),
        ({"size": 8}, "a size of 16, got 128 and 8"),
        ({"count": 4}, "1 to 3 objects, got 4"),
        ({"split": "test"}, "no split 'test'"),
    ],
)
def test_wrong_arguments_are_told_before_training(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Shapes(**given)


def test_a_scene_to_be_measured_is_held_out_and_its_own():
    pictures = [shape_picture(i, count=2) for i in (0, 1, 0)]
    assert torch.equal(pictures[0], pictures[2])
    assert not torch.equal(pictures[0], pictures[1])
    for picture in pictures:
        assert picture.shape == (3, 32, 32)
        assert 0 <= picture.min() < picture.max() <= 1
        (scene,) = parse(picture[None])
        assert len(scene) == 2
        assert is_held_out([(item.color, item.shape) for item in scene])


def test_prompts_that_differ() -> None:
    assert len(set(shape_prompts(100, 1))) < 100
    prompts = shape_prompts(100, 1, distinct=True)
    assert len(set(prompts)) == 100 and prompts == shape_prompts(100, 1, distinct=True)
    with pytest.raises(ConfigError, match="not 1000 prompts that differ"):
        shape_prompts(1000, 1, distinct=True)
