"""Image classifiers against the pipelines of timm, transformers and open_clip on PIL pictures, and what is refused."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import save_open_clip
from tiny_image_models import LABELS, assert_same_pipeline, natural, pil, save_timm, save_transformers
from torch import Tensor

from steerfm import config
from steerfm.errors import RewardError
from steerfm.reward import check
from steerfm.rewards._image_models import load_classifier
from steerfm.rewards.classifier import ImageClassifier, ZeroShotClassifier

SIZES = [(64, 64), (48, 100), (131, 90)]
ANIMALS = ["a cat", "a dog", "a horse"]
DESCRIBED: dict[str, Any] = {
    "label_names": ["n0", "n1", "n2", "n3", "n4"],
    "label_descriptions": {f"n{i}": label for i, label in enumerate(LABELS)},
}


def score(reward, images: Tensor, prompts: list[str] | None = None) -> Tensor:
    return reward(images, prompts or [""] * len(images)).total


def refused(said: str):
    return pytest.raises(RewardError, match=said)


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    return save_timm(tmp_path_factory.mktemp("timm") / "vit", config=DESCRIBED)


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    return save_transformers(tmp_path_factory.mktemp("transformers") / "dino")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return save_open_clip(tmp_path_factory.mktemp("clip") / "clip")


# Parity


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cut", [{}, {"crop_mode": "squash", "interpolation": "bilinear"}])
def test_logits_are_timms(tmp_path, size, cut):
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    folder = save_timm(tmp_path / "vit", **cut)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    images = natural(4, *size)
    assert_same_pipeline(load_classifier(folder), images, torch.stack([transform(x) for x in pil(images)]), model)


@pytest.mark.parametrize("size", SIZES)
def test_logits_are_transformers(dino, size):
    from transformers import BitImageProcessor, Dinov2ForImageClassification

    model = Dinov2ForImageClassification.from_pretrained(dino).eval()
    processor, images = BitImageProcessor.from_pretrained(dino), natural(4, *size)
    pixels = torch.cat([processor(picture, return_tensors="pt").pixel_values for picture in pil(images)])
    assert_same_pipeline(load_classifier(dino), images, pixels, lambda prepared: model(prepared).logits)


def test_scores_are_those_of_the_class(vit, dino):
    images = natural(4, 48, 100)
    for folder in (vit, dino):
        logits = load_classifier(folder)(images)
        for i in range(5):
            assert torch.equal(score(ImageClassifier(folder, i, "logit"), images), logits[:, i])
            assert torch.allclose(score(ImageClassifier(folder, i), images).exp(), logits.softmax(1)[:, i])


def test_zero_shot_scores_are_open_clips(clip):
    made: Any = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    model, _, transform = made
    images, said = natural(4, 24, 40), [f"a photo of {animal}" for animal in ANIMALS]
    with torch.no_grad():
        pictures = model.eval().encode_image(torch.stack([transform(p) for p in pil(images)]), normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer(f"local-dir:{clip}")(said), normalize=True)
        scale = model.logit_scale.exp()
        expected = (scale * pictures @ texts.T).log_softmax(1)
    options: dict[str, Any] = {"model": str(clip), "template": "a photo of {}"}
    rewards = [ZeroShotClassifier(ANIMALS, animal, **options) for animal in ANIMALS]
    found = torch.stack([score(reward, images) for reward in rewards], 1)
    assert (found - expected).abs().max() <= 0.004 * scale  # cosines agree within 0.002
    assert torch.allclose(found.exp().sum(1), torch.ones(4))
    chosen = score(ZeroShotClassifier(ANIMALS, **options), images[:3], ANIMALS)
    assert torch.allclose(chosen, found[:3].diagonal(), atol=1e-5)
    logits = [score(ZeroShotClassifier(ANIMALS, animal, output="logit", **options), images) for animal in ANIMALS]
    assert torch.allclose(torch.stack(logits, 1).log_softmax(1), found, atol=1e-5)


# Gradients


@pytest.mark.parametrize("kind", ["timm", "transformers", "zero shot"])
def test_gradients_are_slopes_and_the_check_passes(vit, dino, clip, kind):
    made = {
        "timm": lambda: ImageClassifier(vit, 2),
        "transformers": lambda: ImageClassifier(dino, 2),
        "zero shot": lambda: ZeroShotClassifier(ANIMALS, "a dog", str(clip)),
    }
    reward, direction = made[kind](), natural(3, 40, 56, seed=1) - 0.5
    images = 0.25 + 0.5 * natural(3, 40, 56)  # nothing is clamped, where gradients are passed on as if it were not
    leaf = images.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(score(reward, leaf).sum(), leaf)
    step = 1e-3
    with torch.no_grad():
        up, down = (score(reward, images + sign * step * direction) for sign in (1, -1))
    slopes = (slope * direction).sum((1, 2, 3))
    assert torch.allclose((up - down) / (2 * step), slopes, rtol=0.05, atol=0.02 * float(slopes.abs().max()))
    assert [found.message for found in check(reward, natural(4, 40, 56), list("abcd")) if found.fault] == []
    assert all(not parameter.requires_grad for parameter in reward.parameters())


# Names of classes


@pytest.mark.parametrize("label", ["tabby", "Tabby cat", "tabby, tabby cat", 2])
def test_classes_go_by_name_synonym_or_index(vit, dino, label):
    images = natural(2, 64, 64)
    for folder in (vit, dino):
        assert torch.equal(score(ImageClassifier(folder, label), images), score(ImageClassifier(folder, 2), images))
    assert torch.equal(score(ImageClassifier(vit, "n2"), images), score(ImageClassifier(vit, 2), images))


def test_prompts_name_the_class(dino):
    images = natural(3, 64, 64)
    rows = torch.stack([score(ImageClassifier(dino, i), images) for i in (0, 2, 4)], 1)
    reward = ImageClassifier(dino)
    assert torch.equal(score(reward, images, ["tench", "tabby", "sports car"]), rows.diagonal())
    assert reward.needs_prompt
    with refused("no class 'tabbi'; did you mean 'tabby'"):
        score(reward, images, ["tench", "tabbi", "tench"])


def test_classes_that_are_not_one_are_named(vit, dino):
    for label, said in {
        "crane": r"2 classes 'crane': pass one of the indices \[1, 3\]",
        "tabbi": "no class 'tabbi'; did you mean 'tabby'",
        "xyzzy": "no class 'xyzzy'; pass its name or index",
        -1: "counted from 0, got label=-1",
    }.items():
        for folder in (vit, dino):
            with refused(said):
                ImageClassifier(folder, label)
    with refused("classes 0 to 4, got label=5"):
        score(ImageClassifier(dino, 5), natural(1, 64, 64))
    with refused("log_probability or logit, got output='logits'; did you mean 'logit'"):
        ImageClassifier(dino, 0, "logits")


def test_imagenets_names_are_known_where_the_tag_says_so(tmp_path):
    folder = save_timm(tmp_path / "vit", classes=1000)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["tag"] = "a1_in1k"
    (folder / "config.json").write_text(json.dumps(config))
    images = natural(1, 64, 64)
    assert torch.equal(score(ImageClassifier(folder, "tabby"), images), score(ImageClassifier(folder, 281), images))
    config["pretrained_cfg"]["tag"] = "mine"
    (folder / "config.json").write_text(json.dumps(config))
    with refused("does not name its classes: pass an index"):
        ImageClassifier(folder, "tabby")


def test_texts_that_are_no_choice_are_named(clip):
    for texts, text, template, said in [
        (["a cat"], None, "{}", "at least two different texts"),
        (["a cat", "a cat"], None, "{}", "at least two different texts"),
        ("a cat", None, "{}", "at least two different texts, got 'a cat'"),
        (ANIMALS, "a dgo", "{}", "no text 'a dgo'; did you mean 'a dog'.* It has: a cat, a dog, a horse"),
        (ANIMALS, None, "a photo", "one {} for the text, got 'a photo'"),
    ]:
        with refused(said):
            ZeroShotClassifier(texts, text, str(clip), template=template)
    with refused("no text 'a cow'"):
        score(ZeroShotClassifier(ANIMALS, model=str(clip)), natural(1, 24, 24), ["a cow"])


# Loading


class Harmful:
    """What unpickling would run."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    for save, key in ((save_timm, "head.weight"), (save_transformers, "classifier.weight")):
        folder = save(tmp_path / key)
        whole = load_file(folder / "model.safetensors")
        partial = {name: value for name, value in whole.items() if name != key}
        for tensors, said in [
            (partial, key),
            ({**whole, key: whole[key][:3].clone()}, key),
            ({**whole, "more": torch.zeros(1)}, "more"),
        ]:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            with refused(f"do not fit.*{said}"):
                ImageClassifier(folder, 0)
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
        with refused("cannot be loaded"):
            ImageClassifier(folder, 0)
        (folder / "model.safetensors").unlink()
        with refused("has no model.safetensors"):
            ImageClassifier(folder, 0)


def test_a_checkpoint_that_holds_code_is_not_run(tmp_path):
    folder = save_timm(tmp_path / "vit")
    (folder / "model.safetensors").unlink()
    torch.save({"head.weight": Harmful(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with refused("holds more than tensors and was not opened"):
        ImageClassifier(folder, 0)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_classifier_is_named(tmp_path):
    with refused("has no classes, only features"):
        ImageClassifier(save_timm(tmp_path / "features", classes=0), 0)
    (tmp_path / "empty").mkdir()
    with refused("has no config.json"):
        ImageClassifier(tmp_path / "empty", 0)
    (tmp_path / "empty" / "config.json").write_text("[]")
    with refused("holds list, not the table of a model"):
        ImageClassifier(tmp_path / "empty", 0)
    (tmp_path / "empty" / "config.json").write_text("{")
    with refused("config.json cannot be loaded"):
        ImageClassifier(tmp_path / "empty", 0)
    (tmp_path / "empty" / "config.json").write_text('{"architecture": "vit_of_tomorrow"}')
    with refused("architecture 'vit_of_tomorrow', which the installed timm lacks"):
        ImageClassifier(tmp_path / "empty", 0)
    with refused("config.json of 'timm/resnet50.a1_in1k' is not on this machine and cannot be downloaded"):
        ImageClassifier("timm/resnet50.a1_in1k", 0, cache_dir=tmp_path / "cache")


def test_another_preprocessing_is_refused(tmp_path):
    folder = save_timm(tmp_path / "vit", crop_mode="border")
    with refused("preprocessing of .* is none that steerfm knows.*border to 32x32"):
        ImageClassifier(folder, 0)


def test_the_recipes_build_it(workplace, vit, clip):
    given = {
        "classifier": [f"reward.model={vit}", "reward.label=tabby"],
        "zero_shot": [f"reward.model={clip}", "reward.weights=null", "reward.texts=[a cat,a dog]", "reward.text=a dog"],
    }
    for name, overrides in given.items():
        lines = ["recipe=digits_steer", "map=none", f"reward={name}", *overrides]
        assert score(config.compose("steer", lines).build("reward"), natural(2, 40, 40)).shape == (2,)
