"""Pictures as conditions: prompts that name them, how they are read, what is refused, and what rewards see."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from steerfm import FlowMap
from steerfm.conditions import CaptionWords, Pictures
from steerfm.conditions.pictures import captions_of, joined, read_picture, split_prompt
from steerfm.errors import ConfigError, DataError
from steerfm.networks import UNet, WordEncoder
from steerfm.networks.mlp import randomise
from steerfm.reward import Reward, as_reward
from steerfm.sampling import Unsteered
from steerfm.types import Condition

WORDS = ["a", "red", "circle"]


@pytest.fixture
def painted(workplace: Path) -> Path:
    """Return a folder with a picture of 4 x 2 pixels, red above and half green below."""
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[0, :, 0], pixels[1, :, 1] = 255, 128
    Image.fromarray(pixels).save(workplace / "stripes.png")
    return workplace


# --- prompts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "caption", "path"),
    [
        ("a red circle @ edges/circle.png", "a red circle", "edges/circle.png"),
        ("@ edges/circle.png", "", "edges/circle.png"),
        (" @  my edges/the circle.JPEG ", "", "my edges/the circle.JPEG"),
        ("a cat @ night @ edges/cat.webp", "a cat @ night", "edges/cat.webp"),
        ("a cat\n@ cat@2x.png", "a cat", "cat@2x.png"),
        ("a red circle", "a red circle", None),
        ("", "", None),
        ("coffee @ noon", "coffee @ noon", None),
        ("write to me@home.png", "write to me@home.png", None),
        ("by @artist", "by @artist", None),
        ("a @ b.png and more", "a @ b.png and more", None),
    ],
)
def test_a_prompt_is_split_before_the_name_of_a_picture(prompt: str, caption: str, path: str | None):
    assert split_prompt(prompt) == (caption, path)
    assert list(captions_of(["x", prompt])) == ["x", caption]


@pytest.mark.parametrize("prompt", ["a @ b.pnq", "@ ", "a cat @", "a @ b.png @ c.png", "a @b.png", "a @ b.png , c"])
def test_what_was_meant_as_a_picture_is_not_read_as_words(prompt: str, painted: Path):
    with pytest.raises(DataError, match=r"has an '@' without a picture: write 'caption @ file\.png'"):
        Pictures(3, 4)([prompt])


def test_an_at_within_a_word_is_let_pass(painted: Path):
    assert not Pictures(3, 4)(["by @artist, a@b.c"])["picture"].any()


# --- reading --------------------------------------------------------------------------------------------------


def test_a_picture_lies_beside_its_mask(painted: Path):
    picture = Pictures(3, (2, 4))(["@ stripes.png", ""])["picture"]
    assert picture.shape == (2, 4, 2, 4)
    assert picture.dtype == torch.float32
    half = 2 * 128 / 255 - 1
    rows = [[[1, -1]], [[-1, half]], [[-1, -1]], [[1, 1]]]  # red, green, blue and the mask, from above
    assert torch.allclose(picture[0], torch.tensor(rows).transpose(1, 2).expand(4, 2, 4), atol=1e-6)
    assert not picture[1].any()


def test_left_and_right_stay_where_they_are(painted: Path):
    pixels = np.zeros((2, 3), np.uint8)
    pixels[0, 0], pixels[1, 2] = 255, 128
    Image.fromarray(pixels).save("corner.png")
    expected = 2 * torch.from_numpy(pixels).float() / 255 - 1
    assert torch.allclose(read_picture("corner.png", 1, (2, 3))[0], expected, atol=1e-6)


def test_grey_is_made_of_colours_and_colours_of_grey(painted: Path):
    weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601-2, as Pillow has it, rounded to one of 255 levels
    grey = read_picture("stripes.png", 1, (2, 4))
    expected = 2 * torch.stack([weights[0], weights[1] * 128 / 255]) - 1
    assert grey.shape == (1, 2, 4)
    assert torch.allclose(grey[0, :, 0], expected, atol=1.01 / 255)
    Image.fromarray(np.full((2, 2), 51, np.uint8)).save("grey.png")
    assert torch.allclose(read_picture("grey.png", 3, (2, 2)), torch.full((3, 2, 2), -0.6), atol=1e-6)


def test_pictures_are_stretched_to_the_state(painted: Path):
    """Bicubic overshoots by 0.12 of the step beside the edge of the stripes, and the range is kept."""
    picture = read_picture("stripes.png", 3, (16, 8))
    assert picture.shape == (3, 16, 8)
    assert float(picture.max()) == 1
    assert float(picture.min()) == -1
    assert torch.allclose(picture[0, 0], torch.ones(8), atol=1e-6)
    assert torch.allclose(picture[1, -1], torch.full((8,), 2 * 128 / 255 - 1), atol=0.13)


def test_unusual_pictures_are_read_as_they_look(painted: Path):
    Image.fromarray(np.array([[0, 65535], [32768, 257]], np.uint16)).save("deep.png")
    deep = torch.tensor([[0, 65535], [32768, 257]]) / 65535 * 2 - 1
    assert torch.allclose(read_picture("deep.png", 1, (2, 2))[0], deep, atol=1e-6)
    assert torch.equal(*read_picture("deep.png", 3, (2, 2))[:2])
    Image.fromarray(np.array([[[255, 0, 0, 0], [255, 0, 0, 255]]], np.uint8), "RGBA").save("clear.png")
    clear = read_picture("clear.png", 3, (1, 2))
    assert clear[:, 0, 0].tolist() == [1, 1, 1]
    assert clear[:, 0, 1].tolist() == [1, -1, -1]
    turned = Image.open("stripes.png")
    exif = turned.getexif()
    exif[0x0112] = 6  # lies on its left side
    turned.save("turned.png", exif=exif)
    assert torch.equal(read_picture("turned.png", 3, (4, 2))[0, 0], torch.tensor([-1.0, 1.0]))


# --- what is refused ------------------------------------------------------------------------------------------


def test_files_that_are_no_good_pictures_are_named(painted: Path, monkeypatch: pytest.MonkeyPatch):
    whole = Path("stripes.png").read_bytes()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save("noise.jpg")
    Path("cut.jpg").write_bytes(Path("noise.jpg").read_bytes()[:2000])
    Path("cut.png").write_bytes(whole[:-20])
    Path("head.png").write_bytes(whole[:20])
    Path("text.png").write_text("a red circle")
    Path("folder.png").mkdir()
    Image.fromarray(np.zeros((2, 2), np.float32)).save("float.tiff")
    Path("script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n")
    for path, said in {
        "missing.png": f"There is no picture 'missing.png' below {painted}: write the path of a file after the '@'",
        "folder.png": "There is no picture 'folder.png'",
        "text.png": "The file 'text.png' is no picture: give one of PNG, JPEG",
        "script.png": "The file 'script.png' is no picture",
        "cut.png": r"The picture 'cut.png' cannot be read \(.*\): save it again",
        "head.png": r"The picture 'head.png' cannot be read \(.*\): save it again",
        "cut.jpg": r"The picture 'cut.jpg' cannot be read \(.*truncated.*\): save it again",
        "float.tiff": "The picture 'float.tiff' cannot be read .*Pillow's mode F",
    }.items():
        with pytest.raises(DataError, match=said) as caught:
            Pictures(3, 4)([f"a circle @ {path}"])
        assert "\n" not in str(caught.value)
    monkeypatch.setattr("steerfm.conditions.pictures.MAX_PIXELS", 7)
    with pytest.raises(DataError, match=r"'stripes.png' has more than 7 pixels: make it smaller"):
        read_picture("stripes.png", 3, (2, 2))
    monkeypatch.setattr("steerfm.conditions.pictures.MAX_BYTES", 20)
    with pytest.raises(DataError, match=r"'stripes.png' is a file of more than 20 bytes"):
        read_picture("stripes.png", 3, (2, 2))


@pytest.mark.parametrize(("channels", "size"), [(2, 4), (3, 0), (3, (4,)), (3, (4, 4, 4))])
def test_sizes_are_checked(channels: int, size: Any):
    with pytest.raises(ConfigError, match="1 or 3 channels and a size of one number or"):
        Pictures(channels, size)


def test_names_of_two_conditioners_must_differ():
    assert set(joined(Condition({"a": torch.zeros(1)}), Condition({"b": torch.zeros(1)})).tensors) == {"a", "b"}
    with pytest.raises(ConfigError, match="Two conditioners both give 'picture'"):
        Pictures(1, 4, captions=Pictures(1, 4)).null(1)


# --- captions, maps and rewards -------------------------------------------------------------------------------


def test_captions_go_to_their_own_conditioner(painted: Path, caplog: pytest.LogCaptureFixture):
    words = CaptionWords(WORDS, 3)
    both = Pictures(1, 4, captions=words)
    condition = both(["a red circle @ stripes.png", "@ stripes.png", "a circle"])
    assert torch.equal(condition["words"], words(["a red circle", "", "a circle"])["words"])
    assert condition["picture"][:, -1].flatten(1).amax(1).tolist() == [1, 1, 0]
    null = both.null(2)
    assert set(null.tensors) == {"picture", "words"}
    assert not any(tensor.any() for tensor in null.tensors.values())
    alone = Pictures(1, 4)
    with caplog.at_level(logging.WARNING):
        alone(["@ stripes.png", ""])
        assert caplog.messages == []
        alone(["a red circle @ stripes.png", "a circle"])
        alone(["a circle"])
    assert caplog.messages == ["The map reads pictures and no captions, so 'a red circle' does not reach it."]


def picture_map() -> FlowMap:
    text = WordEncoder(len(WORDS), 3, width=8, layers=1, heads=2)
    network = UNet((1, 4, 4), channels=(8,), text=text, picture_channels=3)
    randomise(network, scale=0.3)
    return FlowMap(network, conditioner=Pictures(3, 4, captions=CaptionWords(WORDS, 3)))


def test_a_map_with_pictures_comes_back_bit_for_bit(painted: Path):
    flow_map = picture_map().with_guidance(1.5)
    prompts = ["a red circle @ stripes.png", "@ stripes.png", "a circle", ""]
    x = torch.randn(4, 1, 4, 4)
    expected = flow_map.velocity(x, 0.5, flow_map.encode_prompts(prompts))
    flow_map.save("map")
    back = FlowMap.load("map")
    assert torch.equal(back.velocity(x, 0.5, back.encode_prompts(prompts)), expected)
    x = x[:1].expand(4, -1, -1, -1)
    each = flow_map.velocity(x, 0.5, flow_map.encode_prompts(prompts)).flatten(1)
    assert (torch.cdist(each, each) + 9 * torch.eye(4)).min() > 1e-3  # each prompt has a say


class Heard(Reward):
    """Score zero, and remember the prompts."""

    differentiable = False

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.prompts: list[list[str]] = []

    def score(self, images: Tensor, prompts: Any, **metadata: Any) -> Tensor:
        self.prompts.append(list(prompts))
        return images.new_zeros(len(images))


def test_rewards_see_the_caption_and_samples_the_prompt(painted: Path):
    class_, in_sum, heard = Heard("class"), Heard("sum"), []

    def function(images: Tensor, prompts: Any) -> Tensor:
        heard.append(list(prompts))
        return images.mean((1, 2, 3))

    prompts = ["a red circle @ stripes.png", "coffee @ noon"]
    reward = 0.5 * class_ + as_reward(function) + in_sum
    reward(torch.zeros(2, 3, 4, 4), prompts)
    captions = ["a red circle", "coffee @ noon"]
    assert [*class_.prompts, *in_sum.prompts, *heard] == [captions] * 3
    samples = Unsteered("jumps", 1)(picture_map(), reward, prompts=prompts[:1], seeds=[0])
    assert samples.prompts == prompts[:1]
    assert heard[-1] == captions[:1]
    plain: list[Any] = ["a", "b"]
    assert captions_of(plain) is plain
