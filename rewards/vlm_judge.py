"""A vision-language model as a judge: its log-odds of answering yes to a question about the picture.

Model: any of the families Qwen2-VL, Qwen2.5-VL and Qwen3-VL that answers at once (Instruct, not Thinking), by
transformers. Source: the question and the idea of scoring its "yes" are VQAScore's, Lin et al. 2024, arXiv 2404.01291;
models: Wang et al. 2024, arXiv 2409.12191; Bai et al. 2025, arXiv 2502.13923; Qwen3-VL Technical Report, arXiv
2511.21631. Preprocessing: the checkpoint's own: bicubic to multiples of two patches within the least and most pixels,
its mean and std, every picture twice in time; differentiable. Range: a difference of logits, unbounded, mostly -15 to
15; 0 is undecided. Licence: Apache-2.0 for most sizes, a licence of its own for some: see the model's card.
Memory: two bytes a parameter in bfloat16, four in float32, 4.3 GB or 8.5 GB for Qwen3-VL 2B; with gradients several
times that for large pictures: lower max_pixels, or wrap it in MemorySaving.
Fooled by: writing in the picture that answers the question, counts and places of more than a few things, negations;
it says yes too readily, and its optimum under a gradient need not look like anything.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from steerfm.errors import RewardError
from steerfm.reward import Reward
from steerfm.rewards._image_models import read_config
from steerfm.rewards._transformers import (
    BICUBIC,
    explained,
    find_file,
    load_image_processor,
    load_model,
    load_tokenizer,
    resize_like_pillow,
)

MODEL = "Qwen/Qwen3-VL-2B-Instruct"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
QUESTION = "Does this figure show '{prompt}'? Please answer yes or no."  # Lin et al. 2024, section 3
PROMPT = "{prompt}"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONGEST = 200  # times the shorter side, for transformers


@dataclass(frozen=True)
class Patches:
    """Cut pictures into patches as the image processor of Qwen2-VL does, differentiable.

    `patch` is a patch's side, `merge` x `merge` of them become one token, `frames` is how often a picture is repeated
    in time; `least` and `most` bound the pixels of a resized picture.
    """

    patch: int
    merge: int
    frames: int
    least: int
    most: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Return the patches of pictures (B, 1 or 3, H, W) in [0, 1]; (B, N, frames * 3 * patch * patch).

        Patches of one token follow each other; the tokens go along rows. Raises RewardError for another shape.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise RewardError(f"This model needs pictures (B, 1 or 3, H, W), got the shape {tuple(images.shape)}.")
        shape = self.resized((images.shape[2], images.shape[3]))
        pictures = images if shape == images.shape[2:] else resize_like_pillow(images, shape, "bicubic")
        mean, std = (pictures.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        pictures = (pictures.expand(-1, 3, -1, -1) - mean) / std
        cut = pictures.unflatten(3, (-1, self.merge, self.patch)).unflatten(2, (-1, self.merge, self.patch))
        patches = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # (B, rows, columns, merge, merge, 3, 1, p, p)
        return patches.expand(*(-1,) * 6, self.frames, -1, -1).flatten(5).flatten(1, 4)

    def resized(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) that a picture of this shape is resized to: whole tokens, within the bounds."""
        height, width = shape
        if max(shape) > LONGEST * min(shape):
            raise RewardError(
                f"This model sees pictures at most {LONGEST} times longer than wide, got {height} x {width}: crop them."
            )
        side = self.patch * self.merge
        whole = [round(edge / side) * side for edge in shape]
        if math.prod(whole) > self.most:
            shrink = math.sqrt(height * width / self.most)
            whole = [max(side, math.floor(edge / shrink / side) * side) for edge in shape]
        elif math.prod(whole) < self.least:
            grow = math.sqrt(self.least / (height * width))
            whole = [math.ceil(edge * grow / side) * side for edge in shape]
        return whole[0], whole[1]

    def grid(self, shape: tuple[int, int]) -> tuple[int, int, int]:
        """Return how many patches a picture of this shape has: (1, high, wide)."""
        height, width = self.resized(shape)
        return 1, height // self.patch, width // self.patch


class VLMJudge(Reward):
    """Ask a model of the Qwen-VL family about each picture: log p(yes) - log p(no) at the first token of its answer.

    `model`: a folder, or a hub id. `question`: {prompt} in it stands for the sample's prompt; without it, every
    picture is asked the same and no prompt is needed. White space is made single. `yes`, `no`: the words that count as
    either answer, each one token of the model; the probabilities of several are added, by default those of "Yes" and
    "yes", and of "No" and "no". `dtype` of the weights: "float32", "bfloat16" or "float16"; the answer itself is
    compared in float32. `max_pixels` lowers what the checkpoint allows a picture: fewer tokens, less memory.
    Raises RewardError where a file is missing, partial or of another family, naming it.
    """

    def __init__(
        self,
        model: str | Path = MODEL,
        question: str = QUESTION,
        yes: str | Sequence[str] = ("Yes", "yes"),
        no: str | Sequence[str] = ("No", "no"),
        *,
        dtype: str = "float32",
        max_pixels: int | None = None,
        cache_dir: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if dtype not in DTYPES:
            raise RewardError(f"The dtype of '{self.name}' is one of {', '.join(DTYPES)}, got {dtype!r}.")
        self.question = checked_question(question, self.name)
        self.needs_prompt = PROMPT in self.question
        _check_family(read_config(model, cache_dir).get("model_type"), model)
        self.model = load_model("AutoModelForImageTextToText", model, dtype=DTYPES[dtype], cache_dir=cache_dir)
        config = self.model.config
        self._tokenizer = load_tokenizer(model, config.text_config.vocab_size, cache_dir=cache_dir)
        patches = patches_of(load_image_processor(model, cache_dir=cache_dir), config.vision_config, model)
        self._patches = patches if max_pixels is None else _within(patches, max_pixels)
        self._controls = tuple(self._tokenizer.get_added_vocab())
        self._template = _chat_template(model, cache_dir) or self._tokenizer.chat_template
        _check_template(self._ids(self.question), self._rendered(self.question), config.image_token_id, model)
        self._yes, self._no = (self._answers(words) for words in (yes, no))
        if set(self._yes) & set(self._no):
            raise RewardError(f"'{self.name}' cannot tell yes={yes!r} from no={no!r}: give words that differ.")

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the log-odds of yes for each picture; (B,), at least float32."""
        self._check_texts(prompts)
        with torch.autocast(images.device.type, enabled=False):
            patches = self._patches(images)
            grid = self._patches.grid((images.shape[2], images.shape[3]))
            tokens = self.tokens(prompts, patches.shape[1] // self._patches.merge**2)
            hidden = self.model.model(
                **{name: values.to(images.device) for name, values in tokens.items()},
                pixel_values=patches.flatten(0, 1),
                image_grid_thw=torch.tensor([grid] * len(images), device=images.device),
                use_cache=False,
            ).last_hidden_state[:, -1]
            return self._log_odds(hidden)

    def tokens(self, prompts: Sequence[str], places: int) -> dict[str, Tensor]:
        """Return what the language model reads for each prompt: ids, mask and kind (1: picture) of tokens; (B, L).

        A picture takes `places` tokens. Padding is on the left, so that every answer comes last.
        """
        image = self.model.config.image_token_id
        rows = [self._ids(self.question.replace(PROMPT, " ".join(prompt.split()))) for prompt in prompts]
        rows = [[i for token in row for i in [token] * (places if token == image else 1)] for row in rows]
        longest = max(len(row) for row in rows)
        missing = [longest - len(row) for row in rows]
        ids = torch.tensor([[0] * count + row for count, row in zip(missing, rows, strict=True)])
        mask = torch.tensor([[0] * count + [1] * len(row) for count, row in zip(missing, rows, strict=True)])
        return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": ((ids == image) & (mask == 1)).int()}

    def _log_odds(self, hidden: Tensor) -> Tensor:
        """Return log p(yes) - log p(no) from the last state (B, D); bfloat16 would round logits to an eighth."""
        weight = self.model.get_output_embeddings().weight
        precise = torch.promote_types(hidden.dtype, torch.float32)
        yes, no = (
            functional.linear(hidden.to(precise), weight[list(ids)].to(precise)).logsumexp(1)
            for ids in (self._yes, self._no)
        )
        return yes - no  # the normalisation of log p is the same in both

    def _rendered(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        with explained(f"The chat template of '{self.name}'"):
            return self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
            )

    def _ids(self, question: str) -> list[int]:
        return self._tokenizer(self._rendered(question), add_special_tokens=False)["input_ids"]

    def _answers(self, words: str | Sequence[str]) -> tuple[int, ...]:
        """Return the tokens of the words, each once."""
        found = []
        for word in [words] if isinstance(words, (str, bool)) else words:
            if not isinstance(word, str):
                raise RewardError(f"'{self.name}' takes words for its answers, got {word!r}: in YAML, quote \"Yes\".")
            ids = self._tokenizer(word, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise RewardError(
                    f"'{self.name}' reads its answer at one token, and {word!r} is {len(ids)} of this model: pass "
                    "words of one token, such as yes=Yes and no=No."
                )
            found += ids
        if not found:
            raise RewardError(f"'{self.name}' needs a word for yes and one for no, got an empty list.")
        return tuple(dict.fromkeys(found))

    def _check_texts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that would end the question or stand for another picture."""
        for i, prompt in enumerate(prompts if self.needs_prompt else ()):
            token = next((token for token in self._controls if token in prompt), None)
            if token is not None:
                raise RewardError(
                    f"The prompt of sample {i} holds '{token}', which controls the model of '{self.name}': take it out."
                )


def checked_question(question: str, name: str) -> str:
    """Return a question with single spaces. Raises RewardError for an empty one, or a field other than {prompt}."""
    if not isinstance(question, str) or not question.strip():
        raise RewardError(f"'{name}' asks a question about each picture, got {question!r}: pass question='...'.")
    strange = [field for field in re.findall(r"\{\w*\}", question) if field != PROMPT]
    if strange:
        raise RewardError(
            f"The question of '{name}' has the field {strange[0]}, and only {PROMPT} is known: write that."
        )
    return " ".join(question.split())


def patches_of(processor: Any, vision: Any, source: str | Path) -> Patches:
    """Return what an image processor does as tensor code, for a model with the config `vision`.

    Raises RewardError for steps that this cannot express, and for patches that are not the model's.
    """
    steps = [getattr(processor, step, False) for step in ("do_resize", "do_rescale", "do_normalize")]
    by_255 = abs(255 * getattr(processor, "rescale_factor", 0) - 1) < 1e-6
    size = dict(getattr(processor, "size", None) or {})
    least, most = (size.get(key) or 0 for key in ("shortest_edge", "longest_edge"))  # of all pixels, in spite of that
    cut = [getattr(processor, key, None) for key in ("patch_size", "merge_size", "temporal_patch_size")]
    wanted = [vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size]
    if not all((*steps, by_255, least, most)) or int(processor.resample) != BICUBIC or cut != wanted:
        raise RewardError(
            f"The preprocessing of '{source}' ({type(processor).__name__}) is not that of a Qwen-VL model with patches "
            f"of {wanted[0]} pixels: put its published preprocessor_config.json there."
        )
    patch, merge, frames = wanted
    return Patches(patch, merge, frames, least, most, tuple(processor.image_mean), tuple(processor.image_std))


def _within(patches: Patches, most: int) -> Patches:
    side = patches.patch * patches.merge
    if most < side**2:
        raise RewardError(f"max_pixels is at least one token of {side} x {side} pixels, got {most}.")
    return replace(patches, least=min(patches.least, most), most=min(patches.most, most))


def _chat_template(source: str | Path, cache_dir: str | Path | None) -> str | None:
    """Return the chat template for pictures, which has a file of its own beside the tokenizer's; None if there is none.

    Qwen2.5-VL's tokenizer has another, for texts alone.
    """
    try:
        file = find_file(source, TEMPLATE_FILES, cache_dir=cache_dir)
    except RewardError:
        return None
    with explained(file):
        text = file.read_text(encoding="utf-8")
        return str(json.loads(text)["chat_template"]) if file.suffix == ".json" else text


def _check_family(family: Any, source: str | Path) -> None:
    if family not in FAMILIES:
        raise RewardError(
            f"'{source}' is a model of the family '{family}', and a judge is one of {', '.join(FAMILIES)}: take such a "
            "model, or serve yours behind an endpoint and ask it by steerfm.rewards.served_judge."
        )


def _check_template(ids: Sequence[int], text: str, image: int, source: str | Path) -> None:
    """Refuse a template without a place for the picture, and models that think before they answer."""
    if ids.count(image) != 1:
        raise RewardError(
            f"The chat template of '{source}' has {ids.count(image)} places for one picture: put the model's published "
            f"{TEMPLATE_FILES[1]} there."
        )
    if text.rstrip().endswith("<think>"):
        raise RewardError(f"'{source}' thinks before it answers, and a judge answers at once: take its Instruct model.")
