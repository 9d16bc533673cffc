"""Rewards of other libraries: torchmetrics metrics, and TRL's reward functions in both directions.

TRL (1.16) calls `f(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns)` and takes
a list of numbers, or None where the function has no opinion; plain or async.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from steerfm.errors import ConfigError, RewardError
from steerfm.images import to_uint8
from steerfm.reward import Reward, Scores, as_reward, silent_as_zero
from steerfm.types import Values

TEXTS = ("text", "texts", "prompt", "prompts", "source")
NO_METADATA = ("completion_ids", "trainer_state", "log_extra", "environments", "image", "images")  # of TRL's arguments


class TorchMetric(Reward):
    """Score with a metric of torchmetrics, one picture at a time, as most metrics give one number for a batch.

    metric: of pictures alone (TotalVariation), of pictures and texts, or, with `reference`, of pictures and what they
    are compared with, (C, H, W) for all or (1, C, H, W). It says itself whether it is differentiable and whether
    higher is better; where it does not (None), pass `higher_is_better`. Its state is reset at every picture.
    """

    def __init__(
        self,
        metric: Any,
        reference: Tensor | None = None,
        higher_is_better: bool | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name or type(metric).__name__)
        better = metric.higher_is_better if higher_is_better is None else higher_is_better
        if better is None:
            raise ConfigError(f"'{self.name}' does not say whether higher is better: wrap it with higher_is_better=.")
        second = _second_argument(metric)
        self._reads_text = second in TEXTS
        if second and not self._reads_text and reference is None:
            raise ConfigError(f"'{self.name}' compares pictures with a '{second}': wrap it with reference=.")
        self.metric = metric
        self.higher_is_better = bool(better)
        self.differentiable = bool(metric.is_differentiable)
        self.needs_prompt = self._reads_text
        kept = None if reference is None else reference.reshape(1, *reference.shape[-3:]).float()
        self.register_buffer("reference", kept, persistent=False)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Values:
        """Return the metric of each picture; (B,)."""
        return torch.stack([self._one(images[i : i + 1], prompts[i]) for i in range(len(images))])

    def _one(self, image: Tensor, prompt: str) -> Tensor:
        second = [self.reference] if self.reference is not None else [[prompt]] if self._reads_text else []
        value = self.metric(image, *second)
        self.metric.reset()
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise RewardError(f"'{self.name}' must give one number a picture, got {got}: choose a reduction.")
        return value.reshape(())


def trl_reward(
    reward: Any,
    pictures: Callable[[list[str]], Tensor] | None = None,
    against: Literal["prompts", "completions"] | None = None,
    *,
    asynchronous: bool = False,
    name: str | None = None,
) -> Callable[..., Any]:
    """Return a reward as a reward function of TRL; it is called `name`, else as the reward is, in TRL's logs.

    pictures: draws pictures (B, C, H, W) in [0, 1] from the completions, for a language model that writes prompts;
    None takes them from the data set's column "image" or "images" (PIL or tensors). against: the texts with which
    pictures are scored; by default the prompts, which the model cannot bend, where pictures are drawn, and the
    completions where they come from a column. Other columns go to the reward as metadata. Parts are logged as
    metrics. Where every part abstains the function gives None. asynchronous: an async function, for slow rewards,
    which TRL awaits together.
    """
    judge = as_reward(reward)
    compared = against or ("completions" if pictures is None else "prompts")
    if compared not in ("prompts", "completions"):
        raise ConfigError(f"against is 'prompts' or 'completions', got '{against}'.")

    def score(
        prompts: Sequence[Any], completions: Sequence[Any], log_metric: Any = None, **columns: Any
    ) -> list[float | None]:
        texts = {"prompts": [_text(each) for each in prompts], "completions": [_text(each) for each in completions]}
        own = {key: value for key, value in columns.items() if key not in NO_METADATA}
        with torch.no_grad():
            images = _column(columns) if pictures is None else pictures(texts["completions"])
            scores = judge.evaluate(images, texts[compared], **own)
        if log_metric is not None:
            for part, value in means(scores).items():
                log_metric(f"{label}/{part}", value)
        return [None if math.isnan(value) else value for value in scores.total.tolist()]

    async def score_async(**given: Any) -> list[float | None]:
        return await asyncio.to_thread(score, **given)

    label = name or judge.name
    function = score_async if asynchronous else score
    function.__name__ = label
    return function


class FromTRL(Reward):
    """Score with a reward function of TRL, plain or async; a black box, which may abstain (None).

    read: turns pictures (B, C, H, W) into completions, such as a caption or OCR of each; without it the completions
    are the pictures, as PIL images. Metadata are its columns; completion_ids are empty, trainer_state is None, and
    what it logs is dropped.
    """

    differentiable = False
    abstains = True

    def __init__(
        self,
        function: Callable[..., Any],
        read: Callable[[Tensor], Sequence[Any]] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name or getattr(function, "__name__", None))
        self.function = function
        self.read = read

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Values:
        """Call the function; (B,), NaN for None."""
        given = {
            "prompts": list(prompts),
            "completions": _pil(images) if self.read is None else list(self.read(images)),
            "completion_ids": [[] for _ in prompts],
            "trainer_state": None,
            "log_extra": _drop,
            "log_metric": _drop,
            **metadata,
        }
        values = self.function(**given)
        if inspect.isawaitable(values):
            with ThreadPoolExecutor(1) as pool:  # a thread of its own: this one may run an event loop already
                values = pool.submit(asyncio.run, _awaited(values)).result()
        numbers = [math.nan if value is None else float(value) for value in values]
        return torch.tensor(numbers, dtype=torch.float32, device=images.device)


def means(scores: Scores) -> dict[str, float]:
    """Return the mean of each part over the samples on which it has an opinion, and as "NAME/abstained" the share on
    which it has none, where there are any: what logs show."""
    found: dict[str, float] = {}
    for name, values in scores.parts.items():
        silent = values.isnan()
        if not silent.all():
            found[name] = float(silent_as_zero(values.detach()).sum() / (~silent).sum())
        if silent.any():
            found[f"{name}/abstained"] = float(silent.float().mean())
    return found


def _second_argument(metric: Any) -> str:
    """Return the name of the second argument that a metric needs, or "" where it takes pictures alone."""
    needed = [p.name for p in inspect.signature(metric.update).parameters.values() if p.default is p.empty]
    return needed[1] if len(needed) > 1 and needed[1] not in ("args", "kwargs") else ""


def _text(message: Any) -> str:
    """Return the text of a prompt or completion of TRL: a string, or a conversation, whose last message counts."""
    if isinstance(message, str):
        return message
    content = message[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(block["text"] for block in content if block["type"] == "text")


def _column(columns: Mapping[str, Any]) -> Tensor:
    """Return the pictures of TRL's column "image", or "images" (lists of one), as one batch in [0, 1]."""
    given = columns.get("image") or [one for (one,) in columns.get("images", [])]
    if not given:
        fix = 'give the data set a column "image", or pass pictures= to draw them from the completions'
        raise RewardError(f"A reward scores pictures, and TRL gave none (columns: {', '.join(columns)}): {fix}.")
    batch = [each if isinstance(each, Tensor) else _tensor(each) for each in given]
    sizes = {tuple(each.shape) for each in batch}
    if len(sizes) > 1:
        raise RewardError(f"The pictures of a batch have the sizes {sorted(sizes)}: resize them to one.")
    return torch.stack(batch)


def _tensor(picture: Any) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def _pil(images: Tensor) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(pixels) for pixels in to_uint8(images)]


async def _awaited(values: Any) -> Any:
    return await values


def _drop(*ignored: Any) -> None:
    """Take what a function logs, where there is no log."""
