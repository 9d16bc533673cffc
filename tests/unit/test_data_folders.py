"""Folders of pictures: every kind of file is read rightly or skipped by name, captions are found, batches are exact."""

import io
import json
import logging
import re
import shlex
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from picture_files import coloured, encoded, levels, noisy, pretend, write
from PIL import Image
from torch import Tensor
from trainers import copied, equal, trainer

from steerfm import MLP, FlowMap, FlowMapTraining
from steerfm.conditions import Labels
from steerfm.data import ImageFolder, batches
from steerfm.data.captions import from_name
from steerfm.data.pictures import Frame, Unusable
from steerfm.errors import ConfigError, DataError
from steerfm.networks.mlp import randomise

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (128, 128, 128)}
EXACT = 1e-6  # float32 of k / 255 * 2 - 1


def bare_png(width: int, height: int) -> bytes:
    """Return a PNG whose header asks for so many pixels, with next to none of them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def flipped_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def two_frames(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


BROKEN = {  # name -> bytes, and the reason that the report gives
    "empty.png": (b"", "empty"),
    "text.png": (b"a red circle, honestly\n" * 20, "not a picture"),
    "page.jpg": (b"<html><body>404</body></html>", "not a picture"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", "not a picture"),
    "half.png": (encoded(noisy(32, 32), "PNG")[:1500], "damaged: "),
    "half.jpg": (encoded(noisy(64, 64), "JPEG")[:1500], r"damaged: image file is truncated"),
    "header.webp": (encoded(noisy(32, 32), "WEBP")[:40], "damaged: |not a picture"),
    "bit.png": (flipped_bit(encoded(noisy(64, 64), "PNG")), "damaged: broken PNG file"),
    "bomb.png": (bare_png(20_000, 20_000), "too large: .*400000000 pixels"),
    "large.png": (bare_png(9_000, 9_000), "too large: 9000x9000 pixels, more than max_pixels=67108864"),
    "wide.png": (bare_png(20_000, 10), "too large: 20000x10 pixels, a side longer than 16384"),
    "moving.gif": (two_frames("GIF"), "animated or of several pages; animated=first takes the first"),
    "moving.webp": (two_frames("WEBP"), "animated"),
    "moving.png": (two_frames("PNG"), "animated"),
    "pages.tiff": (two_frames("TIFF"), "animated"),
    "floats.tiff": (encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "range of its numbers is unknown"),
    "ints.tiff": (encoded(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"), "range of its numbers is unknown"),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_pictures_are_skipped_with_the_reason(name: str, tmp_path: Path) -> None:
    data, reason = BROKEN[name]
    write(tmp_path, {name: data, "good.png": encoded(noisy(8, 8), "PNG")})
    folder = ImageFolder(tmp_path, size=8, batch_size=1)
    assert list(folder.gallery.skipped) == [name]
    assert re.search(reason, folder.gallery.skipped[name])
    assert folder.count == 1
    assert folder.batch(0)["x0"].shape == (1, 3, 8, 8)


def test_nothing_is_decoded_before_its_size_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    for name in ("bomb.png", "large.png", "wide.png"):
        with pytest.raises(Unusable, match="too large"):
            Frame(8).read(BROKEN[name][0])
    with pytest.raises(Unusable, match=r"too large: a file of 257 bytes, more than 256"):
        Frame(2, max_pixels=32).read(b"x" * 257)


def test_the_report_names_ten_and_counts_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    coloured(tmp_path, 3)
    write(tmp_path, {name: data for name, (data, _) in BROKEN.items()})
    with caplog.at_level(logging.INFO, "steerfm"):
        ImageFolder(tmp_path, size=4)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"used 3 of 20 pictures; skipped {len(BROKEN)}: bit.png (damaged: " in warning
    assert warning.endswith(", and 7 more")
    assert sum(name in warning for name in BROKEN) == 10
    assert "3 pictures, 3 of them stay decoded in memory" in caplog.text


def read_one(image: Image.Image, kind: str, size: Any = 4, **options: Any) -> Tensor:
    """Return a picture (C, H, W) in [0, 1] as training sees it."""
    frame = Frame(size, **options.pop("frame", {}))
    return (frame.stack([frame.read(encoded(image, kind, **options))])[0] + 1) / 2


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.linspace(0, 65535, 16).round().astype(np.uint16).reshape(4, 4)
    for kind in ("PNG", "TIFF", "PPM"):
        found = read_one(Image.fromarray(values), kind)
        expected = torch.from_numpy(values / 65535).float().expand(3, 4, 4)
        assert (found - expected).abs().max() <= 0.5 / 255 + EXACT, kind  # rounded to 8 bits
    deep = read_one(Image.fromarray(values), "PNG", frame={"channels": 1})
    assert deep.shape == (1, 4, 4)
    assert len(deep.unique()) == 16


def test_every_kind_of_colour_comes_out_right() -> None:
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 4, 4)
    palette = Image.new("RGB", (4, 4), "red").convert("P", palette=Image.Palette.ADAPTIVE)
    assert torch.equal(read_one(palette, "PNG"), red)
    cyan_free = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert (read_one(cyan_free, "JPEG", quality=100) - red).abs().max() <= 3 / 255  # JPEG's rounding
    assert torch.equal(read_one(cyan_free, "TIFF"), red)
    assert torch.equal(read_one(Image.new("1", (4, 4), 1), "PNG"), torch.ones(3, 4, 4))
    grey = read_one(Image.new("L", (4, 4), 51), "PNG")
    assert (grey - 0.2).abs().max() < EXACT
    luma = read_one(Image.new("RGB", (4, 4), "red"), "PNG", frame={"channels": 1})
    assert (luma - round(255 * 0.299) / 255).abs().max() < EXACT  # ITU-R 601, as Pillow's "L"


def test_transparency_shows_the_background() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert torch.equal(read_one(clear, "PNG"), torch.ones(3, 4, 4))
    assert torch.equal(read_one(clear, "PNG", frame={"background": "black"}), torch.zeros(3, 4, 4))
    half = read_one(Image.new("RGBA", (4, 4), (255, 0, 0, 51)), "PNG", frame={"background": "#0000ff"})
    expected = torch.tensor([0.2, 0.0, 0.8])
    assert (half[:, 0, 0] - expected).abs().max() <= 1 / 255
    assert (read_one(Image.new("LA", (4, 4), (0, 0)), "PNG") == 1).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert (read_one(palette, "PNG", transparency=0) == 1).all()


def test_cameras_pictures_stand_upright() -> None:
    picture = Image.new("RGB", (8, 4), "blue")
    picture.paste((255, 0, 0), (0, 0, 4, 4))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise, so that the left comes to the top
    found = read_one(picture, "JPEG", (8, 4), exif=exif, quality=100, subsampling=0)
    assert found[0, :3].min() > 0.9 and found[2, :3].max() < 0.1
    assert found[2, 5:].min() > 0.9 and found[0, 5:].max() < 0.1


def test_a_camera_s_preview_is_no_animation() -> None:
    data = two_frames("MPO")
    frame = Frame(8)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert frame.read(data)[0].min() > 250  # the first, red


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frames_are_taken_when_asked(kind: str) -> None:
    pixels = Frame(8, animated="first").read(two_frames(kind))
    assert pixels[0].min() > 240 and pixels[2].max() < 15


def test_pictures_are_framed_in_the_middle() -> None:
    picture = noisy(6, 10)
    exact = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    assert (read_one(picture, "PNG", (6, 10)) - exact).abs().max() < EXACT
    assert (read_one(picture, "PNG", (6, 6)) - exact[:, :, 2:8]).abs().max() < EXACT
    assert (read_one(picture, "PNG", (2, 10)) - exact[:, 2:4]).abs().max() < EXACT
    halves = Image.new("RGB", (40, 20), "black")
    halves.paste((255, 255, 255), (20, 0, 40, 20))
    small = read_one(halves, "PNG", (4, 4))
    assert small[:, :, 0].max() < 0.02 and small[:, :, 3].min() > 0.98  # the middle half, of both colours
    line = read_one(Image.new("RGB", (9000, 1), "red"), "PNG", (4, 4))  # covering 4x4 it would have 36000 columns
    assert torch.equal(line[0], torch.ones(4, 4))
    with pytest.raises(Unusable, match="too long and narrow: 9000x1 pixels"):
        Frame((100, 100), crop="random", max_pixels=2**16).read(encoded(Image.new("L", (9000, 1)), "PNG"))


def test_photographs_are_decoded_no_larger_than_needed() -> None:
    photograph = noisy(5, 7).resize((1400, 1000), Image.Resampling.BICUBIC)
    exact = photograph.resize((70, 50), Image.Resampling.BICUBIC)
    found = read_one(photograph, "JPEG", (50, 70), quality=95, subsampling=0)
    expected = torch.from_numpy(np.array(exact)).permute(2, 0, 1) / 255
    assert (found - expected).abs().max() < 4 / 255  # what JPEG loses, and what halving it twice first does


def test_random_crops_and_mirrors_follow_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = noisy(4, 12)
    write(tmp_path, {"a.png": encoded(picture, "PNG")})
    exact = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    cuts = [exact[:, :, x : x + 4] for x in range(9)]
    cuts += [cut.flip(-1) for cut in cuts]

    def seen(data: ImageFolder, step: int) -> list[int]:
        x0 = data.batch(step)["x0"]
        gaps = torch.stack([(x0 - cut).abs().amax((1, 2, 3)) for cut in cuts])
        assert (gaps.amin(0) < EXACT).all()
        return gaps.argmin(0).tolist()

    def make(**more: Any) -> ImageFolder:
        return ImageFolder(tmp_path, size=4, batch_size=60, crop="random", flip=True, **more)

    whole = [seen(make(), step) for step in range(3)]
    assert len({place for places in whole for place in places}) == 18  # 180 draws of 18: one is missed with p < 1e-3
    assert whole[0] != whole[1]
    assert seen(make(cache_gib=0), 2) == whole[2]
    assert seen(make(seed=1), 0) != whole[0]
    shares = []
    for rank in range(2):
        pretend(monkeypatch, rank, 2)
        shares += seen(make(), 1)
    assert shares == whole[1][::2] + whole[1][1::2]
    pretend(monkeypatch, 0, 1)
    fixed = make().rows([0])["x0"]
    assert (fixed - exact[:, :, 4:8]).abs().max() < EXACT
    assert set(seen(ImageFolder(tmp_path, size=4, batch_size=9, crop="random"), 0)) < set(range(9))


def test_what_does_not_fit_in_memory_is_decoded_again(tmp_path: Path) -> None:
    coloured(tmp_path, 40)
    inside = ImageFolder(tmp_path, size=4, batch_size=16)
    outside = ImageFolder(tmp_path, size=4, batch_size=16, cache_gib=10 * 48 / 2**30)
    assert len(inside.gallery._kept) == 40
    assert len(outside.gallery._kept) == 10
    for step in range(4):
        assert torch.equal(inside.batch(step)["x0"], outside.batch(step)["x0"])
    (tmp_path / "a035.png").write_bytes(b"overwritten")
    with pytest.raises(DataError, match=r"a035\.png in .* was good before and is damaged now: restore it"):
        outside.rows([35])
    (tmp_path / "a036.png").unlink()
    with pytest.raises(DataError, match=r"a036\.png cannot be read \(No such file"):
        outside.rows([36])


def test_every_epoch_shows_every_picture_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coloured(tmp_path, 12)
    write(tmp_path, {"a005.png": b"", "b.png": b"broken"})
    data = ImageFolder(tmp_path, size=4, batch_size=4, validation_size=3)
    batch = data.validation_batch()
    assert batch is not None
    held = levels(batch["x0"])
    assert len(set(held)) == 3
    epochs = [[x for step in steps for x in levels(data.batch(step)["x0"])] for steps in ((0, 1), (2, 3))]
    assert sorted(held + epochs[0]) == [i for i in range(12) if i != 5]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    other = ImageFolder(tmp_path, size=4, batch_size=4, validation_size=3, seed=9)
    assert levels(other.validation_batch()["x0"]) == held  # type: ignore[index]
    assert levels(other.batch(0)["x0"]) != epochs[0][:4]
    shares = []
    for rank in range(2):
        pretend(monkeypatch, rank, 2)
        shares += levels(data.batch(1)["x0"])
    assert shares == epochs[0][4::2] + epochs[0][5::2]
    assert ImageFolder(tmp_path, size=4, batch_size=2).validation_batch() is None


def test_a_permutation_is_remembered_and_the_same() -> None:
    size, seed = 13, 4
    fresh = torch.cat([batches._permutation.__wrapped__(size, seed, epoch) for epoch in range(40)])
    for batch_size in (1, 5, 13, 40):
        for step in range(12):
            found = batches.epoch_indices(size, step, batch_size, seed)
            assert torch.equal(found, fresh[step * batch_size : (step + 1) * batch_size])
            found.zero_()  # what a caller does with its batch is no concern of the next


NAMES = [f"{colour}_{i}.png" for i in range(2) for colour in COLOURS]


def four_colours(folder: Path) -> Path:
    return write(folder, {n: encoded(Image.new("RGB", (4, 4), COLOURS[n.split("_")[0]]), "PNG") for n in NAMES})


def captions_by_colour(data: ImageFolder) -> dict[str, str]:
    """Return colour -> captions found for it."""
    batch = data.rows(range(data.count))
    found = {}
    for x0, prompt in zip(batch["x0"], batch["prompt"], strict=True):
        (colour,) = [
            name
            for name, value in COLOURS.items()
            if (x0[:, 0, 0] - torch.tensor(value) / 127.5 + 1).abs().max() < EXACT
        ]
        found.setdefault(colour, set()).add(prompt)
    return {colour: "|".join(sorted(prompts)) for colour, prompts in found.items()}


WANTED = {colour: f"a {colour} thing, with ü and “quotes”" for colour in COLOURS}


def jsonl(column: str, names: list[str] = NAMES, prefix: str = "") -> bytes:
    rows = [{"file_name": prefix + name, column: WANTED[name.split("_")[0]]} for name in reversed(names)]
    return ("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n").encode()


def table(column: str, mark: str = "") -> bytes:
    rows = [f'{name},"{WANTED[name.split("_")[0]]}"' for name in NAMES]
    return (mark + "\r\n".join([f"file_name,{column}", *rows])).encode()


@pytest.mark.parametrize(
    ("files", "how"),
    [
        ({"metadata.jsonl": jsonl("text")}, "auto"),
        ({"captions.jsonl": jsonl("caption")}, "auto"),
        ({"metadata.csv": table("text")}, "auto"),
        ({"captions.csv": table("caption", "\ufeff")}, "auto"),
        ({"mine.jsonl": jsonl("text", prefix="./"), "red_0.txt": b"no"}, "mine.jsonl"),
        ({name[:-4] + ".txt": f"\n{WANTED[name[:-6]]}\n".encode() for name in NAMES}, "auto"),
        ({"metadata.jsonl": jsonl("text", NAMES[:4]), "more/captions.csv": b"file_name,text\nred_9.png,x\n",
          "captions.jsonl": jsonl("text", NAMES[4:]), "more/red_9.png": b""}, "auto"),
    ],
    ids=["metadata.jsonl", "captions.jsonl", "metadata.csv", "captions.csv", "a path", "texts", "several"],
)  # fmt: skip
def test_captions_are_found(files: dict[str, bytes], how: str, tmp_path: Path) -> None:
    write(four_colours(tmp_path), files)
    assert captions_by_colour(ImageFolder(tmp_path, size=4, captions=how)) == WANTED


def test_a_table_elsewhere_names_paths_below_the_folder(tmp_path: Path) -> None:
    four_colours(tmp_path / "pictures" / "deep")
    (tmp_path / "mine.csv").write_bytes(table("prompt").replace(b"\n", b"\ndeep/"))
    assert captions_by_colour(ImageFolder(tmp_path / "pictures", 4, captions=str(tmp_path / "mine.csv"))) == WANTED
    write(tmp_path, {"pictures/deep/metadata.csv": table("text")})
    assert captions_by_colour(ImageFolder(tmp_path / "pictures", 4)) == WANTED


def test_captions_from_names_or_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    four_colours(tmp_path)
    assert captions_by_colour(ImageFolder(tmp_path, 4, "names")) == {colour: colour for colour in COLOURS}
    assert set(captions_by_colour(ImageFolder(tmp_path, 4, "none")).values()) == {""}
    assert "has no captions" not in caplog.text
    with caplog.at_level(logging.INFO, "steerfm"):
        assert set(captions_by_colour(ImageFolder(tmp_path, 4)).values()) == {""}
    assert "has no captions, so prompts are empty; captions=names reads them off the file names" in caplog.text


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("a_red_circle_12.png", "a red circle"),
        ("deep/a-red-circle (3).jpg", "a red circle"),
        ("a red circle.v2.png", "a red circle.v2"),
        ("00012.png", ""),
        ("mp3_player.png", "mp3 player"),
        ("two_circles_(left).png", "two circles (left)"),
    ],
)
def test_names_are_read_as_captions(name: str, caption: str) -> None:
    assert from_name(name) == caption


def test_accents_are_the_same_however_they_are_written(tmp_path: Path) -> None:
    table = "file_name,text\ncaf\u00e9.png,coffee".encode()
    write(tmp_path, {"cafe\u0301.png": encoded(noisy(4, 4), "PNG"), "metadata.csv": table})
    assert ImageFolder(tmp_path, 4).rows([0])["prompt"] == ["coffee"]


def test_missing_captions_and_files_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"file_name": "red_0.png", "text": "red"}, {"file_name": "grey_0.png", "text": None}]
    rows += [{"file_name": f"gone{i}.png", "text": "gone"} for i in range(12)]
    write(four_colours(tmp_path), {"metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()})
    data = ImageFolder(tmp_path, 4)
    assert "names 12 files that are no pictures" in caplog.text and "gone0.png" in caplog.text
    assert "and 2 more" in caplog.text
    assert "7 pictures in" in caplog.text and "have no caption, so their prompt is empty: blue_0.png" in caplog.text
    assert captions_by_colour(data)["red"] == "|red"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"metadata.jsonl": b'{"file_name": "red_0.png", "text": "x"}\n{"file_name'}, r"Line 2 of .* is no JSON"),
        ({"metadata.jsonl": b"[1]"}, r"Line 1 of .* is no JSON object: write"),
        ({"metadata.jsonl": b'{"file": "red_0.png"}'}, r"needs the columns file_name and text; line 1 .* has file\."),
        ({"metadata.csv": b"file_name,label\nred_0.png,3"}, r"needs the columns .* has file_name, label"),
        ({"metadata.jsonl": b'{"file_name": "red_0.png", "text": 3}'}, r"must be texts; line 1 .* and 3"),
        ({"metadata.jsonl": b'{"file_name": "/data/red_0.png", "text": "x"}'}, r"has no caption for any .* /data/red"),
        ({"metadata.jsonl": b'{"file_name": "../red_0.png", "text": "x"}'}, r"has no caption for any picture"),
        ({"metadata.jsonl": b""}, r"has no caption for any picture.* got no rows"),
        ({"metadata.jsonl": jsonl("text") * 2}, r"red_\d.png has two captions|has two captions, at line"),
        ({"metadata.jsonl": jsonl("text"), "metadata.csv": table("text")}, r"two captions, at line .*csv and line"),
        ({"metadata.jsonl": b"\xff\xfe\x00"}, r"cannot be read .*: give a text file in UTF-8"),
        ({"red_0.txt": b"\xff\xfe\x00"}, r"red_0.txt cannot be read .*: give a text file in UTF-8"),
        ({"metadata.csv": b'file_name,text\nred_0.png,"' + b"x" * 200_000}, r"Line \d of .* is no CSV"),
    ],
)
def test_malformed_captions_are_said(files: dict[str, bytes], said: str, tmp_path: Path) -> None:
    write(four_colours(tmp_path), files)
    with pytest.raises(DataError, match=said):
        ImageFolder(tmp_path, 4)


def test_a_table_that_is_not_there_or_no_table(tmp_path: Path) -> None:
    four_colours(tmp_path)
    with pytest.raises(DataError, match=r"no table of captions at name, nor in .*: captions is auto, names, none, or"):
        ImageFolder(tmp_path, 4, "name")
    (tmp_path / "captions.xml").write_text("<a/>")
    with pytest.raises(DataError, match=r"is a \.jsonl or \.csv file, got .*captions\.xml"):
        ImageFolder(tmp_path, 4, "captions.xml")


def test_folders_without_pictures_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone does not exist: give the folder"):
        ImageFolder(tmp_path / "gone")
    with pytest.raises(DataError, match=r"holds no pictures, but nothing: give \.png"):
        ImageFolder(tmp_path)
    write(tmp_path, {"a.txt": b"x", ".hidden.png": b"x", "._b.png": b"x", ".thumbs/c.png": b"x", "d.svg": b"x"})
    with pytest.raises(DataError, match=r"holds no pictures, but 2 other files, such as a\.txt"):
        ImageFolder(tmp_path)
    with pytest.raises(DataError, match=r"a\.txt is a file"):
        ImageFolder(tmp_path / "a.txt")
    write(tmp_path, {"a.png": b"", "deep/b.JPG": b"x"})
    with pytest.raises(DataError, match=r"None of the 2 pictures .* a\.png \(empty\), deep/b\.JPG \(not a picture\)\."):
        ImageFolder(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"size": 0}, r"size is one number or \[height, width\], each at least 1, got 0"),
        ({"size": [4, 4, 3]}, r"size is one number"),
        ({"channels": 4}, "channels is 3, or 1 for grey, got 4"),
        ({"crop": "centre"}, "crop is 'center' or 'random', got 'centre'; did you mean 'center'"),
        ({"animated": "all"}, "animated is 'skip' or 'first', got 'all'"),
        ({"background": "whitish"}, "background is a colour such as white or #808080, got 'whitish'"),
        ({"max_pixels": 15}, "max_pixels=15 is fewer than the 4x4 asked for"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"validation_size": -1}, "validation_size must be at least 0, got -1"),
        ({"validation_size": 8}, "validation_size=8 leaves none of the 8 usable pictures"),
    ],
)
def test_wrong_arguments_are_said(arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    four_colours(tmp_path)
    with pytest.raises(ConfigError, match=said):
        ImageFolder(tmp_path, **{"size": 4, **arguments})


def test_the_fingerprint_tells_folders_apart(tmp_path: Path) -> None:
    four_colours(tmp_path)
    first = ImageFolder(tmp_path, 4).fingerprint()
    assert ImageFolder(tmp_path, 4, seed=3, batch_size=2, cache_gib=0).fingerprint() == first
    assert ImageFolder(tmp_path, 2).fingerprint() != first
    assert ImageFolder(tmp_path, 4, "names").fingerprint() != first
    (tmp_path / "red_0.png").write_bytes(encoded(Image.new("RGB", (5, 5), "red"), "PNG"))
    assert ImageFolder(tmp_path, 4).fingerprint() != first


class Prompts(Callback):
    """Keep every batch's prompts, and stop after a step."""

    def __init__(self, stop_after: int = 0) -> None:
        self.seen: list[list[str]] = []
        self.stop_after = stop_after

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch["prompt"])
        trainer.should_stop = trainer.global_step == self.stop_after


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 1,000 pictures of four colours with captions, 7 of them broken."""
    folder = tmp_path_factory.mktemp("thousand")
    rows, names = [], list(COLOURS)
    for i in range(1000):
        colour = names[i % 4]
        path = folder / f"{i % 10}" / f"picture_{i:04}.{'jpg' if i % 3 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (12, 9), COLOURS[colour]).save(path)
        rows.append(json.dumps({"file_name": path.relative_to(folder).as_posix(), "text": f"a {colour} picture"}))
        if i % 143 == 0:
            path.write_bytes(path.read_bytes()[: 40 * (i % 2)])
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def training(data: ImageFolder) -> FlowMapTraining:
    network = MLP((3, 8, 8), width=16, depth=1, frequencies=4, num_classes=4)
    randomise(network, seed=0)
    return FlowMapTraining(FlowMap(network, conditioner=Labels([f"a {colour} picture" for colour in COLOURS])))


def test_a_thousand_pictures_train_and_resume(thousand: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make() -> ImageFolder:
        return ImageFolder(thousand, size=8, batch_size=32, flip=True, crop="random", validation_size=16)

    whole, first, rest = Prompts(), Prompts(stop_after=2), Prompts()
    data = make()
    assert "used 993 of 1000 pictures; skipped 7: 0/picture_0000.png (empty), " in caplog.text
    module = training(data)
    trainer(tmp_path / "whole", 4, whole).fit(module, data)
    expected = copied(module.state_dict())

    saving = ModelCheckpoint(tmp_path / "half", every_n_train_steps=1, save_last=True)
    trainer(tmp_path / "half", 4, first, saving).fit(training(data), make())
    resumed = training(data)
    trainer(tmp_path / "half", 4, rest).fit(resumed, make(), ckpt_path=tmp_path / "half" / "last.ckpt")
    assert len(first.seen) == 2 and len(rest.seen) == 2
    assert whole.seen == first.seen + rest.seen
    assert equal(resumed.state_dict(), expected)
    assert not equal(expected, training(data).state_dict())


def test_the_guide_s_line_trains(thousand: Path, workplace: Path) -> None:
    from steerfm.cli import main

    guide = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^steerfm (train .*data=image_folder .*)$", guide, re.MULTILINE)
    (workplace / "my_pictures").symlink_to(thousand)
    values = ["data.batch_size=8", "network.channels=[8,8]", "name=own", "trainer.max_steps=2"]
    values += ["trainer.val_check_interval=2", "trainer.enable_progress_bar=false"]
    assert main([*shlex.split(line), *values]) == 0
    assert any((workplace / "runs" / "own" / "map").glob("*.safetensors"))


def test_the_recipe_asks_for_a_folder(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    from steerfm.cli import main

    assert main(["train", "recipe=digits", "name=own", "data=image_folder"]) == 2
    assert "data.folder" in capsys.readouterr().err
