"""Pretrained maps of every family looked ahead with, steered and fine-tuned toward a real reward class."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import save_open_clip
from trainers import trainer

from steerfm import (
    BestOfN,
    DirectBackprop,
    FlowMapTilting,
    LookAheadGuidance,
    Prompts,
    RewardFineTuning,
    Unsteered,
)
from steerfm.backbones import LoRA
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.rewards.clip import CLIPScore
from steerfm.steering.common import Budget, Watch

tiny: Any = pytest.importorskip("tiny_pipelines")

PROMPTS = ["a red circle", "the blue square"]
SEEDS = [3, 11]
FAMILIES = ["sd3", "flux-dev", "flux-schnell", "sana", "sana-sprint", "lcm", "sd-turbo", "sdxl-turbo", "sd-v", "pixart"]
PARTIAL = ["sana-sprint", "lcm", "sd-turbo", "sdxl-turbo"]

every_family = pytest.mark.parametrize("name", FAMILIES)
every_partial = pytest.mark.parametrize("name", PARTIAL)


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> CLIPScore:
    return CLIPScore(f"local-dir:{save_open_clip(tmp_path_factory.mktemp('clip'))}")


def loaded(loader: Any, name: str, **options: Any) -> FlowMap:
    return loader.map(name, **({"size": 16} if name.startswith("flux") else {}), **options)  # its own is 1024


def jumps_of(flow_map: FlowMap) -> int:
    return 1 if flow_map.partial else 2


@every_family
def test_steering_finds_more_reward(loader: Any, reward: CLIPScore, name: str):
    flow_map = loaded(loader, name)
    jumps, given = jumps_of(flow_map), {"prompts": PROMPTS, "seeds": SEEDS}
    plain = Unsteered("jumps", jumps)(flow_map, reward, **given)
    best = BestOfN(3, jumps)(flow_map, reward, **given)
    assert (best.rewards > plain.rewards - 1e-5).all()  # type: ignore[operator]
    assert best.rewards.mean() > plain.rewards.mean() + 1e-4  # type: ignore[union-attr]
    pushed = LookAheadGuidance(jumps, temperature=0.005, gradient="normalised")(flow_map, reward, **given)
    assert (pushed.rewards > plain.rewards + 0.02).all()  # type: ignore[operator]
    assert pushed.cost.reward_gradients == jumps
    tilted = FlowMapTilting(3, jumps, temperature=0.1)(flow_map, reward, **given)
    assert tilted.log_weights.exp().sum(1).tolist() == pytest.approx([1, 1])  # type: ignore[union-attr]
    assert torch.isfinite(tilted.rewards).all() and torch.isfinite(tilted.log_evidence).all()  # type: ignore[arg-type]
    assert tilted.particles.shape == (2, 3, *flow_map.data_shape)  # type: ignore[union-attr]


@every_family
def test_looking_ahead_leads_to_data_and_has_a_gradient(loader: Any, name: str):
    flow_map = loaded(loader, name)
    condition = flow_map.encode_prompts(PROMPTS)
    x = torch.randn(2, *flow_map.data_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pictures = flow_map.decode(flow_map.look_ahead(x, 0.6, condition))
    assert pictures.shape == (2, 3, *(2 * side for side in flow_map.data_shape[1:]))
    assert pictures.min() >= 0 and pictures.max() <= 1
    (gradient,) = torch.autograd.grad(pictures.sum(), x)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    if not flow_map.partial:  # a velocity looks ahead by one Euler step, on a straight path to the posterior mean
        mean = flow_map.denoise(x, 0.6, condition)
        assert torch.allclose(flow_map.look_ahead(x, 0.6, condition), mean, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "adapter"),
    [*((name, None) for name in FAMILIES), *((name, LoRA(2)) for name in ("sd3", "flux-dev", "sana", "lcm"))],
    ids=str,
)
def test_fine_tuning_finds_more_reward(loader: Any, reward: CLIPScore, tmp_path: Path, name: str, adapter: LoRA | None):
    flow_map = loaded(loader, name, guidance_scale=1.0)
    jumps, given = jumps_of(flow_map), {"prompts": PROMPTS, "seeds": SEEDS}
    before = Unsteered("jumps", jumps)(flow_map, reward, **given)
    tuning = RewardFineTuning(
        flow_map, reward, DirectBackprop(jumps, penalty="sample"), temperature=1e-5, held_out=[reward],
        optimizer=partial(torch.optim.Adam, lr=0.05 if adapter else 0.003), adapter=adapter,
    )  # fmt: skip
    frozen = [name for name, parameter in tuning.flow_map.named_parameters() if not parameter.requires_grad]
    assert bool(frozen) == (adapter is not None)
    trainer(tmp_path, 10).fit(tuning, Prompts(PROMPTS, prompts_per_step=4))
    after = Unsteered("jumps", jumps)(tuning.flow_map.eval(), reward, **given)
    assert after.rewards.mean() > before.rewards.mean() + 0.003  # type: ignore[union-attr]
    assert torch.equal(Unsteered("jumps", jumps)(tuning.reference.eval(), reward, **given).x0, before.x0)


@every_partial
def test_a_partial_map_says_how_it_is_sampled(loader: Any, reward: CLIPScore, name: str):
    flow_map = loaded(loader, name)
    for method, asked in ((LookAheadGuidance(2), 0.5), (FlowMapTilting(2, 2), 1)):
        with pytest.raises(ConfigError, match=rf"one to t = {asked} was asked.*renoised.*kind='velocity'"):
            method(flow_map, reward, prompts=PROMPTS, seeds=SEEDS)
    with pytest.raises(ConfigError, match="renoised"):
        Unsteered("euler", 2)(flow_map, prompts=PROMPTS, seeds=SEEDS)
    samples = Unsteered("renoised", 2)(flow_map, reward, prompts=PROMPTS, seeds=SEEDS)
    assert samples.cost.network_calls == 2
    best = BestOfN(3, jumps=2)(flow_map, reward, prompts=PROMPTS, seeds=SEEDS)
    assert torch.allclose(best.particles[:, 0], samples.x0, atol=1e-4)  # type: ignore[index]
    assert best.rewards.mean() > samples.rewards.mean() and best.cost.network_calls == 6  # type: ignore[union-attr]
    alone = BestOfN(3, jumps=2)(
        flow_map, reward, prompts=PROMPTS[1:], seeds=SEEDS[1:], watch=Watch(Budget(network_calls=1000))
    )
    assert torch.allclose(alone.x0, best.x0[1:], atol=1e-4)  # one candidate after the other, and in another batch


@pytest.mark.parametrize("name", ["sd3", "sd-v"])
def test_methods_that_move_the_velocity_do_not_straighten_it(loader: Any, reward: CLIPScore, tmp_path: Path, name: str):
    """A velocity has no jumps apart from it, which a rule of consistency could bring after."""
    flow_map = loaded(loader, name, guidance_scale=1.0)
    tuning = RewardFineTuning(
        flow_map, reward, DirectBackprop(2), temperature=1.0, optimizer=partial(torch.optim.Adam, lr=1e-3)
    )
    assert tuning.consistency is None
    before = flow_map.network.model.state_dict()["proj_out.weight" if name == "sd3" else "conv_out.weight"].clone()  # type: ignore[union-attr,operator]
    trainer(tmp_path, 2).fit(tuning, Prompts(PROMPTS, prompts_per_step=2))
    after = tuning.flow_map.network.model.state_dict()["proj_out.weight" if name == "sd3" else "conv_out.weight"]  # type: ignore[union-attr,operator]
    assert torch.isfinite(after).all() and not torch.equal(after, before)


@every_partial
def test_a_partial_map_taken_for_a_posterior_mean_is_steered_in_many_steps(loader: Any, reward: CLIPScore, name: str):
    flow_map = loaded(loader, name, kind="velocity", guidance_scale=1.0)
    pushed = LookAheadGuidance(3, temperature=0.01, gradient="normalised", noise="gentle")(
        flow_map, reward, prompts=PROMPTS, seeds=SEEDS
    )
    plain = Unsteered("euler", 3)(flow_map, reward, prompts=PROMPTS, seeds=SEEDS)
    assert (pushed.rewards > plain.rewards).all()  # type: ignore[operator]
