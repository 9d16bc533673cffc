"""Frozen text encoders: what they give, that they stay out of the map, and everything that can be missing."""

import copy
import importlib
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load, load_file, save_file
from tiny_encoders import LENGTH, OPEN_CLIP, SAVERS, save_clip_text, save_open_clip, save_t5
from torch import Tensor, nn
from torch.optim import SGD
from trainers import trainer
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextModel, T5EncoderModel

from steerfm import FlowMap, FlowMapTraining, Prompts, RewardFineTuning
from steerfm.conditions import CaptionWords, FrozenText, text_embeddings
from steerfm.errors import CheckpointError, ConfigError, SteerfmError, TrustError
from steerfm.networks import TextEmbeddings, UNet
from steerfm.networks.mlp import randomise
from steerfm.rewards.simple import Brightness

PROMPTS = ["a red circle", "", "a large blue square left of the small green cross"]
KINDS = list(SAVERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(tmp_path_factory.mktemp("encoders") / kind) for kind, save in SAVERS.items()}


def text_map(encoder: Path, length: int = 6) -> FlowMap:
    conditioner = FrozenText(str(encoder), length)
    text = TextEmbeddings(conditioner.dimension, width=8, heads=2)
    network = UNet((1, 4, 4), channels=(8,), text=text)
    randomise(network, scale=0.3)
    return FlowMap(network, conditioner=conditioner)


def inside(flow_map: Any) -> nn.Module:
    """Return the encoder that a map's conditioner reads with."""
    return flow_map.conditioner._reader.model.module


def entry(flow_map: Any) -> Tensor:
    return flow_map.network.text.enter[1].weight


# --- what they give -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_embeddings_are_transformers_own(kind: str, folders: dict[str, Path]):
    """The published use is a padded batch with its attention mask; ours has no padding, which is rounding."""
    encoder = (T5EncoderModel if kind == "t5" else CLIPTextModel).from_pretrained(folders[kind])
    batch = AutoTokenizer.from_pretrained(folders[kind])(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = encoder.eval()(**batch).last_hidden_state
    ours = FrozenText(str(folders[kind]), LENGTH)(PROMPTS)
    for i in (0, 2):
        n = int(batch["attention_mask"][i].sum())
        assert ours["embedding_mask"][i].tolist() == [True] * n + [False] * (LENGTH - n)
        assert torch.allclose(ours["embedding"][i, :n], theirs[i, :n], atol=1e-5)
        assert not ours["embedding"][i, n:].any()


@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_embeddings_are_open_clips_own(custom: bool, tmp_path: Path):
    """Projected and normalised, the token that ends the text is what open_clip calls the text's features."""
    folder = save_open_clip(tmp_path / "clip", config={**OPEN_CLIP, "custom_text": custom})
    model: Any = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}")
    tower = model.text if custom else model
    with torch.no_grad():
        theirs = model.encode_text(tokenizer(PROMPTS), normalize=True)
        ours = FrozenText(str(folder), LENGTH)(PROMPTS)
        for i in (0, 2):
            end = int(ours["embedding_mask"][i].sum()) - 1
            projected = ours["embedding"][i, end] @ tower.text_projection
            assert torch.allclose(nn.functional.normalize(projected, dim=0), theirs[i], atol=1e-5)


def test_an_open_clip_name_takes_a_file_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save_open_clip(tmp_path / "clip")
    (tmp_path / "tiny-text.json").write_text(json.dumps(OPEN_CLIP))
    factory = importlib.import_module("open_clip.factory")
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", [tmp_path])
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", {})
    open_clip.add_model_config(tmp_path)
    file = FrozenText("tiny-text", 6, weights=str(folder / "open_clip_model.safetensors"))
    for source in (str(folder), f"local-dir:{folder}"):
        assert torch.equal(file(PROMPTS)["embedding"], FrozenText(source, 6)(PROMPTS)["embedding"])


def test_a_whole_clip_gives_its_text_part(tmp_path: Path):
    text = save_clip_text(tmp_path / "text")
    save_clip_text(tmp_path / "whole")
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    part = CLIPTextModel.from_pretrained(text)
    config = CLIPConfig(text_config=part.config.to_dict(), vision_config=vision)
    whole = CLIPModel(config)
    whole.text_model.load_state_dict(part.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    ours = FrozenText(str(tmp_path / "whole"), 6)(PROMPTS)["embedding"]
    assert torch.equal(ours, FrozenText(str(text), 6)(PROMPTS)["embedding"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_embedded_alike_in_every_batch(kind: str, folders: dict[str, Path]):
    conditioner = FrozenText(str(folders[kind]), 6)
    whole = conditioner(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        for alone in (conditioner([prompt]), FrozenText(str(folders[kind]), 6)([prompt])):  # kept, and read anew
            for name in ("embedding", "embedding_mask"):
                assert torch.equal(alone[name][0], whole[name][i])
    assert whole["embedding"].dtype == torch.float32
    assert not whole["embedding"].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_the_empty_prompt_is_null_and_reads_nothing(kind: str, folders: dict[str, Path]):
    conditioner = FrozenText(str(folders[kind]), 6)
    for condition in (conditioner(["", " "]), conditioner.null(2)):
        assert condition["embedding"].shape == (2, 6, conditioner.dimension)
        assert not condition["embedding"].any()
        assert not condition["embedding_mask"].any()
    assert conditioner([])["embedding"].shape == (0, 6, conditioner.dimension)
    assert not conditioner._reader.recent


@pytest.mark.parametrize("kind", KINDS)
def test_long_prompts_are_cut_and_that_is_said_once(kind: str, folders, caplog: pytest.LogCaptureFixture):
    """A cut text ends in its last token too, as both libraries cut."""
    tokens = 4 if kind != "open_clip" else 5  # open_clip's starts with one as well
    with caplog.at_level(logging.WARNING):
        FrozenText(str(folders[kind]), tokens)(["a red circle"])
        assert caplog.messages == []
        cut = FrozenText(str(folders[kind]), tokens)(["a red circle left", "a red circle and a blue cross"])
    assert [f"first {tokens} tokens of a prompt, and 'a red circle left' has {tokens + 1}" in m
            for m in caplog.messages] == [True]  # fmt: skip
    assert cut["embedding_mask"].all()
    assert torch.equal(cut["embedding"][0], FrozenText(str(folders[kind]), tokens)(["a red circle"])["embedding"][0])


def test_recent_prompts_are_kept_within_bounds(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    conditioner = FrozenText(str(folders["t5"]), 6)
    row = 4 * 4 * 16  # four tokens of sixteen float32
    monkeypatch.setattr(text_embeddings, "CACHE_BYTES", 2 * row)
    conditioner(["a red circle", "a blue circle", "a red circle", "a green circle"])
    assert list(conditioner._reader.recent) == ["a red circle", "a green circle"]
    assert conditioner._reader.bytes == 2 * row


# --- frozen, and outside of the map ---------------------------------------------------------------------------


def test_the_encoder_is_no_part_of_the_map(folders: dict[str, Path]):
    flow_map = text_map(folders["t5"])
    conditioner: Any = flow_map.conditioner
    encoder = inside(flow_map)
    assert not list(conditioner.parameters())
    assert not any(name.startswith("conditioner") for name in flow_map.state_dict())
    assert not any(p.requires_grad for p in encoder.parameters())
    flow_map.train().requires_grad_(True)
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert inside(flow_map.frozen_copy()) is encoder
    assert copy.deepcopy(flow_map).dtype == torch.float32


def test_loading_leaves_the_random_state_alone(folders: dict[str, Path]):
    for folder in folders.values():
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        FrozenText(str(folder), 6)(["a red circle"])
        assert torch.equal(torch.rand(1), expected)


def test_another_process_loads_the_encoder_itself(folders: dict[str, Path]):
    reader = FrozenText(str(folders["t5"]), 6)._reader
    expected = reader.read(PROMPTS[0], torch.device("cpu"))
    sent = copy.copy(reader)  # by __reduce__, as to a process that is spawned
    assert sent._model is None
    assert not sent.recent
    assert torch.equal(sent.read(PROMPTS[0], torch.device("cpu")), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_validation_read_serves_training(kind: str, folders: dict[str, Path]):
    """Lightning validates in inference mode and perhaps under autocast: what is kept must be neither."""
    expected = FrozenText(str(folders[kind]), 6)(PROMPTS)["embedding"]
    conditioner = FrozenText(str(folders[kind]), 6)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        conditioner(PROMPTS)
    embedding = conditioner(PROMPTS)["embedding"]
    assert torch.equal(embedding, expected)
    layer = nn.Linear(conditioner.dimension, 1)
    layer(conditioner._reader.recent[PROMPTS[0]]).sum().backward()
    assert layer.weight.grad is not None


def test_the_encoder_follows_the_map_to_its_device(folders: dict[str, Path]):
    conditioner = FrozenText(str(folders["t5"]), 6)
    flow_map = FlowMap(UNet((1, 4, 4), channels=(8,), text=TextEmbeddings(16, 8, heads=2)), conditioner=conditioner)
    flow_map.double().to("meta")
    assert conditioner.place.device.type == "meta"
    assert conditioner.place.dtype == torch.uint8


def test_training_and_fine_tuning_leave_the_encoder_alone(tmp_path: Path, folders: dict[str, Path]):
    flow_map = text_map(folders["t5"])
    encoder = inside(flow_map)
    before = {name: p.clone() for name, p in encoder.state_dict().items()}
    enter = entry(flow_map).detach().clone()
    rows = [{"x0": torch.full((1, 4, 4), 0.5), "prompt": prompt} for prompt in PROMPTS]
    module = FlowMapTraining(flow_map, optimizer=partial(SGD, lr=0.1))
    fit = trainer(tmp_path, 2)
    fit.fit(module, torch.utils.data.DataLoader(rows, batch_size=3))  # type: ignore[arg-type]
    assert (entry(flow_map) - enter).abs().max() > 0
    fit.save_checkpoint(tmp_path / "last.ckpt")
    names = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert not any("conditioner" in name for name in names)
    tuning = RewardFineTuning(flow_map, Brightness(), optimizer=partial(SGD, lr=0.1))
    trainer(tmp_path, 1).fit(tuning, Prompts(PROMPTS))
    assert inside(tuning._reference.on(torch.device("cpu"))) is encoder
    assert all(torch.equal(encoder.state_dict()[name], p) for name, p in before.items())


# --- saved with the map ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_comes_back_with_its_encoder(kind: str, folders: dict[str, Path], tmp_path: Path):
    flow_map = text_map(folders[kind])
    x = torch.randn(3, 1, 4, 4)
    expected = flow_map.velocity(x, 0.5, flow_map.encode_prompts(PROMPTS))
    flow_map.save(tmp_path / "map")
    back = FlowMap.load(tmp_path / "map")
    assert torch.equal(back.velocity(x, 0.5, back.encode_prompts(PROMPTS)), expected)
    written = json.loads((tmp_path / "map" / "flow_map.json").read_text())["flow_map"]["conditioner"]
    target = "steerfm.conditions.text_embeddings.FrozenText"
    assert written == {"_target_": target, "encoder": str(folders[kind]), "length": 6}
    assert max(len(t) for t in load_file(tmp_path / "map" / "flow_map.safetensors")) < 200


def test_a_map_without_its_encoder_loads_and_says_what_is_missing(tmp_path: Path):
    flow_map = text_map(save_t5(tmp_path / "t5"))
    condition = flow_map.encode_prompts(PROMPTS)
    folder = flow_map.save(tmp_path / "map")
    (tmp_path / "t5").rename(tmp_path / "elsewhere")
    back = FlowMap.load(folder)
    x = torch.randn(3, 1, 4, 4)
    assert torch.equal(back.velocity(x, 0.5, condition), flow_map.velocity(x, 0.5, condition))
    with pytest.raises(
        CheckpointError, match=r"There is no text encoder '.*t5': no such folder .* in the recipe or fl"
    ):
        back.encode_prompts(PROMPTS)


# --- everything that can be missing or wrong ------------------------------------------------------------------


def said(error: type[SteerfmError], match: str, encoder: str | Path, length: int = 6, weights: str | None = None):
    with pytest.raises(error, match=match) as caught:
        FrozenText(str(encoder), length, weights)(["a red circle"])
    assert "\n" not in str(caught.value)


def test_places_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    said(CheckpointError, "empty, holds neither config.json nor open_clip_config.json: put a published", "empty")
    said(CheckpointError, "folder of the text encoder, nowhere, does not exist", "local-dir:nowhere")
    said(CheckpointError, f"There is no text encoder 'org/name': no such folder below {tmp_path}", "org/name")
    said(CheckpointError, "There is no text encoder 'hf-hub:org/name'", "hf-hub:org/name")
    said(ConfigError, "'ViT-B-32' has no weights: pass weights= a file, or one of openai", "ViT-B-32")
    said(CheckpointError, "'ViT-B-32' has no weights 'mine.pt', and no such file", "ViT-B-32", weights="mine.pt")
    said(ConfigError, "weights goes with a name .* 'ViT-B-33' is none; did you mean", "ViT-B-33", weights="openai")
    said(ConfigError, "brings its own weights: leave out weights='openai'", "empty", weights="openai")
    with pytest.raises(ConfigError, match=r"saved with the map as text: pass str\(path\)"):
        FrozenText(tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="length of at least 1, got 0"):
        FrozenText("org/name", 0)


@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_more_tokens_than_the_encoder_reads_are_refused(kind: str, folders: dict[str, Path]):
    said(ConfigError, f"reads {LENGTH} tokens, got length=13: lower it", folders[kind], 13)


@pytest.mark.parametrize("vocabulary", [200, 110, 20], ids=["almost empty", "fitting by chance", "larger"])
def test_a_tokenizer_without_files_is_not_believed(vocabulary: int, tmp_path: Path):
    """transformers makes a T5 tokenizer of 104 tokens from nothing, and says nothing."""
    folder = save_t5(tmp_path / "t5", vocab_size=vocabulary)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    if vocabulary == 110:
        FrozenText(str(folder), 6)(["a red circle"])  # within a tenth: no real vocabulary is this small
    else:
        said(CheckpointError, f"knows 104 tokens and the model {vocabulary}, so its files are missing", folder)


def test_a_clip_without_tokenizer_files_is_refused(tmp_path: Path):
    folder = save_clip_text(tmp_path / "clip")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    said(CheckpointError, r"clip cannot be loaded \(ValueError: .*put a whole one there", folder)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_or_partial_weights_are_refused(kind: str, tmp_path: Path):
    folder = SAVERS[kind](tmp_path / kind)
    file = next(folder.glob("*.safetensors"))
    whole = file.read_bytes()
    tensors = load(whole)  # not load_file, whose tensors would still lie in the file that is cut
    file.write_bytes(whole[:5000])
    said(CheckpointError, f"The text encoder in .*{kind} cannot be loaded", folder)
    name = (
        next(name for name in tensors if "embed" in name and "shared" not in name) if kind != "t5" else "shared.weight"
    )
    tensors.pop(name)
    save_file(tensors, file, {"format": "pt"})
    said(CheckpointError, "do not fit its config|cannot be loaded", folder)
    file.unlink()
    said(CheckpointError, f"The text encoder in .*{kind} cannot be loaded", folder)


class Harmful:
    """What unpickling would run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_comes_with_a_model_is_run(kind: str, tmp_path: Path):
    folder = SAVERS[kind](tmp_path / kind)
    next(folder.glob("*.safetensors")).unlink()
    file = "open_clip_pytorch_model.bin" if kind == "open_clip" else "pytorch_model.bin"
    torch.save({"state_dict": Harmful(tmp_path / "ran")}, folder / file)
    said(CheckpointError, "cannot be loaded", folder)
    assert not (tmp_path / "ran").exists()


def test_a_config_that_asks_for_code_is_refused(tmp_path: Path):
    text = {**OPEN_CLIP["text_cfg"], "hf_tokenizer_name": "own", "tokenizer_kwargs": {"trust_remote_code": True}}
    folder = save_open_clip(tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] = text
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    said(TrustError, "asks to run code that comes with it: refused", folder)
    folder = save_t5(tmp_path / "t5")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    own = {"auto_map": {"AutoConfig": "own.C", "AutoTokenizer": "own.C"}, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(own))
    said(CheckpointError, "t5 cannot be loaded", folder)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_reads_no_text_is_refused(tmp_path: Path):
    folder = save_t5(tmp_path / "t5")
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    said(ConfigError, "is of the type 'vit', and text is read by t5, mt5, umt5, clip, clip_text_model only", folder)


def test_a_network_for_another_conditioner_or_encoder_is_refused(folders: dict[str, Path]):
    flow_map = text_map(folders["t5"])
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ConfigError, match=r"reads 'embedding', and the condition has \['words'\]: give the map the"):
        flow_map.velocity(x, 0.5, CaptionWords(["a"])(["a"]))
    with pytest.raises(ConfigError, match=r"of dimension 16, and the encoder gives 8: write TextEmbeddings\(8\)"):
        flow_map.velocity(x, 0.5, FrozenText(str(folders["open_clip"]), 6)(["a"]))
