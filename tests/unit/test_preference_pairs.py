"""Pairs with preferences: every broken line is named, prompts are held out as a whole, batches are exact."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from picture_files import encoded, noisy, pretend, write
from PIL import Image
from torch import Tensor

from steerfm.data.preference_pairs import HuggingFacePairs, PreferencePairs
from steerfm.data.shape_preferences import ShapePreferences
from steerfm.errors import ConfigError, DataError
from steerfm.preferences import agreement, log_likelihood
from steerfm.shape_captions import follow, read
from steerfm.shapes import parse

COUNT = 24  # pairs; picture 2 i is grey of the level 4 i, and 2 i + 1 of 4 i + 2


def grey(level: int, side: int = 4) -> bytes:
    return encoded(Image.new("L", (side, side), level), "PNG")


def rows(count: int = COUNT, prompts: int = 8) -> list[dict[str, Any]]:
    said = ["a", "b", "tie", 0.75]
    return [
        {"image_a": f"p/{2 * i}.png", "image_b": f"p/{2 * i + 1}.png", "prompt": f"prompt {i % prompts}"}
        | {"preferred": said[i % 4]}
        for i in range(count)
    ]


def saved(folder: Path, lines: list[Any] | None = None) -> Path:
    """Write the pictures and a table of pairs; lines that are no text are written as JSON."""
    write(folder, {f"p/{i}.png": grey(2 * i) for i in range(2 * COUNT)})
    texts = [line if isinstance(line, str) else json.dumps(line) for line in (rows() if lines is None else lines)]
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return file


def grey_levels(images: Tensor) -> list[int]:
    return [round(float(value) * 255) for value in images.mean((1, 2, 3))]


def pairs_of(batch: dict[str, Any]) -> list[tuple[int, int, str, float]]:
    """Return (level of a, level of b, prompt, preferred) of a batch's pairs."""
    levels = zip(grey_levels(batch["image_a"]), grey_levels(batch["image_b"]), strict=True)
    said = zip(batch["prompt"], batch["preferred"].tolist(), strict=True)
    return [(a, b, prompt, preferred) for (a, b), (prompt, preferred) in zip(levels, said, strict=True)]


def truth() -> dict[tuple[int, int], tuple[str, float]]:
    """Return the prompt and the preference of each pair of levels, both ways round."""
    numbers: dict[Any, float] = {"a": 1.0, "b": 0.0, "tie": 0.5, 0.75: 0.75}
    found = {}
    for i, row in enumerate(rows()):
        preferred = numbers[row["preferred"]]
        found[4 * i, 4 * i + 2] = row["prompt"], preferred
        found[4 * i + 2, 4 * i] = row["prompt"], 1 - preferred
    return found


def test_pairs_are_read_swapped_together_with_their_preference_and_seen_once_an_epoch(tmp_path: Path) -> None:
    data = PreferencePairs(saved(tmp_path), size=4, batch_size=6)
    assert data.count == COUNT
    known, seen, turned = truth(), Counter(), 0
    for step in range(8):
        batch = data.batch(step)
        assert batch["image_a"].shape == (6, 3, 4, 4) and batch["preferred"].dtype == torch.float32
        for a, b, prompt, preferred in pairs_of(batch):
            assert known[a, b] == (prompt, preferred)
            seen[min(a, b)] += 1
            turned += a > b
    assert set(seen.values()) == {2} and len(seen) == COUNT
    assert 10 <= turned <= 38  # of 48 tosses of a coin: 4 standard deviations


def test_any_shape_is_fitted_as_folders_do(tmp_path: Path) -> None:
    file = saved(tmp_path, [{"image_a": "wide.png", "image_b": "p/1.png", "prompt": "", "preferred": "a"}])
    write(tmp_path, {"wide.png": encoded(noisy(8, 20), "PNG")})
    batch = PreferencePairs(file, size=[4, 6], batch_size=1).batch(0)
    assert batch["image_a"].shape == batch["image_b"].shape == (1, 3, 4, 6)
    assert batch["image_a"].min() >= 0 and batch["image_a"].max() <= 1


def test_batches_depend_on_seed_and_step_and_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path)

    def make(seed: int = 0) -> PreferencePairs:
        return PreferencePairs(file, size=4, batch_size=6, validation_size=4, seed=seed)

    whole = pairs_of(make().batch(3))
    assert pairs_of(make().batch(3)) == whole
    assert pairs_of(make(seed=1).batch(3)) != whole
    shares = []
    for rank in range(2):
        pretend(monkeypatch, rank, 2)
        shares += pairs_of(make().batch(3))
    assert shares == whole[::2] + whole[1::2]


def held_out(data: Any) -> list[tuple[int, int, str, float]]:
    return [pair for batch in data.val_dataloader() for pair in pairs_of(batch)]


def test_no_prompt_is_on_both_sides_and_held_out_pairs_stay_when_the_file_grows(tmp_path: Path) -> None:
    file = saved(tmp_path)
    data = PreferencePairs(file, size=4, batch_size=5, validation_size=5)
    kept = held_out(data)
    assert len(kept) == 6, "two prompts of three pairs each"
    assert all(truth()[a, b] == (prompt, preferred) and a < b for a, b, prompt, preferred in kept)
    prompts = {prompt for _, _, prompt, _ in kept}
    trained = {prompt for step in range(8) for prompt in data.batch(step)["prompt"]}
    assert len(prompts) == 2 and len(trained) == 6 and not prompts & trained
    more = [{"image_a": "p/0.png", "image_b": "p/3.png", "prompt": f"another {i}", "preferred": "a"} for i in range(3)]
    grown = PreferencePairs(saved(tmp_path, rows() + more), size=4, batch_size=5, validation_size=5 + len(more))
    assert prompts <= {prompt for _, _, prompt, _ in held_out(grown)}
    assert held_out(PreferencePairs(file, size=4, validation_size=0)) == []
    with pytest.raises(ConfigError, match="leaves none of the 27 pairs, of 11 prompts"):
        PreferencePairs(file, size=4, validation_size=27)


def test_pairs_without_a_prompt_are_held_out_one_by_one(tmp_path: Path) -> None:
    bare = [{**row, "prompt": " "} for row in rows()]
    assert len(held_out(PreferencePairs(saved(tmp_path, bare), size=4, validation_size=5))) == 5


GOOD = {"image_a": "p/0.png", "image_b": "p/1.png", "prompt": "x", "preferred": "a"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"Line 3 of .*pairs\.jsonl is no JSON \(.*\): correct it"),
        ("[]", "Line 3 of .* is no JSON object: write one with image_a"),
        ({**GOOD, "prompt": None}, "Line 3 of .* has None as its prompt: write a text"),
        ({key: GOOD[key] for key in ("image_a", "image_b", "prompt")}, "Line 3 of .* has no 'preferred'; each line"),
        ({**{k: v for k, v in GOOD.items() if k != "image_b"}, "imageb": "p/1.png"}, "did you mean 'imageb'"),
        ({**GOOD, "image_b": "q/1.png"}, "Line 3 of .* names image_b q/1.png, which is no file: paths are relative to"),
        ({**GOOD, "image_b": "p/0.png"}, "Line 3 of .* compares p/0.png with itself"),
        ({**GOOD, "preferred": "left"}, 'Line 3 of .* has \'left\' as its preference: write "a", "b", "tie"'),
        ({**GOOD, "preferred": 1.5}, "has 1.5 as its preference"),
        ({**GOOD, "preferred": True}, "has True as its preference"),
        ({**GOOD, "preferred": float("nan")}, "has nan as its preference"),
    ],
)
def test_a_broken_line_is_named(line: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        PreferencePairs(saved(tmp_path, [GOOD, "", line, GOOD]), size=4)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"The pairs in .*none\.jsonl cannot be read"):
        PreferencePairs(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no pairs: write one a line"):
        PreferencePairs(saved(tmp_path, [""]))


def test_pairs_with_a_broken_picture_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = saved(tmp_path)
    write(tmp_path, {"p/6.png": b"no picture"})
    with caplog.at_level(logging.WARNING):
        data = PreferencePairs(file, size=4, batch_size=COUNT - 1)
    assert data.count == COUNT - 1 and 14 not in grey_levels(data.batch(0)["image_a"])
    assert "p/6.png (not a picture)" in caplog.text and "1 of 24 pairs have a picture" in caplog.text
    write(tmp_path, {f"p/{2 * i}.png": b"" for i in range(COUNT)})
    with pytest.raises(DataError, match=r"No pair of .* has two pictures that can be used"):
        PreferencePairs(file, size=4)


def columns(folder: Path, said: list[Any], **more: Any) -> HuggingFacePairs:
    """Save a data set with Pick-a-Pic's columns, and read it."""
    table = {
        "jpg_0": [grey(4 * i) for i in range(len(said))],
        "jpg_1": [grey(4 * i + 2) for i in range(len(said))],
        "caption": [f"prompt {i % 3}" for i in range(len(said))],
        "label_0": said,
    }
    datasets.Dataset.from_dict(table).save_to_disk(folder / "set")
    options: dict[str, Any] = {"image_a": "jpg_0", "image_b": "jpg_1", "prompt": "caption", "preferred": "label_0"}
    options |= {"size": 4, "batch_size": 6}
    options |= more
    return HuggingFacePairs(folder / "set", **options)


def test_a_hugging_face_data_set_is_read_by_its_columns(tmp_path: Path) -> None:
    preferred = [1.0, 0.0, 0.5, 1.0, 1.0, 0.0]
    data = columns(tmp_path, preferred, validation_size=2)
    found = held_out(data) + pairs_of(data.batch(0))[:4]
    for a, b, prompt, value in found:
        row = min(a, b) // 4
        assert prompt == f"prompt {row % 3}"
        assert value == (preferred[row] if a < b else 1 - preferred[row])
    assert {min(a, b) // 4 for a, b, _, _ in found} == set(range(6))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"preferred": "label"}, "has no column 'label'; did you mean 'label_0'"),
        ({"image_b": "caption"}, "holds .*not pictures"),
        ({"preferred": "caption"}, "Row 0 of .* has 'prompt 0' as its preference"),
    ],
)
def test_wrong_columns_are_said(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        columns(tmp_path, [1.0, 0.0, 0.5], **more)


def test_shapes_are_preferred_with_the_odds_that_the_parser_and_the_temperature_give() -> None:
    data = ShapePreferences(batch_size=400, temperature=0.5)
    batch = data.batch(0)
    captions = [read(prompt) for prompt in batch["prompt"]]
    a, b = ([follow(*each).correct for each in zip(captions, parse(batch[key]), strict=True)]
            for key in ("image_a", "image_b"))  # fmt: skip
    gap = torch.tensor(a) - torch.tensor(b)
    assert torch.allclose(batch["odds"], torch.sigmoid(gap / 0.5))
    assert {round(float(value)) for value in gap} == {-1, 0, 1}
    surprise = float((batch["preferred"] - batch["odds"]).sum())
    spread = float((batch["odds"] * (1 - batch["odds"])).sum().sqrt())
    assert abs(surprise) < 4 * spread
    right = float(agreement(gap, torch.zeros(400), batch["preferred"]).mean())
    assert abs(right - float(torch.maximum(batch["odds"], 1 - batch["odds"]).mean())) < 4 * 0.4 / 20
    assert float(log_likelihood(gap / 0.5, torch.zeros(400), batch["preferred"]).mean()) > -0.6


def test_shapes_are_divided_and_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ShapePreferences(batch_size=4, validation_size=6)
    kept = [batch["image_a"] for batch in data.val_dataloader()]
    assert [len(images) for images in kept] == [4, 2]
    assert torch.equal(torch.cat(kept), torch.cat([b["image_a"] for b in data.val_dataloader()]))
    assert ShapePreferences(validation_size=0).val_dataloader() == []
    whole = data.batch(2)["image_b"]
    shares = []
    for rank in range(2):
        pretend(monkeypatch, rank, 2)
        shares.append(data.batch(2)["image_b"])
    assert torch.equal(torch.cat(shares), torch.cat([whole[::2], whole[1::2]]))
    with pytest.raises(ConfigError, match="temperature of the judge must be positive, got 0"):
        ShapePreferences(temperature=0)
