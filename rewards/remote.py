"""A reward that a server scores: one in another process, with packages of its own, or on another machine's GPU.

Start one with `steerfm reward serve`. Model, range, licence and what it is fooled by: the served reward's. Memory:
none here. A request and its answer are bounded in seconds, tries and bytes; what comes back is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args
from urllib.parse import urlencode

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steerfm import reward_wire
from steerfm.errors import RewardError, nearest
from steerfm.http_client import Client
from steerfm.reward import Reward, Scores
from steerfm.reward_wire import JSON, TENSORS, Declared, Reply, Request

Pictures = Literal["exact", "png"]


class Remote(Reward):
    """Score by the reward `reward` of the server at `address`, "http://host:port", with its gradient if it has one.

    What it declares is asked of the server here and now. part: of a reward that is made of others, the one to score
    with alone. token_from: the environment variable with the server's token, whose name starts with STEERFM_. A
    request has `batch_size` pictures, a try takes `timeout` seconds at most, and after `tries` of them it is an error.
    pictures: "exact", or "png", rounded to 8 bits and without a gradient, for a server that takes nothing else.
    Metadata are not sent. Raises RewardError where the server cannot be reached, refuses, or answers nonsense.
    """

    bounded = True

    def __init__(
        self,
        address: str,
        reward: str,
        part: str | None = None,
        *,
        token_from: str = "STEERFM_REWARD_TOKEN",
        batch_size: int = 16,
        timeout: float = 60.0,
        tries: int = 4,
        pictures: Pictures = "exact",
        name: str | None = None,
    ) -> None:
        if batch_size < 1 or pictures not in get_args(Pictures):
            raise RewardError(
                f"batch_size is at least 1 and pictures 'exact' or 'png', got {batch_size} and '{pictures}'."
            )
        client = Client(address, token_from, timeout, tries)
        told = _declared(client, reward, part)
        super().__init__(name or told.name)
        self.client, self.told, self.batch_size = client, told, batch_size
        self.form = TENSORS if pictures == "exact" else JSON
        self.path = "/score?" + urlencode({"reward": reward} | ({} if part is None else {"part": part}))
        self.differentiable = told.differentiable and self.form == TENSORS
        self.higher_is_better, self.needs_prompt = told.higher_is_better, told.needs_prompt
        self.native_range, self.abstains = told.native_range, told.abstains
        options = {"batch_size": batch_size, "timeout": timeout, "tries": tries, "pictures": pictures}
        self._members = [Remote(address, reward, each.name, token_from=token_from, **options) for each in told.parts]

    @property
    def members(self) -> list[Reward]:
        """What the served reward is made of, each scored by the server too; none for most."""
        return list(self._members)

    def evaluate(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Scores:
        """Score a batch, so many pictures a request; gradients flow through the total, not through the parts."""
        self._check_needed(prompts)
        wanted = self.differentiable and images.requires_grad and torch.is_grad_enabled()
        starts = range(0, max(len(images), 1), self.batch_size)
        replies = [self._ask(images[i : i + self.batch_size], prompts[i : i + self.batch_size], wanted) for i in starts]
        parts = {name: torch.cat([each.scores.parts[name] for each in replies]) for name in replies[0].scores.parts}
        parts = {name: values.to(images.device) for name, values in parts.items()}
        total = torch.cat([each.scores.total for each in replies]).to(images.device)
        if not self._members:
            parts = {self.name: next(iter(parts.values()))}
        gradients = [each.gradient for each in replies if each.gradient is not None]
        return Scores(_WithGradient.apply(images, total, torch.cat(gradients)) if wanted else total, parts)  # type: ignore[arg-type]

    def _ask(self, images: Tensor, prompts: Sequence[str], gradient: bool) -> Reply:
        """Return the answer for some pictures. Raises RewardError, naming the server."""
        if images.ndim != 4 or len(images) == 0:
            raise RewardError(
                f"'{self.name}' is sent pictures (B, C, H, W), B > 0, got the shape {tuple(images.shape)}."
            )
        request = Request(images, list(prompts), gradient)
        answer = self.client.post(self.path, reward_wire.write_request(request, self.form), self.form)
        try:
            reply = reward_wire.read_reply(answer.body, self.form, request, self.told)
        except RewardError as error:
            raise RewardError(f"The server at {self.client.address} gave no sound scores: {error}") from error
        return reply


class _WithGradient(torch.autograd.Function):
    """Give values (B,) the gradient (B, ...) that came with them: row b is that of value b to sample b."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient.to(images.device, images.dtype))
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outgoing: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return outgoing[0].to(gradient.dtype).reshape(-1, *[1] * (gradient.ndim - 1)) * gradient, None, None


def _declared(client: Client, reward: str, part: str | None) -> Declared:
    """Return what the server says of a reward, or of one of its parts. Raises RewardError where it has none such."""
    answer = client.get("/rewards")
    try:
        listed = reward_wire.read_listing(answer.body)
    except RewardError as error:
        raise RewardError(f"The server at {client.address} gave no sound list of rewards: {error}") from error
    found = _named(reward, listed, f"The server at {client.address}")
    return found if part is None else _named(part, {each.name: each for each in found.parts}, f"'{reward}' there")


def _named(name: str, listed: dict[str, Declared], owner: str) -> Declared:
    if name not in listed:
        raise RewardError(
            f"{owner} has no '{name}'{nearest(name, listed) or '.'} It has: {', '.join(listed) or 'none'}."
        )
    return listed[name]
