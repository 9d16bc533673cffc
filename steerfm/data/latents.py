"""Latents: pictures led through a codec once, such as a VAE, and trained on from files.

A folder of latents holds shards, `latents-00000.safetensors` and so on, each with its captions in its header, and
`latents.json`, which is written last: a folder with it is complete. A killed `cache_latents` goes on after the last
whole shard, and ends with the same files as if it had never stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from steerfm import images
from steerfm.building import describe
from steerfm.data.batches import StepDataModule, epoch_indices, own_rows
from steerfm.data.gallery import check_sizes, divided, progress
from steerfm.errors import CheckpointError, ConfigError, DataError
from steerfm.files import lock_folder, remove_leftovers, unlock_folder, write_atomic

log = logging.getLogger(__name__)

FORMAT = 1
INDEX_NAME = "latents.json"
HEADER = "steerfm"
DAMAGE = (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError)  # what a damaged file makes us raise
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Encoder(Protocol):
    """Lead pictures (B, C, H, W) in [0, 1] to model space; every Codec does."""

    def encode(self, pictures: Tensor, /) -> Tensor: ...


class Pictures(Protocol):
    """Hold pictures by number, as ImageFolder and HuggingFaceData do."""

    @property
    def count(self) -> int: ...

    def rows(self, index: Iterable[int], /) -> dict[str, Any]: ...

    def fingerprint(self) -> str: ...


@torch.no_grad()
def cache_latents(
    codec: Encoder,
    data: Pictures,
    folder: str | os.PathLike[str],
    batch_size: int = 16,
    *,
    shard_size: int = 1024,
    dtype: str = "float32",
    device: str | None = None,
) -> Path:
    """Encode all pictures of `data` and write their latents with the captions into `folder`; return the folder.

    codec: what has `encode`; one that is a module, or holds one, is fed on its device, or on `device`, where a
    pretrained one goes with the pictures. batch_size: pictures encoded at once. shard_size: pictures a file. dtype:
    "float32", "float16" or "bfloat16", of what is stored. A folder that is complete is left as it is, an unfinished one
    is completed, without encoding again what it holds.
    Raises DataError where the folder holds latents of other pictures or another codec, or where a latent is not
    finite; RunError where it cannot be written or another process writes it.
    """
    if batch_size < 1 or shard_size < 1:
        raise ConfigError(f"batch_size and shard_size must be at least 1, got {batch_size} and {shard_size}.")
    if dtype not in TYPES:
        raise ConfigError(f"dtype is one of {', '.join(TYPES)}, got '{dtype}'.")
    folder = Path(folder)
    origin = {"codec": _identity(codec), "data": data.fingerprint(), "shard_size": shard_size, "dtype": dtype}
    key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
    lock_folder(folder)
    try:
        remove_leftovers(folder)
        if (folder / INDEX_NAME).exists():
            _require_key(str(_read_index(folder).get("key")), key, folder)
            log.info("%s is complete", folder)
            return folder
        starts = range(0, data.count, shard_size)
        paths = [folder / f"latents-{number:05d}.safetensors" for number in range(len(starts))]
        for path, start in progress(list(zip(paths, starts, strict=True)), f"Encoding {data.count} pictures"):
            if not _is_whole(path, key):
                rows = range(start, min(start + shard_size, data.count))
                x0, captions = _encoded(codec, data, rows, batch_size, device)
                header = json.dumps({"key": key, "captions": captions})  # in one entry: several have no fixed order
                write_atomic(path, serialise({"x0": x0.to(TYPES[dtype]).contiguous()}, {HEADER: header}))
        index = {"format": FORMAT, "key": key, **origin, **_summary(paths)}
        write_atomic(folder / INDEX_NAME, json.dumps(index, indent=2).encode())
    finally:
        unlock_folder(folder)
    log.info("%s: %d latents %s, mean %.3f, std %.3f",
             folder, index["count"], tuple(index["shape"]), index["mean"], index["std"])  # fmt: skip
    return folder


class Latents(StepDataModule):
    """Batches {"x0": latents (B, C, h, w) float32, "prompt": captions} from a folder of `cache_latents`.

    batch_size: samples a step, over all processes. validation_size: latents kept from training for the fixed
    validation batch; 0 is none. verify: compare every shard with its checksum at the start, about a second a GB.
    The files stay on disk and are mapped into memory as they are read; `index` says where they come from.
    Raises DataError for a folder that is unfinished, and names the shard that is missing or damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        batch_size: int = 64,
        validation_size: int = 0,
        verify: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(batch_size, validation_size)
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.seed = seed
        self.index = _read_index(self.folder)
        self.shards: list[Tensor] = []
        self.captions: list[str] = []
        for entry in progress(self.index["shards"], f"Opening {len(self.index['shards'])} shards"):
            x0, captions = _open_shard(self.folder, entry, tuple(self.index["shape"]), verify)
            self.shards.append(x0)
            self.captions += captions
        self.validation, self.training = divided(len(self.captions), validation_size)

    @property
    def count(self) -> int:
        """Return how many latents there are."""
        return len(self.captions)

    def batch(self, step: int) -> dict[str, Any]:
        index = self.training[epoch_indices(len(self.training), step, self.batch_size, self.seed)]
        return self.rows(index[own_rows(self.batch_size)].tolist())

    def validation_batch(self) -> dict[str, Any] | None:
        return self.rows(self.validation.tolist()) if len(self.validation) else None

    def rows(self, index: Iterable[int]) -> dict[str, Any]:
        """Return latents by number."""
        numbers, size = list(index), self.index["shard_size"]
        x0 = torch.stack([self.shards[number // size][number % size] for number in numbers])
        return {"x0": x0.float(), "prompt": [self.captions[number] for number in numbers]}


def _encoded(
    codec: Encoder, data: Pictures, rows: range, batch_size: int, device: str | None
) -> tuple[Tensor, list[str]]:
    """Return the latents and captions of some pictures. Raises DataError for what is no batch of finite numbers."""
    latents, captions = [], []
    place = _device(codec) if device is None else torch.device(device)
    for start in range(rows.start, rows.stop, batch_size):
        batch = data.rows(range(start, min(start + batch_size, rows.stop)))
        x0 = codec.encode(images.to_unit(batch["x0"]).to(place)).float().cpu()
        if len(x0) != len(batch["prompt"]):
            raise DataError(f"The codec made {len(x0)} latents of {len(batch['prompt'])} pictures: it must keep rows.")
        finite = x0.flatten(1).isfinite().all(1)
        if not finite.all():
            bad = start + int((~finite).nonzero()[0])
            raise DataError(f"The latent of picture {bad} is not finite: run the codec in float32, or see the picture.")
        latents.append(x0)
        captions += batch["prompt"]
    return torch.cat(latents), captions


def _summary(paths: list[Path]) -> dict[str, Any]:
    """Return the index's part about what the shards hold: count, shape, mean, standard deviation, checksums."""
    shards, shape, total, squares, numbers = [], [], 0.0, 0.0, 0
    for path in paths:
        x0, _ = _read_shard(path)
        shape = list(x0.shape[1:])
        shards.append({"file": path.name, "rows": len(x0), "sha256": _digest(path)})
        total, squares = total + float(x0.double().sum()), squares + float(x0.double().square().sum())
        numbers += x0.numel()
    mean = total / numbers
    return {
        "count": sum(shard["rows"] for shard in shards),
        "shape": shape,
        "mean": mean,
        "std": max(0.0, squares / numbers - mean**2) ** 0.5,
        "shards": shards,
    }


def _identity(codec: Any) -> dict[str, Any]:
    """Return what tells a codec from others: its description, or its class, and a digest of its tensors."""
    try:
        described = describe(codec)
    except CheckpointError:
        described = f"{type(codec).__module__}.{type(codec).__qualname__}"
    digest = hashlib.sha256()
    for name, tensor in _tensors(codec).items():
        digest.update(name.encode() + serialise({"x": tensor.detach().cpu().contiguous()}))
    return {"described": described, "tensors": digest.hexdigest()}


def _tensors(codec: Any) -> dict[str, Tensor]:
    """Return the tensors of a codec that is a module or holds some."""
    held = {"": codec, **getattr(codec, "__dict__", {})}
    modules = {name: part for name, part in held.items() if isinstance(part, torch.nn.Module)}
    return {f"{name} {key}": tensor for name, part in modules.items() for key, tensor in part.state_dict().items()}


def _device(codec: Any) -> torch.device:
    tensor = next(iter(_tensors(codec).values()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _is_whole(path: Path, key: str) -> bool:
    """Say whether a shard is there; raises DataError where it was made of something else."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as shard:
            found = json.loads((shard.metadata() or {})[HEADER])["key"]
    except DAMAGE:
        log.warning("%s is damaged and is made again", path)
        return False
    _require_key(found, key, path)
    return True


def _require_key(found: str, key: str, path: Path) -> None:
    if found != key:
        raise DataError(
            f"{path} holds latents of other pictures, another codec, or other settings: choose another folder, or "
            "delete this one."
        )


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version, _ = (
            int(index["format"]),
            [(entry["file"], entry["rows"], entry["sha256"]) for entry in index["shards"]],
        )
        _ = index["shape"], index["shard_size"], index["count"]
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} has no {INDEX_NAME}, so it holds no latents or unfinished ones: run cache_latents (again)."
        ) from error
    except DAMAGE as error:
        raise DataError(f"{path} is damaged ({error!r}): delete it and run cache_latents again.") from error
    if version > FORMAT:
        raise DataError(f"{path} was written by a newer steerfm: upgrade steerfm to read it.")
    return index


def _open_shard(folder: Path, entry: dict[str, Any], shape: tuple[int, ...], verify: bool) -> tuple[Tensor, list[str]]:
    """Return a shard's latents and captions. Raises DataError, with its name, where it is not as the index says."""
    path = folder / Path(entry["file"]).name  # an index leads to no other folder
    try:
        x0, captions = _read_shard(path)
        intact = tuple(x0.shape) == (entry["rows"], *shape) and len(captions) == entry["rows"]
        if intact and verify:
            intact = _digest(path) == entry["sha256"]
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: restore it, or run cache_latents again.") from error
    except DAMAGE as error:
        raise DataError(
            f"{path} is damaged ({error}): delete it and {INDEX_NAME}, and run cache_latents again."
        ) from error
    if not intact:
        raise DataError(
            f"{path} is not what {INDEX_NAME} says: delete both, and run cache_latents again to make it anew."
        )
    return x0, captions


def _read_shard(path: Path) -> tuple[Tensor, list[str]]:
    """Return a shard's latents, mapped from the file and not yet read, and its captions."""
    with safe_open(path, "pt") as shard:
        return shard.get_tensor("x0"), json.loads((shard.metadata() or {})[HEADER])["captions"]


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
