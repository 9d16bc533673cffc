"""Classes for a map that has none: it starts as it was, learns from the reward alone, and is saved as any map."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainers import digit_map, point_map, trainer

from steerfm import DiT, FlowMap, Prompts, RewardFineTuning, Unsteered
from steerfm.digits import CAPTIONS
from steerfm.errors import ConfigError, RewardError
from steerfm.finetuning import DirectBackprop, NewClasses
from steerfm.networks.mlp import randomise
from steerfm.rewards.digit_judge import DigitJudge

NAMES = ["dark", "bright"]


def wished(images: Tensor, prompts: Any) -> Tensor:
    """Return how bright a picture is where that was wished, else how dark."""
    signs = torch.tensor([1.0 if prompt == "bright" else -1.0 for prompt in prompts])
    return signs * images.mean((1, 2, 3))


@pytest.mark.parametrize("kind", ["mlp", "dit"])
def test_at_first_every_prompt_draws_what_the_map_drew(kind: str) -> None:
    network = DiT((1, 8, 8), patch=2, width=16, depth=1, heads=2, frequencies=4)
    randomise(network, seed=2)
    base = digit_map(classes=False) if kind == "mlp" else FlowMap(network)
    told = NewClasses(NAMES)(base)
    x = torch.randn(2, 1, 8, 8)
    expected = base.jump(x, 1.0, 0.3)
    assert torch.equal(told.jump(x, 1.0, 0.3, told.encode_prompts(NAMES)), expected)
    assert not {id(p) for p in base.parameters()} & {id(p) for p in told.parameters()}


def test_the_reward_teaches_what_prompts_mean(tmp_path: Path) -> None:
    base = digit_map(classes=False)
    method = DirectBackprop(1, penalty="sample")
    tuning = RewardFineTuning(base, wished, method, 1e-6, adapter=NewClasses(NAMES), optimizer=None, monitor_every=100)
    tuning.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.02)
    trainer(tmp_path, 40).fit(tuning, Prompts(NAMES, 2, 8))
    tuned = FlowMap.load(tuning.save(tmp_path / "map"))
    dark, bright = (Unsteered("jumps", 1)(tuned, prompts=[name], seeds=range(16)).images.mean() for name in NAMES)
    assert bright > dark + 0.2


def test_maps_that_cannot_be_told_are_refused() -> None:
    with pytest.raises(ConfigError, match="The map reads its prompts by Labels already: leave the adapter out"):
        NewClasses(NAMES)(digit_map())

    class Deaf(nn.Module):
        data_shape = (2,)

    with pytest.raises(ConfigError, match="Deaf reads no classes"):
        NewClasses(NAMES)(FlowMap(Deaf()))
    assert NewClasses(NAMES)(point_map()).conditioner is not None


def test_the_judge_reads_the_digit_off_the_prompt() -> None:
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    judge = DigitJudge(None)
    every = judge.probabilities(images)
    found = judge(images, [CAPTIONS[3], "seven", "A handwritten ZERO"]).total
    assert torch.equal(found, every[torch.arange(3), [3, 7, 0]])
    with pytest.raises(RewardError, match="judges the digit that a prompt ends with, got 'a cat': set digit=7"):
        judge(images, ["seven", "a cat", "one"])
