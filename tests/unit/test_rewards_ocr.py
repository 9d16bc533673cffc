"""Written text: edit distances by hand, what prompts quote, and a reader of digits that compares with templates."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from steerfm import config
from steerfm.errors import RewardError, TrustError
from steerfm.reward import check
from steerfm.rewards.ocr import OCR, edits, quoted

GLYPHS = {
    "0": "###/#.#/#.#/#.#/###", "1": ".#./##./.#./.#./###", "2": "###/..#/###/#../###", "3": "###/..#/###/..#/###",
    "4": "#.#/#.#/###/..#/..#", "5": "###/#../###/..#/###", "6": "###/#../###/#.#/###", "7": "###/..#/..#/..#/..#",
    "8": "###/#.#/###/#.#/###", "9": "###/#.#/###/..#/###",
}  # fmt: skip
TEMPLATES = {digit: np.array([[x == "#" for x in row] for row in g.split("/")]) for digit, g in GLYPHS.items()}


def written(text: str, width: int = 33) -> Tensor:
    """Return a picture (3, 9, width) of digits, white on dark blue, four columns each."""
    picture = torch.zeros(3, 9, width)
    picture[2] = 0.3
    for i, digit in enumerate(text):
        picture[:, 2:7, 2 + 4 * i : 5 + 4 * i] += torch.from_numpy(TEMPLATES[digit]).float() * 0.7
    return picture


def read_digits(picture: Image.Image) -> str:
    """Read digits of three columns by their nearest template, from left to right, skipping dark columns."""
    ink = np.asarray(picture.convert("L")) > 100
    found, left = "", 0
    while left < ink.shape[1] - 2:
        if not ink[:, left].any():
            left += 1
            continue
        seen = ink[2:7, left : left + 3]
        found += min(TEMPLATES, key=lambda digit: int((TEMPLATES[digit] != seen).sum()))
        left += 3
    return found


def score(reward: OCR, images: Tensor, prompts: list[str]) -> list[float]:
    return reward(images, prompts).total.tolist()


def refused(said: str):
    return pytest.raises(RewardError, match=said)


def test_the_reader_reads_what_is_written():
    for text in ("0123456", "789", "4071", ""):
        assert read_digits(Image.fromarray((written(text) * 255).byte().permute(1, 2, 0).numpy())) == text


def test_scores_fall_with_every_edit():
    images = torch.stack([written(text) for text in ("2025", "2024", "225", "20252", "9", "")])
    prompts = ['a sign that says "2025"'] * 6
    assert score(OCR(read_digits), images, prompts) == pytest.approx([1, 0.75, 0.75, 0.75, 0, 0])


def test_more_edits_than_letters_score_zero():
    assert score(OCR(read_digits, text="1"), written("2025789")[None], [""]) == [0.0]


def test_each_prompt_is_scored_on_its_own_picture():
    images = torch.stack([written("12"), written("12")])
    assert score(OCR(read_digits), images, ['"12"', '"34"']) == [1.0, 0.0]
    assert score(OCR(read_digits, text="12"), images, ["nothing", "is quoted"]) == [1.0, 1.0]


def test_readers_see_rgb_pictures_of_pillow():
    seen = []
    images = torch.rand(2, 1, 6, 8)
    OCR(lambda picture: seen.append(picture) or "a", text="a")(images, ["", ""])
    assert [(picture.mode, picture.size) for picture in seen] == [("RGB", (8, 6))] * 2
    assert np.array_equal(np.asarray(seen[1])[..., 0], (images[1, 0] * 255).round().numpy())


def test_case_and_white_space_count_only_if_asked():
    images, prompts = torch.rand(1, 3, 8, 8), ['the words "Open  now"']
    for read, exact, expected in [("open\nNOW", False, 1.0), ("Open now", True, 8 / 9), ("OPENNOW", False, 1.0)]:
        assert score(OCR(lambda picture, read=read: read, exact=exact), images, prompts) == pytest.approx([expected])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edits(a, b, expected):
    assert edits(a, b) == edits(b, a) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('a sign that says "OPEN"', "OPEN"),
        ("a sign that says “Open now”, neon", "Open now"),
        ("a sign that says 'stop', it's red", "stop"),
        ("it's the dogs' bowl with ‘don’t eat’ on it", "don’t eat"),
        ("'don't stop'", "don't stop"),
        ("une affiche « Ouvert »", "Ouvert"),
        ('"left" and "right"', "left right"),
    ],
)
def test_what_prompts_quote(prompt, expected):
    assert quoted(prompt) == expected


@pytest.mark.parametrize("prompt", ["a red sign", "it's the dogs' bowl", 'an empty "" sign', 'a " " sign'])
def test_prompts_that_quote_nothing_are_refused(prompt):
    with refused("'ocr' finds no text in quotation marks in .*: quote it, or pass text="):
        OCR(read_digits)(torch.rand(1, 3, 8, 8), [prompt])


def test_readers_that_fail_are_named():
    images = torch.rand(3, 3, 8, 8)

    def failing(picture):
        if np.array_equal(np.asarray(picture)[..., 0], (images[2, 0] * 255).round().numpy()):
            raise OSError("no such model")
        return "a"

    with refused(r"reader of 'ocr' fails on sample 2: OSError\('no such model'\)"):
        OCR(failing, text="a")(images, [""] * 3)
    with refused("gave list for sample 0: return one string"):
        OCR(lambda picture: ["a"], text="a")(images, [""] * 3)  # type: ignore[arg-type,return-value]
    with refused("callable from a PIL picture to a string, got 'my_readers:read': pass the function itself"):
        OCR("my_readers:read")  # type: ignore[arg-type]
    with refused("wants a text to be read, got ' '"):
        OCR(read_digits, text=" ")
    with refused(r"got the shape \(2, 2\)"):
        OCR(read_digits, text="1")(torch.rand(2, 2), ["", ""])


def test_it_is_a_black_box_that_passes_the_check():
    reward = OCR(read_digits)
    assert reward.name == "ocr"
    assert not reward.differentiable
    images = torch.stack([written(text) for text in ("12", "345", "6", "7890")])
    assert [found.message for found in check(reward, images, ['"12"', '"34"', '"6"', '"789"']) if found.fault] == []
    assert not check(OCR(read_digits, text="12"), images, list("abcd"))[0].fault  # does not look at prompts


def test_a_reader_of_the_users_needs_trust(workplace, monkeypatch: pytest.MonkeyPatch):
    (workplace / "my_readers.py").write_text("def read(picture):\n    return 'seven'\n")
    monkeypatch.syspath_prepend(workplace)
    lines = ["recipe=digits_steer", "map=none", "reward=ocr", "reward.reader._target_=my_readers.read"]
    with pytest.raises(TrustError, match="--trust my_readers"):
        config.compose("steer", lines)
    reward = config.compose("steer", lines, trusted=["my_readers"]).build("reward")
    assert score(reward, torch.rand(1, 1, 8, 8), ['a "seven"']) == [1.0]
