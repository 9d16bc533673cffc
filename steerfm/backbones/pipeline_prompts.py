"""The text encoders of a pretrained pipeline as the conditioner of a flow map."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.backbones.families import family_of, parameters_of
from steerfm.backbones.pipeline_files import PipelineFiles, check_tokenizer, library
from steerfm.backbones.recent import Recent
from steerfm.building import remembered
from steerfm.conditions.text_files import TextFiles
from steerfm.errors import ConfigError
from steerfm.files import file_fingerprint
from steerfm.types import Condition


@remembered
class PipelinePrompts(nn.Module):
    """Turn prompts into what a pipeline's network is told: "embedding", and "pooled" or "embedding_mask" beside it.

    negative_prompt: stands for the null condition; None is the pipeline's own, the empty prompt or zeros. length: the
    most tokens of a long prompt, the pipeline's own where nothing is said. device: where the encoders work; None is
    where the map is. kept: a folder in which what prompts were read as is kept; one that is there is not read again.

    As those of `FrozenText`, the encoders are loaded when the first prompt is read and are no part of the map, every
    prompt is read by itself, and recent ones are held, on the CPU; `release` lets go of the encoders.
    """

    def __init__(
        self,
        files: PipelineFiles,
        negative_prompt: str | None = None,
        length: int | None = None,
        device: str | None = None,
        kept: str | None = None,
    ) -> None:
        super().__init__()
        self.negative_prompt, self.length, self.device, self.kept = negative_prompt, length, device, kept
        self._reader = _Reader(files, length, kept)
        self.place: Tensor  # follows the map to its device
        self.register_buffer("place", torch.zeros((), dtype=torch.uint8), persistent=False)

    def forward(self, prompts: Sequence[str]) -> Condition:
        """Return the condition of B prompts. Raises CheckpointError where the encoders cannot be loaded."""
        return self._condition([(prompt, False, False) for prompt in prompts])

    def null(self, n: int) -> Condition:
        """Return the null condition for n samples: the negative prompt."""
        return self._condition([self._null()]).repeat_interleave(n)

    def keeping(self, folder: str) -> PipelinePrompts:
        """Return the same with what prompts were read as kept in `folder`."""
        made = PipelinePrompts(self._reader.files, self.negative_prompt, self.length, self.device, folder)
        return made.to(self.place.device)

    def keep(self, prompts: Sequence[str]) -> int:
        """Read prompts, and the null condition, that `kept` does not hold yet; return how many these were."""
        texts, read = self._reader.texts, 0
        if texts is None:
            raise ConfigError("Prompts are kept in a folder: name one by kept=.")
        for asked in [self._null(), *((prompt, False, False) for prompt in dict.fromkeys(prompts))]:
            if not texts.holds(asked):
                self._condition([asked])
                read += 1
        return read

    def workplace(self) -> torch.device:
        """Return the device on which prompts are read."""
        return self.place.device if self.device is None else torch.device(self.device)

    def release(self) -> None:
        """Let go of the encoders and their memory; a prompt that is not among the recent ones loads them again."""
        self._reader.pipeline = None

    def _null(self) -> tuple[str, bool, bool]:
        return (self.negative_prompt or "", True, self.negative_prompt is None)

    def _condition(self, asked: Sequence[tuple[str, bool, bool]]) -> Condition:
        read = [self._reader.read(each, self.workplace()) for each in asked]
        return Condition({name: torch.cat([each[name] for each in read]) for name in read[0]})


class _Reader:
    """Hold the encoders outside the module tree, and what they made of recent prompts; copies of a map share it."""

    def __init__(self, files: PipelineFiles, length: int | None, kept: str | None) -> None:
        self.files, self.length, self.kept = files, length, kept
        self.recent = Recent()
        self.pipeline: Any = None

    def __deepcopy__(self, memo: Any) -> _Reader:
        return self

    def __reduce__(self) -> Any:
        return _Reader, (self.files, self.length, self.kept)  # another process loads the encoders itself

    @cached_property
    def texts(self) -> TextFiles | None:
        """The files of what prompts were read as; of a pipeline in a folder they are told apart by its bytes."""
        if self.kept is None:
            return None
        files, index = self.files, self.files.index()
        parts = [part for pair in family_of(index).texts.items() for part in pair if files.has(part)]
        folder = Path(files.source)
        if folder.is_dir():
            named: Any = [file_fingerprint(folder / part) for part in parts]
        else:
            named = [files.source, files.revision, files.variant]
        origin = {"pipeline": index["_class_name"], "parts": named, "dtype": files.dtype, "length": self.length}
        return TextFiles(self.kept, origin)

    def read(self, asked: tuple[str, bool, bool], device: torch.device) -> dict[str, Tensor]:
        """Return the tensors (1, ...) of (prompt, negative, unsaid) on the CPU."""
        return self.recent.read(asked, self.texts, lambda: self._encoded(asked, device))

    def _encoded(self, asked: tuple[str, bool, bool], device: torch.device) -> dict[str, Tensor]:
        prompt, negative, unsaid = asked
        index = self.files.index()
        family = family_of(index)
        pipeline = self._loaded(index, device)
        options = {"length": self.length, "negative": negative, "unsaid": unsaid}
        # What is kept must serve training too, so it may be neither an inference tensor nor rounded by autocast.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            return {name: found.cpu().clone() for name, found in family.read(pipeline, prompt, options).items()}

    def _loaded(self, index: dict[str, Any], device: torch.device) -> Any:
        """Return the pipeline with its encoders alone, on a device."""
        family = family_of(index)
        if self.pipeline is None:
            kind = getattr(library("diffusers"), index["_class_name"])
            parts: dict[str, Any] = {name: None for name, kept in index.items() if isinstance(kept, list)}
            for encoder, tokenizer in family.texts.items():
                if encoder in family.optional and not self.files.has(encoder):
                    continue
                parts |= {encoder: self.files.part(encoder), tokenizer: self.files.part(tokenizer)}
                check_tokenizer(parts[tokenizer], parts[encoder], self.files.source)
            named = {name: kept for name, kept in index.items() if not name.startswith("_") and name not in parts}
            known = parameters_of(kind.__init__)
            given = {**parts, **named, "scheduler": self.files.part("scheduler")}
            pipeline = kind(**{name: value for name, value in given.items() if name in known})
            if set(family.optional) - parts.keys() or any(parts.get(name) is None for name in family.optional):
                pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**self.files.config(family.network)))
            self.pipeline = pipeline
        for encoder in family.texts:
            if getattr(self.pipeline, encoder, None) is not None:
                getattr(self.pipeline, encoder).to(device)
        return self.pipeline
