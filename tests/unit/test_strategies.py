"""What the strategies refuse, and what they say of a process that is lost; tests/distributed runs them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import distributed as dist
from torch import nn
from torch.optim import SGD
from trainers import digit_map

from steerfm import Digits, FlowMapTraining, Lagrangian, PromptSeeds, SampleGrid, SteeredSampling
from steerfm.distributed import blocks
from steerfm.errors import ConfigError, RunError
from steerfm.finetuning import NoiseAdapter
from steerfm.modules.strategies import Replicated, Sharded
from steerfm.networks import Critic, DiT, UNet
from steerfm.objectives import Adversarial


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Leave no process group behind."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def trainer(folder: Path, *callbacks: Any) -> Trainer:
    return Trainer(
        max_steps=1,
        accelerator="cpu",
        devices=1,
        strategy=Sharded(),
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def training(objective: Any = None) -> FlowMapTraining:
    return FlowMapTraining(digit_map(), objective or Lagrangian(), optimizer=partial(SGD, lr=0.1))


def test_what_shares_of_weights_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"SampleGrid samples on one process.*set it to null under callbacks"):
        trainer(tmp_path, SampleGrid()).fit(training(), Digits(8))
    critic = Adversarial(Critic(digit_map().network))
    with pytest.raises(ConfigError, match=r"'companions.objective_critic.* is in none of them: use trainer=ddp"):
        trainer(tmp_path).fit(training(critic), Digits(8))
    with pytest.raises(ConfigError, match="Sampling goes with whole maps"):
        trainer(tmp_path).predict(SteeredSampling(digit_map()), PromptSeeds([""], 2))
    adapted = NoiseAdapter(digit_map().network)(digit_map())
    with pytest.raises(ConfigError, match="A noise adapter is called beside its map"):
        trainer(tmp_path).fit(FlowMapTraining(adapted), Digits(8))
    module = LightningModule()
    module.layer = nn.Linear(2, 2)
    module.training_step = module.configure_optimizers = lambda *_: None
    with pytest.raises(ConfigError, match="shares out flow maps, and LightningModule has none"):
        trainer(tmp_path).fit(module, Digits(8))
    with pytest.raises(ConfigError, match=r"timeout is in minutes and above 0, got 0"):
        Replicated(timeout=0)


def test_one_process_may_share_with_itself(tmp_path: Path) -> None:
    module = training()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer(tmp_path).fit(module, Digits(8))
    assert type(module.flow_map.network) is type(digit_map().network)
    assert all(type(p) is nn.Parameter for p in module.parameters())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    module.save(tmp_path / "map")


def test_a_lost_process_is_told_of_and_other_errors_are_not(tmp_path: Path) -> None:
    strategy, folder = Replicated(), tmp_path / "checkpoints"
    folder.mkdir()
    for step in (20, 40):
        (folder / f"step={step:08d}.ckpt").touch()
    module = training()
    module.trainer = trainer(tmp_path)
    strategy._lightning_module = module
    told = r"lost, or silent for too long, after step 0 \(.*closed by peer.*\): .* goes on from .*step=00000040\.ckpt\."
    for error in (RuntimeError("[tcp/pair.cc] Connection closed by peer [10.0.0.2]:1"), dist.DistNetworkError("peer")):
        with pytest.raises(RunError, match=told if "closed" in str(error) else "lost, or silent"):
            strategy.on_exception(error)
    for other in (RuntimeError("The size of tensor a"), torch.OutOfMemoryError("peer memory"), ValueError("timeout")):
        strategy.on_exception(other)


def test_blocks_are_the_outermost_members_of_lists() -> None:
    dit = DiT((1, 8, 8), patch=2, width=12, depth=3, heads=2)
    assert list(blocks(dit)) == list(dit.blocks)
    unet = UNet((1, 8, 8), channels=(8, 8), groups=2)
    assert list(blocks(unet)) == [*unet.down, *unet.up]
