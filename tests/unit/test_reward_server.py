"""A reward server over real sockets: whatever it is sent, it answers with one sentence and lives on."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from served import served
from torch import Tensor

from steerfm.cli import main
from steerfm.errors import ConfigError, RewardError
from steerfm.images import encode_png
from steerfm.reward import Reward
from steerfm.reward_server import application, evaluate, listen
from steerfm.reward_wire import JSON, TENSORS, Limits, Request, write_request
from steerfm.rewards.simple import Brightness, Contrast, JPEGSize

TOKEN = "right"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
LIMITS = Limits(body=20_000, pictures=4, pixels=1000, prompt=50)
PICTURES = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
SOUND = {form: write_request(Request(PICTURES, ["a", "b"], form == TENSORS), form) for form in (JSON, TENSORS)}


class Broken(Reward):
    """Fail in a way that no reward should."""

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        raise ZeroDivisionError("a secret of the server")


class Slow(Reward):
    """Score when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.free = Event(), Event()

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        self.asked.set()
        assert self.free.wait(60)
        return images.mean((1, 2, 3))


SLOW = Slow()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    rewards = (Brightness(), JPEGSize(), Broken(), SLOW)
    with served(*rewards, token=TOKEN, limits=LIMITS, waiting=2, seconds=0.5) as address:
        yield int(address.rpartition(":")[2])


def ask(
    port: int, method: str = "POST", path: str = "/score?reward=brightness", body: Any = SOUND[JSON], **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Return status, JSON and headers of an answer; the token is borne unless `headers` say otherwise."""
    sent = {"Content-Type": JSON, **BEARER, **{name.replace("_", "-"): text for name, text in headers.items()}}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, sent)
        answer = connection.getresponse()
        read = answer.read()
        told = json.loads(read) if answer.headers.get_content_type() == JSON else read
        return answer.status, told, {name.lower(): text for name, text in answer.getheaders()}
    finally:
        connection.close()


def raw(port: int, *pieces: bytes) -> bytes:
    """Send bytes as they are, hang up for sending, and return all that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        for piece in pieces:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while piece := connection.recv(65536):
            received += piece
        return received


def healthy(port: int) -> bool:
    status, told, _ = ask(port, "GET", "/health", None)
    return status == 200 and list(told) == ["version"]


def test_health_says_the_version_and_no_more_to_anybody(port: int):
    assert ask(port, "GET", "/health", None, Authorization="")[0] == 200
    assert healthy(port)


def test_rewards_are_listed(port: int):
    status, told, _ = ask(port, "GET", "/rewards", None)
    assert status == 200
    assert [each["name"] for each in told["rewards"]] == ["brightness", "jpeg_size", "broken", "slow"]
    assert told["rewards"][1] == {
        "name": "jpeg_size",
        "differentiable": False,
        "higher_is_better": True,
        "needs_prompt": False,
        "native_range": None,
        "abstains": False,
        "parts": [],
    }


def test_the_curl_of_the_documentation_is_answered(port: int):
    picture = base64.b64encode(encode_png(PICTURES[0])).decode()
    status, told, _ = ask(port, body=json.dumps({"images": [picture], "prompts": ["a"]}))
    assert status == 200
    assert told["total"] == told["parts"]["brightness"] == [pytest.approx(float(PICTURES[0].mean()), abs=0.5 / 255)]


def test_tensors_are_answered_with_the_gradient(port: int):
    status, told, headers = ask(port, body=SOUND[TENSORS], Content_Type=f"{TENSORS}; charset=utf-8")
    tensors = safetensors.torch.load(told)
    assert (status, headers["content-type"]) == (200, TENSORS)
    assert torch.equal(tensors["total"], PICTURES.mean((1, 2, 3)))
    assert torch.equal(tensors["gradient"], torch.full_like(PICTURES, 1 / 90))


@pytest.mark.parametrize(
    ("status", "said", "change"),
    [
        (401, "Authorization: Bearer TOKEN", {"Authorization": ""}),
        (401, "Authorization: Bearer TOKEN", {"Authorization": "Bearer wrong"}),
        (401, "Authorization: Bearer TOKEN", {"Authorization": "Basic right"}),
        (401, "Authorization: Bearer TOKEN", {"Authorization": "Bearer r\xefght"}),
        (401, "Authorization: Bearer TOKEN", {"Authorization": "", "path": "/rewards", "method": "GET"}),
        (404, "no reward of that name here; did you mean 'brightness'?", {"path": "/score?reward=brightnes"}),
        (404, "no reward of that name here; see GET /rewards", {"path": "/score"}),
        (404, "no part of that name", {"path": "/score?reward=brightness&part=x"}),
        (404, "POST /score", {"path": "/docs", "method": "GET"}),
        (404, "POST /score", {"path": "/openapi.json", "method": "GET"}),
        (405, "POST /score", {"method": "GET"}),
        (415, f"{JSON} or {TENSORS}", {"Content_Type": "application/python-pickle"}),
        (413, "at most 20000 bytes", {"body": b"x" * 20_001}),
        (413, "at most 4 pictures", {"body": json.dumps({"images": ["a"] * 5, "prompts": ["a"] * 5})}),
        (400, "no JSON", {"body": SOUND[JSON][:-5]}),
        (400, "cannot be read", {"body": SOUND[TENSORS][:-5], "Content_Type": TENSORS}),
        (400, "shorter than their header", {"body": SOUND[JSON], "Content_Type": TENSORS}),
        (
            422,
            "'jpeg_size' has no gradient",
            {"path": "/score?reward=jpeg_size", "body": SOUND[TENSORS], "Content_Type": TENSORS},
        ),
    ],
)
def test_refusals(status: int, said: str, change: dict[str, Any], port: int):
    found, told, _ = ask(port, **change)
    assert (found, list(told)) == (status, ["error"])
    assert said in told["error"]
    assert healthy(port)


def test_401_says_how_to_be_let_in(port: int):
    assert ask(port, Authorization="")[2]["www-authenticate"] == "Bearer"


def test_what_fails_here_is_logged_and_not_told(port: int, caplog: pytest.LogCaptureFixture):
    status, told, _ = ask(port, path="/score?reward=broken")
    assert (status, told) == (500, {"error": "The reward failed here: look at the server's log."})
    assert "a secret of the server" in caplog.text
    assert healthy(port)


HEAD = b"POST /score?reward=brightness HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\n" + (
    b"Content-Type: application/json\r\n"
)


def test_a_request_without_a_length_is_refused(port: int):
    assert raw(port, HEAD + b"\r\n").startswith(b"HTTP/1.1 411 ")
    assert healthy(port)


def test_a_length_that_is_too_large_is_refused_before_the_body_comes(port: int):
    assert raw(port, HEAD + b"Content-Length: 99999999999\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    assert healthy(port)


def test_a_body_without_an_end_is_cut_off(port: int):
    chunk = b"2000\r\n" + b"x" * 0x2000 + b"\r\n"
    assert raw(port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 3).startswith(b"HTTP/1.1 413 ")
    assert healthy(port)


@pytest.mark.parametrize("length", [b"-1", b"abc", b"1, 2", b"10\r\nContent-Length: 20"])
def test_a_length_that_is_none_is_refused(length: bytes, port: int):
    assert raw(port, HEAD + b"Content-Length: " + length + b"\r\n\r\n" + b"x" * 30).startswith(b"HTTP/1.1 400 ")
    assert healthy(port)


def test_a_body_that_breaks_off_is_given_up(port: int):
    raw(port, HEAD + b"Content-Length: 5000\r\n\r\n" + SOUND[JSON][:100])
    assert healthy(port)


def test_a_body_that_does_not_come_is_given_up(port: int):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(HEAD + b"Content-Length: 5000\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
    assert healthy(port)


def test_more_requests_than_can_wait_are_told_to_come_again(port: int):
    SLOW.asked.clear()
    SLOW.free.clear()
    answers: list[int] = []

    def insist() -> None:  # a request below may have had the second place when this one came
        while (status := ask(port, path="/score?reward=slow")[0]) == 503:
            pass
        answers.append(status)

    threads = [Thread(target=insist) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert SLOW.asked.wait(60)
    status, headers, deadline = 200, {}, time.monotonic() + 30
    while status != 503 and time.monotonic() < deadline:  # until the second request has arrived too
        status, _, headers = ask(port, path="/score?reward=brightness")
    assert (status, headers["retry-after"]) == (503, "1")
    assert healthy(port)
    SLOW.free.set()
    for thread in threads:
        thread.join()
    assert answers == [200, 200]
    assert ask(port)[0] == 200


def altered(body: bytes, place: int, put: bytes, cut: int) -> bytes:
    place %= len(body) + 1
    return body[:place] + put + body[place + cut :]


BODIES = some.one_of(
    some.binary(max_size=400),
    some.builds(
        altered,
        some.sampled_from(list(SOUND.values())),
        some.integers(0, 10_000),
        some.binary(max_size=20),
        some.integers(0, 3000),
    ),
)
NAMES = some.one_of(some.sampled_from(["brightness", "jpeg_size"]), some.text(max_size=10))
WORDS = some.text(some.characters(min_codepoint=33, max_codepoint=255, categories=["L", "N", "P", "S"]), max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=BODIES,
    name=NAMES,
    form=some.one_of(some.sampled_from([JSON, TENSORS]), WORDS),
    token=some.one_of(some.just(TOKEN), WORDS),
)
def test_whatever_is_sent_is_answered_or_refused(body: bytes, name: str, form: str, token: str, port: int):
    from urllib.parse import quote

    path = f"/score?reward={quote(name)}"
    status, told, _ = ask(port, path=path, body=body, Content_Type=form, Authorization=f"Bearer {token}")
    assert status == 200 or (400 <= status < 500 and list(told) == ["error"])
    assert healthy(port)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sent=some.one_of(
        some.binary(max_size=200),
        some.builds(altered, some.just(HEAD), some.integers(0, 200), some.binary(max_size=5), some.integers(0, 9)),
    )
)
def test_whatever_is_no_http_is_survived(sent: bytes, port: int):
    assert not raw(port, sent + b"\r\n\r\n").startswith(b"HTTP/1.1 5")
    assert healthy(port)


@pytest.mark.parametrize("gradient", [True, False])
def test_micro_batches_give_the_same(gradient: bool):
    request = Request(torch.rand(5, 3, 4, 4), list("abcde"), gradient)
    whole, pieces = evaluate(Contrast(), request), evaluate(Contrast(), request, 2)
    assert torch.equal(whole.scores.total, pieces.scores.total)
    assert torch.equal(whole.scores.parts["contrast"], pieces.scores.parts["contrast"])
    if gradient:
        assert torch.equal(whole.gradient, pieces.gradient)  # type: ignore[arg-type]


def test_a_gradient_is_not_invented():
    with pytest.raises(RewardError, match="'jpeg_size' has no gradient"):
        evaluate(JPEGSize(), Request(PICTURES, ["", ""], True))


def test_a_server_of_nothing_is_refused():
    for wrong in ({"rewards": {}}, {"token": ""}, {"micro_batch": 0}):
        with pytest.raises(ConfigError, match="A server needs a reward"):
            application(**{"rewards": {"brightness": Brightness()}, **wrong})


# --- the command ---


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = main(["reward", "serve", *argv])
    return code, capsys.readouterr().err


def test_other_hosts_need_a_token(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("STEERFM_REWARD_TOKEN", raising=False)
    code, said = run(capsys, "brightness", "--host", "0.0.0.0")
    assert code == 2
    assert "Whoever reaches 0.0.0.0 could ask this server, and there is no token" in said


def test_a_port_that_is_taken_is_said(capsys: pytest.CaptureFixture[str], workplace: Path):
    with listen("127.0.0.1", 0) as taken:
        code, said = run(capsys, "brightness", "--port", str(taken.getsockname()[1]))
    assert code == 2
    assert "Nothing can listen at 127.0.0.1" in said


def test_values_belong_to_one_reward(capsys: pytest.CaptureFixture[str], workplace: Path):
    code, said = run(capsys, "brightness", "jpeg_size", "reward.quality=5")
    assert code == 2
    assert "got 2 rewards" in said
    code, said = run(capsys, "brightness", "brightness")
    assert code == 2
    assert "Two rewards are called 'brightness'" in said


def test_missing_packages_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "steerfm.reward_server", raising=False)
    code, said = run(capsys, "brightness")
    assert code == 2
    assert "pip install 'steerfm[serve]'" in said


OWN = "def redness(images, prompts):\n    return images[:, 0].mean((1, 2))\n"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_stopped(stop: signal.Signals, tmp_path: Path):
    (tmp_path / "mine.py").write_text(OWN)
    command = [sys.executable, "-m", "steerfm.cli", "reward", "serve", "mine:redness", "--port", "0"]
    environment = {**os.environ, "STEERFM_REWARD_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("Serving redness at http://127.0.0.1:"), process.stderr.read()
        assert line.endswith(", with a token.\n")
        found = int(line.partition("127.0.0.1:")[2].partition(",")[0])
        assert ask(found, path="/score?reward=redness")[0] == 200
        assert ask(found, path="/score?reward=redness", Authorization="")[0] == 401
        process.send_signal(stop)
        assert process.wait(240) == 0  # a busy machine takes long to leave Python
    finally:
        process.kill()
        process.wait()
