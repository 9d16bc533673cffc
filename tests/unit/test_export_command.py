"""`steerfm export`: what is written is loaded by plain diffusers and compared before it is called done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from steerfm import MLP
from steerfm.backbones import LoRA, export_diffusers, two_times
from steerfm.backbones.export_check import painting_gap
from steerfm.backbones.pipeline_files import PipelineFiles
from steerfm.cli import main
from steerfm.errors import CheckpointError, ConfigError
from steerfm.flow_map import FlowMap
from steerfm.runs import Run

tiny: Any = pytest.importorskip("tiny_pipelines")


def tuned(loader: Any, name: str) -> FlowMap:
    """Return a map with LoRA that has been moved, as training moves it."""
    flow_map = LoRA(2)(loader.map(name, guidance_scale=1.0))
    generator = torch.Generator().manual_seed(0)
    for parameter in flow_map.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return flow_map


def saved(loader: Any, name: str, folder: Path) -> Path:
    """Return a fine-tuning's run folder with such a map."""
    config = {
        "module": {"temperature": 0.1, "adapter": {"_target_": "steerfm.backbones.LoRA", "rank": 2}},
        "reward": {"_target_": "steerfm.rewards.pick_score.PickScore", "weight": 1},
        "method": {"_target_": "steerfm.finetuning.DirectBackprop", "jumps": 2, "weights": {"a": 1}},
        "trainer": {"max_steps": 3},
    }
    with Run.start("tuned", command="finetune", config=config, recipe="r", root=folder) as run:
        tuned(loader, name).save(run.folder / "map")
        run.finish({"reward": 21.5, "held_out/hps": 0.27, "monitor/divergence": 3.0, "loss": 1.0})
    return run.folder


@pytest.mark.parametrize(
    ("name", "merged"), [("sd3", False), ("sd3-without-t5", True), ("lcm", False), ("sdxl-turbo", False)]
)
def test_what_is_exported_paints_the_same_in_plain_diffusers(
    loader: Any, tmp_path: Path, name: str, merged: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(loader, name, tmp_path)
    assert main(["export", str(folder / "map"), str(tmp_path / "out"), *(["--merged"] if merged else [])]) == 0
    assert "plain diffusers paints the same" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert ("pytorch_lora_weights.safetensors" in files) is not merged
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)


def test_the_card_says_what_was_done(loader: Any, tmp_path: Path) -> None:
    folder = saved(loader, "sd3", tmp_path)
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["base_model"] == loader.path("sd3")
    for said in (
        "- reward: PickScore(weight=1)", "- method: DirectBackprop(jumps=2)", "- temperature: 0.1",
        "- adapter: LoRA(rank=2)", "| reward | 21.5 |", "| held_out/hps | 0.27 |", "| monitor/divergence | 3 |",
        "pipeline.load_lora_weights(",
    ):  # fmt: skip
        assert said in card
    assert "| loss" not in card


def test_files_that_paint_otherwise_are_no_success(loader: Any, tmp_path: Path) -> None:
    flow_map = tuned(loader, "sd3")
    export_diffusers(flow_map, tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({name: 0.5 * tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="diffusers paints otherwise than the map: a pixel is off by"):
        painting_gap(flow_map, tmp_path, PipelineFiles(loader.path("sd3")))


def test_what_cannot_be_exported_is_said_in_one_sentence(
    loader: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = FlowMap(MLP((2,), width=8, depth=1)).save(tmp_path / "own")
    assert main(["export", str(own), str(tmp_path / "out")]) == 2
    assert "is no map of a pretrained pipeline" in capsys.readouterr().err
    assert main(["export", str(own), str(own)]) == 2
    assert "holds some already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"diffusers loads no LoRA into a PixArtTransformer2DModel: export .*merged"):
        export_diffusers(tuned(loader, "pixart"), tmp_path / "out")
    with pytest.raises(ConfigError, match="tells its networks one time and this map is told two"):
        export_diffusers(two_times(loader.map("sd3")), tmp_path / "out")
