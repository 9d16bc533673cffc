"""What is sent to a reward server, and what a server answers, damaged: a sentence, never a traceback."""

import json
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from starlette.testclient import TestClient

from fuzz.damage import TEXTS, damaged, damaged_bytes, damaged_json, garbage, randoms
from fuzz.test_checkpoints import safetensors_of
from fuzz.watching import check_sentence, often, watched
from steerfm.reward import Scores
from steerfm.reward_server import application
from steerfm.reward_wire import (
    FORMS,
    JSON,
    TENSORS,
    Limits,
    Reply,
    Request,
    declared,
    read_listing,
    read_reply,
    write_declared,
    write_reply,
    write_request,
)
from steerfm.rewards.simple import Brightness, Contrast

TOKEN = "a-token-that-nobody-may-see"
REWARD = 0.5 * Brightness() + Contrast()
LIMITS = Limits(body=20_000, pictures=4, pixels=4096, prompt=2000)
BODIES = {form: write_request(Request(torch.rand(2, 3, 4, 4), ["a", "b"]), form) for form in FORMS}
SCORES = Scores(torch.rand(2), {"brightness": torch.rand(2), "contrast": torch.rand(2)})
REPLIES = {form: write_reply(Reply(SCORES), form) for form in FORMS}
LISTING: dict[str, Any] = {"rewards": [write_declared(declared(REWARD, "both"))]}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = application({"both": REWARD, "bright": Brightness()}, token=TOKEN, limits=LIMITS, seconds=5)
    return TestClient(app, raise_server_exceptions=False)


def body_of(random: Random, bodies: dict[str, bytes], form: str) -> bytes:
    """Return a damaged body in one of the two forms, or garbage."""
    if random.randrange(8) == 0:
        return garbage(random, [b"[" * 50_000, b'{"images":', b"\xff" * 8])
    if form == JSON:
        return damaged_json(random, json.loads(bodies[JSON]))
    return safetensors_of(random, bodies[TENSORS])


def word(random: Random) -> str:
    """Return what may stand in a header or a query."""
    return random.choice([*TEXTS, "both", "bright", "Bearer", "a" * 9000]).encode("ascii", "ignore").decode()


@often
@given(random=randoms)
def test_a_request_is_answered_or_refused(client: TestClient, random: Random):
    form = random.choice(FORMS)
    body = body_of(random, BODIES, form) if random.randrange(12) else BODIES[form]
    query = {"reward": random.choice(["both", "bright"])}
    headers = {"Content-Type": form, "Authorization": f"Bearer {TOKEN}"}
    changed = random.randrange(10)
    if changed == 0:
        query[random.choice(["reward", "part", "x"])] = word(random)
    elif changed == 1:
        headers[random.choice(["Content-Type", "Authorization", "Accept", "X"])] = visible(word(random))
    elif changed == 2:
        headers["Content-Length"] = random.choice(["-1", "99999999999999999999", "x", "1e9", "0", " 5"])
    path, method = (
        ("/score", "POST") if changed != 3 else (f"/{visible(word(random))[:200]}", random.choice(["GET", "PUT"]))
    )
    with watched():
        answer = client.request(method, path, params=query, headers=headers, content=body)
        told = answer.json() if answer.headers["Content-Type"] == JSON else {}
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, told
        if answer.status_code != 200:
            check_sentence(told["error"])
        assert TOKEN not in answer.text


def visible(text: str) -> str:
    """Return a text as a client could put it into a header."""
    return "".join(each for each in text if " " < each <= "~" and each not in "?#%")


@often
@given(random=randoms)
def test_an_answer_is_read_or_refused(random: Random):
    form = random.choice(FORMS)
    asked = Request(torch.rand(2, 3, 4, 4), ["a", "b"], gradient=form == TENSORS and bool(random.randrange(2)))
    with watched():
        read = read_reply(body_of(random, REPLIES, form), form, asked, declared(REWARD, "both"))
        assert read.scores.total.shape == (2,)


@often
@given(random=randoms)
def test_a_listing_is_read_or_refused(random: Random):
    data = damaged_json(random, LISTING) if random.randrange(4) else damaged_bytes(random, json.dumps(LISTING).encode())
    with watched():
        for name, each in read_listing(data).items():
            assert each.name == name


def test_what_is_whole_is_answered(client: TestClient):
    """A server that refused everything would pass as well."""
    for form in FORMS:
        headers = {"Content-Type": form, "Authorization": f"Bearer {TOKEN}"}
        assert (
            client.post("/score", params={"reward": "both"}, headers=headers, content=BODIES[form]).status_code == 200
        )
    assert damaged(Random(0), LISTING) != LISTING
