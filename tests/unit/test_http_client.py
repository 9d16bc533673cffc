"""HTTP to a service over real sockets: what is asked again, what is not, what is bounded, and what is never told."""

from __future__ import annotations

import asyncio
import logging
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from ports import free_port
from tiny_service import Asked, Told, service

from steerfm import http_client
from steerfm.errors import ConfigError, RewardError
from steerfm.http_client import Client, is_loopback

SECRET = "s3cr3t-t0k3n"


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("STEERFM_TEST_TOKEN", SECRET)
    return "STEERFM_TEST_TOKEN"


def quick(address: str, token_from: str | None = None, **options: Any) -> Client:
    return Client(address, token_from, **{"timeout": 5.0, "pause": 0.01, **options})


def test_what_is_posted_arrives_and_what_is_answered_comes_back():
    with service(lambda asked: Told(body=asked.body[::-1], headers={"Content-Type": "Text/Plain; charset=x"})) as there:
        answer = quick(there.address).post("/a?b=c", b"\0abc", "application/x-own")
        (asked,) = there.asked
    assert (answer.body, answer.media_type) == (b"cba\0", "text/plain")
    assert (asked.method, asked.path, asked.body) == ("POST", "/a?b=c", b"\0abc")
    assert asked.headers["content-type"] == "application/x-own"
    assert "authorization" not in asked.headers


def test_a_path_of_the_address_is_kept_and_json_is_read():
    with service(lambda asked: Told(body=b'{"a": [1]}')) as there:
        assert quick(there.address + "/v1/").get("/models").json() == {"a": [1]}
        assert [asked.path for asked in there.asked] == ["/v1/models"]


def test_it_works_where_a_loop_is_running():
    async def inside() -> bytes:
        return quick(there.address).get("/").body

    with service(lambda asked: Told(body=b"yes")) as there:
        assert asyncio.run(inside()) == b"yes"


@pytest.mark.parametrize("status", http_client.AGAIN)
def test_what_may_pass_is_asked_again(status: int):
    with service(lambda asked: Told(200 if len(there.asked) == 3 else status, b"here")) as there:
        assert quick(there.address).post("/", b"x", "text/plain").body == b"here"
        assert [asked.body for asked in there.asked] == [b"x"] * 3


@pytest.mark.parametrize("status", [201, 204, 301, 307, 400, 401, 403, 404, 413, 422, 500])
def test_what_will_not_pass_is_asked_once(status: int):
    headers = {"Location": "/elsewhere"} if 300 <= status < 400 else {}
    with service(lambda asked: Told(status, headers=headers)) as there:
        with pytest.raises(RewardError, match=f"{there.address}/score answers with status {status}"):
            quick(there.address).get("/score")
        assert [asked.path for asked in there.asked] == ["/score"]


def test_tries_are_counted_and_pauses_grow(monkeypatch: pytest.MonkeyPatch):
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with service(lambda asked: Told(503)) as there:
        with pytest.raises(RewardError, match=r"/x gave no answer in 5 tries and 0\.\d s \(status 503\): start it"):
            Client(there.address, tries=5, timeout=5.0, pause=8.0).get("/x?secret=1")
        assert len(there.asked) == 5
    assert pauses == [8.0, 16.0, 30.0, 30.0]


@pytest.mark.parametrize(("said", "waited"), [("0", 0.0), ("7", 7.0), ("1e9", 30.0), ("-3", 0.0), ("soon", 0.25)])
def test_retry_after_is_obeyed_within_bounds(said: str, waited: float, monkeypatch: pytest.MonkeyPatch):
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with service(lambda asked: Told(429, headers={"Retry-After": said})) as there, pytest.raises(RewardError):
        Client(there.address, tries=2, timeout=5.0, pause=0.25).get("/")
    assert pauses == [waited]


def test_retry_after_may_be_a_date():
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    assert http_client._retry_after(date) == pytest.approx(20, abs=2)
    assert http_client._retry_after("nan") is None


def test_nobody_there():
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RewardError, match=f"{address}/ gave no answer in 1 try and .*onnection.*: start it"):
        Client(address, tries=1).get("/")


def test_a_connection_that_is_cut_is_asked_again():
    def half() -> Iterator[bytes]:
        yield b"half"

    def answer(asked: Asked) -> Told:
        cut = Told(headers={"Content-Length": "10"}, pieces=half)
        return cut if len(there.asked) == 1 else Told(body=b"whole")

    with service(answer) as there:
        assert quick(there.address).get("/").body == b"whole"


def test_a_service_that_drips_is_left_after_the_timeout():
    def drip() -> Iterator[bytes]:
        while True:
            time.sleep(0.05)
            yield b"."

    with service(lambda asked: Told(pieces=drip)) as there:
        start = time.monotonic()
        with pytest.raises(RewardError, match=r"in 2 tries .*\(no answer within 0.3 s\)"):
            Client(there.address, timeout=0.3, tries=2, pause=0.01).get("/")
        assert time.monotonic() - start < 5


def test_an_answer_over_the_limit_is_cut_off():
    sent = []

    def endless() -> Iterator[bytes]:
        while True:
            sent.append(1)
            yield b"x" * 1000

    with service(lambda asked: Told(pieces=endless)) as there:
        with pytest.raises(RewardError, match="answers with more than 5000 bytes: ask it for less"):
            quick(there.address, limit=5000).get("/")
        assert len(there.asked) == 1
    with service(lambda asked: Told(body=b"x" * 5000)) as there:
        assert len(quick(there.address, limit=5000).get("/").body) == 5000


def test_a_packed_answer_is_refused_unread():
    with service(lambda asked: Told(body=b"bomb", headers={"Content-Encoding": "gzip"})) as there:
        with pytest.raises(RewardError, match="answers in 'gzip'"):
            quick(there.address).get("/")
        assert there.asked[0].headers["accept-encoding"] == "identity"


def test_a_refusal_is_repeated_on_one_line_without_control_characters():
    said = b'{"error": "prompt 3\\nis \\u001b[31m too long."}'
    told = r"status 422 \(prompt 3 is \[31m too long\): correct the request\.$"
    with service(lambda asked: Told(422, said)) as there, pytest.raises(RewardError, match=told):
        quick(there.address).get("/")


@pytest.mark.parametrize("said", [b'{"error": {"message": "no quota"}}', b"no quota"])
def test_other_refusals_are_repeated_too(said: bytes):
    with service(lambda asked: Told(400, said)) as there, pytest.raises(RewardError, match=r"400 \(no quota\)"):
        quick(there.address).get("/")


@pytest.mark.parametrize("said", [b"\xff\xfe", b"[" * 100_000, b"", b'{"error": 3}'])
def test_refusals_of_any_form_are_told(said: bytes):
    with service(lambda asked: Told(400, said)) as there, pytest.raises(RewardError, match="status 400"):
        quick(there.address).get("/")


def test_the_token_is_sent_and_told_to_nobody(token: str):
    with service(lambda asked: Told(401, asked.headers["authorization"].encode())) as there:
        client = quick(there.address, token)
        with pytest.raises(
            RewardError, match=r"\(Bearer \*\*\*\): put the right token into .* STEERFM_TEST_TOKEN"
        ) as refused:
            client.get("/")
        assert there.asked[0].headers["authorization"] == f"Bearer {SECRET}"
    assert SECRET not in f"{refused.value!r} {client!r}"
    assert SECRET.encode() not in pickle.dumps(client)  # noqa: TID251


def test_a_missing_token_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("STEERFM_TEST_TOKEN", raising=False)
    with service(lambda asked: Told(401)) as there:
        with pytest.raises(RewardError, match="put its token into the environment variable STEERFM_TEST_TOKEN"):
            quick(there.address, "STEERFM_TEST_TOKEN").get("/")
        with pytest.raises(RewardError, match="pass token_from="):
            quick(there.address).get("/")


def test_no_other_secret_can_be_sent():
    with pytest.raises(ConfigError, match=r"starts with STEERFM_, .* got 'AWS_SECRET_ACCESS_KEY'"):
        Client("http://h", "AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize("bad", ["two words", "line\nbreak", "ümlaut"])
def test_a_token_that_is_no_header_is_refused_unseen(bad: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STEERFM_TEST_TOKEN", bad)
    with pytest.raises(ConfigError, match="The token in STEERFM_TEST_TOKEN has spaces") as refused:
        Client("http://127.0.0.1:1", "STEERFM_TEST_TOKEN").get("/")
    assert bad not in str(refused.value)


def test_a_token_over_plain_http_is_warned_of_once(token: str, caplog: pytest.LogCaptureFixture):
    http_client._warn_of_plain_text.cache_clear()
    with caplog.at_level(logging.WARNING):
        for address in ("http://10.0.0.1:9", "https://10.0.0.1:9", "http://localhost:9", "http://10.0.0.1:9"):
            Client(address, token)._authorisation()
    assert [record.getMessage() for record in caplog.records] == [
        "The token for 10.0.0.1:9 is sent over http, which others on the way can read: use https."
    ]


def test_loopback_is_reached_without_a_proxy(monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with service(lambda asked: Told(body=b"direct")) as there:
        assert quick(there.address).get("/").body == b"direct"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "::1", "LOCALHOST"])
def test_loopback(host: str):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["10.0.0.1", "localhost.evil.org", "", "0.0.0.0", "::"])
def test_not_loopback(host: str):
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "address",
    [
        "http://me:hunter2@h:1",
        "https://h/?key=hunter2",
        "http://h#hunter2",
        "ftp://h",
        "h:80",
        "",
        "http://",
        "http://h:x",
    ],
)
def test_an_address_with_credentials_or_none_at_all_is_refused(address: str):
    with pytest.raises(ConfigError, match="address of a service") as refused:
        Client(address)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "wrong", [{"timeout": 0}, {"timeout": float("inf")}, {"tries": 0}, {"limit": 0}, {"pause": -1}]
)
def test_bounds_are_bounds(wrong: dict[str, float]):
    with pytest.raises(ConfigError, match="got"):
        Client("http://h", **wrong)  # type: ignore[arg-type]


def test_importing_it_is_light():
    code = "import sys, steerfm.http_client; sys.exit('httpx' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
