"""Cached latents: what is written and read again, after a kill, with damage, and in training."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_files import coloured, levels, pretend
from torch import Tensor, nn
from trainers import trainer

from steerfm import MLP, FlowMap, FlowMapTraining
from steerfm.data import ImageFolder, Latents, cache_latents
from steerfm.errors import ConfigError, DataError, RunError
from steerfm.flow_map import Pixels
from steerfm.networks.mlp import randomise


@dataclass
class Halving:
    """Average 2x2 pixels; counts what it encodes, and can fail after so many pictures."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        self.encoded = 0
        self.fails_after = 10**9

    def encode(self, pictures: Tensor) -> Tensor:
        assert pictures.min() >= 0 and pictures.max() <= 1
        self.encoded += len(pictures)
        if self.encoded > self.fails_after:
            raise KeyboardInterrupt
        return self.scale * nn.functional.avg_pool2d(pictures, 2)


class Learnt(nn.Module):
    """A codec with weights, as a VAE is."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 2, 2)
        with torch.no_grad():
            self.convolution.bias.zero_()  # type: ignore[union-attr]
            self.convolution.weight.copy_(torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed)))

    def encode(self, pictures: Tensor) -> Tensor:
        return self.convolution(pictures)


@pytest.fixture
def pictures(tmp_path: Path) -> ImageFolder:
    """Return 23 pictures of 4x4, picture i of the level i, with captions."""
    folder = coloured(tmp_path / "pictures", 23)
    rows = [json.dumps({"file_name": f"a{i:03}.png", "text": f"grey {i}"}) for i in range(23)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return ImageFolder(folder, size=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def number(latents: Tensor) -> list[int]:
    """Return the level of each picture that latents of Halving() came from."""
    return [round(float(value)) for value in latents.mean((1, 2, 3)) * 255]


def test_latents_are_the_codec_s_with_their_captions(pictures: ImageFolder, tmp_path: Path) -> None:
    codec = Learnt()
    folder = cache_latents(codec, pictures, tmp_path / "latents", batch_size=4, shard_size=10)
    assert sorted(contents(folder)) == ["latents-00000.safetensors", "latents-00001.safetensors",
                                        "latents-00002.safetensors", "latents.json"]  # fmt: skip
    data = Latents(folder)
    found, wanted = data.rows(range(23)), pictures.rows(range(23))
    with torch.no_grad():
        expected = codec.encode((wanted["x0"] + 1) / 2)
    assert found["prompt"] == wanted["prompt"] == [f"grey {i}" for i in range(23)]
    assert found["x0"].shape == (23, 4, 2, 2) and found["x0"].dtype == torch.float32
    assert torch.allclose(found["x0"], expected, atol=1e-5)  # convolutions of 4 and of 23 pictures round differently
    index = data.index
    assert (index["count"], index["shape"], index["shard_size"]) == (23, [4, 2, 2], 10)
    assert [shard["rows"] for shard in index["shards"]] == [10, 10, 3]
    assert abs(index["mean"] - float(expected.mean())) < 1e-5
    assert abs(index["std"] - float(expected.std(unbiased=False))) < 1e-5
    assert index["codec"]["described"].endswith("Learnt")
    assert list(data.rows([22, 3])["prompt"]) == ["grey 22", "grey 3"]


def test_pixels_are_latents_too(pictures: ImageFolder, tmp_path: Path) -> None:
    data = Latents(cache_latents(Pixels(), pictures, tmp_path / "latents"))
    assert levels(data.rows(range(23))["x0"]) == list(range(23))
    assert data.index["codec"]["described"]["_target_"] == "steerfm.flow_map.Pixels"


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 24), ("float16", 11), ("bfloat16", 8)])
def test_fewer_bits_are_rounded(dtype: str, bits: int, pictures: ImageFolder, tmp_path: Path) -> None:
    data = Latents(cache_latents(Halving(), pictures, tmp_path / "latents", dtype=dtype))
    expected = torch.arange(23) / 255
    found = data.rows(range(23))["x0"]
    assert found.dtype == torch.float32
    assert (found.mean((1, 2, 3)) - expected).abs().max() <= expected.max() * 2.0**-bits + 1e-7
    assert not torch.equal(found[:, 0, 0, 0], expected) or dtype == "float32"


def test_a_killed_run_goes_on_after_the_last_whole_shard(pictures: ImageFolder, tmp_path: Path) -> None:
    whole = contents(cache_latents(Halving(), pictures, tmp_path / "whole", batch_size=3, shard_size=6))
    codec = Halving()
    codec.fails_after = 15
    with pytest.raises(KeyboardInterrupt):
        cache_latents(codec, pictures, tmp_path / "latents", batch_size=3, shard_size=6)
    assert sorted(contents(tmp_path / "latents")) == ["latents-00000.safetensors", "latents-00001.safetensors"]
    with pytest.raises(DataError, match=r"has no latents\.json, so it holds no latents or unfinished ones"):
        Latents(tmp_path / "latents")
    (tmp_path / "latents" / ".latents-00002.safetensors.1.tmp").write_bytes(b"half")
    (tmp_path / "latents" / "latents-00001.safetensors").write_bytes(b"torn")  # as after a power failure
    codec = Halving()
    cache_latents(codec, pictures, tmp_path / "latents", batch_size=3, shard_size=6)
    assert codec.encoded == 23 - 6
    assert contents(tmp_path / "latents") == whole
    again = Halving()
    cache_latents(again, pictures, tmp_path / "latents", batch_size=5, shard_size=6)
    assert again.encoded == 0


@pytest.mark.parametrize("finished", [True, False])
def test_other_pictures_or_another_codec_are_refused(finished: bool, pictures: ImageFolder, tmp_path: Path) -> None:
    folder = cache_latents(Learnt(), pictures, tmp_path / "latents")
    if not finished:
        (folder / "latents.json").unlink()
    smaller = ImageFolder(pictures.folder, size=2)
    changes: list[Any] = [
        (Learnt(1), pictures, {}),
        (Halving(), pictures, {}),
        (Learnt(), smaller, {}),
        (Learnt(), pictures, {"dtype": "float16"}),
        (Learnt(), pictures, {"shard_size": 5}),
    ]
    before = contents(folder)
    for codec, data, more in changes:
        with pytest.raises(DataError, match="holds latents of other pictures, another codec, or other settings"):
            cache_latents(codec, data, folder, **more)
    assert contents(folder) == before
    cache_latents(Learnt(), pictures, folder)  # and the lock was let go of


def test_scales_and_held_modules_tell_codecs_apart(pictures: ImageFolder, tmp_path: Path) -> None:
    @dataclass
    class Holding:
        inner: nn.Module

        def encode(self, x: Tensor) -> Tensor:
            return self.inner.encode(x)  # type: ignore[operator]

    keys = []
    for i, codec in enumerate([Halving(), Halving(2.0), Holding(Learnt(0)), Holding(Learnt(1))]):
        keys.append(Latents(cache_latents(codec, pictures, tmp_path / str(i))).index["key"])
    assert len(set(keys)) == 4


class Bad:
    def __init__(self, make: Any) -> None:
        self.encode = make


@pytest.mark.parametrize(
    ("encode", "said"),
    [
        (lambda x: x.where(x.mean((1, 2, 3), keepdim=True) < 7 / 255 - 1e-4, torch.nan), "picture 7 is not finite"),
        (lambda x: x[1:], r"The codec made 3 latents of 4 pictures: it must keep rows"),
    ],
)
def test_bad_latents_are_refused(encode: Any, said: str, pictures: ImageFolder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        cache_latents(Bad(encode), pictures, tmp_path / "latents", batch_size=4)
    assert contents(tmp_path / "latents") == {}


def test_wrong_arguments_are_said(pictures: ImageFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype is one of float32, float16, bfloat16, got 'int8'"):
        cache_latents(Halving(), pictures, tmp_path / "latents", dtype="int8")
    with pytest.raises(ConfigError, match="batch_size and shard_size must be at least 1, got 0 and 1024"):
        cache_latents(Halving(), pictures, tmp_path / "latents", batch_size=0)
    folder = cache_latents(Halving(), pictures, tmp_path / "latents")
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        Latents(folder, batch_size=0)
    with pytest.raises(ConfigError, match="leaves none of the 23"):
        Latents(folder, validation_size=23)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Cannot write"):
        cache_latents(Halving(), pictures, tmp_path / "file")


def spoilt(folder: Path, how: str) -> str:
    """Damage a folder of latents in one way; return what the error says of it."""
    shard, index = folder / "latents-00001.safetensors", folder / "latents.json"
    data, values = shard.read_bytes(), json.loads(index.read_text())
    if how == "missing":
        shard.unlink()
        return r"latents-00001\.safetensors is missing: restore it"
    if how == "cut":
        shard.write_bytes(data[:-9])
        return r"latents-00001\.safetensors is damaged \(.*delete it and latents\.json"
    if how == "empty":
        shard.write_bytes(b"")
        return r"latents-00001\.safetensors is damaged \("
    if how == "bit":
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return r"latents-00001\.safetensors is not what latents\.json says"
    if how == "swapped":
        shard.write_bytes((folder / "latents-00002.safetensors").read_bytes())
        return r"latents-00001\.safetensors is not what latents\.json says"
    if how == "newer":
        index.write_text(json.dumps({**values, "format": 99}))
        return r"latents\.json was written by a newer steerfm"
    index.write_text(index.read_text()[:-40] if how == "index cut" else "[]")
    return r"latents\.json is damaged \(.*delete it and run cache_latents again"


@pytest.mark.parametrize("how", ["missing", "cut", "empty", "bit", "swapped", "newer", "index cut", "index list"])
def test_damage_is_named(how: str, pictures: ImageFolder, tmp_path: Path) -> None:
    folder = cache_latents(Halving(), pictures, tmp_path / "latents", shard_size=10)
    with pytest.raises(DataError, match=spoilt(folder, how)):
        Latents(folder)
    if how == "bit":
        assert Latents(folder, verify=False).count == 23


def test_an_index_leads_to_no_other_folder(pictures: ImageFolder, tmp_path: Path) -> None:
    folder = cache_latents(Halving(), pictures, tmp_path / "latents")
    other = cache_latents(Halving(), pictures, tmp_path / "other")
    text = (folder / "latents.json").read_text().replace("latents-00000", f"{other}/latents-00000")
    (folder / "latents.json").write_text(text)
    (folder / "latents-00000.safetensors").unlink()
    with pytest.raises(DataError, match=r"latents/latents-00000\.safetensors is missing"):
        Latents(folder)


def test_batches_depend_on_seed_and_step_and_are_divided(
    pictures: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache_latents(Halving(), pictures, tmp_path / "latents", shard_size=10)
    data = Latents(folder, batch_size=6, validation_size=5)
    held = data.validation_batch()
    assert held is not None
    batches = [data.batch(step) for step in range(6)]
    seen = [number(batch["x0"]) for batch in batches]
    assert sorted(number(held["x0"]) + seen[0] + seen[1] + seen[2]) == list(range(23))
    assert sorted(seen[3] + seen[4] + seen[5]) == sorted(seen[0] + seen[1] + seen[2])
    assert seen[:3] != seen[3:]
    assert all(batch["prompt"] == [f"grey {i}" for i in row] for batch, row in zip(batches, seen, strict=True))
    assert number(Latents(folder, batch_size=6, validation_size=5).batch(4)["x0"]) == seen[4]
    assert number(Latents(folder, batch_size=6, validation_size=5, seed=1).batch(0)["x0"]) != seen[0]
    assert Latents(folder).validation_batch() is None
    shares = []
    for rank in range(2):
        pretend(monkeypatch, rank, 2)
        shares += number(data.batch(1)["x0"])
    assert shares == seen[1][::2] + seen[1][1::2]


def test_latents_train(pictures: ImageFolder, tmp_path: Path) -> None:
    data = Latents(cache_latents(Learnt(), pictures, tmp_path / "latents"), batch_size=8, validation_size=4)
    network = MLP((4, 2, 2), width=16, depth=1, frequencies=4)
    randomise(network, seed=0)
    module = FlowMapTraining(FlowMap(network))
    run = trainer(tmp_path, 2)
    run.fit(module, data)
    assert run.global_step == 2
    assert {"loss", "validation/flow_matching"} <= set(run.callback_metrics)
