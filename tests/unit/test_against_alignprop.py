"""The comparison with AlignProp: what it makes of figures and pictures, without TRL and without training."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from steerfm import zoo
from steerfm.data import Shapes
from steerfm.errors import ConfigError, RewardError
from steerfm.images import to_unit
from steerfm.rewards.clip import CLIPScore

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def against() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("against_alignprop")


def mark(against: ModuleType, steps: int, seconds: float, rewards: list[float]) -> object:
    return against.Mark(steps, seconds, torch.tensor(rewards), torch.ones(len(rewards)))


def test_what_reward_costs_is_compared_at_equal_steps_and_at_the_end(against: ModuleType) -> None:
    theirs = [mark(against, 0, 0.0, [0.5, 0.5]), mark(against, 4, 40.0, [0.7, 0.5])]  # 0.1 for 40 s
    ours = [
        mark(against, 0, 0.0, [0.4, 0.4]),
        mark(against, 4, 2.0, [0.5, 0.4]),  # 0.05 for 2 s
        mark(against, 80, 40.0, [0.6, 0.6]),  # 0.2 for 40 s
    ]
    table = against.compared(theirs, ours, (20_000_000, 10_000_000))
    cells = [list(column.cells) for column in table.columns]
    assert cells[1:] == [["4.00", "2.00"] * 2, ["0.40", "2.00", "2.00", "0.50"], ["10.00", "1.00", "2.00", "4.00"]]
    lost = [*ours[:2], mark(against, 80, 40.0, [0.3, 0.3])]
    column = list(against.compared(theirs, lost, (1, 1)).columns[3].cells)
    assert column[2:] == ["", ""]  # no ratio to what gained nothing


def test_marks_are_judged_here_and_rewards_seen_otherwise_are_refused(against: ModuleType, tmp_path: Path) -> None:
    reward = CLIPScore(str(zoo.folder("shapes32_clip", zoo.CLIPS)))
    scenes = Shapes(4, 32, count=1).batch(0)
    images, prompts = to_unit(scenes["x0"]), scenes["prompt"]

    def kept(step: int, pictures: Tensor, rewards: Tensor) -> None:
        save_file({"images": pictures.contiguous(), "rewards": rewards}, tmp_path / f"{step}.safetensors")

    with torch.no_grad():
        kept(10, images, reward.score(images, prompts))
        kept(2, images.flip(0), reward.score(images.flip(0), prompts))
    first, last = against.judged(tmp_path, {"seconds": [1.0] * 12}, reward, prompts)
    assert (first.steps, last.steps, first.seconds, last.seconds) == (2, 10, 2.0, 10.0)
    assert last.followed.tolist() == [1] * 4
    assert first.followed.sum() < 4
    kept(10, images, last.rewards + 2 * against.CLOSE)
    with pytest.raises(RewardError, match=r"10\.safetensors has rewards that differ by 2\.0e-04"):
        against.judged(tmp_path, {"seconds": [1.0] * 12}, reward, prompts)


def test_an_environment_that_cannot_be_made_is_one_sentence(
    against: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)  # which needs no making
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match=r"could not be completed \(.+\): run this where pip reaches a package index"):
        against.python_of(tmp_path)
