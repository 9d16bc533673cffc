"""A vision-language model behind an OpenAI-compatible endpoint as a judge: the number that it answers, or its log-odds.

Model: whatever the endpoint serves (vLLM, SGLang, llama.cpp, OpenAI and others), asked at /chat/completions.
Source: questions and log-odds as in rewards.vlm_judge, after Lin et al. 2024, arXiv 2404.01291. Preprocessing: a PNG
of 8 bits in the request, then the server's own. Range: the scale, for numbers; unbounded for log-odds, mostly -15 to
15. Licence: the model's, and the service's terms. Memory: none here. A black box: no gradient.
Fooled by: prompts, and writing in pictures, that tell the judge what to answer; numbers cluster on a few values, such
as 8 of 10; at temperature 0 servers still do not repeat themselves to the last bit.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from steerfm.errors import RewardError
from steerfm.http_client import Answer, Client
from steerfm.images import encode_png
from steerfm.reward import Reward
from steerfm.rewards.vlm_judge import PROMPT, checked_question

Reading = Literal["number", "log_odds"]
QUESTIONS = {
    "number": "How well does this figure show '{prompt}'?",
    "log_odds": "Does this figure show '{prompt}'?",  # Lin et al. 2024, section 3
}
NUMBER = re.compile(r"([+-]?[0-9]{1,9}(?:\.[0-9]{1,9})?)(?:\s*/\s*([0-9]{1,9}))?\.?")  # 7, 7.5, 7/10, 7.
TOKENS = {"number": 16, "log_odds": 1}  # the longest reply
LIKELIEST = 20  # tokens whose probabilities are asked for, the most that servers give
LIMIT = 2**20  # bytes of a reply
QUOTED = 80  # characters of a reply that errors repeat
T = TypeVar("T")


class ServedJudge(Reward):
    """Ask a served model about each picture, and read a number from its reply or the log-odds of its first token.

    `address`: up to the version, "http://localhost:8000/v1". `model`: its name there. `question`: {prompt} stands for
    the sample's prompt; how to answer is added to it. `read`: "number", on `scale` (low, high), or "log_odds", which is
    log p(yes) - log p(no) of the words in `yes` and `no` where the server gives top_logprobs; words that are not among
    the 20 likeliest count as the last of these, which is the most that they can have. token_from: the environment
    variable with the key, whose name starts with STEERFM_. `concurrency` requests run at a time; each takes `timeout`
    seconds at most, and `tries` of them. Raises RewardError, with the start of the reply, for one that is no answer: a
    refusal, a cut one, no number or one outside the scale, no JSON.
    """

    differentiable = False

    def __init__(
        self,
        address: str,
        model: str,
        question: str | None = None,
        read: Reading = "number",
        *,
        scale: tuple[float, float] = (0, 10),
        yes: str | Sequence[str] = ("Yes", "yes"),
        no: str | Sequence[str] = ("No", "no"),
        token_from: str = "STEERFM_JUDGE_TOKEN",
        concurrency: int = 8,
        timeout: float = 60.0,
        tries: int = 4,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if read not in get_args(Reading):
            raise RewardError(f"'{self.name}' reads {' or '.join(get_args(Reading))}, got read={read!r}.")
        if concurrency < 1:
            raise RewardError(f"concurrency is a number of requests, at least 1, got {concurrency}.")
        self.client = Client(address, token_from, timeout, tries, LIMIT)
        self.model_name, self.read, self.concurrency = model, read, concurrency
        question = checked_question(QUESTIONS[read] if question is None else question, self.name)
        self.needs_prompt = PROMPT in question
        self.low, self.high = _scale(scale, self.name)
        self.yes, self.no = _words(yes, self.name), _words(no, self.name)
        if set(self.yes) & set(self.no):
            raise RewardError(f"'{self.name}' cannot tell yes={yes!r} from no={no!r}: give words that differ.")
        if read == "number":
            self.native_range = (self.low, self.high)
            self.question = f"{question} Answer with one number from {self.low:g} to {self.high:g} and nothing else."
        else:
            self.question = f"{question} Answer with one word, {self.yes[0]} or {self.no[0]}."

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the number or the log-odds of each picture; (B,). Raises RewardError, naming the sample."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise RewardError(f"'{self.name}' sees pictures (B, 1 or 3, H, W), got the shape {tuple(images.shape)}.")
        pictures = images.detach().cpu()
        values = _together(lambda i: self._value(pictures[i], prompts[i], i), len(pictures), self.concurrency)
        return torch.tensor(values, dtype=torch.float32, device=images.device)

    def _value(self, picture: Tensor, prompt: str, sample: int) -> float:
        answer = self.client.post("/chat/completions", self._request(picture, prompt), "application/json")
        try:
            choice = _choice(answer)
            return self._number(choice) if self.read == "number" else self._log_odds(choice)
        except _Unreadable as error:
            reply = self._quoted(error.reply)
            raise RewardError(
                f"The reply to '{self.name}' for sample {sample} {error.reason}: {reply}. {error.fix}"
            ) from error

    def _request(self, picture: Tensor, prompt: str) -> bytes:
        url = f"data:image/png;base64,{base64.b64encode(encode_png(picture)).decode()}"
        text = self.question.replace(PROMPT, " ".join(prompt.split()))
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        asked: dict[str, Any] = {
            "model": self.model_name,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": TOKENS[self.read],
        }
        if self.read == "log_odds":
            asked |= {"logprobs": True, "top_logprobs": LIKELIEST}
        return json.dumps(asked).encode()

    def _number(self, choice: dict[str, Any]) -> float:
        """Return the number that the whole reply is. Raises _Unreadable."""
        text = choice["message"]["content"]
        if choice.get("finish_reason") == "length":
            raise _Unreadable("was cut off", text, "Have the question ask for a number alone, or take another model.")
        found = NUMBER.fullmatch(text.strip())
        if found is None or (found[2] is not None and float(found[2]) != self.high):
            raise _Unreadable("is no number", text, "Have the question ask for one alone, or take another model.")
        if not self.low <= float(found[1]) <= self.high:
            raise _Unreadable(
                f"is outside {self.low:g} to {self.high:g}", text, "Correct scale= or the question, so that they agree."
            )
        return float(found[1])

    def _log_odds(self, choice: dict[str, Any]) -> float:
        """Return log p(yes) - log p(no) of the first token. Raises _Unreadable."""
        text = choice["message"]["content"]
        try:
            listed = [
                (str(each["token"]).strip(), float(each["logprob"]))
                for each in choice["logprobs"]["content"][0]["top_logprobs"]
            ]
        except (KeyError, IndexError, TypeError, ValueError):
            listed = []
        if not listed or not all(math.isfinite(logprob) for _, logprob in listed):
            raise _Unreadable("has no top_logprobs", text, "Take a server that gives them, or read='number'.")
        yes, no = ([logprob for token, logprob in listed if token in words] for words in (self.yes, self.no))
        if not yes and not no:
            raise _Unreadable(f"is neither {self.yes[0]} nor {self.no[0]}", text, "Give its words as yes= and no=.")
        least = min(logprob for _, logprob in listed)
        return _log_sum(yes or [least]) - _log_sum(no or [least])

    def _quoted(self, reply: str) -> str:
        """Return the start of a reply on one line, without the key, which a server might echo."""
        token = os.environ.get(self.client.token_from or "", "")
        text = " ".join((reply.replace(token, "***") if token else reply).split())
        return repr("".join(each for each in text if each.isprintable())[:QUOTED])


class _Unreadable(Exception):
    """Say what is wrong with a reply, what it was, and what to do."""

    def __init__(self, reason: str, reply: str, fix: str) -> None:
        super().__init__(reason)
        self.reason, self.reply, self.fix = reason, reply, fix


def _choice(answer: Answer) -> dict[str, Any]:
    """Return the first choice of a reply; its message has text. Raises _Unreadable."""
    body = answer.body[: 4 * QUOTED].decode("utf-8", "replace")
    try:
        choice = answer.json()["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text, refusal = message.get("content"), message.get("refusal")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _Unreadable(
            "is none of a chat", body, "Give the address of an OpenAI-compatible service, up to /v1."
        ) from None
    if refusal or finish == "content_filter":
        said = refusal or text
        raise _Unreadable("is a refusal", said if isinstance(said, str) else body, "Take another question or model.")
    if not isinstance(text, str):
        raise _Unreadable("has no text", body, "Take a model that answers at once, without tools or thinking.")
    return choice


def _together(do: Callable[[int], T], count: int, at_once: int) -> list[T]:
    """Return do(0), do(1), ... do(count - 1), so many at a time; after an error, those not begun are left."""
    with ThreadPoolExecutor(at_once) as pool:
        waiting = [pool.submit(do, i) for i in range(count)]
        try:
            return [each.result() for each in waiting]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _log_sum(values: Sequence[float]) -> float:
    """Return log(exp(a) + exp(b) + ...)."""
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values))


def _scale(scale: Any, name: str) -> tuple[float, float]:
    try:
        low, high = (float(bound) for bound in scale)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not -math.inf < low < high < math.inf:
        raise RewardError(f"The scale of '{name}' is its lowest and highest number, got {scale!r}: write [0, 10].")
    return low, high


def _words(words: Any, name: str) -> tuple[str, ...]:
    found = [words] if isinstance(words, (str, bool)) else list(words)
    stripped = tuple(word.strip() for word in found if isinstance(word, str))
    if not found or len(stripped) < len(found) or not all(stripped):
        raise RewardError(f"'{name}' takes words for its answers, got {words!r}: in YAML, quote \"Yes\".")
    return stripped
