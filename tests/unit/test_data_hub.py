"""Hugging Face data sets, made in the test: at random and as streams, broken pictures, captions, resuming."""

import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from picture_files import coloured, encoded, levels, noisy, pretend
from PIL import Image
from trainers import copied, equal, trainer

from steerfm import MLP, FlowMap, FlowMapTraining
from steerfm.data import HuggingFaceData
from steerfm.errors import ConfigError, DataError
from steerfm.networks.mlp import randomise

COUNT = 24
BROKEN = {3: b"", 10: b"no picture", 17: encoded(noisy(32, 32), "PNG")[:1500]}
GOOD = [i for i in range(COUNT) if i not in BROKEN]


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `datasets` keep its copies in the test's folder, and draw no bars."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05)  # else 5 s after each parquet epoch
    datasets.disable_progress_bars()


def table(broken: bool = True, count: int = COUNT) -> datasets.Dataset:
    """Return a data set whose picture i is grey of the level i, some of them broken."""
    bad = BROKEN if broken else {}
    cells = [bad.get(i, encoded(Image.new("L", (4, 4), i), "PNG")) for i in range(count)]
    columns = {
        "image": [{"bytes": cell, "path": None} for cell in cells],
        "caption": [f"grey  {i}" if i else None for i in range(count)],
        "captions": [[f"first {i}", "second"] if i else [] for i in range(count)],
        "label": [i % 2 for i in range(count)],
        "score": [0.5] * count,
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "captions": datasets.List(datasets.Value("string")),
            "label": datasets.ClassLabel(names=["light_grey", "dark_grey"]),
            "score": datasets.Value("float32"),
        }
    )
    return datasets.Dataset.from_dict(columns, features=features)


def saved(folder: Path, how: str, **more: Any) -> Path:
    """Write the data set in one of the ways that people keep them, and return what to give to HuggingFaceData."""
    folder.mkdir(parents=True, exist_ok=True)
    data, path = table(**more), folder / how
    if how == "disk":
        data.save_to_disk(path)
    elif how == "dict":
        datasets.DatasetDict({"train": data, "test": data.select(range(2))}).save_to_disk(path)
    elif how == "file.parquet":
        data.to_parquet(path)
    elif how == "parquets":
        path.mkdir()
        data.select(range(10)).to_parquet(path / "train-0.parquet")
        data.select(range(10, len(data))).to_parquet(path / "train-1.parquet")
    else:
        data.to_pandas().to_parquet(path)  # pyright: ignore  plain columns, without the features' names
    return path


@pytest.mark.parametrize("how", ["disk", "dict", "file.parquet", "parquets", "plain.parquet"])
@pytest.mark.parametrize("streaming", [False, True], ids=["random", "stream"])
def test_every_way_of_keeping_one_is_read(how: str, streaming: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, how)
    data = HuggingFaceData(path, size=4, batch_size=COUNT, streaming=streaming)
    batch = data.batch(0)
    found = levels(batch["x0"])
    assert batch["x0"].shape == (COUNT, 3, 4, 4)
    assert set(found) == set(GOOD)
    assert all(
        prompt == (f"grey {level}" if level else "") for level, prompt in zip(found, batch["prompt"], strict=True)
    )
    assert not streaming or data.pictures.skipped == len(BROKEN)  # type: ignore[union-attr]


@pytest.mark.parametrize("streaming", [False, True], ids=["random", "stream"])
def test_a_folder_of_pictures_is_a_data_set(streaming: bool, tmp_path: Path) -> None:
    folder = coloured(tmp_path / "pictures", 5)
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"a{i:03}.png,grey {i}\n" for i in range(5)))
    batch = HuggingFaceData(folder, size=4, batch_size=5, streaming=streaming).batch(0)
    pairs = zip(levels(batch["x0"]), batch["prompt"], strict=True)
    assert sorted(pairs) == [(i, f"grey {i}") for i in range(5)]


def test_pictures_in_an_archive_are_streamed(tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "archived" / "pictures"), "zip", coloured(tmp_path / "pictures", 5))
    data = HuggingFaceData(tmp_path / "archived", size=4, batch_size=5, streaming=True)
    assert sorted(levels(data.batch(0)["x0"])) == list(range(5))  # their paths are zip://a000.png::...


def test_broken_pictures_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = HuggingFaceData(saved(tmp_path, "disk"), size=4, batch_size=7)
    assert data.count == len(GOOD)
    warning = re.escape(
        f"used {len(GOOD)} of {COUNT} pictures; skipped 3: row 3 (empty), row 10 (not a picture), row 17"
    )
    assert re.search(warning, caplog.text)
    epoch = [level for step in range(3) for level in levels(data.batch(step)["x0"])]
    assert sorted(epoch) == GOOD
    none = table().select(list(BROKEN))
    none.save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match=r"None of the 3 pictures in .*none \(train\) can be used: row 0 \(empty\)"):
        HuggingFaceData(tmp_path / "none", size=4)
    with pytest.raises(
        DataError, match=r"None of the 4 pictures of a batch .* \((empty|not|damaged).* batch_size larger"
    ):
        HuggingFaceData(tmp_path / "none", size=4, batch_size=4, streaming=True).batch(0)


@pytest.mark.parametrize(
    ("column", "caption"),
    [
        ("auto", lambda i: f"grey {i}" if i else ""),
        ("captions", lambda i: f"first {i}" if i else ""),
        ("label", lambda i: "dark grey" if i % 2 else "light grey"),
        (None, lambda i: ""),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["random", "stream"])
def test_captions_come_from_texts_and_classes(column: Any, caption: Any, streaming: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, "disk")
    batch = HuggingFaceData(path, size=4, batch_size=COUNT, caption_column=column, streaming=streaming).batch(0)
    assert batch["prompt"] == [caption(level) for level in levels(batch["x0"])]


@pytest.mark.parametrize("streaming", [False, True], ids=["random", "stream"])
def test_batches_depend_on_seed_and_step_and_are_divided(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, "disk")

    def make(seed: int = 0) -> HuggingFaceData:
        return HuggingFaceData(path, size=4, batch_size=6, streaming=streaming, shuffle_buffer=8, seed=seed)

    data = make()
    whole = [levels(data.batch(step)["x0"]) for step in range(9)]  # more than two epochs
    assert len({tuple(batch) for batch in whole}) == 9
    assert [levels(make().batch(step)["x0"]) for step in (5, 8, 2)] == [whole[5], whole[8], whole[2]]
    assert [levels(data.batch(step)["x0"]) for step in (4, 5, 0)] == [whole[4], whole[5], whole[0]]
    assert levels(make(seed=1).batch(0)["x0"]) != whole[0]
    shares: list[list[int]] = [[] for _ in range(9)]
    for rank in range(3):
        pretend(monkeypatch, rank, 3)
        own = make()
        for step in range(9):
            shares[step] += levels(own.batch(step)["x0"])
    assert shares == [batch[::3] + batch[1::3] + batch[2::3] for batch in whole]


def test_a_stream_passes_every_picture_once_an_epoch(tmp_path: Path) -> None:
    path = saved(tmp_path, "disk", broken=False)
    data = HuggingFaceData(path, size=4, batch_size=8, streaming=True, shuffle_buffer=8)
    epochs = [[x for step in range(3 * e, 3 * e + 3) for x in levels(data.batch(step)["x0"])] for e in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    plain = HuggingFaceData(path, size=4, batch_size=COUNT, streaming=True, shuffle_buffer=1)
    assert levels(plain.batch(0)["x0"]) == levels(plain.batch(1)["x0"]) == list(range(COUNT))


def test_a_broken_picture_s_place_goes_to_the_next_usable_one(tmp_path: Path) -> None:
    data = HuggingFaceData(saved(tmp_path, "disk"), size=4, batch_size=6, streaming=True, shuffle_buffer=1)
    assert [levels(data.batch(step)["x0"]) for step in range(3)] == [
        [0, 1, 2, 4, 4, 5],
        [6, 7, 8, 9, 11, 11],
        [12, 13, 14, 15, 16, 12],  # 17 is the last of its batch, so the first takes its place
    ]
    assert data.batch(1)["prompt"][4] == "grey 11"


def test_a_stream_warns_ever_more_rarely(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = HuggingFaceData(saved(tmp_path, "disk"), size=4, batch_size=COUNT, streaming=True, shuffle_buffer=1)
    for step in range(3):
        data.batch(step)
    assert data.pictures.skipped == 9  # type: ignore[union-attr]
    counts = re.findall(r"skipped (\d+) pictures so far, now row (\d+) of epoch (\d)", caplog.text)
    assert counts == [("1", "3", "0"), ("2", "10", "0"), ("4", "3", "1"), ("8", "10", "2")]


@pytest.mark.parametrize("streaming", [False, True], ids=["random", "stream"])
def test_validation_is_kept_from_training(streaming: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, "disk")
    data = HuggingFaceData(path, size=4, batch_size=6, streaming=streaming, validation_size=3)
    first, again = data.validation_batch(), data.validation_batch()
    assert first is not None and again is not None
    held = set(levels(first["x0"]))
    assert torch.equal(first["x0"], again["x0"]) and len(held) == 3
    seen = Counter(level for step in range(20) for level in levels(data.batch(step)["x0"]))
    assert set(seen) == set(GOOD) - held
    assert HuggingFaceData(path, size=4, streaming=streaming).validation_batch() is None


def test_random_crops_and_mirrors_are_those_of_folders(tmp_path: Path) -> None:
    picture = noisy(4, 8)
    cells = [{"bytes": encoded(picture, "PNG"), "path": None}] * 3
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(tmp_path / "one")
    options = {"size": 4, "batch_size": 40, "crop": "random", "flip": True}
    random, stream = (HuggingFaceData(tmp_path / "one", streaming=streaming, **options) for streaming in (False, True))
    assert torch.equal(random.batch(1)["x0"], stream.batch(1)["x0"])
    exact = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    cuts = [cut for x in range(5) for cut in (exact[:, :, x : x + 4], exact[:, :, x : x + 4].flip(-1))]
    found = [min((float((x0 - cut).abs().max()), i) for i, cut in enumerate(cuts)) for x0 in random.batch(1)["x0"]]
    assert all(gap < 1e-6 for gap, _ in found)
    assert len({i for _, i in found}) >= 8  # 40 draws of 10 places miss three with p < 1e-3


def test_large_pictures_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = encoded(Image.new("1", (300, 300)), "PNG")
    cells = [{"bytes": big, "path": None}, {"bytes": encoded(noisy(4, 4), "PNG"), "path": None}]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(tmp_path / "big")
    data = HuggingFaceData(tmp_path / "big", size=4, max_pixels=10_000)
    assert data.pictures.skipped == {"row 0": "too large: 300x300 pixels, more than max_pixels=10000"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"image_column": "images"},
            r"no column 'images'; did you mean 'image'\? Its columns: image, caption, captions",
        ),
        ({"image_column": "score"}, r"The column 'score' of .* holds Value\('float32'\), not pictures"),
        ({"caption_column": "captoin"}, r"no column 'captoin'; did you mean 'caption'\?"),
        ({"caption_column": "score"}, r"The column 'score' .* not captions: name another caption_column, or null"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["random", "stream"])
def test_wrong_columns_are_said(arguments: dict[str, Any], said: str, streaming: bool, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        HuggingFaceData(saved(tmp_path, "disk"), streaming=streaming, size=4, **arguments)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nobody/nothing with the split 'train' cannot be loaded \(.*check its name"):
        HuggingFaceData("nobody/nothing")
    for how in ("dict", "parquets"):
        with pytest.raises(
            DataError, match=r"with the split 'valid' cannot be loaded \(.*valid.*check its name, its split"
        ):
            HuggingFaceData(saved(tmp_path, how), split="valid")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"cannot be loaded"):
        HuggingFaceData(tmp_path / "nothing")
    path = saved(tmp_path, "disk")
    with pytest.raises(ConfigError, match="shuffle_buffer must be at least 1, which does not shuffle, got 0"):
        HuggingFaceData(path, shuffle_buffer=0)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        HuggingFaceData(path, batch_size=0)
    with pytest.raises(DataError, match=r"is a stream, whose pictures have no numbers: use streaming=false"):
        HuggingFaceData(path, streaming=True).rows([0])
    with pytest.raises(DataError, match=r"has no pictures to train on: check its split and validation_size"):
        HuggingFaceData(path, streaming=True, validation_size=COUNT).batch(0)


def test_a_missing_package_names_the_extra(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from steerfm.cli import main

    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["train", "recipe=digits", "name=x", "data=hugging_face", "data.path_or_id=a/b"]) == 2
    assert (
        "needs the package 'datasets', which is not installed: pip install 'steerfm[data]'" in capsys.readouterr().err
    )


def test_scripts_in_a_data_set_are_not_run(tmp_path: Path) -> None:
    folder, mark = tmp_path / "scripted", tmp_path / "run"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"open({str(mark)!r}, 'w').close()")
    with pytest.raises(DataError, match="cannot be loaded"):
        HuggingFaceData(folder)
    assert not mark.exists()


@pytest.mark.parametrize("streaming", [False, True], ids=["random", "stream"])
def test_training_resumes_as_if_it_had_never_stopped(streaming: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, "disk")

    def make() -> HuggingFaceData:
        return HuggingFaceData(path, size=4, batch_size=7, streaming=streaming, shuffle_buffer=5, flip=True)

    def module() -> FlowMapTraining:
        network = MLP((3, 4, 4), width=16, depth=1, frequencies=4)
        randomise(network, seed=0)
        return FlowMapTraining(FlowMap(network))

    whole = module()
    trainer(tmp_path / "whole", 6).fit(whole, make())
    expected = copied(whole.state_dict())
    saving = ModelCheckpoint(tmp_path / "half", every_n_train_steps=1, save_last=True, save_top_k=-1)
    trainer(tmp_path / "half", 6, saving).fit(module(), make())
    resumed, middle = module(), next((tmp_path / "half").glob("*step=4.ckpt"))
    trainer(tmp_path / "half", 6).fit(resumed, make(), ckpt_path=middle)
    assert equal(resumed.state_dict(), expected)


def test_the_fingerprint_tells_data_sets_apart(tmp_path: Path) -> None:
    path = saved(tmp_path, "disk")
    first = HuggingFaceData(path, size=4).fingerprint()
    assert HuggingFaceData(path, size=4, seed=3, batch_size=2).fingerprint() == first
    assert HuggingFaceData(path, size=4, caption_column="label").fingerprint() != first
    assert HuggingFaceData(saved(tmp_path / "other", "disk", broken=False), size=4).fingerprint() != first
