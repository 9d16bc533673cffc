"""PickScore, HPS v2 and aesthetic scores against plain computations on PIL pictures, and everything that can be wrong.

The models are small and random, made here and saved as the real ones are published: files, keys and shapes.
"""

import json
import logging
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_scores import (
    EMBEDDING,
    HPS,
    LENGTH,
    SIDE,
    TINY,
    Published,
    PublishedV25,
    save_clip,
    save_head,
    save_head_v25,
    save_hps,
    save_siglip,
)
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.transforms.functional import pil_to_tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)

from steerfm.errors import RewardError
from steerfm.reward import Reward, check
from steerfm.rewards import aesthetic, hps
from steerfm.rewards._transformers import preprocessing_of
from steerfm.rewards.aesthetic import Aesthetic, AestheticV25
from steerfm.rewards.hps import HPSv2
from steerfm.rewards.pick_score import PickScore

PROMPTS = ["a red fox", "two boats", "a red fox", "snow", "a city"]
SIZES = [(64, 64), (48, 100), (101, 47), (32, 32), (20, 26)]
LARGE = [(64, 64), (120, 200), (160, 113)]


def natural(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return pictures with the 1/f spectrum of photographs, in whole levels of 1/255, (count, 3, height, width)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    noise = rng.standard_normal((count, 3, *frequency.shape, 2)) @ np.array([1, 1j])
    pictures = np.fft.irfft2(noise / frequency, s=(height, width))
    pictures = 0.5 + 0.22 * pictures / pictures.std((2, 3), keepdims=True)
    return torch.from_numpy((pictures.clip(0, 1) * 255).round() / 255).float()


def pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray((x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()) for x in images]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("pick") / "clip")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_siglip(tmp_path_factory.mktemp("v25") / "siglip")


@pytest.fixture
def own(clip: Path, tmp_path: Path) -> Path:
    """Return a copy of the CLIP's folder, to be damaged."""
    return shutil.copytree(clip, tmp_path / "clip")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_head(tmp_path_factory.mktemp("head"))


@pytest.fixture(scope="module")
def head_v25(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_head_v25(tmp_path_factory.mktemp("head"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hps(tmp_path_factory.mktemp("hps"))


def hps_score(folder: str | Path, **options: Any) -> HPSv2:
    return HPSv2(folder, architecture=HPS, **options)


# Parity with a plain computation on PIL pictures


# Pillow rounds to whole levels after rows and after columns: half a level each, and the absolute weights of a
# bicubic pass sum to at most 1.3.
LEVEL = 1 / 255
ROUNDING = (0.5 + 1.3 * 0.5) * LEVEL


def order_gap(picture: Image.Image, shape: tuple[int, int]) -> float:
    """Return what Pillow's order of passes changes: from version 13 on, columns first where that is cheaper."""
    height, width = shape
    direct = picture.resize((width, height), Image.Resampling.BICUBIC)
    in_order = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
    in_order = in_order.resize((width, height), Image.Resampling.BICUBIC)
    return float(np.abs(np.asarray(direct, dtype=float) - np.asarray(in_order, dtype=float)).max() / 255)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        CLIPImageProcessorPil(size={"shortest_edge": 41}, crop_size={"height": 32, "width": 26}),
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=2),
        SiglipImageProcessorPil(size={"height": 32, "width": 48}),
    ],
)
def test_preprocessing_is_transformers(processor: Any, size: tuple[int, int]):
    images = natural(2, *size)
    prepare = preprocessing_of(processor, "here")
    theirs = processor(pil(images), return_tensors="pt")["pixel_values"]
    ours = prepare(images)
    assert ours.shape == theirs.shape
    gap = (ours - theirs).abs() * torch.tensor(processor.image_std).view(3, 1, 1)
    other_order = max(order_gap(picture, prepare.resized(size)) for picture in pil(images))
    assert gap.max() <= ROUNDING + other_order + 1e-5
    assert gap.mean() <= LEVEL / 2


@pytest.mark.parametrize("size", LARGE)
def test_pick_score_is_transformers_clip(clip: Path, size: tuple[int, int]):
    model: Any = CLIPModel.from_pretrained(clip).eval()
    images = natural(5, *size)
    read = CLIPTokenizer.from_pretrained(clip)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        pixels = CLIPImageProcessorPil.from_pretrained(clip)(pil(images), return_tensors="pt")["pixel_values"]
        pictures = normalize(model.get_image_features(pixels).pooler_output, dim=-1)
        texts = normalize(model.get_text_features(**read).pooler_output, dim=-1)
        ours = PickScore(clip)(images, PROMPTS).total
    assert (pictures @ texts.T).std() > 0.05  # the test would see pictures and texts mixed up
    assert (ours / 100 - (pictures * texts).sum(1)).abs().max() <= 0.002


@pytest.mark.parametrize("size", LARGE)
def test_hps_is_open_clips_with_black_bars(tuned: Path, size: tuple[int, int]):
    model = CLIP(**json.loads(json.dumps(TINY))).eval()
    model.load_state_dict(torch.load(tuned / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"])
    transform: Any = image_transform_v2(PreprocessCfg(size=SIDE, resize_mode="longest", fill_color=0), is_train=False)
    images = natural(5, *size)
    with torch.no_grad():
        pictures: Any = model.encode_image(torch.stack([transform(p) for p in pil(images)]), normalize=True)
        texts: Any = model.encode_text(open_clip.get_tokenizer(HPS)(PROMPTS), normalize=True)
        ours = hps_score(tuned)(images, PROMPTS).total
    assert (pictures @ texts.T).std() > 0.02
    assert (ours - (pictures * texts).sum(1)).abs().max() <= 0.002


@pytest.mark.parametrize(
    ("size", "bars"), [((16, 32), (8, 8, 0, 0)), ((32, 21), (0, 0, 5, 6)), ((64, 22), (0, 0, 10, 11))]
)
def test_hps_pads_with_black_and_crops_nothing(tuned: Path, size: tuple[int, int], bars: tuple[int, ...]):
    """The bars of HPSv2's own transform: half of what is missing before, rounded down, the rest behind."""
    reward = hps_score(tuned)
    picture = natural(1, *size)
    small = pil(picture)[0].resize((SIDE - bars[2] - bars[3], SIDE - bars[0] - bars[1]), Image.Resampling.BICUBIC)
    padded = torch.zeros(1, 3, SIDE, SIDE)
    padded[..., bars[0] : SIDE - bars[1], bars[2] : SIDE - bars[3]] = pil_to_tensor(small) / 255
    with torch.no_grad():
        assert torch.allclose(reward(picture, ["snow"]).total, reward(padded, ["snow"]).total, atol=0.002)


def test_aesthetic_is_the_published_row_of_layers(clip: Path, head: Path):
    model: Any = CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    row = Published().eval()
    row.load_state_dict(torch.load(head, weights_only=True))
    images = natural(5, 48, 100)
    with torch.no_grad():
        pixels = CLIPImageProcessorPil.from_pretrained(clip)(pil(images), return_tensors="pt")["pixel_values"]
        theirs = row.layers(normalize(model(pixels).image_embeds, dim=-1))[:, 0]
        ours = Aesthetic(head, clip)(images, PROMPTS).total
    assert theirs.std() > 0.02
    assert (ours - theirs).abs().max() <= 0.01 * theirs.std() + slack(row.layers)


def slack(row: nn.Module) -> float:
    """Return how far a rating moves where the embedding moves by 0.002: the slope of the map times that."""
    origin = torch.zeros(1, 32 if isinstance(row, nn.Sequential) and len(row) == 9 else EMBEDDING, requires_grad=True)
    (slope,) = torch.autograd.grad(row(origin).sum(), origin)
    return 0.002 * float(slope.norm())


def test_aesthetic_v25_is_the_published_row_of_layers(siglip: Path, head_v25: Path):
    model: Any = SiglipVisionModel.from_pretrained(siglip).eval()
    row = PublishedV25().eval()
    row.load_state_dict(torch.load(head_v25, weights_only=True))
    images = natural(5, 48, 100)
    with torch.no_grad():
        pixels = SiglipImageProcessorPil.from_pretrained(siglip)(pil(images), return_tensors="pt")["pixel_values"]
        theirs = row.scoring_head(normalize(model(pixels).pooler_output, dim=-1))[:, 0]
        ours = AestheticV25(head_v25, siglip)(images, PROMPTS).total
    assert theirs.std() > 0.02
    assert (ours - theirs).abs().max() <= 0.01 * theirs.std() + slack(row.scoring_head)


def test_aesthetic_v1_is_one_linear_layer(clip: Path, tmp_path: Path):
    file = tmp_path / "sa_0_4_vit_l_14_linear.pth"
    layer = nn.Linear(EMBEDDING, 1)
    torch.save(layer.state_dict(), file)
    model: Any = CLIPModel.from_pretrained(clip).eval()
    images = natural(5, SIDE, SIDE)  # as large as the model's, so that nothing is resized
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(pil(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = layer(normalize(model.get_image_features(pixels).pooler_output, dim=-1))[:, 0]
        for weights in (file, tmp_path):
            assert torch.allclose(Aesthetic(weights, clip)(images, PROMPTS).total, theirs, atol=1e-5)


def test_a_head_that_was_saved_on_a_gpu_is_read_on_a_cpu(clip: Path, head: Path, tmp_path: Path):
    file = tmp_path / "head.pth"
    with zipfile.ZipFile(head) as before, zipfile.ZipFile(file, "w") as after:
        for name in before.namelist():
            data = before.read(name)
            moved = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            assert (moved == data) != name.endswith("data.pkl")
            after.writestr(name, moved)
    images = natural(2, SIDE, SIDE)
    assert torch.equal(
        Aesthetic(file, clip)(images, PROMPTS[:2]).total, Aesthetic(head, clip)(images, PROMPTS[:2]).total
    )


# The contract


Made = dict[str, Callable[..., Reward]]


@pytest.fixture(scope="module")
def made(clip: Path, siglip: Path, head: Path, head_v25: Path, tuned: Path) -> dict[str, Reward]:
    return {
        "pick_score": PickScore(clip),
        "hps_v2.1": hps_score(tuned),
        "aesthetic": Aesthetic(head, clip),
        "aesthetic_v25": AestheticV25(head_v25, siglip),
    }


NAMES = ["pick_score", "hps_v2.1", "aesthetic", "aesthetic_v25"]


@pytest.mark.parametrize("name", NAMES)
def test_they_pass_the_check(made: dict[str, Reward], name: str):
    reward = made[name]
    assert reward.name == name
    expected = ["does not look at the prompts."] if "aesthetic" in name else []
    assert [finding.message for finding in check(reward, natural(5, SIDE, SIDE), PROMPTS)] == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_slope(made: dict[str, Reward], name: str):
    reward, direction = made[name], natural(2, 40, 56, seed=1) - 0.5
    images = 0.2 + 0.6 * natural(2, 40, 56)  # nothing is clamped, where gradients pass and values do not
    leaf = images.clone().requires_grad_(True)
    reward(leaf, PROMPTS[:2]).total.sum().backward()
    assert leaf.grad is not None
    step = 1e-3
    with torch.no_grad():
        up, down = (reward(images + sign * step * direction, PROMPTS[:2]).total.double() for sign in (1, -1))
    slopes = (leaf.grad * direction).sum((1, 2, 3)).double()
    assert torch.allclose((up - down) / (2 * step), slopes, rtol=0.01, atol=0.01 * float(slopes.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_blur_the_score_and_grey_is_colour(made: dict[str, Reward], name: str):
    reward, images = made[name], natural(2, 40, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(images, PROMPTS[:2]).total, reward(images, PROMPTS[:2]).total)
        blurred = reward(images, PROMPTS[:2]).total
    assert torch.equal(blurred, reward(images, PROMPTS[:2]).total)
    grey = images[:, :1]
    whole = reward(grey.expand(-1, 3, -1, -1), PROMPTS[:2]).total
    assert torch.allclose(reward(grey, PROMPTS[:2]).total, whole, rtol=1e-4)
    with pytest.raises(RewardError, match="needs pictures"):
        reward(torch.rand(2, 4, 8, 8), PROMPTS[:2])


def test_a_fixed_prompt_overrides_the_maps(clip: Path, tuned: Path, made: dict[str, Reward]):
    images = natural(5, SIDE, SIDE)
    for fixed, free in ((PickScore(clip, prompt="snow"), "pick_score"), (hps_score(tuned, prompt="snow"), "hps_v2.1")):
        assert torch.allclose(fixed(images, PROMPTS).total, made[free](images, ["snow"] * 5).total, rtol=1e-4)


@pytest.mark.parametrize("name", ["pick_score", "hps_v2.1"])
def test_a_prompt_that_is_cut_is_said_once(clip: Path, tuned: Path, name: str, caplog: pytest.LogCaptureFixture):
    reward = PickScore(clip) if name == "pick_score" else hps_score(tuned)
    images = natural(1, SIDE, SIDE)
    fits, cut = " ".join("a" * (LENGTH - 2)), " ".join("a" * (LENGTH - 1))
    with caplog.at_level(logging.WARNING):
        reward(images, [fits])
        assert caplog.messages == []
        first = reward(images, [cut]).total
        assert torch.allclose(first, reward(images, [cut + " fox"]).total)
    assert caplog.messages == [
        f"'{name}' reads the first {LENGTH} tokens of a prompt and ignores the rest; '{cut}' has {LENGTH + 1}. "
        "Said once."
    ]


def test_texts_are_encoded_once_and_survive_inference_mode(clip: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("steerfm.rewards._texts.CACHED_TEXTS", 4)
    monkeypatch.setattr("steerfm.rewards._texts.TEXTS_AT_ONCE", 3)
    reward, calls = PickScore(clip), []
    reward.model.text_model.register_forward_hook(lambda module, arguments, output: calls.append(len(output[0])))
    with torch.inference_mode():
        first = reward(natural(5, SIDE, SIDE), PROMPTS).total
    images = natural(5, SIDE, SIDE).requires_grad_(True)
    second = reward(images, PROMPTS).total
    second.sum().backward()  # would fail on tensors made for inference
    assert torch.allclose(first, second)
    assert calls == [3, 1]
    reward(natural(1, SIDE, SIDE), ["a fifth text"])
    assert torch.allclose(reward(images, PROMPTS).total, first)
    assert calls == [3, 1, 1, 3, 1]


# What is missing, partial, damaged or another's


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (["config.json"], "clip has no config.json: put it there, or pass another model="),
        (["model.safetensors"], "clip has no model.safetensors .or model.safetensors.index.json, pytorch_model.bin"),
        (["preprocessor_config.json"], "clip has no preprocessor_config.json .*pass another processor="),
        (["tokenizer.json", "vocab.json", "merges.txt"], "clip has no tokenizer.json .*pass another processor="),
    ],
)
def test_a_file_that_is_missing_is_named(own: Path, missing: list[str], said: str):
    for name in missing:
        (own / name).unlink(missing_ok=True)
    with pytest.raises(RewardError, match=said):
        PickScore(own)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda cache: PickScore(cache_dir=cache), "config.json of 'yuvalkirstain/PickScore_v1' .*pass model=FOLDER"),
        (lambda cache: HPSv2(cache_dir=cache), "HPS_v2.1_compressed.pt of 'xswu/HPSv2' .*pass weights=FOLDER"),
        (lambda cache: HPSv2("nowhere/hps.pt/a"), "There is no folder nowhere/hps.pt/a: put HPS_v2.1_compress"),
        (lambda cache: Aesthetic(cache_dir=cache), "aesthetic-model.pth of 'trl-lib/ddpo-aesthetic-predictor'"),
        (lambda cache: AestheticV25(cache), "has no aesthetic_predictor_v2_5.pth: put it there, or pass"),
    ],
)  # fmt: skip
def test_offline_the_file_and_the_place_are_named(tmp_path: Path, make: Callable[[Path], Reward], said: str):
    with pytest.raises(RewardError, match=said) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


def change(file: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("visual_projection.weight"), r"keys are missing .*\(1, such as visual_projection.weight\)"),
        (
            lambda t: t.update({"text_projection.weight": torch.zeros(3, 3)}),
            "or of another shape .1, such as text_proj",
        ),
        (
            lambda t: t.update({"head.weight": torch.zeros(3)}),
            r"keys belong to another model \(1, such as head.weight\)",
        ),
    ],
)
def test_keys_that_do_not_fit_are_refused(own: Path, edit: Callable[[dict[str, Tensor]], Any], said: str):
    change(own / "model.safetensors", edit)
    with pytest.raises(RewardError, match=said):
        PickScore(own)


def test_a_cut_file_is_refused(own: Path):
    file = own / "model.safetensors"
    file.write_bytes(file.read_bytes()[:10_000])
    with pytest.raises(RewardError, match=r"clip cannot be loaded .*is every file whole"):
        PickScore(own)


class Harmful:
    """What unpickling would run."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_checkpoints_that_hold_code_are_not_run(own: Path, clip: Path, tmp_path: Path):
    marker = tmp_path / "ran"
    (own / "model.safetensors").unlink()
    torch.save({"logit_scale": Harmful(marker)}, own / "pytorch_model.bin")
    torch.save({"state_dict": Harmful(marker)}, tmp_path / "HPS_v2.1_compressed.pt")
    torch.save({"layers.0.weight": Harmful(marker)}, tmp_path / "aesthetic-model.pth")
    for make in (lambda: PickScore(own), lambda: hps_score(tmp_path), lambda: Aesthetic(tmp_path, clip)):
        with pytest.raises(RewardError, match="holds more than tensors and was not opened"):
            make()
    assert not marker.exists()


def test_an_empty_tokenizer_is_refused(own: Path):
    """transformers makes a tokenizer of a few tokens from such files and says nothing."""
    (own / "tokenizer.json").unlink()
    (own / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1}))
    with pytest.raises(RewardError, match=r"clip cannot be loaded .*merges"):
        PickScore(own)
    (own / "merges.txt").write_text("#version: 0.2")
    with pytest.raises(RewardError, match=r"The tokenizer of '.*clip' knows 2 tokens and the model 514: its files are"):
        PickScore(own)


def test_a_tokenizer_that_ends_texts_elsewhere_is_refused(own: Path):
    config = json.loads((own / "config.json").read_text())
    config["text_config"]["eos_token_id"] -= 1
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(RewardError, match="ends texts with token 513, and the model reads them at 512"):
        PickScore(own)


def test_old_configs_read_the_highest_token(own: Path, clip: Path):
    config = json.loads((own / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (own / "config.json").write_text(json.dumps(config))
    images = natural(5, SIDE, SIDE)
    assert torch.allclose(PickScore(own)(images, PROMPTS).total, PickScore(clip)(images, PROMPTS).total)


@pytest.mark.parametrize(
    "edit",
    [{"resample": 1}, {"do_resize": False}, {"rescale_factor": 1 / 127.5}, {"size": {"longest_edge": 32}}],
)
def test_preprocessing_that_cannot_be_expressed_is_refused(own: Path, edit: dict[str, Any]):
    file = own / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    with pytest.raises(RewardError, match="is none that steerfm knows"):
        PickScore(own)


def test_a_processor_elsewhere_is_taken(own: Path, clip: Path):
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (own / name).unlink()
    images = natural(5, SIDE, SIDE)
    assert torch.equal(PickScore(own, clip)(images, PROMPTS).total, PickScore(clip)(images, PROMPTS).total)


def with_state(edit: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda found: edit(found["state_dict"])


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (with_state(lambda s: s.pop("visual.proj")), r"Missing key.*visual\.proj"),
        (with_state(lambda s: s.update(head=torch.zeros(3))), r"Unexpected key.*head"),
        (
            with_state(lambda s: s.update({"visual.positional_embedding": torch.zeros(37, 32)})),
            r"another size: its 'visual\.positional_embedding' is \(37, 32\)",  # which open_clip stretches
        ),
        (lambda found: found.update(found.pop("state_dict")), "has no 'state_dict', .*a plain CLIP of that size would"),
    ],
)
def test_hps_checkpoints_that_do_not_fit_are_refused(
    tuned: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], said: str
):
    found = torch.load(tuned / "HPS_v2.1_compressed.pt", weights_only=True)
    edit(found)
    torch.save(found, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(RewardError, match=said):
        hps_score(tmp_path)


def test_a_cut_hps_checkpoint_is_refused(tuned: Path, tmp_path: Path):
    data = (tuned / "HPS_v2.1_compressed.pt").read_bytes()
    (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(RewardError, match="is every file whole"):
        hps_score(tmp_path)


def test_the_versions_of_hps_are_not_mixed_up(tuned: Path, tmp_path: Path):
    old = shutil.copy(tuned / "HPS_v2.1_compressed.pt", tmp_path / hps.FILES["v2.0"])
    with pytest.raises(RewardError, match=r"HPS_v2_compressed.pt is HPS v2.0, got version='v2.1': pass version='v2.0'"):
        hps_score(old)
    with pytest.raises(RewardError, match=r"has no HPS_v2\.1_compressed\.pt"):
        hps_score(tmp_path)
    with pytest.raises(RewardError, match=r"has the versions v2\.0 and v2\.1, got version=2\.1"):
        hps_score(tuned, version=2.1)
    assert hps_score(tmp_path, version="v2.0").name == "hps_v2.0"


def test_loading_hps_draws_no_random_numbers_of_others(tuned: Path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    hps_score(tuned)
    assert torch.equal(torch.rand(3), expected)


RELU = {f"layers.{i}.{part}": torch.zeros(1) for i in (0, 3, 6, 9, 11) for part in ("weight", "bias")}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (RELU, r"is no head of this predictor: its keys are layers\.0\.bias, .*layers\.2\.bias.* or bias, weight are"),
        (PublishedV25(EMBEDDING).state_dict(), r"is no head of this predictor: its keys are scoring_head\.0\.bias"),
        (Published(8).state_dict(), r"of the shape \(8,\), and .* embeddings of 16 numbers: pass the encoder"),
        ({"weight": torch.zeros(2, EMBEDDING), "bias": torch.zeros(2)}, r"of the shape \(2, 16\)"),
        (Published().state_dict() | {"layers.4.weight": torch.zeros(64, 127)}, "do not fit each other"),
        ([torch.zeros(3)], "holds list, not a table of tensors"),
    ],
)
def test_heads_that_do_not_fit_are_refused(clip: Path, tmp_path: Path, tensors: Any, said: str):
    torch.save(tensors, tmp_path / "aesthetic-model.pth")
    with pytest.raises(RewardError, match=said):
        Aesthetic(tmp_path, clip)


def test_encoders_of_the_other_kind_are_refused(clip: Path, siglip: Path, head: Path, head_v25: Path):
    with pytest.raises(RewardError, match="do not fit"):
        Aesthetic(head, siglip)
    with pytest.raises(RewardError, match="do not fit"):
        AestheticV25(head_v25, clip)


def test_the_cards_name_what_is_loaded():
    assert aesthetic.__doc__ is not None
    for file in ("sac+logos+ava1-l14-linearMSE.pth", "sa_0_4_vit_l_14_linear.pth", *aesthetic.HEAD_FILES_V25):
        assert file in aesthetic.__doc__
    assert "AGPL-3.0" in aesthetic.__doc__
