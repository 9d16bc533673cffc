"""A U-Net with an IP-Adapter reads the picture that a prompt names, as "caption @ path"."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_encoders import save_open_clip
from torch import Tensor
from trainers import trainer

from steerfm import BestOfN, DirectBackprop, LookAheadGuidance, Prompts, RewardFineTuning, Unsteered
from steerfm.backbones import LoRA, export_diffusers, merged
from steerfm.backbones.diffusers import scheduler_times
from steerfm.cli import main
from steerfm.errors import CheckpointError, ConfigError, SteerfmError
from steerfm.flow_map import FlowMap
from steerfm.rewards.clip import CLIPScore
from steerfm.seeds import noise
from steerfm.types import Condition

pytest.importorskip("diffusers")
tiny: Any = pytest.importorskip("tiny_pipelines")

CLOSE = 1e-3  # the largest difference of a pixel
SEEDS = [3, 11]
PROMPTS = ["a red circle", "the blue square"]
EMBEDDING, HIDDEN = 12, 16  # what the image encoder makes of a picture, and of each of its tokens


def image_encoder(projection: int = EMBEDDING) -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        patch_size=16, projection_dim=projection,
    )  # fmt: skip
    torch.manual_seed(20)
    return tiny.lively(transformers.CLIPVisionModelWithProjection(config))


def plain(width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what reads a picture's embedding as four tokens, as ip-adapter_sd15.safetensors names it."""
    projection: dict[str, tuple[int, ...]] = {"proj.weight": (4 * width, EMBEDDING), "proj.bias": (4 * width,)}
    return projection | {"norm.weight": (width,), "norm.bias": (width,)}


def plus(width: int, inner: int = 64, tokens: int = 3) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what reads the encoder's tokens, as ip-adapter-plus_sd15.safetensors names it."""
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, tokens, inner), "proj_in.weight": (inner, HIDDEN), "proj_in.bias": (inner,),
        "proj_out.weight": (width, inner), "proj_out.bias": (width,), "norm_out.weight": (width,),
        "norm_out.bias": (width,),
    }  # fmt: skip
    for layer in (f"layers.{i}" for i in range(4)):
        shapes |= {f"{layer}.0.to_q.weight": (inner, inner), f"{layer}.0.to_kv.weight": (2 * inner, inner)}
        shapes |= {f"{layer}.0.to_out.weight": (inner, inner), f"{layer}.1.1.weight": (4 * inner, inner)}
        shapes |= {f"{layer}.1.3.weight": (inner, 4 * inner)}
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"{layer}.{norm}.weight": (inner,), f"{layer}.{norm}.bias": (inner,)}
    return shapes


def full(width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what reads each token by itself, as ip-adapter-full-face_sd15.safetensors names it."""
    shapes: dict[str, tuple[int, ...]] = {"proj.0.weight": (HIDDEN, HIDDEN), "proj.0.bias": (HIDDEN,)}
    shapes |= {"proj.2.weight": (width, HIDDEN), "proj.2.bias": (width,)}
    return shapes | {"proj.3.weight": (width,), "proj.3.bias": (width,)}


def save_adapter(path: Path, projection: dict[str, tuple[int, ...]], width: int, seed: int = 21) -> Path:
    """Write an IP-Adapter of random weights for the tiny U-Nets, which have four cross-attentions of 16 channels."""
    generator = torch.Generator().manual_seed(seed)
    keys = [f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight" for i in range(4) for part in "kv"]
    shapes = {f"image_proj.{name}": shape for name, shape in projection.items()} | dict.fromkeys(keys, (16, width))
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    for name in tensors:
        if name.endswith("weight") and tensors[name].ndim == 1:
            tensors[name] = torch.ones_like(tensors[name])
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return IP-Adapters in the published layout: of SD and SDXL, and two that read tokens."""
    folder = tmp_path_factory.mktemp("adapters")
    image_encoder().save_pretrained(folder / "models" / "image_encoder")
    made = {"sd": (plain(16), 16), "sdxl": (plain(32), 32), "plus": (plus(16), 16), "full": (full(16), 16)}
    return {name: save_adapter(folder / "models" / f"{name}.safetensors", *made[name]) for name in made}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two pictures, neither square nor of the encoder's size."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"picture {i}.png" for i in range(2)]
    for path in paths:
        coarse = generator.integers(0, 256, (3, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC).save(path)
    return paths


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> CLIPScore:
    return CLIPScore(f"local-dir:{save_open_clip(tmp_path_factory.mktemp('clip'))}")


def theirs(
    pipeline: Any, flow_map: FlowMap, adapter: Path, scale: float, pictures: list[Path], **options: Any
) -> Tensor:
    """Return what diffusers' own pipeline paints of PROMPTS and pictures, one by one."""
    pipeline.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name)
    pipeline.set_ip_adapter_scale(scale)
    x1 = noise(SEEDS, flow_map.data_shape)
    made = [
        pipeline(
            PROMPTS[i], ip_adapter_image=Image.open(pictures[i]), latents=x1[i : i + 1], output_type="pt", **options
        ).images
        for i in range(2)
    ]  # fmt: skip
    return torch.cat(made)


@pytest.mark.parametrize(
    ("name", "adapter", "steps", "scale", "options"),
    [
        ("sd-epsilon", "sd", 3, 1.0, {"guidance_scale": 1.0}),
        ("sd-epsilon", "sd", 3, 0.6, {"guidance_scale": 5.0, "negative_prompt": "blurred"}),
        ("sd-epsilon", "plus", 3, 1.0, {"guidance_scale": 5.0}),
        ("sd-epsilon", "full", 2, 1.0, {"guidance_scale": 5.0}),
        ("sdxl-turbo", "sdxl", 1, 0.6, {"guidance_scale": 1.0}),
        ("sdxl-turbo", "sdxl", 1, 1.0, {"guidance_scale": 4.0}),
        ("lcm", "sd", 1, 1.0, {"guidance_scale": 8.5}),
    ],
    ids=str,
)
def test_pictures_agree_with_the_pipeline_s(
    loader: Any, adapters: Any, pictures: Any, name: str, adapter: str, steps: int, scale: float, options: Any
) -> None:
    flow_map = loader.map(name, ip_adapter=adapters[adapter], ip_adapter_scale=scale, **options)
    prompts = [f"{caption} @ {path}" for caption, path in zip(PROMPTS, pictures, strict=True)]
    sampler, times = ("ddim", scheduler_times(flow_map, steps)) if steps > 1 else ("jumps", 1)
    ours = Unsteered(sampler, times)(flow_map, prompts=prompts, seeds=SEEDS).images
    expected = theirs(
        loader.pipeline(name), flow_map, adapters[adapter], scale, pictures, num_inference_steps=steps, **options
    )
    assert (ours - expected).abs().max() < CLOSE
    swapped = [f"{caption} @ {path}" for caption, path in zip(PROMPTS, reversed(pictures), strict=True)]
    other = Unsteered(sampler, times)(flow_map, prompts=swapped, seeds=SEEDS).images
    assert (other - ours).abs().amax((1, 2, 3)).min() > 10 * CLOSE


def test_no_picture_is_what_diffusers_takes_for_none(loader: Any, adapters: Any, pictures: Any) -> None:
    for adapter, shape in (("sd", (2, EMBEDDING)), ("plus", (2, 5, HIDDEN))):  # four patches and the class
        flow_map = loader.map("sd-epsilon", ip_adapter=adapters[adapter], guidance_scale=1.0)
        found = flow_map.encode_prompts(["a red circle", f"a red circle @ {pictures[0]}"])["image_embedding"]
        none = flow_map.conditioner.null(2)["image_embedding"]
        assert found.shape == shape and (found[1] != found[0]).any()
        assert torch.equal(none, found[:1].expand(shape))
        assert (adapter == "sd") == (not none.any())


def test_a_strength_of_zero_is_no_adapter(loader: Any, adapters: Any, pictures: Any) -> None:
    without = loader.map("sd-epsilon", guidance_scale=1.0)
    off = loader.map("sd-epsilon", guidance_scale=1.0, ip_adapter=adapters["sd"], ip_adapter_scale=0.0)
    x, prompts = noise(SEEDS, without.data_shape), [f"a red circle @ {path}" for path in pictures]
    alone = without.velocity(x, 0.5, without.encode_prompts(["a red circle"] * 2))
    assert torch.equal(off.velocity(x, 0.5, off.encode_prompts(prompts)), alone)


def test_it_is_steered_and_tuned(loader: Any, adapters: Any, pictures: Any, reward: CLIPScore, tmp_path: Path) -> None:
    flow_map = loader.map("sd-v", ip_adapter=adapters["sd"], guidance_scale=3.0)
    prompts = [f"a red circle @ {path}" for path in pictures]
    given = {"prompts": prompts, "seeds": SEEDS}
    plain = Unsteered("jumps", 2)(flow_map, reward, **given)
    best = BestOfN(8, 2)(flow_map, reward, **given)
    assert (best.rewards > plain.rewards - 1e-5).all()  # type: ignore[operator]
    assert best.rewards.mean() > plain.rewards.mean() + 1e-4  # type: ignore[union-attr]
    pushed = LookAheadGuidance(2, temperature=0.005, gradient="normalised")(flow_map, reward, **given)
    assert (pushed.rewards > plain.rewards + 0.02).all()  # type: ignore[operator]
    assert not any("_ip" in name for name, _ in flow_map.named_parameters())
    adapter = [value for each in flow_map.network._outside for value in each.module.state_dict().values()]
    before = [value.clone() for value in adapter]
    tuning = RewardFineTuning(
        flow_map, reward, DirectBackprop(2, penalty="sample"), temperature=1e-5,
        optimizer=partial(torch.optim.Adam, lr=0.05), adapter=LoRA(2),
    )  # fmt: skip
    names = [name for name, parameter in tuning.flow_map.named_parameters() if parameter.requires_grad]
    assert sum("attn2.to_k" in name for name in names) == 2 * 4 and not any("_ip" in name for name in names)
    trainer(tmp_path, 5).fit(tuning, Prompts(prompts, prompts_per_step=4))
    after = Unsteered("jumps", 2)(tuning.flow_map.eval(), reward, **given)
    assert after.rewards.mean() > plain.rewards.mean() + 0.003  # type: ignore[union-attr]
    assert all(torch.equal(value, old) for value, old in zip(adapter, before, strict=True))


def test_it_is_saved_loaded_and_exported(
    loader: Any, adapters: Any, pictures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "models" / "sd.safetensors"
    shutil.copytree(adapters["sd"].parent, file.parent)
    tuned = LoRA(2)(loader.map("sd-epsilon", ip_adapter=file, ip_adapter_scale=0.7))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05)
    folder = tuned.save(tmp_path / "map")
    assert sum(tensor.numel() for tensor in load_file(folder / "flow_map.safetensors").values()) < 20_000
    prompts, x = [f"a red circle @ {pictures[0]}"], noise([0], tuned.data_shape)
    wanted = tuned.eval().look_ahead(x, 1.0, tuned.encode_prompts(prompts))
    for again in (FlowMap.load(folder), FlowMap.from_pretrained(folder)):
        found = again.look_ahead(x, 1.0, again.encode_prompts(prompts))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    assert "paints the same" in " ".join(capsys.readouterr().out.split())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'load_ip_adapter("{file.parent}", subfolder="", weight_name="{file.name}")' in card
    assert "set_ip_adapter_scale(0.7)" in card
    whole = load_file(next((export_diffusers(merged(tuned), tmp_path / "whole") / "unet").glob("*.safetensors")))
    assert len(whole) > 100 and not any("_ip" in name for name in whole)
    with pytest.raises(ConfigError, match="with its own ip_adapter_scale: leave that out"):
        FlowMap.from_pretrained(folder, ip_adapter_scale=0.0)
    save_adapter(file, plain(16), 16, seed=22)
    with pytest.raises(CheckpointError, match="not the IP-Adapter that this map was made with: restore it"):
        FlowMap.load(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no IP-Adapter .*sd.safetensors"):
        FlowMap.load(folder)


def told(flow_map: FlowMap, prompts: list[str]) -> Condition:
    condition = flow_map.encode_prompts(prompts)
    assert condition is not None
    return condition


@pytest.mark.parametrize("adapter", ["sd", "plus"])
def test_what_pictures_are_read_as_is_kept(
    loader: Any, adapters: Any, pictures: Any, tmp_path: Path, adapter: str
) -> None:
    texts, prompts = tmp_path / "texts", [f"a red circle @ {path}" for path in pictures]
    first = loader.map("sd-epsilon", ip_adapter=adapters[adapter], text_files=texts)
    wanted = told(first, prompts)
    assert len(list(texts.rglob("*.safetensors"))) == 1 + 2
    first.save(tmp_path / "map")
    again = FlowMap.from_pretrained(tmp_path / "map", text_files=texts)
    found = told(again, prompts)
    assert again.conditioner._reader.encoder is None  # type: ignore[union-attr]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted.tensors)
    shutil.copy(pictures[1], tmp_path / "one.png")
    one = told(again, [f"a red circle @ {tmp_path / 'one.png'}"])
    shutil.copy(pictures[0], tmp_path / "one.png")
    other = told(again, [f"a red circle @ {tmp_path / 'one.png'}"])
    assert torch.equal(one["image_embedding"], wanted["image_embedding"][1:])
    assert torch.equal(other["image_embedding"], wanted["image_embedding"][:1])  # by its pixels, and not by its name


def test_smaller_types_and_copies(loader: Any, adapters: Any, pictures: Any, tmp_path: Path) -> None:
    flow_map = loader.map("sd-epsilon", ip_adapter=adapters["plus"], guidance_scale=3.0, dtype="bfloat16")
    x, prompts = noise([0], flow_map.data_shape), [f"a red circle @ {pictures[0]}"]
    exact = loader.map("sd-epsilon", ip_adapter=adapters["plus"], guidance_scale=3.0)
    wanted = exact.velocity(x, 0.5, exact.encode_prompts(prompts))
    smaller = flow_map.velocity(x, 0.5, flow_map.encode_prompts(prompts))
    assert smaller.dtype == torch.float32 and (smaller - wanted).abs().max() < 0.1 * wanted.abs().max()
    exact.save(tmp_path / "map")
    opened = FlowMap.from_pretrained(tmp_path / "map", dtype="bfloat16")
    found = opened.velocity(x, 0.5, opened.encode_prompts(prompts))
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()
    copied = exact.frozen_copy()
    assert torch.equal(copied.velocity(x, 0.5, copied.encode_prompts(prompts)), wanted)
    assert all(one is other for one, other in zip(copied.network._outside, exact.network._outside, strict=True))


def rewritten(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(file)), file)


def no_safetensors(file: Path) -> dict[str, Any]:
    torch.save(load_file(file), file.with_suffix(".bin"))
    return {"ip_adapter": file.with_suffix(".bin")}


def another_encoder(file: Path) -> dict[str, Any]:
    image_encoder(projection=20).save_pretrained(file.parent / "other")
    return {"ip_adapter_encoder": file.parent / "other"}


WRONG: list[tuple[str, Callable[[Path], Any], str]] = [
    ("sd-epsilon", no_safetensors, r"sd.bin is no .safetensors, and weights are read from nothing else"),
    ("sd-epsilon", Path.unlink, r"There is no IP-Adapter .*sd.safetensors"),
    ("sd-epsilon", lambda file: file.write_bytes(file.read_bytes()[:-9]) and None, r"sd.safetensors is damaged"),
    ("sd-epsilon", lambda file: rewritten(file, lambda _: {"w": torch.zeros(2)}), r"no IP-Adapter that reads pictures"),
    (
        "sd-epsilon",
        lambda file: rewritten(file, lambda old: old | {"ip_adapter.0.to_q_lora.up.weight": torch.zeros(2)}),
        r"face-ID ones, .*, and other files are not read",
    ),
    ("sd-epsilon", lambda file: shutil.rmtree(file.parent / "image_encoder"), r"no image encoder at .*image_encoder"),
    (
        "sd-epsilon",
        lambda file: (file.parent / "image_encoder" / "model.safetensors").unlink(),
        r"image_encoder holds no .safetensors",
    ),
    ("sd-epsilon", another_encoder, r"reads 12 numbers of a picture and .*other makes 20"),
    ("sdxl-turbo", lambda file: None, r"another model \(4 layers of width 16, and the U-Net has 4 of 32\)"),
    (
        "sd-epsilon",
        lambda file: rewritten(file, lambda old: {key: old[key] for key in old if ".7." not in key}),
        r"another model \(3 layers of width 16, and the U-Net has 4 of 16\)",
    ),
    (
        "sd-epsilon",
        lambda file: rewritten(file, lambda old: old | {"ip_adapter.1.to_k_ip.weight": torch.zeros(24, 16)}),
        r"another model \(.*size mismatch for to_k_ip",
    ),
    ("pixart", lambda file: None, r"not for a PixArtSigmaPipeline: leave ip_adapter out"),
    ("sd-control", lambda file: None, r"one picture, and the ControlNet of a StableDiffusionControlNetPipeline"),
    ("sd-epsilon", lambda file: {"ip_adapter": None, "ip_adapter_scale": 0.5}, r"without its file: name that"),
]


@pytest.mark.parametrize(("name", "change", "said"), WRONG, ids=[said[:30] for _, _, said in WRONG])
def test_wrong_files_are_one_sentence(
    loader: Any, adapters: Any, tmp_path: Path, name: str, change: Callable[[Path], Any], said: str
) -> None:
    file = tmp_path / "models" / "sd.safetensors"
    shutil.copytree(adapters["sd"].parent, file.parent)
    options = change(file) or {}
    with pytest.raises(SteerfmError, match=said) as caught:
        loader.map(name, **({"ip_adapter": file} | options))
    assert "\n" not in str(caught.value)


def test_recipes_pass_it_on(loader: Any, adapters: Any, pictures: Any, workplace: Path) -> None:
    prompts = [f"a red circle @ {path}" for path in pictures]
    Path("prompts.txt").write_text("\n".join(prompts))
    asked = [
        f"map={loader.path('sd-epsilon')}", "prompts=prompts.txt", "seeds=1", "data.batch_size=2", "reward=brightness",
        f"flow_map.ip_adapter={adapters['sd']}", "flow_map.ip_adapter_scale=0.7", "flow_map.dtype=float32",
        "trainer.enable_progress_bar=false", "trainer.accelerator=cpu",
    ]  # fmt: skip
    assert main(["sample", "recipe=pretrained_sample", *asked, "method.steps=2", "name=one"]) == 0
    rows = [json.loads(line) for line in Path("runs/one/samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts


def test_a_controlnet_is_opened_in_a_smaller_type_too(loader: Any, tmp_path: Path) -> None:
    loader.map("sd-control", guidance_scale=1.0).save(tmp_path / "map")
    flow_map = FlowMap.from_pretrained(tmp_path / "map", dtype="bfloat16")
    x = noise([0], flow_map.data_shape)
    assert torch.isfinite(flow_map.velocity(x, 0.5, flow_map.encode_prompts(["a red circle"]))).all()
