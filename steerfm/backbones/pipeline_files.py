"""A pipeline in diffusers' file layout, read part by part: tensors from safetensors, settings from JSON, no code."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from steerfm.errors import CheckpointError, SteerfmError, TrustError, causes, missing_package
from steerfm.logs import quiet
from steerfm.saving import DTYPES

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")  # whose classes a part may have
LEAST_TOKENS = 0.9  # of the vocabulary of a text encoder; below, files of its tokenizer are missing
CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json")  # one of them is in every part's folder


@dataclass(frozen=True)
class PipelineFiles:
    """Name a published pipeline: a folder or a hub id, its revision on the hub, and the variant of its weights.

    dtype: the floating type that its weights are read in, by name.
    """

    source: str
    revision: str | None = None
    variant: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SteerfmError(f"dtype is one of {', '.join(DTYPES)}, got '{self.dtype}'.")

    def index(self) -> dict[str, Any]:
        """Return model_index.json. Raises CheckpointError, naming the layout, where there is none."""
        return self._index()[0]

    def pinned(self) -> PipelineFiles:
        """Return the same with the hub's commit for a revision, so that it means the same files tomorrow."""
        commit = self._index()[1]
        return self if Path(self.source).is_dir() or not commit else replace(self, revision=commit)

    def has(self, part: str) -> bool:
        """Whether the pipeline has a part; optional ones, such as SD3's third encoder, may be left out."""
        named = self.index().get(part)
        return isinstance(named, list) and len(named) == 2 and None not in named

    def config(self, part: str) -> Mapping[str, Any]:
        """Return the settings of a part of diffusers', without its weights."""
        kind = self._class(part)
        with self._telling(part):
            return kind.load_config(self.source, subfolder=part, revision=self.revision)

    def part(self, part: str, dtype: str | None = None) -> Any:
        """Return one part, built and filled; models in evaluation mode without gradients.

        Raises CheckpointError where its files are missing or do not fit, TrustError where it asks for code.
        """
        kind = self._class(part)
        options: dict[str, Any] = {"subfolder": part, "revision": self.revision}
        if issubclass(kind, torch.nn.Module):
            return self._model(part, kind, DTYPES[dtype or self.dtype], options)
        with self._telling(part):
            return kind.from_pretrained(self.source, **options)

    def check(self, parts: tuple[str, ...]) -> None:
        """Raise CheckpointError where a local folder lacks one of these parts, before anything large is read."""
        folder = Path(self.source)
        for part in parts:
            if not self.has(part):
                raise CheckpointError(f"The pipeline {self.source} has no '{part}' in its {INDEX}: {self._layout()}")
            if not folder.is_dir():
                continue
            if not any((folder / part / name).is_file() for name in CONFIGS):
                raise CheckpointError(f"{folder} has no folder '{part}' with its settings: {self._layout()}")
            weighted = issubclass(self._class(part), torch.nn.Module)
            if weighted and not any((folder / part).glob("*.safetensors")):
                raise CheckpointError(
                    f"{folder / part} holds no .safetensors, and weights are read from nothing else: save the pipeline "
                    "once more by save_pretrained(folder, safe_serialization=True)."
                )

    def _index(self) -> tuple[dict[str, Any], str | None]:
        folder = Path(self.source)
        if folder.is_dir():
            try:
                return dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))), None
            except FileNotFoundError as error:
                raise CheckpointError(f"{folder} has no {INDEX}: {self._layout()}") from error
            except (OSError, ValueError, TypeError) as error:
                raise CheckpointError(f"{folder / INDEX} is damaged ({error}): copy it again.") from error
        with self._telling(INDEX):
            found, commit = library("diffusers").DiffusionPipeline.load_config(
                self.source, revision=self.revision, return_commit_hash=True
            )
        return dict(found), commit

    def _class(self, part: str) -> Any:
        """Return the class of a part, one of diffusers' or transformers' own."""
        module, name = self.index()[part]
        found = getattr(library(module), name, None) if module in LIBRARIES else None
        if not isinstance(found, type):
            raise TrustError(
                f"The part '{part}' of {self.source} is a {module}.{name}, and only classes of "
                f"{' and '.join(LIBRARIES)} are built: code that comes with a model is never run."
            )
        return found

    def _model(self, part: str, kind: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
        of_diffusers = kind.__module__.startswith("diffusers.")
        options |= {"use_safetensors": True, "variant": self.variant, "output_loading_info": True}
        options |= {"torch_dtype": dtype} if of_diffusers else {"dtype": dtype, "trust_remote_code": False}
        with self._telling(part), torch.inference_mode(False), torch.random.fork_rng(devices=[]), quiet():
            model, report = kind.from_pretrained(self.source, **options)
        unfit = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
        if unfit:
            raise CheckpointError(
                f"The weights of '{part}' in {self.source} do not fit its config: {unfit[0]} is missing or differs."
            )
        return model.eval().requires_grad_(False)

    @contextlib.contextmanager
    def _telling(self, part: str) -> Iterator[None]:
        """Say in one sentence what could not be read, whatever the libraries make of it."""
        try:
            yield
        except SteerfmError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            gated = any("Gated" in type(each).__name__ for each in causes(error)) or "gated" in reason.lower()
            fix = "accept its licence on the hub and log in by 'hf auth login'" if gated else self._layout()
            raise CheckpointError(
                f"'{part}' of {self.source} cannot be read ({type(error).__name__}: {reason}): {fix}"
            ) from error

    def _layout(self) -> str:
        return (
            f"give a hub id, or a folder as save_pretrained writes it: {INDEX}, scheduler/scheduler_config.json, and "
            "transformer/ or unet/, vae/, text_encoder/ and tokenizer/ with their config and .safetensors."
        )


def check_tokenizer(tokenizer: Any, encoder: Any, source: str) -> None:
    """Raise CheckpointError for a tokenizer that is almost empty, as transformers builds it where files are missing."""
    vocabulary = int(encoder.config.get_text_config().vocab_size)
    if not LEAST_TOKENS * vocabulary <= len(tokenizer) <= vocabulary:
        raise CheckpointError(
            f"A tokenizer of {source} knows {len(tokenizer)} tokens and its encoder {vocabulary}, so its files are "
            "missing or another model's: put them beside its tokenizer_config.json."
        )


def library(name: str) -> Any:
    """Return diffusers or transformers. Raises SteerfmError where it is not installed."""
    import importlib

    try:
        found = importlib.import_module(name)
        if name == "diffusers":  # torchao has much to say on its own import, which happens here if it is installed
            with quiet():
                importlib.import_module("diffusers.quantizers")
        return found
    except ModuleNotFoundError as error:
        raise missing_package(name, "diffusers", "A pretrained model") from error
