"""Saved maps and Lightning checkpoints, damaged: a map that loads is whole, and nothing in a file is run."""

import io
import json
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given

from fuzz.damage import damaged, damaged_bytes, damaged_json, garbage, randoms
from fuzz.watching import often, watched
from steerfm import MLP, FlowMap
from steerfm.conditions import CaptionWords
from steerfm.networks import DiT, WordEncoder
from steerfm.saving import describe_flow_map, read_checkpoint

HEADER = 8  # bytes that say how long a safetensors header is


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> list[FlowMap]:
    """Return two maps, one of them with prompts."""
    words = ["red", "circle"]
    dit = DiT(
        (1, 4, 4), patch=2, width=8, depth=1, heads=2, text=WordEncoder(len(words), 4, width=8, layers=1, heads=2)
    )
    return [FlowMap(MLP((2,), width=4, depth=1)), FlowMap(dit, conditioner=CaptionWords(words, 4))]


def safetensors_of(random: Random, data: bytes) -> bytes:
    """Return safetensors with a damaged header, or damaged anywhere."""
    if random.randrange(2):
        return (
            damaged_bytes(random, data)
            if random.randrange(6)
            else garbage(random, [b"\xff" * 8, b"\2\0\0\0\0\0\0\0{}"])
        )
    length = int.from_bytes(data[:HEADER], "little")
    header = damaged_json(random, json.loads(data[HEADER : HEADER + length]))
    claimed = random.choice([len(header), len(header), 2**60, 0])
    return claimed.to_bytes(HEADER, "little") + header + data[HEADER + length :]


@often
@given(random=randoms)
def test_a_saved_map_loads_or_is_refused(workshop: Path, maps: list[FlowMap], random: Random):
    folder = random.choice(maps).save(workshop / "map")
    described, weights = folder / "flow_map.json", folder / "flow_map.safetensors"
    if random.randrange(4):
        described.write_bytes(damaged_json(random, json.loads(described.read_text())))
    if random.randrange(3) == 0:
        weights.write_bytes(safetensors_of(random, weights.read_bytes()))
    with watched():
        assert FlowMap.load(folder).network is not None
    for path in (described, weights):
        path.unlink()


def checkpoint_of(random: Random, flow_map: FlowMap) -> bytes:
    """Return a checkpoint as Lightning writes it, damaged before or after it was packed."""
    names = {f"flow_map.{name}": tensor for name, tensor in flow_map.state_dict().items()}
    whole: dict[str, Any] = {
        "state_dict": names,
        "flow_map": describe_flow_map(flow_map),
        "callbacks": {},
        "global_step": 3,
    }
    if random.randrange(2):
        whole = damaged(random, whole)
    stream = io.BytesIO()
    torch.save(whole, stream)
    kind = random.randrange(4)
    if kind == 0:
        return damaged_bytes(random, stream.getvalue())
    if kind == 1:
        return repacked(random, stream.getvalue())
    return stream.getvalue()


def repacked(random: Random, data: bytes) -> bytes:
    """Return the archive with one entry damaged or replaced by a pickle that calls a function."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        chosen = random.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            if name == chosen or (name.endswith("data.pkl") and random.randrange(3) == 0):
                evil = b"cevil_module\nrun\n(S'x'\ntR."
                content = evil if random.randrange(2) else damaged_bytes(random, content)
            new.writestr(name if random.randrange(9) else f"../../{name}", content)
    return stream.getvalue()


@often
@given(random=randoms)
def test_a_checkpoint_loads_or_is_refused(workshop: Path, maps: list[FlowMap], random: Random):
    path = workshop / "last.ckpt"
    path.write_bytes(garbage(random) if random.randrange(12) == 0 else checkpoint_of(random, random.choice(maps)))
    with watched():
        read_checkpoint(path)
        assert FlowMap.load(path).network is not None


def test_what_is_whole_loads(workshop: Path, maps: list[FlowMap]):
    """Nothing that is refused here would say anything if whole maps were refused as well."""
    with watched(OSError):
        loaded = [FlowMap.load(flow_map.save(workshop / "map")) for flow_map in maps]
    assert [type(flow_map.network) for flow_map in loaded] == [MLP, DiT]
