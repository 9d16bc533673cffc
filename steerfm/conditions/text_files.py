"""What a text encoder made of prompts, in files, so that it need not be loaded again: one file a prompt.

A file is called by a hash of the encoder's origin and the prompt, and is written in one step. Several processes may
read and write one folder, and a folder may serve several encoders.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor

from steerfm.files import write_atomic

log = logging.getLogger(__name__)

DAMAGE = (ValueError, KeyError, safetensors.SafetensorError)


class TextFiles:
    """Keep tensors of prompts below a folder.

    origin: plain data that says which encoder made them and how; what another made is not found. A damaged file is
    named in the log and counts as none.
    """

    def __init__(self, folder: str | os.PathLike[str], origin: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.origin = json.dumps(origin, sort_keys=True)

    def holds(self, asked: Any) -> bool:
        """Whether there is a file of what was asked."""
        return self._path(asked).exists()

    def read(self, asked: Any) -> dict[str, Tensor] | None:
        """Return the tensors of what was asked, plain data such as a prompt, or None. Raises OSError."""
        path = self._path(asked)
        try:
            return parse(path.read_bytes())
        except FileNotFoundError:
            return None
        except DAMAGE as error:
            log.warning("%s is damaged (%s) and is made again", path, error)
            return None

    def write(self, asked: Any, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of what was asked. Raises RunError where the folder cannot be written."""
        path = self._path(asked)
        write_atomic(path, serialise({name: tensor.contiguous() for name, tensor in tensors.items()}), durable=False)

    def _path(self, asked: Any) -> Path:
        name = hashlib.sha256(json.dumps([self.origin, asked]).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"
