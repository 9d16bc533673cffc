"""Train a small CLIP from scratch and save it in the format in which public ones are published."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from safetensors.torch import save as serialise
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW, Optimizer

from steerfm.building import check_arguments
from steerfm.callbacks.ema import averaged
from steerfm.callbacks.skip_non_finite import non_finite
from steerfm.errors import ConfigError, DataError
from steerfm.files import write_atomic
from steerfm.images import clamp, resize, to_unit
from steerfm.modules.common import configure, rows_of, step_generator
from steerfm.objectives.contrastive import attacked, augment, contrastive

CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"


class Texts(NamedTuple):
    """The captions of a batch, each once, and which of them is each picture's own, (B,)."""

    captions: list[str]
    groups: Tensor


class ClipTraining(lightning.LightningModule):
    """Train a CLIP of open_clip on batches {"x0" in [-1, 1] or "images" in [0, 1], "prompt": list of str}.

    model: an open_clip model config, plain data with embed_dim, vision_cfg and text_cfg. Pictures are resized to
    vision_cfg.image_size and normalised with `mean` and `std`, which are saved with the model. paraphrase:
    caption -> several ways to say it, of which every step draws one, so that other wordings work too.
    noise, shift, fade: see `augment`. adversarial: every picture is also moved by up to so much in every pixel, against
    its own caption (`attacked`); it costs a second pass. logit_scale: what multiplies cosines in the loss; None learns
    it (as CLIP does). A small fixed one (5) spreads the cosines of right and wrong captions widest, as a reward likes.
    optimizer, scheduler, seed: as in FlowMapTraining. Negatives are those of the own process.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        optimizer: Callable[..., Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        *,
        paraphrase: Callable[[str], Sequence[str]] | None = None,
        noise: float = 0.0,
        shift: int = 0,
        fade: float = 0.0,
        adversarial: float = 0.0,
        logit_scale: float | None = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = copy.deepcopy(dict(model))
        self.clip, self.tokenizer = build_clip(self.config)
        if logit_scale is not None:
            self.clip.logit_scale.data.fill_(math.log(logit_scale))
            self.clip.logit_scale.requires_grad_(False)
        self.optimizer = optimizer or partial(AdamW, lr=1e-3)
        self.scheduler = scheduler
        self.paraphrase = paraphrase or (lambda caption: [caption])
        self.noise, self.shift, self.fade = noise, shift, fade
        if adversarial < 0:
            raise ConfigError(f"adversarial is a distance in pixel values and at least 0, got {adversarial}.")
        self.adversarial = adversarial
        self.mean, self.std = tuple(mean), tuple(std)
        self.seed = seed

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        generator = step_generator(self, self.seed, rows_of(batch))
        images = augment(_pictures(batch), self.noise, self.shift, self.fade, generator)
        texts = self._texts(batch["prompt"], generator)
        if self.adversarial:
            images = attacked(images, lambda moved: self._loss(moved, texts)[0], self.adversarial, generator)
        loss, accuracy = self._loss(images, texts)
        if not torch.isfinite(loss):
            non_finite(self, f"The contrastive loss is {float(loss)} at step {self.global_step}")
        self.log("loss", loss, prog_bar=True)
        self.log("accuracy", accuracy, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss, accuracy = self.loss(_pictures(batch), batch["prompt"])
        rows = len(batch["prompt"])
        self.log("validation/loss", loss, batch_size=rows, sync_dist=True)
        self.log("validation/accuracy", accuracy, prog_bar=True, batch_size=rows, sync_dist=True)

    def loss(
        self, images: Tensor, prompts: Sequence[str], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the share of pictures nearest to their own caption among the batch's.

        images: (B, C, H, W) in [0, 1]. With a generator every caption is said in a random one of its ways.
        """
        return self._loss(images, self._texts(prompts, generator))

    def _loss(self, images: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
        own = torch.arange(len(texts.captions), device=self.device)
        groups = texts.groups.to(self.device)
        pictures, words = self.embed_images(images), self.embed_texts(texts.captions)
        per_image, per_text = contrastive(pictures, words, groups, own, self.clip.logit_scale.exp())
        accuracy = ((pictures @ words.T).argmax(1) == groups).float().mean()
        return (per_image.mean() + per_text.mean()) / 2, accuracy

    def embed_images(self, images: Tensor) -> Tensor:
        """Return embeddings of length one, (B, D), of pictures (B, 1 or 3, H, W) in [0, 1]."""
        height, width = _size(self.config)
        wide = clamp(resize(images, (images.shape[2], width)))  # in two steps, as Pillow does and CLIPScore
        pictures = clamp(resize(wide, (height, width))).expand(-1, 3, -1, -1)
        mean, std = (pictures.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return functional.normalize(self.clip.encode_image((pictures - mean) / std), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings of length one, (M, D)."""
        return functional.normalize(self.clip.encode_text(self.tokenizer(list(texts)).to(self.device)), dim=-1)

    def configure_optimizers(self) -> Any:
        return configure(self.clip.parameters(), self.optimizer, self.scheduler)

    def save(self, folder: str | Path) -> Path:
        """Write the model into `folder` in open_clip's published format, with EMA weights where there are some.

        `CLIPScore(folder)` loads it, and so does open_clip itself as "local-dir:folder".
        """
        folder = Path(folder)
        preprocessing = {"mean": self.mean, "std": self.std, "interpolation": "bicubic", "resize_mode": "squash"}
        text = json.dumps({"model_cfg": self.config, "preprocess_cfg": preprocessing}, indent=2)
        with averaged(self):
            tensors = {name: t.detach().cpu().contiguous() for name, t in self.clip.state_dict().items()}
        write_atomic(folder / WEIGHTS_NAME, serialise(tensors))
        write_atomic(folder / CONFIG_NAME, text.encode())
        return folder

    def _texts(self, prompts: Sequence[str], generator: torch.Generator | None = None) -> Texts:
        """Return the different captions of a batch; with a generator each is said in a random one of its ways."""
        captions = list(dict.fromkeys(prompts))
        groups = torch.tensor([captions.index(prompt) for prompt in prompts])
        return Texts(captions if generator is None else [self._reworded(each, generator) for each in captions], groups)

    def _reworded(self, caption: str, generator: torch.Generator) -> str:
        ways = self.paraphrase(caption)
        return ways[int(torch.randint(len(ways), (1,), generator=generator))]


def build_clip(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return an open_clip model with random weights, and its tokenizer. Raises ConfigError for a wrong config."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
    from open_clip.tokenizer import SimpleTokenizer

    arguments = copy.deepcopy(dict(config))
    kind = CustomTextCLIP if arguments.pop("custom_text", False) else CLIP
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in arguments]
    if missing:
        raise ConfigError(f"The model config has no '{missing[0]}': see the JSON files of open_clip's model_configs.")
    check_arguments(kind, arguments, "model")
    check_arguments(CLIPVisionCfg, arguments["vision_cfg"], "model.vision_cfg")
    check_arguments(CLIPTextCfg, arguments["text_cfg"], "model.text_cfg")
    text = CLIPTextCfg(**arguments["text_cfg"])
    if text.hf_model_name or text.hf_tokenizer_name or arguments["vision_cfg"].get("timm_model_name"):
        raise ConfigError("Towers from transformers or timm cannot be trained here: use open_clip's own.")
    return kind(**arguments), SimpleTokenizer(context_length=text.context_length, **(text.tokenizer_kwargs or {}))


def _size(config: Mapping[str, Any]) -> tuple[int, int]:
    size = config["vision_cfg"].get("image_size", 224)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _pictures(batch: Mapping[str, Any]) -> Tensor:
    """Return a batch's pictures in [0, 1]."""
    if "images" in batch:
        return batch["images"]
    if "x0" in batch:
        return to_unit(batch["x0"])
    raise DataError(f"A batch needs 'images' in [0, 1] or 'x0' in [-1, 1], got {', '.join(batch)}.")
