"""Prompts, captions and pairs, damaged: what is read is text, and paths in them lead nowhere."""

import json
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import given
from PIL import Image

from fuzz.damage import TEXTS, damaged, damaged_bytes, damaged_json, garbage, randoms
from fuzz.watching import often, watched
from steerfm.data import ImageFolder
from steerfm.data.captions import TABLES, read_captions
from steerfm.data.preference_pairs import read_pairs
from steerfm.data.prompts import read_prompts

PROMPTS = "a red circle\n\n  a blue square left of a grüner Kreis\r\n数字\n".encode()
PICTURES = ["a.png", "b/a red circle 12.png"]
ROWS: list[dict[str, Any]] = [{"file_name": "a.png", "text": "a"}, {"file_name": "b/a red circle 12.png", "text": "b"}]
CSV = b'file_name,text\na.png,"a, b"\nb/a red circle 12.png,c\n'
PAIRS: list[dict[str, Any]] = [
    {"image_a": "a.png", "image_b": "b.png", "prompt": "a", "preferred": "a"},
    {"image_a": "a.png", "image_b": "c/d.png", "prompt": "b", "preferred": 0.5},
]


def lines(random: Random, rows: list[dict[str, Any]]) -> bytes:
    """Return rows as JSON Lines, some of them damaged."""
    if random.randrange(8) == 0:
        return garbage(random, [b"{", b'{"file_name":', b"[" * 5000])
    whole = [json.dumps(row).encode() for row in rows]
    i = random.randrange(len(rows))
    whole[i] = damaged_json(random, rows[i])
    text = b"\n".join(whole)
    return damaged_bytes(random, text) if random.randrange(4) == 0 else text


@often
@given(random=randoms)
def test_prompts_are_read_or_refused(workshop: Path, random: Random):
    (workshop / "prompts.txt").write_bytes(
        garbage(random) if random.randrange(4) == 0 else damaged_bytes(random, PROMPTS)
    )
    with watched():
        prompts = read_prompts(workshop / "prompts.txt")
        assert prompts
        assert all(isinstance(prompt, str) and prompt.strip() for prompt in prompts)


@often
@given(random=randoms)
def test_a_path_of_prompts_is_read_or_refused(workshop: Path, random: Random):
    with watched():
        read_prompts(random.choice(TEXTS))


@often
@given(random=randoms)
def test_captions_are_read_or_refused(workshop: Path, random: Random):
    table = random.choice(list(TABLES))
    data = lines(random, ROWS) if table.endswith("jsonl") else damaged_bytes(random, CSV)
    (workshop / table).write_bytes(data)
    how = random.choice(["auto", table, *TEXTS]) if random.randrange(4) == 0 else "auto"
    with watched():
        captions = read_captions(workshop, [table, *PICTURES], PICTURES, how)
        assert [type(caption) for caption in captions] == [str, str]


@often
@given(random=randoms)
def test_pairs_are_read_or_refused(workshop: Path, random: Random):
    for name in ("a.png", "b.png", "c/d.png"):
        (workshop / name).parent.mkdir(exist_ok=True)
        if not (workshop / name).exists():
            Image.new("RGB", (2, 2)).save(workshop / name)
    (workshop / "pairs.jsonl").write_bytes(lines(random, PAIRS))
    with watched():
        places, pairs = read_pairs(workshop / "pairs.jsonl")
        assert pairs
        assert all(isinstance(place, str) for place in places)


@often
@given(random=randoms)
def test_a_folder_of_pictures_is_read_or_refused(workshop: Path, random: Random):
    folder = workshop / "pictures"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (3, 2)).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    suffix = random.choice([".png", ".jpg", ".gif", ".tif", ".webp", ".bmp", ".ppm", ".avif"])
    for old in folder.glob("sent.*"):
        old.unlink()
    (folder / f"sent{suffix}").write_bytes(picture(random, whole))
    if random.randrange(8) == 0:
        (folder / "sent.link.png").symlink_to("../prompts.txt")
    with watched():
        ImageFolder(folder, size=2, batch_size=1).batch(0)


def picture(random: Random, whole: bytes) -> bytes:
    """Return a damaged picture, or what looks like one."""
    starts = [
        b"P6 99999 99999 255\n",
        b"GIF89a\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0",
        b"BM",
        b"RIFF\xff\xff\xff\xffWEBP",
    ]
    return garbage(random, starts) if random.randrange(3) == 0 else damaged_bytes(random, whole)


def test_damage_is_damage():
    """A strategy that changed nothing would prove nothing."""
    random = Random(0)
    assert sum(damaged_bytes(random, PROMPTS) != PROMPTS for _ in range(100)) > 80
    assert sum(damaged(random, ROWS) != ROWS for _ in range(100)) > 80
