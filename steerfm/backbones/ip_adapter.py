"""IP-Adapters: a U-Net's attention to a picture that the prompt names, beside that to its text.

Reference: Ye et al. 2023, arXiv 2308.06721.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from steerfm.backbones.families import IMAGE
from steerfm.backbones.pipeline_files import PipelineFiles, library
from steerfm.backbones.pipeline_prompts import PipelinePrompts
from steerfm.backbones.recent import Recent
from steerfm.building import remembered
from steerfm.conditions.pictures import joined, parts_of, read_pixels
from steerfm.conditions.text_files import TextFiles
from steerfm.errors import CheckpointError
from steerfm.files import file_fingerprint
from steerfm.logs import quiet
from steerfm.types import Condition

ENCODER = "image_encoder"  # the folder beside a published file
KINDS = {  # what tells one from another -> what is as wide as its picture's embedding, and that of the encoder
    "proj.weight": ("proj.weight", "projection_dim"),
    "latents": ("proj_in.weight", "hidden_size"),  # "plus"
    "proj.3.weight": ("proj.0.weight", "hidden_size"),  # "full face"
}


@dataclass(frozen=True)
class IPAdapter:
    """Name a published IP-Adapter: its .safetensors, the folder of its image encoder, and its strength.

    dtype: of the image encoder, by name. digest: the SHA-256 of the .safetensors, which may not be another later.
    """

    file: str
    encoder: str
    scale: float = 1.0
    dtype: str = "float32"
    digest: str | None = None

    @classmethod
    def named(cls, file: str, encoder: str | None, scale: float | None, dtype: str) -> IPAdapter:
        """Return the adapter of a file; by default its encoder lies beside it and its strength is 1.

        Raises CheckpointError for files that are missing, damaged or of different adapters.
        """
        beside = str(Path(file).parent / ENCODER) if encoder is None else encoder
        found = cls(file, beside, 1.0 if scale is None else float(scale), dtype)
        read, made = found.width, getattr(found.encoder_files().settings(), KINDS[found.kind][1])
        if read != made:
            raise CheckpointError(
                f"{file} reads {read} numbers of a picture and {beside} makes {made}: name the folder of the encoder "
                "that it was trained with, ip_adapter_encoder."
            )
        return replace(found, digest=file_fingerprint(Path(file)))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights by name. Raises CheckpointError for what is no .safetensors of an IP-Adapter."""
        path = Path(self.file)
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is no .safetensors, and weights are read from nothing else: take that form.")
        if not path.is_file():
            raise CheckpointError(
                f"There is no IP-Adapter {path}: give the path of a file, such as models/ip-adapter_sd15.safetensors "
                f"of h94/IP-Adapter, with the folder {ENCODER} beside it."
            )
        try:
            with safetensors.safe_open(path, "pt") as weights:
                return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): copy it again.") from error

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is. Raises CheckpointError for others, such as face-ID."""
        found = [kind for kind in KINDS if f"image_proj.{kind}" in self.shapes]
        faces = any("_lora." in name or "perceiver_resampler" in name for name in self.shapes)
        if not found or faces or "ip_adapter.1.to_k_ip.weight" not in self.shapes:
            raise CheckpointError(
                f"{self.file} is no IP-Adapter that reads pictures by CLIP; face-ID ones, which read faces by "
                "insightface, and other files are not read."
            )
        return found[0]

    @property
    def width(self) -> int:
        """How many numbers it reads of a picture, or of each of its tokens."""
        return self.shapes[f"image_proj.{KINDS[self.kind][0]}"][-1]

    @property
    def tokens(self) -> bool:
        """Whether it reads the encoder's tokens, (B, tokens, width), as "plus" does, and no embedding (B, width)."""
        return KINDS[self.kind][1] == "hidden_size"

    def encoder_files(self) -> EncoderFiles:
        """Return the files of its encoder. Raises CheckpointError where they are not there."""
        folder = Path(self.encoder)
        if not folder.is_dir():
            raise CheckpointError(
                f"The IP-Adapter {self.file} has no image encoder at {folder}: put the published folder there, or name "
                "it, ip_adapter_encoder."
            )
        files = EncoderFiles(str(folder.parent), dtype=self.dtype, name=folder.name)
        files.check((files.name,))
        return files

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights as diffusers takes them. Raises CheckpointError where the file is another than before."""
        _ = self.kind
        if self.digest is not None and file_fingerprint(Path(self.file)) != self.digest:
            raise CheckpointError(f"{self.file} is not the IP-Adapter that this map was made with: restore it.")
        grouped: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        with safetensors.safe_open(self.file, "pt") as weights:
            for name in self.shapes:
                group, _, rest = name.partition(".")
                if group in grouped:
                    grouped[group][rest] = weights.get_tensor(name)
        return grouped

    def put_into(self, unet: Any) -> list[Outside]:
        """Let a U-Net attend to pictures too, and return what it calls for that, frozen and none of its parts.

        Raises CheckpointError for an adapter of another U-Net.
        """
        tensors = self.tensors()
        theirs = sum(name.endswith("attn2.processor") for name in unet.attn_processors)
        ours = sum(name.endswith(".to_k_ip.weight") for name in tensors["ip_adapter"])
        width, wanted = tensors["ip_adapter"]["1.to_k_ip.weight"].shape[-1], unet.config.cross_attention_dim
        try:
            if (ours, width) != (theirs, wanted):
                raise ValueError(f"{ours} layers of width {width}, and the U-Net has {theirs} of {wanted}")
            with torch.inference_mode(False), torch.random.fork_rng(devices=[]), quiet():
                unet._load_ip_adapter_weights([tensors], low_cpu_mem_usage=False)
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{self.file} is the IP-Adapter of another model ({reason}).") from error
        projection = Outside(unet.encoder_hid_proj)
        del unet.encoder_hid_proj
        unet.encoder_hid_proj = projection
        processors = {
            name: Outside(each) if isinstance(each, nn.Module) else each for name, each in unet.attn_processors.items()
        }
        added = [each for each in processors.values() if isinstance(each, Outside)]
        for each in added:
            each.module.scale = [self.scale]
        unet.set_attn_processor(processors)  # which empties what it is given
        return [projection, *added]

    def load_into(self, pipeline: Any) -> None:
        """Let a pipeline of diffusers load it, without its encoder."""
        path = Path(self.file)
        with quiet():
            pipeline.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None)
        pipeline.set_ip_adapter_scale(self.scale)


class Outside:
    """Call a module that stands outside the module tree: it is neither trained nor saved, and copies of a map share it.

    Additions such as LoRA's do not find it, and what is exported is the U-Net alone.
    """

    def __init__(self, module: Any) -> None:
        self.module = module.requires_grad_(False)

    def __deepcopy__(self, memo: Any) -> Outside:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@dataclass(frozen=True)
class EncoderFiles(PipelineFiles):
    """Name an image encoder: the folder `name` in the folder `source`."""

    name: str = ENCODER

    def index(self) -> dict[str, Any]:
        return {self.name: ["transformers", "CLIPVisionModelWithProjection"]}

    def settings(self) -> Any:
        """Return its settings, without its weights."""
        with self._telling(self.name):
            return library("transformers").CLIPVisionConfig.from_pretrained(self.source, subfolder=self.name)

    def _layout(self) -> str:
        return "an IP-Adapter's image encoder is a folder with config.json and model.safetensors."


@remembered
class PromptedPictures(nn.Module):
    """Turn "caption @ path" into what `captions` makes of the caption, and CLIP's embedding of the picture beside it.

    "image_embedding" is (B, width), or (B, tokens, width) for adapters that read the encoder's tokens. A picture is
    resized to the encoder's size by its shorter side, and its middle taken. Without one, and in the null condition, it
    is what diffusers takes for none: zeros, or the tokens of a picture of zeros. As the text encoders, the image
    encoder is loaded when the first picture is read, works where they do, and is no part of the map; what it makes is
    held and kept as theirs is, by the picture's pixels.
    """

    def __init__(self, adapter: IPAdapter, captions: PipelinePrompts) -> None:
        super().__init__()
        self.adapter, self.captions = adapter, captions
        self._reader = _Reader(adapter, captions.kept)

    def forward(self, prompts: Sequence[str]) -> Condition:
        """Return the condition of B prompts. Raises DataError, naming the file, for one that is no good picture."""
        parts, device = parts_of(prompts), self.captions.workplace()
        read = torch.cat([self._reader.read(path, device) for _, path in parts])
        return joined(self.captions([caption for caption, _ in parts]), Condition({IMAGE: read}))

    def null(self, n: int) -> Condition:
        """Return the null condition for n samples: no picture and the negative prompt."""
        none = Condition({IMAGE: self._reader.read(None, self.captions.workplace())})
        return joined(self.captions.null(n), none.repeat_interleave(n))

    def keeping(self, folder: str) -> PromptedPictures:
        """Return the same with what prompts and pictures were read as kept in `folder`."""
        return PromptedPictures(self.adapter, self.captions.keeping(folder))

    def release(self) -> None:
        """Let go of all encoders and their memory."""
        self.captions.release()
        self._reader.encoder = None


class _Reader:
    """Hold the image encoder outside the module tree, and what it made of recent pictures; copies of a map share it."""

    def __init__(self, adapter: IPAdapter, kept: str | None) -> None:
        self.adapter, self.kept = adapter, kept
        self.recent = Recent()
        self.encoder: Any = None

    def __deepcopy__(self, memo: Any) -> _Reader:
        return self

    def __reduce__(self) -> Any:
        return _Reader, (self.adapter, self.kept)  # another process loads the encoder itself

    @cached_property
    def files(self) -> TextFiles | None:
        """The files of what pictures were read as, told apart by the encoder's bytes."""
        if self.kept is None:
            return None
        adapter = self.adapter
        origin = {"image_encoder": file_fingerprint(Path(adapter.encoder)), "dtype": adapter.dtype}
        return TextFiles(self.kept, {**origin, "tokens": adapter.tokens})

    def read(self, path: str | None, device: torch.device) -> Tensor:
        """Return the embedding (1, ...) of a picture, or of none, on the CPU."""
        if path is None and not self.adapter.tokens:
            return torch.zeros(1, self.adapter.width)
        pixels = None if path is None else self._pixels(path)
        asked = None if pixels is None else hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        return self.recent.read(asked, self.files, lambda: self._encoded(pixels, device))[IMAGE]

    @cached_property
    def size(self) -> int:
        """The side of the pictures that the encoder reads."""
        return int(self.adapter.encoder_files().settings().image_size)

    def _pixels(self, path: str) -> Tensor:
        """Return what the encoder is given of a picture, (1, 3, size, size)."""
        from PIL import Image

        picture = Image.fromarray(np.rint(255 * read_pixels(path, 3)).astype(np.uint8))
        prepare = library("transformers").CLIPImageProcessor(size=self.size, crop_size=self.size)
        return prepare(picture, return_tensors="pt").pixel_values

    def _encoded(self, pixels: Tensor | None, device: torch.device) -> dict[str, Tensor]:
        if self.encoder is None:
            files = self.adapter.encoder_files()
            self.encoder = files.part(files.name)
        encoder, tokens = self.encoder.to(device), self.adapter.tokens
        given = torch.zeros(1, 3, self.size, self.size) if pixels is None else pixels
        # As with texts, what is kept may be neither an inference tensor nor rounded by autocast.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            made = encoder(given.to(device, encoder.dtype), output_hidden_states=tokens)
            return {IMAGE: (made.hidden_states[-2] if tokens else made.image_embeds).cpu().clone()}
