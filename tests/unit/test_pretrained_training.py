"""From pictures and a pipeline to a flow map: what encoders make is kept, and the denoiser is trained from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from picture_files import encoded, noisy
from safetensors.torch import load_file
from torch.optim import SGD

from steerfm import FlowMapTraining, RewardFineTuning
from steerfm.backbones import LoRA, LoRABase, adapted, encoders, without_lora
from steerfm.backbones.pipeline_codec import PipelineCodec
from steerfm.backbones.pipeline_prompts import PipelinePrompts, _Reader
from steerfm.cli import main
from steerfm.data import ImageFolder, Prompts
from steerfm.data.latents import Latents
from steerfm.errors import ConfigError
from steerfm.finetuning import DirectBackprop
from steerfm.flow_map import FlowMap
from steerfm.objectives import Compositional, FlowMatching
from steerfm.sampling import decoded

pytest.importorskip("diffusers")
tiny: Any = pytest.importorskip("tiny_pipelines")

CAPTIONS = ["a red circle", "a blue square", "", "a red circle"]


@pytest.fixture(scope="module")
def place(loader: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with pictures, and a run in which a tiny SD3's encoders have led them to latents and texts."""
    place = tmp_path_factory.mktemp("place")
    (place / "pictures").mkdir()
    for i in range(len(CAPTIONS)):
        (place / f"pictures/{i}.png").write_bytes(encoded(noisy(16, 16, i), "PNG"))
    rows = [json.dumps({"file_name": f"{i}.png", "text": caption}) for i, caption in enumerate(CAPTIONS)]
    (place / "pictures/captions.jsonl").write_text("\n".join(rows))
    before = Path.cwd()
    os.chdir(place)
    try:
        assert main(cache_arguments(loader)) == 0
    finally:
        os.chdir(before)
    return place


def cache_arguments(loader: Any) -> list[str]:
    return ["cache", "recipe=latents", f"map={loader.path('sd3')}", "data.folder=pictures", "data.size=16",
            "encoders.text_length=8", "name=cached"]  # fmt: skip


def pretrained(loader: Any, place: Path, **more: Any) -> FlowMap:
    options: dict[str, Any] = {"guidance_scale": 1.0, "text_length": 8, "text_files": place / "runs/cached/texts"}
    return loader.map("sd3", **(options | more))


# --- what is kept --------------------------------------------------------------------------------------------------


def test_latents_and_texts_are_the_model_s_own(loader: Any, place: Path) -> None:
    data, flow_map = Latents(place / "runs/cached/latents"), loader.map("sd3", text_length=8)
    assert data.captions == CAPTIONS
    pictures = ImageFolder(str(place / "pictures"), size=16, batch_size=4).rows(range(4))["x0"]
    torch.testing.assert_close(data.rows(range(4))["x0"], flow_map.encode(pictures / 2 + 0.5))
    texts = list((place / "runs/cached/texts").rglob("*.safetensors"))
    assert len(texts) == 4  # three captions, each once, and the null condition
    kept = pretrained(loader, place)
    condition, wanted = kept.encode_prompts(CAPTIONS), flow_map.encode_prompts(CAPTIONS)
    for name, tensor in wanted.tensors.items():  # type: ignore[union-attr]
        torch.testing.assert_close(condition.tensors[name], tensor, rtol=0, atol=0)  # type: ignore[union-attr]


def test_encoders_are_not_loaded_for_what_is_kept(
    loader: Any, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flow_map = pretrained(loader, place)

    def refuse(*_: Any) -> Any:
        raise AssertionError("the encoders are loaded")

    monkeypatch.setattr(_Reader, "_loaded", refuse)
    assert flow_map.encode_prompts(CAPTIONS) is not None
    flow_map.conditioner.null(2)  # type: ignore[union-attr,operator]
    for other in ({"text_length": 9}, {"dtype": "bfloat16"}, {"text_files": place / "elsewhere"}):
        with pytest.raises(AssertionError, match="are loaded"):
            pretrained(loader, place, **other).encode_prompts(CAPTIONS)
    with pytest.raises(AssertionError, match="are loaded"):
        flow_map.encode_prompts(["a caption that is not there"])


def test_a_damaged_file_is_made_again(loader: Any, place: Path, tmp_path: Path, caplog: Any) -> None:
    made = encoders(loader.path("sd3"), text_files=str(tmp_path))
    assert made.size == (16, 16) and made.conditioner.keep(["a red circle"]) == 2
    assert made.conditioner.keep(["a red circle", "a blue circle"]) == 1
    wanted = made.conditioner(["a red circle"])
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:40])
    again = encoders(loader.path("sd3"), text_files=str(tmp_path)).conditioner(["a red circle"])
    assert "is damaged" in caplog.text
    torch.testing.assert_close(again.tensors["embedding"], wanted.tensors["embedding"], rtol=0, atol=0)
    with pytest.raises(ConfigError, match="name one by kept="):
        PipelinePrompts(made.conditioner._reader.files).keep(["a"])


def test_the_command_goes_on_and_refuses_other_sizes(
    loader: Any, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert main([*cache_arguments(loader), "name=other", "encoders.size=32"]) == 2
    assert "32 x 32 pixels and the data's 16 x 16" in " ".join(capsys.readouterr().err.split())
    assert main([*cache_arguments(loader), "name=nothing", "map=runs/nothing"]) == 2
    assert "Nothing found at runs/nothing" in " ".join(capsys.readouterr().err.split())


def test_weights_that_rest_elsewhere_decode_alike(loader: Any) -> None:
    near, far = (loader.map("sd3", offload=each) for each in (False, True))
    x = torch.randn(2, *near.data_shape, requires_grad=True)
    torch.testing.assert_close(near.decode(x), far.decode(x), rtol=0, atol=0)
    torch.testing.assert_close(near.encode(near.decode(x)), far.encode(far.decode(x)), rtol=0, atol=0)
    gradients = [torch.autograd.grad(decoded(each, x).square().sum(), x)[0] for each in (near, far)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    if torch.cuda.is_available():
        far.to("cuda").decode(x.to("cuda"))
        assert isinstance(far.codec, PipelineCodec) and far.codec._holder.vae.device.type == "cpu"


# --- what is trained -------------------------------------------------------------------------------------------------


def fit(module: Any, data: Any, steps: int, checkpoint: Path | None = None) -> Trainer:
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return trainer


def test_the_base_teaches_its_guided_velocity_on_the_same_weights(loader: Any, place: Path) -> None:
    base = pretrained(loader, place)
    flow_map, teacher = adapted(base, True, LoRA(2)), LoRABase(3.0)
    module = FlowMapTraining(
        flow_map, Compositional(), diagonal=FlowMatching(teacher), optimizer=lambda p: SGD(p, lr=0.1), prompt_dropout=0
    )
    assert {id(p) for p in teacher.map.parameters()} <= {id(p) for p in flow_map.parameters()}
    x, condition = torch.randn(2, *base.data_shape), flow_map.encode_prompts(CAPTIONS[:2])
    wanted = base.with_guidance(3.0).velocity(x, 0.4, condition)
    before = {name: p.clone() for name, p in flow_map.named_parameters()}
    fit(module, Latents(place / "runs/cached/latents", batch_size=4), 2)
    torch.testing.assert_close(teacher.map.velocity(x, 0.4, condition), wanted, rtol=1e-5, atol=1e-5)
    moved = {name for name, p in flow_map.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    torch.testing.assert_close(
        without_lora(flow_map).velocity(x, 0.4, condition), base.velocity(x, 0.4, condition), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ConfigError, match="holds no map yet"):
        _ = LoRABase().map
    with pytest.raises(ConfigError, match="This map has no LoRA"):
        LoRABase().begin(base)


def redness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def tuning(loader: Any, place: Path) -> RewardFineTuning:
    return RewardFineTuning(
        pretrained(loader, place, kind="velocity"),
        redness,
        DirectBackprop(jumps=2, penalty="sample"),
        adapter=LoRA(2),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
    )


def test_resuming_equals_never_having_stopped(loader: Any, place: Path, tmp_path: Path) -> None:
    data = Prompts(CAPTIONS[:2], prompts_per_step=2)
    whole = tuning(loader, place)
    fit(whole, data, 4)
    half = tuning(loader, place)
    fit(half, data, 2).save_checkpoint(tmp_path / "half.ckpt")
    kept = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert "flow_map.network.network.left_out" in kept  # the base is not in it
    again = tuning(loader, place)
    fit(again, data, 4, tmp_path / "half.ckpt")
    wanted, found = dict(whole.flow_map.named_parameters()), dict(again.flow_map.named_parameters())
    assert all(torch.equal(found[name], each) for name, each in wanted.items())
    again.save(tmp_path / "map")
    assert sum(t.numel() for t in load_file(tmp_path / "map/flow_map.safetensors").values()) < 0.5 * sum(
        p.numel() for p in again.flow_map.parameters()
    )
    x, condition = torch.randn(1, *whole.flow_map.data_shape), whole.flow_map.encode_prompts(CAPTIONS[:1])
    loaded = FlowMap.load(tmp_path / "map")
    torch.testing.assert_close(
        loaded.velocity(x, 0.5, condition), whole.flow_map.eval().velocity(x, 0.5, condition), rtol=0, atol=0
    )


def test_a_saved_map_takes_what_can_be_set_and_nothing_else(loader: Any, place: Path, tmp_path: Path) -> None:
    loader.map("sd3").save(tmp_path / "map")
    found = FlowMap.from_pretrained(tmp_path / "map", guidance_scale=2.0, text_files=tmp_path / "texts")
    assert found.guidance_scale == 2.0
    found.encode_prompts(["a red circle"])
    assert list((tmp_path / "texts").rglob("*.safetensors"))
    assert FlowMap.from_pretrained(tmp_path / "map", checkpointing=True).network.model.is_gradient_checkpointing  # type: ignore[union-attr]
    assert FlowMap.from_pretrained(tmp_path / "map", dtype="bfloat16").network.model.dtype == torch.bfloat16  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"with its own kind, size, variant: leave that out"):
        FlowMap.from_pretrained(tmp_path / "map", kind="velocity", size=16, variant="fp16")
