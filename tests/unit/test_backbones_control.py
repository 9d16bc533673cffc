"""A pipeline with a ControlNet takes a picture with its prompt, as "caption @ path"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from steerfm import BestOfN, RewardFineTuning, Unsteered, zoo
from steerfm.backbones import LoRA
from steerfm.backbones.diffusers import scheduler_times
from steerfm.cli import main
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.seeds import noise

pytest.importorskip("diffusers")
tiny: Any = pytest.importorskip("tiny_pipelines")

SEEDS = [3, 11]


@pytest.fixture
def sketches(tmp_path: Path) -> list[Path]:
    """Return two pictures of the model's size."""
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"sketch_{i}.png" for i in range(2)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [("sd-control", 3, {"guidance_scale": 1.0}), ("sdxl-control", 1, {})],
)
def test_pictures_agree_with_the_pipeline_s(
    loader: Any, sketches: list[Path], name: str, steps: int, options: dict[str, Any]
) -> None:
    flow_map, pipeline = loader.map(name, **options), loader.pipeline(name)
    captions = ["a red circle", "the blue square"]
    prompts = [f"{caption} @ {path}" for caption, path in zip(captions, sketches, strict=True)]
    times = scheduler_times(flow_map, steps) if steps > 1 else 1
    sampler = "ddim" if steps > 1 else "jumps"
    ours = Unsteered(sampler, times)(flow_map, prompts=prompts, seeds=SEEDS).images
    theirs = pipeline(
        captions, image=[Image.open(path) for path in sketches], num_inference_steps=steps, guidance_scale=1.0,
        latents=noise(SEEDS, flow_map.data_shape), output_type="pt",
    ).images  # fmt: skip
    assert (ours - theirs).abs().max() < 1e-3
    free = Unsteered(sampler, times)(flow_map, prompts=captions, seeds=SEEDS).images
    assert (free - ours).abs().max() > 0.01


def test_a_caption_without_a_picture_is_not_controlled(loader: Any, sketches: list[Path]) -> None:
    flow_map, plain = loader.map("sd-control", guidance_scale=1.0), loader.map("sd-epsilon", guidance_scale=1.0)
    x = noise(SEEDS, flow_map.data_shape)
    mixed = flow_map.velocity(x, 0.5, flow_map.encode_prompts(["a red circle", f"a red circle @ {sketches[0]}"]))
    alone = plain.velocity(x, 0.5, plain.encode_prompts(["a red circle", "a red circle"]))
    torch.testing.assert_close(mixed[0], alone[0], rtol=1e-4, atol=1e-4)
    assert (mixed[1] - alone[1]).abs().max() > 0.01


def test_it_is_steered_tuned_saved_and_exported(
    loader: Any, sketches: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow_map = loader.map("sdxl-control")
    prompts = [f"a red circle @ {sketches[0]}"]

    def redness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        assert list(prompts) == ["a red circle"] * len(images)  # a reward reads the caption alone
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

    assert BestOfN(4, 1)(flow_map, redness, prompts=prompts, seeds=[0]).images.shape == (1, 3, 16, 16)
    tuned = RewardFineTuning(flow_map, redness, adapter=LoRA(2)).flow_map
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05)
    tuned.save(tmp_path / "map")
    again, x = FlowMap.load(tmp_path / "map"), noise([0], flow_map.data_shape)
    wanted = tuned.eval().look_ahead(x, 1.0, tuned.encode_prompts(prompts))
    torch.testing.assert_close(again.look_ahead(x, 1.0, again.encode_prompts(prompts)), wanted, rtol=1e-5, atol=1e-5)
    assert main(["export", str(tmp_path / "map"), str(tmp_path / "out")]) == 0
    assert "paints the same" in " ".join(capsys.readouterr().out.split())


def test_what_its_prompts_are_read_as_is_kept(loader: Any, tmp_path: Path) -> None:
    loader.map("sd-control").save(tmp_path / "map")
    found = FlowMap.from_pretrained(tmp_path / "map", text_files=tmp_path / "texts")
    found.encode_prompts(["a red circle"])
    assert len(list((tmp_path / "texts").rglob("*.safetensors"))) == 1
    with pytest.raises(ConfigError, match="leave text_files out"):
        FlowMap.from_pretrained(zoo.folder("shapes32"), text_files=tmp_path / "texts")
