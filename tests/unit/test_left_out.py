"""What is as published is not saved: low-rank maps of pretrained models are small, and find their base again."""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from steerfm.backbones import LoRA, merged, two_times, unquantised
from steerfm.backbones.two_times import TwoTimeNetwork
from steerfm.cli import main
from steerfm.errors import CheckpointError, ConfigError
from steerfm.flow_map import FlowMap
from steerfm.modules import RewardFineTuning
from steerfm.seeds import noise

pytest.importorskip("diffusers")
tiny: Any = pytest.importorskip("tiny_pipelines")


def tuned(flow_map: FlowMap) -> FlowMap:
    """Return a map with low-rank additions that matter."""
    found = LoRA(2)(flow_map)
    torch.manual_seed(0)
    for parameter in found.network.additions():  # type: ignore[operator,union-attr]
        parameter.data.normal_(0, 0.1)
    return found


def answer(flow_map: FlowMap) -> torch.Tensor:
    x = noise([0, 1], flow_map.data_shape)
    return flow_map.jump(x, 0.8, 0.2, flow_map.encode_prompts(["a red circle", "b"])).detach()


@pytest.mark.parametrize("second_time", [False, True])
def test_low_rank_maps_are_small_and_load_as_they_were(loader: Any, tmp_path: Path, second_time: bool) -> None:
    base = loader.map("sd3", guidance_scale=1.0)
    flow_map = tuned(two_times(base) if second_time else base)
    flow_map.save(tmp_path)
    names = load_file(tmp_path / "flow_map.safetensors").keys()
    assert any("lora_A" in name for name in names) and not any("base_layer.weight" in name and "model" in name
                                                               for name in names)  # fmt: skip
    again = FlowMap.load(tmp_path)
    torch.testing.assert_close(answer(again), answer(flow_map), rtol=0, atol=0)
    again.save(tmp_path / "again")
    assert load_file(tmp_path / "again/flow_map.safetensors").keys() == names
    assert isinstance(again.network.network, TwoTimeNetwork) == second_time  # type: ignore[union-attr]


def test_weights_that_were_trained_are_saved(loader: Any, tmp_path: Path) -> None:
    trained = loader.map("sd3", guidance_scale=1.0)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    flow_map = tuned(trained)
    flow_map.save(tmp_path)
    torch.testing.assert_close(answer(FlowMap.load(tmp_path)), answer(flow_map), rtol=0, atol=0)
    halves = tuned(loader.map("sd3", guidance_scale=1.0).to(torch.float64).to(torch.float32))
    halves.network.network.model.transformer_blocks[0].ff.net[0].proj.base_layer.weight.data.mul_(2)  # type: ignore[union-attr]
    copied = copy.deepcopy(halves)
    copied.save(tmp_path / "copied")
    torch.testing.assert_close(answer(FlowMap.load(tmp_path / "copied")), answer(copied), rtol=0, atol=0)


def test_all_is_saved_of_what_takes_gradients_or_is_merged(loader: Any, tmp_path: Path) -> None:
    flow_map = loader.map("sd3", guidance_scale=1.0)
    count = len(list(flow_map.parameters()))
    flow_map.save(tmp_path / "plain")
    one = merged(tuned(flow_map))
    one.requires_grad_(False).save(tmp_path / "merged")
    for name in ("plain", "merged"):
        assert len(load_file(tmp_path / name / "flow_map.safetensors")) >= count
    torch.testing.assert_close(answer(FlowMap.load(tmp_path / "merged")), answer(one), rtol=0, atol=0)


def test_another_base_is_not_taken_for_it(loader: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(loader.path("sd3"), tmp_path / "sd3"))
    tuned(FlowMap.from_pretrained(folder, guidance_scale=1.0)).save(tmp_path / "map")
    model = FlowMap.from_pretrained(folder).network.model  # type: ignore[union-attr]
    with torch.no_grad():
        model.transformer_blocks[1].attn.to_q.weight.mul_(1.01)  # type: ignore[union-attr,index]
    model.save_pretrained(folder / "transformer")  # type: ignore[union-attr,operator]
    with pytest.raises(CheckpointError, match=r"sd3 does not hold the weights that this map was tuned from"):
        FlowMap.load(tmp_path / "map")


def test_half_precision_is_kept(loader: Any, tmp_path: Path) -> None:
    flow_map = tuned(loader.map("sd3", guidance_scale=1.0, dtype="bfloat16"))
    flow_map.save(tmp_path)
    again = FlowMap.load(tmp_path)
    assert again.network.network.model.dtype == torch.bfloat16  # type: ignore[union-attr]
    torch.testing.assert_close(answer(again), answer(flow_map), rtol=0, atol=0)


def test_weights_of_8_bits_carry_low_rank_additions(loader: Any, tmp_path: Path, caplog: Any) -> None:
    pytest.importorskip("torchao")
    whole, base = (loader.map("sd3", guidance_scale=1.0, quantised=each) for each in (None, "int8"))
    gap = (answer(base) - answer(whole)).abs().max() / answer(whole).abs().max()
    assert 1e-5 < gap < 0.05
    flow_map = tuned(base)
    answered = answer(flow_map)
    assert (answered - answer(base)).abs().max() > 0.01
    with caplog.at_level(logging.WARNING):
        flow_map.save(tmp_path)
        torch.testing.assert_close(answer(FlowMap.load(tmp_path)), answered, rtol=0, atol=0)
    x = noise([0], flow_map.data_shape)
    flow_map.velocity(x, 0.5, flow_map.encode_prompts(["a"])).square().mean().backward()
    grads = [parameter.grad for parameter in flow_map.network.additions()]  # type: ignore[operator,union-attr]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    with pytest.raises(ConfigError, match="Quantised weights cannot be trained"):
        RewardFineTuning(base, lambda images, prompts: images.mean((1, 2, 3)))
    with pytest.raises(ConfigError, match="cannot take its additions in"):
        merged(flow_map)
    full, wanted = unquantised(FlowMap.load(tmp_path)), tuned(whole)
    torch.testing.assert_close(answer(full), answer(wanted), rtol=0, atol=0)
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 0  # plain diffusers, in full precision, agrees
    with pytest.raises(ConfigError, match="quantised is 'int8' or None"):
        loader.map("sd3", quantised="int3")
