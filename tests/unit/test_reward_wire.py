"""What goes between a reward and whoever asks it: written and read to the last bit, and refused in one sentence."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from picture_files import encoded, noisy
from PIL import Image
from torch import Tensor

from steerfm import reward_wire
from steerfm.errors import RewardError
from steerfm.reward import Scores
from steerfm.reward_wire import FORMS, JSON, TENSORS, Declared, Limits, Refused, Reply, Request
from steerfm.rewards.simple import Brightness, JPEGSize

SMALL = Limits(body=10_000, pictures=3, pixels=200, prompt=20)
BRIGHTNESS = reward_wire.declared(Brightness())
SILENT = Declared("silent", True, True, False, None, True)


def pictures(count: int = 2, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, channels, 5, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


def tensors(more: Any = None, **given: Tensor) -> bytes:
    values = {"prompts": ["a", "b"]} if more is None else more
    return safetensors.torch.save(given or {"images": pictures()}, {"request": json.dumps(values)})


def text(**changes: Any) -> bytes:
    picture = base64.b64encode(encoded(noisy(5, 4), "PNG")).decode()
    return json.dumps({"images": [picture, picture], "prompts": ["a", "b"], **changes}).encode()


def png(image: Image.Image, **options: Any) -> list[str]:
    return [base64.b64encode(encoded(image, "PNG", **options)).decode()] * 2


@pytest.mark.parametrize("dtype", reward_wire.DTYPES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("gradient", [True, False])
def test_a_request_arrives_as_it_was(dtype: torch.dtype, channels: int, gradient: bool):
    sent = Request(pictures(channels=channels, dtype=dtype), ["ein Bär", "\n🐻"], gradient)
    read = reward_wire.read_request(reward_wire.write_request(sent, TENSORS), TENSORS, Limits())
    assert torch.equal(read.images, sent.images)
    assert (read.images.dtype, read.prompts, read.gradient) == (dtype, sent.prompts, gradient)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_request_in_png_is_rounded_to_8_bits(channels: int):
    sent = Request(pictures(channels=channels), ["ein Bär", "\n🐻"])
    read = reward_wire.read_request(reward_wire.write_request(sent, JSON), JSON, Limits())
    assert torch.equal(read.images, (sent.images * 255).round() / 255)
    assert read.prompts == sent.prompts


@pytest.mark.parametrize("form", FORMS)
def test_a_reply_arrives_as_it_was(form: str):
    images = pictures()
    parts = {"silent": torch.tensor([torch.nan, 1 / 3])}
    gradient = images / 7 if form == TENSORS else None
    asked = Request(images, ["", ""], gradient is not None)
    sent = Reply(Scores(torch.tensor([torch.nan, 0.1]), parts), gradient)
    read = reward_wire.read_reply(reward_wire.write_reply(sent, form), form, asked, SILENT)
    assert torch.equal(read.scores.total.nan_to_num(-9.0), sent.scores.total.nan_to_num(-9.0))
    assert torch.equal(read.scores.parts["silent"].nan_to_num(-9.0), parts["silent"].nan_to_num(-9.0))
    assert (gradient is None and read.gradient is None) or torch.equal(read.gradient, gradient)  # type: ignore[arg-type]


@pytest.mark.parametrize("reward", [Brightness(), JPEGSize(), Brightness() + 0.5 * JPEGSize()])
def test_what_is_declared_arrives_as_it_was(reward: Any):
    told = reward_wire.declared(reward)
    written = json.dumps({"rewards": [reward_wire.write_declared(told)]}, allow_nan=False).encode()
    assert reward_wire.read_listing(written) == {told.name: told}


def test_an_infinite_bound_is_null():
    told = Declared("log", True, True, False, (-float("inf"), 0.0), False)
    assert reward_wire.write_declared(told)["native_range"] == [None, 0.0]
    assert reward_wire.read_declared(reward_wire.write_declared(told)) == told


def nested(depth: int) -> bytes:
    return b"[" * depth


def bomb() -> str:
    """Return a small PNG file that says it is of 60000 x 60000 pixels."""
    data = encoded(Image.new("L", (1, 1)), "PNG")
    header = struct.pack(">II", 60_000, 60_000) + data[24:29]
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return base64.b64encode(data[:16] + header + checksum + data[33:]).decode()


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "This is no JSON"),
        (b"\xff\xfe\x00", 400, "This is no JSON"),
        (nested(2000), 400, "This is no JSON"),
        (nested(reward_wire.MARKS + 1), 413, "commas and brackets"),
        (b"[]", 400, "A JSON object was expected, got list"),
        (b"{}", 400, "'prompts' is a list of strings"),
        (text(prompts="ab"), 400, "'prompts' is a list of strings"),
        (text(prompts=["a", 1]), 400, "'prompts' is a list of strings"),
        (text(prompts=["a", "\ud800"]), 400, "half of a character"),
        (text(prompts=["a", "b" * 21]), 413, "at most 20 characters, got 21"),
        (text(prompts=["a"]), 400, "one prompt a picture, and at least one picture, got 2 and 1"),
        (text(prompts=[], images=[]), 400, "at least one picture, got 0"),
        (text(prompts=["a"] * 4, images=[""] * 4), 413, "at most 3 pictures, got 4"),
        (text(images="a"), 400, "'images' is a list of PNG files"),
        (text(images=[1, 2]), 400, "'images' is a list of PNG files"),
        (text(images=["§", "§"]), 400, "Picture 0 is no PNG in base64"),
        (text(images=["AAAA", "AAAA"]), 400, "Picture 0 is no PNG in base64"),
        (text(images=[base64.b64encode(encoded(noisy(5, 4), "JPEG")).decode()] * 2), 400, "is no PNG"),
        (text(images=[bomb()] * 2), 413, "pixels"),
        (text(images=png(noisy(15, 15))), 413, "at most 200 pixels, got 225"),
        (text(images=png(noisy(11, 11))), 413, "at most 200 pixels, got 242"),
        (text(images=png(noisy(5, 4).convert("RGBA"))), 400, "mode RGBA: save it as 8-bit RGB or grey"),
        (text(images=png(noisy(5, 4).convert("P"))), 400, "mode P"),
        (text(images=png(Image.new("I;16", (4, 5)))), 400, "mode I;16"),
        (text(images=[png(noisy(5, 4))[0][:-40]] * 2), 400, "Picture 0 is no PNG"),
        (text(images=[png(noisy(5, 4))[0], png(noisy(4, 5))[0]]), 400, "send one size"),
        (text(gradient=True), 400, f"send {TENSORS}"),
    ],
)
def test_json_that_is_not_sound_is_refused(body: bytes, status: int, said: str):
    with pytest.raises(Refused, match=said.replace("(", r"\(")) as refused:
        reward_wire.read_request(body, JSON, SMALL)
    assert refused.value.status == status


LARGE = torch.zeros(1, 3, 15, 15)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "shorter than their header"),
        (b"\xff" * 8 + b"{}", 400, "shorter than their header"),
        (struct.pack("<Q", 2) + b"[]", 400, "A JSON object was expected"),
        (struct.pack("<Q", 5000) + nested(5000), 400, "This is no JSON"),
        (tensors()[:-1], 400, "cannot be read"),
        (tensors() + b"\0", 400, "cannot be read"),
        (struct.pack("<Q", 70) + b'{"images":{"dtype":"F32","shape":[9],"data_offsets":[0,9]}}'.ljust(70), 400, "read"),
        (tensors(other=pictures()), 400, "lack the tensor 'images'"),
        (safetensors.torch.save({"images": pictures()}), 400, "This is no JSON"),
        (tensors([]), 400, "A JSON object was expected"),
        (tensors({}), 400, "'prompts' is a list"),
        (tensors({"prompts": ["a", "b"], "gradient": 1}), 400, "'gradient' is true or false, got 1"),
        (tensors(images=pictures()[0]), 400, "got (3, 5, 4), float32"),
        (tensors(images=pictures(channels=2)), 400, "got (2, 2, 5, 4), float32"),
        (tensors(images=pictures().half()), 400, "got (2, 3, 5, 4), float16"),
        (tensors(images=pictures().long()), 400, "got (2, 3, 5, 4), int64"),
        (tensors(images=pictures()[..., :0].contiguous()), 400, "got (2, 3, 5, 0)"),
        (tensors({"prompts": []}, images=pictures()[:0]), 400, "got (0, 3, 5, 4)"),
        (tensors(images=pictures(1)), 400, "got 1 and 2"),
        (tensors({"prompts": [""] * 4}, images=pictures(4)), 413, "at most 3 pictures"),
        (tensors({"prompts": [""]}, images=LARGE), 413, "at most 200 pixels, got 225"),
        (tensors(images=pictures() * 2), 422, "Pixels lie in [0, 1]"),
        (tensors(images=pictures() - 0.1), 422, "Pixels lie in [0, 1]"),
        (tensors(images=pictures() * torch.nan), 422, "got values in [nan, nan]"),
        (tensors(images=pictures() / 0), 422, "Pixels lie in [0, 1]"),
    ],
)
def test_tensors_that_are_not_sound_are_refused(body: bytes, status: int, said: str):
    with pytest.raises(Refused) as refused:
        reward_wire.read_request(body, TENSORS, SMALL)
    assert said in str(refused.value)
    assert refused.value.status == status


def test_rounding_may_leave_the_range():
    assert reward_wire.read_request(tensors(images=pictures() * 0 - 5e-4), TENSORS, SMALL).images.min() < 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"total": torch.zeros(3)}, "must return the shape (2,)"),
        ({"total": torch.tensor([0.0, torch.inf])}, "gave inf for sample 1"),
        ({"total": torch.tensor([0.0, torch.nan])}, "gave nan for sample 1"),
        ({"total": torch.zeros(2).long()}, "floating-point"),
        ({"part/brightness": torch.zeros(2, 1)}, "must return the shape (2,)"),
        ({"part/other": torch.zeros(2)}, "are its values alone, got 2"),
        ({"gradient": torch.zeros(2, 3, 4, 5)}, "has the shape (2, 3, 5, 4) of its pictures, got (2, 3, 4, 5)"),
        ({"gradient": torch.zeros(2, 3, 5, 4).int()}, "has the shape"),
        ({"gradient": torch.full((2, 3, 5, 4), torch.nan)}, "not finite"),
        ({"gradient": None}, "none came"),
    ],
)
def test_a_reply_that_is_not_sound_is_refused(given: dict[str, Tensor | None], said: str):
    sound: dict[str, Tensor | None] = {
        "total": torch.zeros(2),
        "part/brightness": torch.zeros(2),
        "gradient": pictures(),
    }
    body = safetensors.torch.save({name: each for name, each in (sound | given).items() if each is not None})
    with pytest.raises(RewardError) as refused:
        reward_wire.read_reply(body, TENSORS, Request(pictures(), ["", ""], True), BRIGHTNESS)
    assert said in str(refused.value)


def test_a_part_that_was_declared_must_come():
    whole = reward_wire.declared(Brightness() + JPEGSize())
    body = json.dumps({"total": [1], "parts": {"brightness": [1]}}).encode()
    with pytest.raises(Refused, match="are brightness, jpeg_size, got 1 others"):
        reward_wire.read_reply(body, JSON, Request(pictures(1), [""]), whole)


@pytest.mark.parametrize(
    "wrong",
    [
        3,
        {},
        {"name": "a"},
        {"native_range": [1]},
        {"native_range": ["a", 1]},
        {"parts": 3},
        {"parts": [{"parts": [1]}]},
    ],
)
def test_a_description_that_is_not_sound_is_refused(wrong: Any):
    sound = reward_wire.write_declared(BRIGHTNESS)
    given = {**sound, **wrong} if isinstance(wrong, dict) and wrong and "name" not in wrong else wrong
    with pytest.raises(Refused):
        reward_wire.read_declared(given)


SOUND = (text(), tensors())


def altered(body: bytes, place: int, put: bytes, cut: int) -> bytes:
    place %= len(body) + 1
    return body[:place] + put + body[place + cut :]


@settings(max_examples=150, deadline=None)
@given(
    some.one_of(
        some.binary(max_size=300),
        some.builds(
            altered, some.sampled_from(SOUND), some.integers(0, 10_000), some.binary(max_size=9), some.integers(0, 600)
        ),
    ),
    some.sampled_from(FORMS),
)
def test_whatever_comes_is_read_or_refused(body: bytes, form: str):
    found = read_or_refused(body, form)
    if isinstance(found, Refused):
        assert found.status in (400, 413, 422)
        assert str(found).isprintable()
    else:
        assert len(found.images) == len(found.prompts) <= 3
        assert found.images.isfinite().all()


def read_or_refused(body: bytes, form: str) -> Request | Refused:
    try:
        return reward_wire.read_request(body, form, SMALL)
    except Refused as refused:
        return refused
