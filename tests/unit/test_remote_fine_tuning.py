"""Fine-tuning toward a reward whose server is killed midway: the last checkpoint stands, and one goes on from it."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from served import served
from torch.optim import SGD
from trainers import copied, digit_map, trainer

from steerfm import DirectBackprop, Prompts, RewardFineTuning
from steerfm.errors import RewardError
from steerfm.reward import Reward
from steerfm.rewards.remote import Remote
from steerfm.rewards.simple import Brightness
from steerfm.saving import read_checkpoint


class StopAfter(Callback):
    """Stop what is served once so many steps are taken."""

    def __init__(self, steps: int, stack: ExitStack) -> None:
        self.steps, self.stack = steps, stack

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.steps:
            self.stack.close()


def tuning(reward: Reward) -> RewardFineTuning:
    method = DirectBackprop(1, penalty="noise")
    return RewardFineTuning(digit_map(classes=False), reward, method, optimizer=partial(SGD, lr=0.1))


def kept(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1, monitor="step", mode="max")


def test_a_server_that_is_killed_costs_no_more_than_a_step(tmp_path: Path):
    here = tuning(Brightness())
    trainer(tmp_path / "here", 4).fit(here, Prompts([""], 4))

    with ExitStack() as stack:
        first = tuning(Remote(stack.enter_context(served(Brightness())), "brightness", tries=2))
        run = trainer(tmp_path, 4, kept(tmp_path / "checkpoints"), StopAfter(2, stack))
        with pytest.raises(RewardError, match=r"http://127.0.0.1:\d+/score gave no answer in 2 tries"):
            run.fit(first, Prompts([""], 4))
    (last,) = (tmp_path / "checkpoints").iterdir()
    assert last.name == "step=2.ckpt"
    names = read_checkpoint(last)["state_dict"]
    assert names.keys() == first.state_dict().keys()
    assert not any("reward" in name for name in names)

    with served(Brightness()) as address:
        resumed = tuning(Remote(address, "brightness"))
        trainer(tmp_path, 4).fit(resumed, Prompts([""], 4), ckpt_path=last, weights_only=True)
    before, after = copied(digit_map(classes=False).state_dict()), copied(resumed.flow_map.state_dict())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name, weights in here.flow_map.state_dict().items():  # the mean over samples is taken in another order
        assert torch.allclose(weights, after[name], rtol=1e-5, atol=1e-7)
