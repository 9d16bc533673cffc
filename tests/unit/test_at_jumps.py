"""A map with a second time, bound to its jumps, is one that plain diffusers samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steerfm.backbones import LoRA, export_diffusers, two_times
from steerfm.backbones.export import jump_times
from steerfm.backbones.export_check import painting_gap
from steerfm.backbones.pipeline_files import PipelineFiles
from steerfm.backbones.two_times import at_jumps
from steerfm.cli import main
from steerfm.errors import CheckpointError, ConfigError
from steerfm.flow_map import FlowMap
from steerfm.sampling import few_jumps
from steerfm.seeds import noise

pytest.importorskip("diffusers")
tiny: Any = pytest.importorskip("tiny_pipelines")


def taught(flow_map: FlowMap) -> FlowMap:
    """Return a map with a second time that matters, as training leaves it."""
    told = two_times(flow_map)
    torch.manual_seed(0)
    for parameter in told.network.interval.parameters():  # type: ignore[union-attr]
        parameter.data.normal_(0, 0.5)
    return told


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "flux-schnell", "sana"])
@pytest.mark.parametrize("jumps", [1, 4])
def test_plain_diffusers_makes_the_same_jumps(loader: Any, tmp_path: Path, name: str, jumps: int) -> None:
    flow_map = taught(loader.map(name, guidance_scale=1.0))
    export_diffusers(flow_map, tmp_path, jumps)
    assert painting_gap(flow_map, tmp_path, PipelineFiles(loader.path(name)), jumps) < 1e-4


def test_it_is_the_second_time_that_is_bound(loader: Any, tmp_path: Path) -> None:
    flow_map = taught(loader.map("sd3", guidance_scale=1.0))
    x1, condition = noise([0, 1], flow_map.data_shape), flow_map.encode_prompts(["a red circle", ""])
    times = jump_times(flow_map, 4)
    wanted = few_jumps(flow_map, x1, times, condition)
    bound = at_jumps(flow_map, times)
    torch.testing.assert_close(few_jumps(bound, x1, times, condition), wanted, rtol=1e-4, atol=1e-4)
    untold = few_jumps(loader.map("sd3", guidance_scale=1.0), x1, times, condition)
    assert (untold - wanted).abs().max() > 0.1
    assert (few_jumps(bound, x1, jump_times(flow_map, 3), condition) - wanted).abs().max() > 0.01
    export_diffusers(flow_map, tmp_path, 3)
    with pytest.raises(CheckpointError, match="paints otherwise"):
        painting_gap(flow_map, tmp_path, PipelineFiles(loader.path("sd3")), 4)


def test_the_command_merges_low_rank_additions(loader: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow_map = LoRA(2)(taught(loader.map("sd3", guidance_scale=1.0, text_length=8)))
    for layer in flow_map.network.layers().values():  # type: ignore[union-attr,operator]
        layer.lora_B["default"].weight.data.normal_(0, 0.1)
    flow_map.save(tmp_path / "map")
    assert main(["export", str(tmp_path / "map"), str(tmp_path / "out"), "--jumps", "2"]) == 0
    assert "paints the same" in " ".join(capsys.readouterr().out.split())
    card = (tmp_path / "out/README.md").read_text()
    assert "sigmas=[1, 0.5], guidance_scale=1.0, max_sequence_length=8)" in card and "load_lora_weights" not in card


def test_what_cannot_be_bound_is_refused(loader: Any, tmp_path: Path) -> None:
    told = taught(loader.map("sd3", guidance_scale=1.0))
    with pytest.raises(ConfigError, match=r"--jumps 4 or jumps=4"):
        export_diffusers(told, tmp_path)
    with pytest.raises(ConfigError, match="leave jumps out"):
        export_diffusers(loader.map("sd3"), tmp_path, 4)
    with pytest.raises(ConfigError, match=r"rectified flows, got 4 for a unet with DDIMScheduler"):
        export_diffusers(taught(loader.map("sd-epsilon")), tmp_path, 4)
    with pytest.raises(ConfigError, match="take fewer"):
        at_jumps(told, [1 - i / 100 for i in range(101)])
    with pytest.raises(ConfigError, match="merge its LoRA first"):
        at_jumps(LoRA(2)(told), [1.0, 0.0])
