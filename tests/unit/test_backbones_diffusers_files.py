"""Pretrained maps on disk: what is read, what is refused, what is saved, and the parts around the network."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from steerfm import MLP, Unsteered
from steerfm.backbones import LoRA, load_adapter, merged, save_adapter
from steerfm.backbones.diffusers import scheduler_times
from steerfm.backbones.export import export_diffusers
from steerfm.backbones.families import packed
from steerfm.backbones.pipeline_codec import PipelineCodec
from steerfm.backbones.pipeline_files import PipelineFiles
from steerfm.errors import CheckpointError, ConfigError, SteerfmError, TrustError
from steerfm.flow_map import FlowMap
from steerfm.sampling import decoded

diffusers: Any = pytest.importorskip("diffusers")
tiny: Any = pytest.importorskip("tiny_pipelines")

PROMPTS = ["a red circle", "the blue square"]
SEEDS = [3, 11]


@pytest.fixture
def folder(loader: Any, tmp_path: Path) -> Path:
    """Return a copy of SD3's folder that a test may damage."""
    return Path(shutil.copytree(loader.path("sd3"), tmp_path / "sd3"))


def sample(flow_map: FlowMap, jumps: int = 2) -> torch.Tensor:
    return Unsteered("jumps", jumps)(flow_map, prompts=PROMPTS, seeds=SEEDS).images


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_missing_folder_is_no_pipeline(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no model_index.json: give a hub id, or a folder .*vae/"):
        FlowMap.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"'model_index.json' of org/nothing cannot be read .*save_pretrained"):
        FlowMap.from_pretrained("org/nothing")


def test_a_gated_model_says_how_it_is_had(monkeypatch: pytest.MonkeyPatch):
    class GatedRepoError(OSError):
        pass

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError("You are not allowed") from GatedRepoError("Access to model org/gated is restricted")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", refuse)
    with pytest.raises(CheckpointError, match=r"org/gated cannot be read .*accept its licence on the hub and log in"):
        FlowMap.from_pretrained("org/gated")


@pytest.mark.parametrize("part", ["vae", "text_encoder_2", "tokenizer_3", "transformer", "scheduler"])
def test_a_missing_part_is_named_before_anything_is_read(folder: Path, part: str):
    shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match=f"no folder '{part}'"):
        FlowMap.from_pretrained(folder)


def test_pickled_weights_are_not_read(folder: Path):
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save({"weight": torch.zeros(1)}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"holds no .safetensors, and weights are read from nothing else"):
        FlowMap.from_pretrained(folder)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_code_that_comes_with_a_model_is_not_run(folder: Path):
    (folder / "transformer" / "mine.py").write_text("raise SystemExit('this code ran')")
    edit(folder / "model_index.json", transformer=["mine", "Transformer"])
    with pytest.raises(TrustError, match=r"'transformer' .* is a mine.Transformer, .* never run"):
        FlowMap.from_pretrained(folder)
    edit(folder / "model_index.json", transformer=["diffusers", "utils"])
    with pytest.raises(TrustError, match=r"diffusers.utils"):
        FlowMap.from_pretrained(folder)


def test_an_unknown_pipeline_is_named_with_those_that_are_known(folder: Path):
    edit(folder / "model_index.json", _class_name="StableDiffusion3Pipelin")
    with pytest.raises(ConfigError, match=r"did you mean 'StableDiffusion3Pipeline'.*FluxPipeline"):
        FlowMap.from_pretrained(folder)


def test_weights_that_do_not_fit_are_found(folder: Path):
    from safetensors.torch import load_file, save_file

    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["proj_out.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'transformer' .* do not fit its config: proj_out.weight"):
        FlowMap.from_pretrained(folder)
    file.write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match=r"'transformer' of .* cannot be read"):
        FlowMap.from_pretrained(folder)


def test_an_almost_empty_tokenizer_is_found(folder: Path):
    tokenizer = json.loads((folder / "tokenizer_3" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = tokenizer["model"]["vocab"][:4]
    (folder / "tokenizer_3" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="knows 4 tokens and its encoder 12"):
        FlowMap.from_pretrained(folder).encode_prompts(PROMPTS)


def test_impossible_options_are_refused(loader: Any):
    with pytest.raises(ConfigError, match="sides that 4 divides, got 18"):
        loader.map("sd3", size=18)
    with pytest.raises(ConfigError, match="kind is 'velocity', 'partial' or None"):
        loader.map("sd3", kind="flow")
    with pytest.raises(SteerfmError, match="dtype is one of float16"):
        loader.map("sd3", dtype="int8")
    with pytest.raises(ConfigError, match="reads a prompt"):
        loader.map("sd3").velocity(torch.zeros(1, 4, 8, 8), 0.5)
    with pytest.raises(ConfigError, match=r"Only maps of FlowMap.from_pretrained"):
        scheduler_times(FlowMap(MLP((2,), width=8, depth=1)), 4)


# --- prompts -----------------------------------------------------------------------------------------------------


def test_prompts_are_read_once_and_alone(loader: Any):
    flow_map = loader.map("sd3")
    one = flow_map.encode_prompts(PROMPTS[:1])
    reader = flow_map.conditioner._reader
    calls: list[str] = []
    reader.pipeline.text_encoder_3.register_forward_hook(lambda *_: calls.append("t5"))
    both = flow_map.encode_prompts([*PROMPTS, PROMPTS[0]])
    assert calls == ["t5"]
    assert all(torch.equal(one[name][0], both[name][i]) for name in one.tensors for i in (0, 2))
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in both.tensors.values())
    flow_map.conditioner.release()
    assert reader.pipeline is None
    assert torch.equal(flow_map.encode_prompts(PROMPTS)["embedding"], both["embedding"][:2])
    assert reader.pipeline is None  # both were kept
    assert torch.equal(flow_map.encode_prompts(["red"])["pooled"], loader.map("sd3").encode_prompts(["red"])["pooled"])


def test_the_negative_prompt_is_the_null_condition(loader: Any):
    flow_map = loader.map("sd3", negative_prompt="the blue square")
    null, wanted = flow_map.conditioner.null(2), flow_map.encode_prompts(["the blue square"] * 2)
    assert all(torch.equal(null[name], wanted[name]) for name in wanted.tensors)
    turbo = loader.map("sdxl-turbo").conditioner
    assert all(tensor.abs().max() == 0 for tensor in turbo.null(1).tensors.values())
    assert loader.map("sdxl-turbo", negative_prompt="").conditioner.null(1)["embedding"].abs().max() > 0


def test_sana_asks_for_its_caption_with_an_instruction_and_not_for_its_negative_prompt(loader: Any):
    conditioner = loader.map("sana", negative_prompt="red").conditioner
    assert not torch.allclose(conditioner(["red"])["embedding"], conditioner.null(1)["embedding"])
    assert conditioner(["red"])["embedding"].shape == conditioner.null(1)["embedding"].shape


def test_stable_diffusion_3_does_without_its_third_encoder(tmp_path: Path):
    pipeline = tiny.sd3(third=False)
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    flow_map = FlowMap.from_pretrained(tmp_path, guidance_scale=1.0)
    x1 = torch.randn(2, 4, 8, 8)
    expected = pipeline(PROMPTS, latents=x1, num_inference_steps=1, guidance_scale=1.0, output_type="pt").images
    with torch.no_grad():
        found = flow_map.decode(flow_map.look_ahead(x1, 1.0, flow_map.encode_prompts(PROMPTS)))
    assert (found - expected).abs().max() < 1e-3


def test_parts_that_are_not_needed_are_not_read(loader: Any, tmp_path: Path):
    """A safety checker judges pictures, which rewards do here."""
    folder = Path(shutil.copytree(loader.path("lcm"), tmp_path / "lcm"))
    edit(
        folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        requires_safety_checker=True, older_part=["transformers", "CLIPImageProcessor"], older_option=3,
    )  # fmt: skip
    wanted, found = loader.map("lcm"), FlowMap.from_pretrained(folder)
    assert torch.equal(found.conditioner(PROMPTS)["embedding"], wanted.conditioner(PROMPTS)["embedding"])  # type: ignore[misc]


def test_long_prompts_are_cut_where_one_says(loader: Any):
    assert loader.map("flux-dev", text_length=9, size=16).encode_prompts(["a"])["embedding"].shape == (1, 9, 32)


# --- pictures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "sana", "sd-turbo"])
def test_the_codec_is_the_autoencoder_with_its_scale_and_shift(loader: Any, name: str):
    flow_map, pipeline = loader.map(name), loader.pipeline(name)
    pictures = torch.rand(2, 3, *(2 * side for side in flow_map.data_shape[1:]))
    config, vae = pipeline.vae.config, pipeline.vae
    shift = getattr(config, "shift_factor", None) or 0.0
    with torch.no_grad():
        encoded = vae.encode(2 * pictures - 1)
        z = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        latents = (z - shift) * config.scaling_factor
        assert torch.allclose(flow_map.encode(pictures), latents, atol=1e-5)
        back = (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
        assert torch.allclose(flow_map.decode(latents), back, atol=1e-5)


def test_latents_with_a_mean_and_a_spread_of_each_channel(loader: Any, tmp_path: Path):
    folder = Path(shutil.copytree(loader.path("sdxl-turbo"), tmp_path / "sdxl"))
    edit(folder / "vae" / "config.json", latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 3.0])
    flow_map = FlowMap.from_pretrained(folder)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    x1 = torch.randn(1, 4, 8, 8)
    expected = pipeline(
        PROMPTS[0], latents=x1, num_inference_steps=1, guidance_scale=0.0, output_type="pt", height=16, width=16
    ).images
    with torch.no_grad():
        x0 = flow_map.look_ahead(x1, 1.0, flow_map.encode_prompts(PROMPTS[:1]))
        assert (flow_map.decode(x0) - expected).abs().max() < 1e-3
    raw = flow_map.codec._raw(x0, pipeline.vae.config)  # type: ignore[union-attr]
    assert torch.allclose(flow_map.codec._model(raw, pipeline.vae.config), x0, atol=1e-4)  # type: ignore[union-attr]


def test_tiles_slices_and_what_is_kept_for_the_gradient(loader: Any):
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    plain, sliced, tiled = (
        loader.map("sd3", size=32, **options) for options in ({}, {"slicing": True}, {"tiling": True})
    )
    with torch.no_grad():
        assert torch.allclose(plain.decode(x), sliced.decode(x), atol=1e-5)
    vae = loader.pipeline("sd3").vae
    vae.enable_tiling()
    with torch.no_grad():
        expected = (vae.decode(x / 1.5 + 0.06).sample / 2 + 0.5).clamp(0, 1)
        assert torch.allclose(tiled.decode(x), expected, atol=1e-5)
        assert not torch.allclose(tiled.decode(x), plain.decode(x), atol=1e-4)
    calls: list[int] = []
    plain.codec._holder.vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    (gradient,) = torch.autograd.grad(decoded(plain, x).sum(), x)
    assert len(calls) == 2 and gradient.abs().sum() > 0  # it is worked out again in the backward pass
    assert all(parameter.grad is None for parameter in plain.codec._holder.vae.parameters())


def test_an_autoencoder_that_overflows_in_float16_works_in_float32(loader: Any):
    files = PipelineFiles(loader.path("sdxl-turbo"), dtype="float16")
    assert PipelineCodec(files)._holder.on(torch.device("cpu")).dtype == torch.float32
    assert files.part("unet").dtype == torch.float16


# --- the map around the network ------------------------------------------------------------------------------------


def test_only_the_denoiser_trains_and_is_copied(loader: Any):
    flow_map = loader.map("sd3")
    sample(flow_map)
    count = sum(parameter.numel() for parameter in flow_map.network.model.parameters())
    assert sum(parameter.numel() for parameter in flow_map.parameters()) == count
    copied = copy.deepcopy(flow_map)
    assert copied.codec._holder is flow_map.codec._holder and copied.conditioner._reader is flow_map.conditioner._reader
    fresh = copy.copy(flow_map.conditioner._reader)  # as another process gets it, without the encoders
    assert fresh.pipeline is None and fresh.files == flow_map.conditioner._reader.files
    assert copy.copy(flow_map.codec._holder).vae is None


def test_states_stay_in_float32_when_weights_are_of_8_bits(loader: Any):
    """bfloat16 holds a time to 8 bits: 0.9933 would be told as 0.9922."""
    flow_map, exact = loader.map("sd3", dtype=torch.bfloat16), loader.map("sd3")
    assert flow_map.dtype == torch.float32 and flow_map.network.model.dtype == torch.bfloat16
    assert LoRA(2)(flow_map).dtype == torch.float32
    samples = Unsteered("jumps", 2)(flow_map, prompts=PROMPTS, seeds=SEEDS)
    assert samples.x0.dtype == samples.images.dtype == torch.float32
    assert (samples.images - sample(exact)).abs().mean() < 0.1


def test_less_memory_in_the_backward_pass_gives_the_same_gradient(loader: Any):
    x = torch.randn(1, 4, 8, 8)
    gradients = []
    for checkpointing in (False, True):
        flow_map = loader.map("sd3", checkpointing=checkpointing, guidance_scale=1.0).train()
        flow_map.look_ahead(x, 0.7, flow_map.encode_prompts(PROMPTS[:1])).sum().backward()
        gradients.append(flow_map.network.model.proj_out.weight.grad)
    assert flow_map.network.model.gradient_checkpointing
    assert torch.allclose(*gradients, atol=1e-5)


def test_what_was_decided_is_logged(loader: Any, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="steerfm"):
        loader.map("sd-turbo")
        loader.map("sd-turbo", kind="velocity", guidance_scale=2.0)
    assert "as a partial map, which knows jumps to data alone, with guidance 1, for pictures of 16 x 16" in caplog.text
    assert "as a velocity, with guidance 2" in caplog.text


# --- saving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "lcm", "sana-sprint", "pixart"])
def test_a_saved_map_holds_the_weights_and_where_the_rest_lies(loader: Any, tmp_path: Path, name: str):
    flow_map = loader.map(name, size=32, guidance_scale=2.0)
    with torch.no_grad():
        for parameter in flow_map.parameters():
            parameter.mul_(1.02)
    jumps = 1 if flow_map.partial else 2
    expected = sample(flow_map, jumps)
    flow_map.save(tmp_path / "map")
    described = json.loads((tmp_path / "map" / "flow_map.json").read_text())["flow_map"]
    assert described["network"]["files"]["source"] == loader.path(name)
    for back in (FlowMap.load(tmp_path / "map"), FlowMap.from_pretrained(tmp_path / "map")):
        assert back.partial == flow_map.partial and back.path == flow_map.path
        assert torch.equal(sample(back, jumps), expected)
    assert not torch.allclose(sample(loader.map(name, size=32, guidance_scale=2.0), jumps), expected, atol=1e-3)


def test_a_saved_map_of_low_rank(loader: Any, tmp_path: Path):
    base = loader.map("lcm")
    tuned = LoRA(2)(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    expected = sample(tuned, 1)
    assert tuned.partial and not torch.allclose(expected, sample(base, 1), atol=1e-3)
    tuned.save(tmp_path / "whole")
    assert torch.equal(sample(FlowMap.load(tmp_path / "whole"), 1), expected)
    with pytest.raises(ConfigError, match="renoised"):
        sample(tuned, 2)


def test_low_rank_additions_alone(loader: Any, tmp_path: Path):
    tuned = LoRA(2)(loader.map("lcm"))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    save_adapter(tuned, tmp_path)
    assert torch.equal(sample(load_adapter(loader.map("lcm"), tmp_path), 1), sample(tuned, 1))


def test_a_hub_id_is_kept_with_its_commit(loader: Any, monkeypatch: pytest.MonkeyPatch):
    index = json.loads((Path(loader.path("sd3")) / "model_index.json").read_text())
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda *a, **o: (index, "0123abc"))
    files = PipelineFiles("org/name", variant="fp16")
    assert files.pinned() == PipelineFiles("org/name", "0123abc", "fp16")
    assert PipelineFiles(loader.path("sd3")).pinned().revision is None


# --- export --------------------------------------------------------------------------------------------------------


def moved(flow_map: FlowMap) -> FlowMap:
    """Return the map with what trains of it moved, as training moves it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flow_map.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return flow_map


def by_diffusers(pipeline: Any, name: str, flow_map: FlowMap, x1: torch.Tensor) -> torch.Tensor:
    more: dict[str, Any] = {"use_resolution_binning": False} if name.startswith(("sana", "pixart")) else {}
    if name == "sana-sprint":
        more["intermediate_timesteps"] = None
    height, width = (2 * side for side in flow_map.data_shape[1:])
    return pipeline(
        PROMPTS, latents=packed(x1) if name.startswith("flux") else x1, num_inference_steps=1, guidance_scale=1.0,
        output_type="pt", height=height, width=width, **more,
    ).images  # fmt: skip


FAMILIES = ["sd3", "flux-dev", "sana", "sana-sprint", "lcm", "sd-turbo", "sdxl-turbo"]


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_diffusers_loads_our_additions(loader: Any, tmp_path: Path, name: str):
    base = loader.map(name, guidance_scale=1.0, **({"size": 16} if name.startswith("flux") else {}))
    tuned = moved(LoRA(2, alpha=3)(base))
    x1 = torch.randn(2, *base.data_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = (each.decode(each.look_ahead(x1, 1.0, each.encode_prompts(PROMPTS))) for each in (base, tuned))
    assert (after - before).abs().max() > 0.05
    pipeline = loader.pipeline(name)
    pipeline.load_lora_weights(export_diffusers(tuned, tmp_path))
    assert (by_diffusers(pipeline, name, base, x1) - after).abs().max() < 1e-3
    assert torch.equal(tuned.decode(tuned.look_ahead(x1, 1.0, tuned.encode_prompts(PROMPTS))), after)  # left as it was
    pipeline.unload_lora_weights()
    assert (by_diffusers(pipeline, name, base, x1) - before).abs().max() < 1e-3


@pytest.mark.parametrize(("name", "part"), [("sd3", "transformer"), ("lcm", "unet"), ("pixart", "transformer")])
def test_plain_diffusers_loads_our_whole_network(loader: Any, tmp_path: Path, name: str, part: str):
    tuned = merged(moved(LoRA(2)(loader.map(name, guidance_scale=1.0))))
    x1 = torch.randn(2, *tuned.data_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = tuned.decode(tuned.look_ahead(x1, 1.0, tuned.encode_prompts(PROMPTS)))
    export_diffusers(tuned, tmp_path)
    pipeline = loader.pipeline(name)
    network = type(getattr(pipeline, part)).from_pretrained(tmp_path, subfolder=part)
    pipeline.register_modules(**{part: network})
    assert (by_diffusers(pipeline, name, tuned, x1) - expected).abs().max() < 1e-3


def test_other_maps_have_no_form_in_diffusers(tmp_path: Path):
    with pytest.raises(ConfigError, match="have a form in diffusers"):
        export_diffusers(FlowMap(MLP((2,), width=8, depth=1)), tmp_path)
