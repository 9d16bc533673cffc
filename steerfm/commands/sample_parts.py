"""The samples of a run that is under way: written batch by batch, by every process, and joined in order at the end."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from lightning import Callback, LightningModule, Trainer
from safetensors import safe_open
from torch import Tensor

from steerfm import files
from steerfm.distributed import wait
from steerfm.errors import RunError
from steerfm.records import has_pictures, log_weights
from steerfm.types import Cost, Samples

log = logging.getLogger(__name__)


class SampleParts(Callback):
    """Write each batch of Trainer.predict into `folder`, so that an interrupted run keeps what it has.

    Batches hold "index", the numbers of their (prompt, seed) pairs. Each is one file, of tensors by name and the rest
    as JSON in its header, written whole or not at all; pictures are kept in the eight bits of their PNGs, and of a
    population what a run says of it. The folder must be one that all processes see.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.write(outputs.to("cpu"), batch["index"])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wait()

    def write(self, samples: Samples, index: Sequence[int]) -> None:
        """Write the samples of the pairs of these numbers. Raises RunError where the folder cannot be written."""
        header = {"index": list(index), "cost": asdict(samples.cost), "note": samples.note}
        header |= {"prompts": list(samples.prompts), "seeds": [int(seed) for seed in samples.seeds]}
        data = safetensors.torch.save(_tensors(samples), metadata={"samples": json.dumps(header)})
        files.write_atomic(self.folder / f"{index[0]:08d}-{index[-1]:08d}.safetensors", data, durable=False)

    def done(self) -> set[int]:
        """Return the numbers of the pairs whose samples are there."""
        return {number for index in self._parts().values() for number in index}

    def joined(self, count: int) -> list[Samples]:
        """Return the samples of `count` pairs in their order, each once. Raises RunError where some are missing."""
        wanted, batches = set(range(count)), []
        for path, index in sorted(self._parts().items(), key=lambda part: part[1]):
            rows = [row for row, number in enumerate(index) if number in wanted]
            wanted -= set(index)
            if rows:
                batches.append(_read(path, rows))
        if wanted:
            raise RunError(
                f"The samples of {len(wanted)} of {count} pairs are not in {self.folder}: give all processes one "
                "folder that all of them see (folder=...), and run the same command again for what is missing."
            )
        return batches

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _parts(self) -> dict[Path, list[int]]:
        """Return the files that can be read, and the numbers of the pairs in each."""
        found = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as part:
                    found[path] = json.loads(part.metadata()["samples"])["index"]
            except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
                log.warning("%s is damaged (%s): its samples are drawn again.", path, error)
        return found


def _tensors(samples: Samples) -> dict[str, Tensor]:
    """Return what a run keeps of its samples, by field and name; see `_read`."""
    images = samples.images
    if has_pictures(samples):
        images = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    look_aheads = {name: values for name, values in samples.trace.items() if name == "look_ahead"}
    kept = replace(samples, images=images, log_weights=log_weights(samples), particles=None, trace=look_aheads)
    tensors: dict[str, Tensor] = {}
    for each in fields(kept):
        value = getattr(kept, each.name)
        if isinstance(value, Mapping):
            tensors |= {f"{each.name}/{name}": values for name, values in value.items()}
        elif isinstance(value, Tensor):
            tensors[each.name] = value
    return {name: values.detach().clone().contiguous() for name, values in tensors.items()}  # some are one tensor


def _read(path: Path, rows: list[int]) -> Samples:
    """Return some rows of a file that `SampleParts.write` wrote."""
    with safe_open(path, "pt") as part:
        header = json.loads(part.metadata()["samples"])
    values: dict[str, Any] = {"parts": {}, "held_out": {}, "trace": {}}
    for name, tensor in safetensors.torch.load_file(path).items():
        group, _, key = name.partition("/")
        some = tensor if group == "trace" else tensor[rows]  # of the first few samples alone
        if key:
            values[group][key] = some
        else:
            values[name] = some / 255 if some.dtype == torch.uint8 else some
    values |= {name: [header[name][row] for row in rows] for name in ("prompts", "seeds")}
    return Samples(**values, cost=Cost(**header["cost"]), note=header["note"])
