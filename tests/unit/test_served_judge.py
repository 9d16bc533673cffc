"""The served judge over real sockets: what it asks, how replies are read, and every reply that is no answer."""

import base64
import copy
import io
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_image_reward import natural
from tiny_service import Asked, Told, service
from torch import Tensor

from steerfm.errors import ConfigError, RewardError
from steerfm.images import to_uint8
from steerfm.reward import check
from steerfm.rewards import served_judge
from steerfm.rewards.served_judge import ServedJudge

PROMPTS = ["a red fox", "two boats", "snow", "a city"]
IMAGES = torch.stack([natural((3, 12, 10), seed) for seed in range(4)])
SECRET = "s3cr3t-k3y"


def reply(content: Any = "7", finish: str = "stop", logprobs: Any = None, **message: Any) -> Told:
    """Return a reply in the form of OpenAI's chat completions."""
    message = {"role": "assistant", "content": content, **message}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": logprobs}
    return Told(body=json.dumps({"object": "chat.completion", "choices": [choice]}).encode())


def listed(**logprobs: float) -> dict[str, Any]:
    """Return the logprobs of a reply whose first token may be any of these; "_" stands for a space."""
    top = [{"token": token.replace("_", " "), "logprob": value, "bytes": None} for token, value in logprobs.items()]
    return {"content": [{**top[0], "top_logprobs": top}], "refusal": None}


def judge(address: str, **options: Any) -> ServedJudge:
    return ServedJudge(address + "/v1", "tiny", **{"timeout": 5.0, "tries": 1, **options})


def scored(answer: Callable[[Asked], Told], images: Tensor = IMAGES[:1], **options: Any) -> list[float]:
    with service(answer) as there:
        return judge(there.address, **options)(images, PROMPTS[: len(images)]).total.tolist()


def picture_of(asked: Asked) -> np.ndarray:
    content = json.loads(asked.body)["messages"][0]["content"]
    kind, _, data = content[0]["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"]))


# What is asked


def test_a_request_holds_the_picture_the_question_and_the_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STEERFM_JUDGE_TOKEN", SECRET)
    with service(lambda asked: reply()) as there:
        judge(there.address)(IMAGES[:1], [" a {x}\nfox"])
        (asked,) = there.asked
    assert (asked.method, asked.path) == ("POST", "/v1/chat/completions")
    assert asked.headers["authorization"] == f"Bearer {SECRET}"
    body = json.loads(asked.body)
    question = body["messages"][0]["content"][1]["text"]
    assert (
        question == "How well does this figure show 'a {x} fox'? Answer with one number from 0 to 10 and nothing else."
    )
    assert {key: body[key] for key in body if key != "messages"} == {
        "model": "tiny",
        "temperature": 0,
        "max_tokens": 16,
    }
    assert np.array_equal(picture_of(asked), to_uint8(IMAGES[:1])[0])


def test_log_odds_ask_for_the_likeliest_first_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("STEERFM_JUDGE_TOKEN", raising=False)
    with service(lambda asked: reply("Ja", "length", listed(Ja=-0.1, Nein=-2.0))) as there:
        judge(there.address, question="Ist das {prompt}?", read="log_odds", yes="Ja", no="Nein")(IMAGES[:1], ["Schnee"])
        (asked,) = there.asked
    body = json.loads(asked.body)
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
    assert body["messages"][0]["content"][1]["text"] == "Ist das Schnee? Answer with one word, Ja or Nein."
    assert "authorization" not in asked.headers


def test_a_question_without_prompt_needs_none():
    with service(lambda asked: reply("3")) as there:
        plain = judge(there.address, question="How sharp is it?")
        assert not plain.needs_prompt
        assert plain(IMAGES, [""] * 4).total.tolist() == [3.0] * 4
        assert judge(there.address).needs_prompt


# How replies are read


@pytest.mark.parametrize(
    ("text", "value"), [("7", 7), (" 7.25\n", 7.25), ("7/10", 7), ("8 / 10.", 8), ("10.", 10), ("0", 0), ("+3", 3)]
)
def test_numbers_are_read(text: str, value: float):
    assert scored(lambda asked: reply(text)) == [value]


def test_another_scale_is_declared_asked_for_and_read():
    with service(lambda asked: reply("-1.5")) as there:
        wide = judge(there.address, scale=[-2, 5])
        assert wide.native_range == (-2, 5)
        assert wide(IMAGES[:1], PROMPTS[:1]).total.tolist() == [-1.5]
        assert b"from -2 to 5 and nothing else" in there.asked[0].body
        assert judge(there.address, read="log_odds").native_range is None


def test_log_odds_add_the_words_of_an_answer():
    top = listed(Yes=-0.5, _yes=-2.0, No=-3.0, Maybe=-4.0, no=-5.0)
    expected = math.log(math.exp(-0.5) + math.exp(-2)) - math.log(math.exp(-3) + math.exp(-5))
    assert scored(lambda asked: reply("Yes", "length", top), read="log_odds") == pytest.approx([expected])


def test_a_word_that_is_not_listed_counts_as_the_last():
    top = listed(Yes=-0.01, Sure=-6.0, Maybe=-9.0)
    assert scored(lambda asked: reply("Yes", "length", top), read="log_odds") == pytest.approx([8.99])
    top = listed(No=-0.01, Nope=-6.0, Never=-9999.0)
    assert scored(lambda asked: reply("No", "length", top), read="log_odds") == pytest.approx([-9998.99])


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (reply("I'd say 7"), r"is no number: \"I'd say 7\"\. Have the question ask for one alone"),
        (reply("7 or 8"), "is no number: '7 or 8'"),
        (reply("7,5"), "is no number"),
        (reply("7/5"), "is no number"),
        (reply("nan"), "is no number"),
        (reply("٧"), "is no number"),
        (reply(""), "is no number: ''"),
        (reply("11"), "is outside 0 to 10: '11'. Correct scale= or the question"),
        (reply("-1"), "is outside 0 to 10: '-1'"),
        (reply("7", finish="length"), "was cut off: '7'"),
        (reply("I cannot rate people.", finish="content_filter"), "is a refusal: 'I cannot rate people.'"),
        (reply(None, refusal="I can't help with that."), "is a refusal: \"I can't help with that.\". Take another"),
        (reply(None), "has no text: '{\"object\": \"chat.completion\""),
        (reply([{"text": "7"}]), "has no text"),
        (Told(body=b'{"choices": [{"mess'), r"is none of a chat: '\{\"choices\": \[\{\"mess'. Give the address"),
        (Told(body=b'{"choices": []}'), "is none of a chat"),
        (Told(body=b'{"choices": [{"message": 7}]}'), "is none of a chat"),
        (Told(body=b'{"error": "no such model"}'), "is none of a chat: .*no such model"),
        (Told(body=b"[7]"), "is none of a chat"),
        (Told(body=b"<html>Welcome</html>"), "is none of a chat: '<html>Welcome</html>'"),
        (Told(body=b"\xff\xfe\x00"), "is none of a chat"),
        (Told(body=b"[" * 100_000), "is none of a chat"),
        (Told(body=b""), "is none of a chat: ''"),
    ],
)  # fmt: skip
def test_replies_that_are_no_answer_are_errors(told: Told, said: str):
    with pytest.raises(RewardError, match=f"The reply to 'served_judge' for sample 0 {said}") as caught:
        scored(lambda asked: told)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("logprobs", "said"),
    [
        (None, "has no top_logprobs: 'Yes'. Take a server that gives them, or read='number'"),
        ({"content": []}, "has no top_logprobs"),
        ({"content": [{"token": "Yes", "logprob": -0.1, "top_logprobs": []}]}, "has no top_logprobs"),
        ({"content": [{"token": "Yes", "top_logprobs": [{"token": "Yes"}]}]}, "has no top_logprobs"),
        (listed(Yes=math.nan), "has no top_logprobs"),
        (listed(The=-0.1, A=-3.0), "is neither Yes nor No: 'Yes'. Give its words as yes= and no="),
    ],
)
def test_replies_without_log_odds_are_errors(logprobs: Any, said: str):
    with pytest.raises(RewardError, match=f"The reply to 'served_judge' for sample 0 {said}"):
        scored(lambda asked: reply("Yes", "length", logprobs), read="log_odds")


def test_errors_repeat_80_characters_and_not_the_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STEERFM_JUDGE_TOKEN", SECRET)
    with pytest.raises(RewardError, match=r"is no number: '\*\*\* x{76}'\.") as caught:
        scored(lambda asked: reply(f"{SECRET}\n\x1b" + 300 * "x"))
    assert SECRET not in str(caught.value)
    with pytest.raises(RewardError) as caught:
        scored(lambda asked: Told(401, f"wrong key {SECRET}".encode()))
    assert SECRET not in str(caught.value)


# Services in trouble


def test_one_that_is_busy_is_asked_again():
    with service(
        lambda asked: Told(429, headers={"Retry-After": "0"}) if len(there.asked) < 3 else reply("4")
    ) as there:
        assert judge(there.address, tries=3)(IMAGES[:1], PROMPTS[:1]).total.tolist() == [4.0]
        assert len(there.asked) == 3


def test_one_that_is_slow_is_given_up():
    def late(asked: Asked) -> Told:
        time.sleep(0.6)
        return reply()

    with pytest.raises(RewardError, match=r"/v1/chat/completions gave no answer in 1 try .*no answer within 0\.3 s"):
        scored(late, timeout=0.3)


def test_a_reply_that_is_huge_is_cut_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(served_judge, "LIMIT", 10_000)

    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 4096

    with pytest.raises(RewardError, match="answers with more than 10000 bytes"):
        scored(lambda asked: Told(pieces=endless))


def test_one_that_is_not_there_is_named():
    with service(lambda asked: reply()) as there:
        gone = judge(there.address)
    with pytest.raises(RewardError, match=f"{there.address}/v1/chat/completions gave no answer"):
        gone(IMAGES, PROMPTS)


def brightness(asked: Asked) -> Told:
    return reply(f"{picture_of(asked).mean() / 25.5:.6f}")


def test_replies_keep_the_order_of_the_pictures():
    def reversed_in_time(asked: Asked) -> Told:
        first = np.array_equal(picture_of(asked), to_uint8(IMAGES[:1])[0])
        time.sleep(0.2 if first else 0)
        return brightness(asked)

    expected = [10 * float(pixels.mean()) / 255 for pixels in to_uint8(IMAGES)]
    assert scored(reversed_in_time, IMAGES, concurrency=4) == pytest.approx(expected, abs=1e-5)


def test_so_many_requests_run_at_a_time():
    running, most, lock = 0, 0, threading.Lock()
    both = threading.Barrier(2, timeout=5)  # is passed by two requests that run together, or not at all

    def answer(asked: Asked) -> Told:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait()
        time.sleep(0.05)
        with lock:
            running -= 1
        return reply()

    assert scored(answer, IMAGES, concurrency=2) == [7.0] * 4
    assert most == 2


def test_after_an_error_no_more_is_asked():
    images = IMAGES[:1].expand(20, -1, -1, -1)
    with service(lambda asked: reply("no idea")) as there:
        with pytest.raises(RewardError, match="for sample 0 is no number"):
            judge(there.address, concurrency=1)(images, ["snow"] * 20)
        assert len(there.asked) <= 3


# As a reward


def test_the_check_of_rewards_finds_nothing():
    def of_both(asked: Asked) -> Told:
        question = json.loads(asked.body)["messages"][0]["content"][1]["text"]
        return reply(f"{(picture_of(asked).mean() + len(question)) / 50:.6f}")

    with service(of_both) as there:
        assert [each for each in check(judge(there.address), IMAGES, PROMPTS) if each.fault] == []


def test_it_is_a_black_box_that_can_be_copied():
    with service(brightness) as there:
        plain = judge(there.address)
        total = plain(IMAGES.clone().requires_grad_(True), PROMPTS).total
        assert not plain.differentiable
        assert not total.requires_grad
        assert torch.equal(copy.deepcopy(plain)(IMAGES, PROMPTS).total, total)
        assert plain(IMAGES[:0], []).total.shape == (0,)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"read": "words"}, "reads number or log_odds, got read='words'"),
        ({"scale": [10, 0]}, r"its lowest and highest number, got \[10, 0\]"),
        ({"scale": [0, math.inf]}, "its lowest and highest number"),
        ({"scale": [0, 5, 10]}, "its lowest and highest number"),
        ({"scale": 10}, "its lowest and highest number, got 10"),
        ({"concurrency": 0}, "at least 1, got 0"),
        ({"yes": [True]}, r"takes words for its answers, got \[True\]: in YAML, quote"),
        ({"no": []}, r"takes words for its answers, got \[\]"),
        ({"yes": "no"}, "cannot tell yes='no' from no="),
        ({"question": "Is it {caption}?"}, "has the field {caption}"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], said: str):
    with pytest.raises(RewardError, match=said):
        judge("http://127.0.0.1:1", **options)


def test_addresses_and_keys_are_held_to_the_rules_of_the_client():
    with pytest.raises(ConfigError, match="starts with http:// or https://"):
        judge("localhost:8000")
    with pytest.raises(ConfigError, match="token_from"):
        judge("http://127.0.0.1:1", token_from="OPENAI_API_KEY")


def test_other_shapes_are_refused():
    with pytest.raises(RewardError, match=r"sees pictures .B, 1 or 3, H, W., got the shape \(2, 4, 8, 8\)"):
        judge("http://127.0.0.1:1")(torch.rand(2, 4, 8, 8), PROMPTS[:2])
