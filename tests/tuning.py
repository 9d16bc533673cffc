"""One step of a fine-tuning method outside Lightning, shared by the tests."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steerfm.finetuning import Batch
from steerfm.flow_map import FlowMap
from steerfm.reward import as_reward
from steerfm.seeds import RowDraws


def draws(n: int, step: int = 0, seed: int = 0) -> RowDraws:
    """Return the numbers that the rows of a batch of n draw; the same again for the same arguments."""
    return RowDraws(seed, step, range(n))


def batch(
    flow_map: FlowMap,
    reward: Any,
    n: int = 4,
    temperature: float = 1.0,
    *,
    reference: FlowMap | None = None,
    prompts: Sequence[str] | None = None,
    step: int = 0,
    seed: int = 0,
    rows: range | None = None,
    data: Mapping[str, Any] | None = None,
    **more: Any,
) -> Batch:
    """Return a batch of n rows; the reference is a copy of the map by default, rows those of a larger batch."""
    prompts = [""] * n if prompts is None else list(prompts)
    return Batch(
        flow_map=flow_map,
        reference=reference or flow_map.frozen_copy(),
        reward=None if reward is None else as_reward(reward),  # type: ignore[arg-type]
        prompts=prompts,
        condition=flow_map.encode_prompts(prompts),
        temperature=temperature,
        draws=RowDraws(seed, step, rows or range(len(prompts))),
        generator=torch.Generator().manual_seed(seed + step),
        step=step,
        seed=seed,
        data=data or {},
        **more,
    )


def normal(numbers: RowDraws, like: FlowMap, count: int = 1) -> Tensor:
    """Return the noise that a batch draws next for a map."""
    return numbers.normal(like.data_shape, count).to(like.dtype)
