"""ImageReward against stored scores of the original package, its gradient, and every file that can be wrong.

The model is small and random, saved in the published format; `make parity` runs the original package on it.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_image_reward as tiny
import torch
from torch import Tensor
from torch.nn import functional

from steerfm.errors import RewardError
from steerfm.reward import check
from steerfm.rewards.image_reward import UNUSED, ImageReward, build, published_key

STORED = Path(__file__).parents[1] / "data" / "image_reward.json"
PROMPTS = [prompt for prompt, _ in tiny.EXAMPLES]
PICTURES = tiny.pictures()
UNRESIZED = 5  # the first examples are 224 pixels wide and high


def made(folder: Path, **options: Any) -> ImageReward:
    options = {"vision_layers": tiny.SIZES["layers"]} | options
    return ImageReward(folder, folder / tiny.BERT, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("image_reward"))


@pytest.fixture(scope="module")
def reward(folder: Path) -> ImageReward:
    return made(folder)


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    """Return what the original package said; `make parity` checks it and --store writes it."""
    return {key: torch.tensor(values) for key, values in json.loads(STORED.read_text(encoding="utf-8")).items()}


# Parity


def test_tokens_are_the_originals(reward, original):
    tokens = reward.tokens(PROMPTS)
    assert torch.equal(tokens["input_ids"], original["tokens"])
    assert torch.equal(tokens["attention_mask"], (original["tokens"] != 0).long())


def test_padding_is_cut_to_the_longest_text(reward):
    assert reward.tokens(["a", "a red circle"])["input_ids"].shape == (2, 5)
    images = torch.stack(PICTURES[:3])
    with torch.no_grad():
        padded = reward(images, ["a red circle"] * 2 + PROMPTS[2:3]).total[:2]
        assert torch.allclose(reward(images[:2], ["a red circle"] * 2).total, padded, atol=1e-5)


def test_scores_are_the_originals(reward, original):
    with torch.no_grad():
        ours = torch.cat([reward.score(x[None], [p]) for x, p in zip(PICTURES, PROMPTS, strict=True)])
    gap = (ours - original["scores"]).abs()
    assert original["scores"].std() > 0.5  # the test would see pictures or prompts mixed up
    assert gap[:UNRESIZED].max() <= 1e-5
    assert gap[UNRESIZED:].max() <= 0.02  # the original resizes in whole levels of 1/255


def test_gradients_are_the_originals(reward, original):
    leaf = torch.stack(PICTURES[:UNRESIZED]).requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward.score(leaf, PROMPTS[:UNRESIZED]).sum(), leaf)
    theirs = original["gradients"]
    gap = (functional.avg_pool2d(gradient, 224 // theirs.shape[-1]) - theirs).abs().amax((1, 2, 3))
    assert (gap <= 1e-4 * theirs.abs().amax((1, 2, 3))).all()


def test_the_published_checkpoint_fits_to_the_last_key():
    """The sizes of ImageReward-v1.0, without its numbers: 625 keys, of which 5 are not used."""
    med = tiny.MED | {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "max_position_embeddings": 512, "vocab_size": 30524,
    }  # fmt: skip
    shapes = tiny.shapes(med, width=1024, layers=24, patch=16, side=224)
    known = {key: med[key] for key in med if key not in ("architectures", "model_type", "add_cross_attention")}
    with torch.device("meta"):
        model: Any = build(known, shapes["blip.visual_encoder.pos_embed"], (1024, 3, 16, 16), 24)
    ours = {published_key(key): tuple(value.shape) for key, value in model.state_dict().items()}
    assert len(shapes) == 625
    assert ours == {key: shape for key, shape in shapes.items() if key not in UNUSED}
    assert model["vision"].config.num_attention_heads == 16


# The contract


def test_the_gradient_is_the_slope(reward):
    images, prompts = 0.1 + 0.8 * torch.stack(PICTURES[:2]), PROMPTS[:2]  # nothing is clamped on the way
    direction = torch.stack(PICTURES[3:5]) - 0.5
    leaf = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(leaf, prompts).total.sum(), leaf)
    step = 0.01
    with torch.no_grad():
        up, down = (reward(images + sign * step * direction, prompts).total for sign in (1, -1))
    slopes = (gradient * direction).sum((1, 2, 3))
    assert torch.allclose((up - down) / (2 * step), slopes, rtol=0.01, atol=1e-3)


def test_it_passes_the_check(reward):
    assert check(reward, torch.stack([tiny.natural((3, 40, 56), seed) for seed in range(4)]), PROMPTS[4:8]) == []


def test_one_prompt_for_all(folder, reward):
    images = torch.stack(PICTURES[:3])
    fixed = made(folder, prompt="a red circle")
    assert torch.equal(fixed(images, ["", "", ""]).total, reward(images, ["a red circle"] * 3).total)
    with pytest.raises(RewardError, match="fixes one prompt for all pictures, got list"):
        made(folder, prompt=["a"])


def test_no_prompt_is_refused_where_none_is_fixed(reward):
    with pytest.raises(RewardError, match=r"'image_reward'.*prompt"):
        reward(torch.stack(PICTURES[:2]), ["a", ""])


def test_autocast_does_not_blur_the_score(reward):
    images = torch.stack(PICTURES[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        blurred = reward(images, PROMPTS[:2]).total
    assert torch.equal(blurred, reward(images, PROMPTS[:2]).total)


def test_a_long_prompt_is_warned_of_once(folder, caplog):
    reward = made(folder)
    with caplog.at_level(logging.WARNING):
        reward.tokens(["a " * 33])
        assert not caplog.records
        reward.tokens(["a", "a " * 34, "a " * 40])
        reward.tokens(["a " * 50])
    assert [record.getMessage()[:60] for record in caplog.records if record.name == "steerfm.rewards.image_reward"] == [
        "'image_reward' reads the first 35 tokens of a prompt and ign"
    ]


def test_half_precision_files_are_scored_in_float32(tmp_path, reward):
    halves = {key: value.half() if value.is_floating_point() else value for key, value in tiny.weights().items()}
    half = made(tiny.save(tmp_path, halves))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    images = torch.stack(PICTURES[:2])
    assert torch.allclose(half(images, PROMPTS[:2]).total, reward(images, PROMPTS[:2]).total, atol=0.05)


# Wrong files

LAST_BLOCK = "blip.visual_encoder.blocks.1."
QKV = f"{LAST_BLOCK}attn.qkv.weight"


def without(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if not key.startswith(start)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: without(x, LAST_BLOCK), "has no key 'blip.visual_encoder.blocks.1"),
        (lambda x: without(x, "mlp.layers.7"), "has no key 'mlp.layers.7.weight': it is a part"),
        (lambda x: without(x, "blip.text_encoder.encoder.layer.0.crossattention"), "has no key .*crossattention"),
        (lambda x: without(x, "blip."), "has no key 'blip.visual_encoder.pos_embed': it is no checkpoint"),
        (lambda x: x | {"blip.visual_encoder_m.cls_token": torch.zeros(1)}, "1 keys that ImageReward has not"),
        (lambda x: tiny.weights(layers=3), "12 keys that ImageReward has not, 'blip.visual_encoder.blocks.2"),
        (lambda x: x | {QKV: x[QKV][:-1]}, r"has the shape \(383, 128\), not \(384, 128\)"),
        (lambda x: {"state_dict": x}, "has no key 'blip.visual_encoder.pos_embed'"),
        (lambda x: [x], "holds list, not a table of tensors"),
        (lambda x: x | {"blip": print}, "holds more than tensors and was not opened"),
    ],
)
def test_wrong_weights_are_refused(tmp_path, change, said):
    folder = tiny.save(tmp_path, change(tiny.weights()))
    with pytest.raises(RewardError, match=said):
        made(folder)


def test_unused_keys_may_be_missing(tmp_path, reward):
    lean = {key: value for key, value in tiny.weights().items() if key not in UNUSED}
    images = torch.stack(PICTURES[:2])
    assert torch.equal(made(tiny.save(tmp_path, lean))(images, PROMPTS[:2]).total, reward(images, PROMPTS[:2]).total)


def test_a_cut_file_is_one_sentence(tmp_path):
    file = tiny.save(tmp_path) / "ImageReward.pt"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(RewardError, match="is every file whole"):
        made(tmp_path)


@pytest.mark.parametrize("name", ["ImageReward.pt", "med_config.json", f"{tiny.BERT}/vocab.txt"])
def test_the_missing_file_is_named(tmp_path, name):
    (tiny.save(tmp_path) / name).unlink()
    with pytest.raises(RewardError, match=f"has no {Path(name).name}.*put it there"):
        made(tmp_path)


def test_offline_the_error_says_what_is_missing_and_where_it_goes(tmp_path):
    with pytest.raises(RewardError, match=r"med_config.json of 'zai-org/ImageReward' is not on this machine.*model="):
        ImageReward(cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps({k: v for k, v in tiny.MED.items() if k != "num_attention_heads"}), "has no 'num_attention_heads'"),
        ("[]", "has no 'vocab_size'"),
        ("{", "cannot be loaded"),
        (json.dumps(tiny.MED | {"num_hidden_layers": 3}), "has no key 'blip.text_encoder.encoder.layer.2"),
        (json.dumps(tiny.MED | {"num_hidden_layers": 1}), "26 keys that ImageReward has not"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, text, said):
    (tiny.save(tmp_path) / "med_config.json").write_text(text)
    with pytest.raises(RewardError, match=said):
        made(tmp_path)


@pytest.mark.parametrize("words", [tiny.VOCABULARY[:6], tiny.VOCABULARY[:-1], [*tiny.VOCABULARY, "more", "words"]])
def test_another_vocabulary_is_refused(tmp_path, words):
    (tiny.save(tmp_path) / tiny.BERT / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(RewardError, match=rf"knows {len(words) + 2} tokens and the model {tiny.MED['vocab_size']}"):
        made(tmp_path)


def test_the_tokenizer_may_lie_beside_the_weights(tmp_path, folder, reward):
    tiny.save(tmp_path)
    with pytest.raises(RewardError, match=r"has no vocab.txt \(or tokenizer.json\): .* tokenizer="):
        ImageReward(tmp_path, vision_layers=2)
    (tmp_path / tiny.BERT / "vocab.txt").rename(tmp_path / "vocab.txt")
    beside = ImageReward(tmp_path, vision_layers=2)
    assert torch.equal(beside.tokens(PROMPTS)["input_ids"], reward.tokens(PROMPTS)["input_ids"])


def test_other_shapes_are_no_pictures(reward):
    with pytest.raises(RewardError, match="needs pictures"):
        reward(torch.rand(2, 4, 8, 8), ["a", "b"])
