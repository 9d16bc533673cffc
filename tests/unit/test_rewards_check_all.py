"""`steerfm reward check` on every reward that ships, on small models in the published formats."""

import importlib
import json
import pkgutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import tiny_image_reward
import tiny_scores
import tiny_vlm
from PIL import Image
from safetensors.torch import save_file
from served import served
from tiny_encoders import save_open_clip
from tiny_image_models import save_backbone, save_timm
from tiny_service import Asked, Told, service
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from steerfm import digits, reward_check, rewards
from steerfm.commands.reward import noise, scenes, tinted_digits
from steerfm.reward import Reward, check
from steerfm.rewards.aesthetic import Aesthetic, AestheticV25
from steerfm.rewards.classifier import ImageClassifier, ZeroShotClassifier
from steerfm.rewards.clip import CLIPScore
from steerfm.rewards.digit_judge import DigitJudge
from steerfm.rewards.hps import HPSv2
from steerfm.rewards.image_reward import ImageReward
from steerfm.rewards.inverse import GaussianBlur, Measurement
from steerfm.rewards.ocr import OCR
from steerfm.rewards.pick_score import PickScore
from steerfm.rewards.preference import JSON_NAME, WEIGHTS_NAME, Preference, PreferenceNetwork
from steerfm.rewards.remote import Remote
from steerfm.rewards.served_judge import ServedJudge
from steerfm.rewards.shape_prompts import ShapePrompts
from steerfm.rewards.similarity import LPIPS, SSIM, FeatureSimilarity, image_features
from steerfm.rewards.simple import Brightness, Colourfulness, Contrast, JPEGSize, Redness, Sharpness, Symmetry
from steerfm.rewards.vlm_judge import VLMJudge

COUNT = 4
Pictures = tuple[Tensor, list[str]]
REFERENCE = noise(COUNT + 1)[0][-1]


def reading_digits(picture: Image.Image) -> str:
    """Read a scan of a digit as its caption."""
    (label,) = DigitJudge().labels(to_tensor(picture)[None]).tolist()
    return digits.CAPTIONS[label]


def quoted_digits(count: int) -> Pictures:
    """Return scans of digits with prompts that quote the caption of the first."""
    pictures, captions = tinted_digits(count)
    return pictures, [f'a sign that says "{captions[0]}"'] * count


def image_reward(folder: Path, stack: ExitStack) -> Reward:
    tiny_image_reward.save(folder)
    return ImageReward(folder, folder / tiny_image_reward.BERT, vision_layers=tiny_image_reward.SIZES["layers"])


def preference(folder: Path, stack: ExitStack) -> Reward:
    network = PreferenceNetwork(str(save_open_clip(folder / "clip")))
    (folder / JSON_NAME).write_text(json.dumps(network.describe()))
    save_file(network.learnt(), folder / WEIGHTS_NAME)
    return Preference(folder)


def served_judge(folder: Path, stack: ExitStack) -> Reward:
    def answer(asked: Asked) -> Told:
        picture, question = json.loads(asked.body)["messages"][0]["content"]
        number = (len(picture["image_url"]["url"]) / 1000 + len(question["text"])) / 100
        message = {"role": "assistant", "content": f"{number:.6f}"}
        return Told(body=json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode())

    return ServedJudge(stack.enter_context(service(answer)).address + "/v1", "tiny", tries=1)


Make = Callable[[Path, ExitStack], Reward]
MADE: dict[type[Reward], tuple[Make, Callable[[int], Pictures]]] = {
    Aesthetic: (lambda at, _: Aesthetic(tiny_scores.save_head(at), tiny_scores.save_clip(at / "clip")), noise),
    AestheticV25: (lambda at, _: AestheticV25(tiny_scores.save_head_v25(at), tiny_scores.save_siglip(at / "v")), noise),
    Brightness: (lambda at, _: Brightness(), scenes),
    CLIPScore: (lambda at, _: CLIPScore(str(save_open_clip(at / "clip"))), noise),
    Colourfulness: (lambda at, _: Colourfulness(), scenes),
    Contrast: (lambda at, _: Contrast(), scenes),
    DigitJudge: (lambda at, _: DigitJudge(), tinted_digits),
    FeatureSimilarity: (lambda at, _: FeatureSimilarity(REFERENCE, image_features(save_timm(at))), noise),
    HPSv2: (lambda at, _: HPSv2(tiny_scores.save_hps(at), architecture=tiny_scores.HPS), noise),
    ImageClassifier: (lambda at, _: ImageClassifier(save_timm(at), 2), noise),
    ImageReward: (image_reward, noise),
    JPEGSize: (lambda at, _: JPEGSize(), scenes),
    LPIPS: (lambda at, _: LPIPS(REFERENCE, save_backbone(at / "alexnet.pth")), noise),
    Measurement: (lambda at, _: Measurement(GaussianBlur(1.0), 0.1, picture=REFERENCE), scenes),
    OCR: (lambda at, _: OCR(reading_digits), quoted_digits),
    PickScore: (lambda at, _: PickScore(tiny_scores.save_clip(at / "clip")), noise),
    Preference: (preference, noise),
    Redness: (lambda at, _: Redness(), scenes),
    Remote: (lambda at, stack: Remote(stack.enter_context(served(Contrast())), "contrast"), scenes),
    SSIM: (lambda at, _: SSIM(REFERENCE), noise),
    ServedJudge: (served_judge, scenes),
    ShapePrompts: (lambda at, _: ShapePrompts("graded"), scenes),
    Sharpness: (lambda at, _: Sharpness(), scenes),
    Symmetry: (lambda at, _: Symmetry(), scenes),
    VLMJudge: (lambda at, _: VLMJudge(tiny_vlm.save(at)), noise),
    ZeroShotClassifier: (
        lambda at, _: ZeroShotClassifier(["a red circle", "two boats"], "two boats", str(save_open_clip(at / "clip"))),
        noise,
    ),
}
BLACK_BOXES = {DigitJudge, JPEGSize, OCR, ServedJudge, ShapePrompts}


def test_no_reward_that_ships_is_left_out():
    modules = [
        importlib.import_module(f"steerfm.rewards.{each.name}") for each in pkgutil.iter_modules(rewards.__path__)
    ]
    found = {
        each
        for module in modules
        for name, each in vars(module).items()
        if isinstance(each, type) and issubclass(each, Reward) and not name.startswith("_")
    }
    assert found - {Reward} == set(MADE)


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.__name__)
def test_the_check_finds_no_fault(kind: type[Reward], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tried: list[float] = []

    def difference(*arguments: object) -> float:
        tried.append(arguments[-1])  # type: ignore[arg-type]
        return whole(*arguments)  # type: ignore[arg-type]

    whole = reward_check._difference
    monkeypatch.setattr(reward_check, "_difference", difference)
    make, pictures = MADE[kind]
    with ExitStack() as stack:
        reward = make(tmp_path, stack)
        assert type(reward) is kind
        findings = check(reward, *pictures(COUNT))
    assert [f"{each.subject}: {each.message}" for each in findings if each.fault] == []
    assert reward.differentiable == (kind not in BLACK_BOXES)
    assert tried == (list(reward_check.STEPS) if reward.differentiable else [])
    assert {each.subject for each in findings} <= {"prompts"}  # neither silent nor flat, and no gradient undeclared
