"""Rewards behind HTTP, for processes and machines other than the one that scores.

GET /health says the version to anybody. GET /rewards says what each reward declares. POST /score?reward=NAME scores
pictures, sent in one of the two forms of `steerfm.reward_wire`; with &part=PART, what a reward is made of on its own.
Everything but /health wants the token, where there is one. A refusal is {"error": one sentence}, and nothing that is
sent stops the server or is ever unpickled.
"""

from __future__ import annotations

import hmac
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version

import anyio
import torch
import uvicorn
from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from steerfm import reward_wire
from steerfm.errors import ConfigError, DataError, RewardError, nearest
from steerfm.reward import Reward, Scores, parts_of, silent_as_zero
from steerfm.reward_wire import FORMS, Limits, Refused, Reply, declared, write_declared

log = logging.getLogger(__name__)

BACKLOG = 64  # connections that the system holds until they are answered
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}
LAST_SECONDS = 10  # for what is being scored when the server is stopped


@dataclass
class Served:
    """Hold a reward, and the lock that lets one request at a time have it."""

    reward: Reward
    lock: threading.Lock = field(default_factory=threading.Lock)


def application(
    rewards: Mapping[str, Reward],
    *,
    token: str | None = None,
    limits: Limits | None = None,
    waiting: int = 16,
    seconds: float = 60.0,
    micro_batch: int | None = None,
    device: torch.device | str = "cpu",
) -> FastAPI:
    """Return the service that scores with `rewards`, by name; they are moved to `device`.

    token: what a request must bear; None asks for none. limits: on one request. waiting: requests that are taken
    on at once, each in a thread; all others are told to come again. seconds: for a request's body to arrive.
    micro_batch: so many pictures are scored, and differentiated, at a time. Raises ConfigError.
    """
    if not rewards or (token is not None and not token) or (micro_batch is not None and micro_batch < 1):
        raise ConfigError(
            f"A server needs a reward, a token that is not empty or None, and a micro_batch of at least 1 or None, got "
            f"{len(rewards)} rewards and micro_batch={micro_batch}."
        )
    served = {name: Served(reward.to(device)) for name, reward in rewards.items()}
    limits, room = limits or Limits(), anyio.Semaphore(waiting)

    async def health(request: Request) -> Response:
        return JSONResponse({"version": version("steerfm")})

    async def listing(request: Request) -> Response:
        _authorise(request, token)
        return JSONResponse({"rewards": [write_declared(declared(s.reward, name)) for name, s in served.items()]})

    async def score(request: Request) -> Response:
        _authorise(request, token)
        chosen, form = _chosen(request, served), _form(request)
        reward = _part(chosen.reward, request.query_params.get("part"))
        with _place(room):
            body = await _body(request, limits.body, seconds)
            return Response(await to_thread.run_sync(answer, body, form, chosen.lock, reward), media_type=form)

    def answer(body: bytes, form: str, lock: threading.Lock, reward: Reward) -> bytes:
        asked = reward_wire.read_request(body, form, limits)
        with lock:
            reply = evaluate(reward, asked, micro_batch, device)
        return reward_wire.write_reply(reply, form)

    app = FastAPI(title="steerfm rewards", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/health", _guarded(health), methods=["GET"])
    app.add_api_route("/rewards", _guarded(listing), methods=["GET"])
    app.add_api_route("/score", _guarded(score), methods=["POST"])
    app.add_exception_handler(HTTPException, _unknown)
    return app


def evaluate(
    reward: Reward, request: reward_wire.Request, micro_batch: int | None = None, device: torch.device | str = "cpu"
) -> Reply:
    """Score a request, so many pictures at a time, with the gradient of the summed total where it is wanted.

    Raises RewardError where the reward has none, and what the reward raises.
    """
    if request.gradient and not reward.differentiable:
        raise RewardError(f"'{reward.name}' has no gradient: ask for its scores alone.")
    size, prompts = micro_batch or len(request.images), request.prompts
    pieces = [
        _piece(reward, request.images[i : i + size].to(device), prompts[i : i + size], request.gradient)
        for i in range(0, len(prompts), size)
    ]
    parts = {name: torch.cat([each.scores.parts[name] for each in pieces]) for name in pieces[0].scores.parts}
    gradients = [each.gradient for each in pieces if each.gradient is not None]
    total = torch.cat([each.scores.total for each in pieces])
    return Reply(Scores(total, parts), torch.cat(gradients) if gradients else None)


def _piece(reward: Reward, images: Tensor, prompts: Sequence[str], wanted: bool) -> Reply:
    with torch.set_grad_enabled(wanted):
        leaf = images.requires_grad_(wanted)
        total, parts = reward.evaluate(leaf, prompts)
        gradient = torch.autograd.grad(silent_as_zero(total).sum(), leaf)[0] if wanted else None
    return Reply(Scores(total.detach(), {name: values.detach() for name, values in parts.items()}), gradient)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes a free one. Raises ConfigError where the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"Nothing can listen at {host}, port {port} ({error}): choose another, --port 0 for any that is free."
        ) from error


def address_of(listening: socket.socket) -> str:
    """Return the address that a listening socket is reached at."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Run an application until `should_exit` is set or a signal comes; `ready` is called when it can be asked."""

    def __init__(self, app: FastAPI, ready: Callable[[], None] | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=LAST_SECONDS,
            )
        )
        self._ready = ready or (lambda: None)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        self._ready()


def _guarded(route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Return the route with every error turned into an answer; what is nobody's fault outside is logged, not told."""

    async def guarded(request: Request) -> Response:
        try:
            return await route(request)
        except Refused as error:
            return _refusal(error.status, str(error))
        except (RewardError, DataError) as error:
            return _refusal(422, str(error))
        except ClientDisconnect:
            return _refusal(400, "The request broke off.")
        except Exception:
            log.exception("%s %s failed", request.method, request.url.path)
            return _refusal(500, "The reward failed here: look at the server's log.")

    return guarded


def _refusal(status: int, sentence: str) -> Response:
    return JSONResponse({"error": sentence}, status, HEADERS.get(status))


async def _unknown(request: Request, error: Exception) -> Response:
    """Answer a path or a method that there is not."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    return _refusal(status, "This is not answered here: GET /health, GET /rewards or POST /score.")


def _authorise(request: Request, token: str | None) -> None:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if token is None or (scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), token.encode())):
        return
    raise Refused("This needs the header 'Authorization: Bearer TOKEN' with the server's token.", 401)


def _chosen(request: Request, served: Mapping[str, Served]) -> Served:
    name = request.query_params.get("reward", "")
    if name not in served:
        raise Refused(
            f"There is no reward of that name here{nearest(name[:100], served) or ';'} see GET /rewards.", 404
        )
    return served[name]


def _part(reward: Reward, name: str | None) -> Reward:
    found = reward if name is None else next((part for part in parts_of(reward) if part.name == name), None)
    if found is None:
        raise Refused(f"'{reward.name}' has no part of that name: see GET /rewards.", 404)
    return found


def _form(request: Request) -> str:
    form = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if form not in FORMS:
        raise Refused(f"The Content-Type is {' or '.join(FORMS)}.", 415)
    return form


@contextmanager
def _place(room: anyio.Semaphore) -> Iterator[None]:
    """Hold one of the places for requests that are taken on. Raises Refused where there is none left."""
    try:
        room.acquire_nowait()
    except anyio.WouldBlock as error:
        raise Refused("Too many requests are waiting: come again in a moment.", 503) from error
    try:
        yield
    finally:
        room.release()


async def _body(request: Request, limit: int, seconds: float) -> bytes:
    """Return the body, read no further than `limit` bytes, whatever length was declared. Raises Refused."""
    declared_length = request.headers.get("Content-Length")
    if declared_length is None and "Transfer-Encoding" not in request.headers:
        raise Refused("A request to score has a body and says how long it is.", 411)
    if not (declared_length or "0").isdecimal():
        raise Refused("The Content-Length is a number of bytes.")
    large = Refused(f"A request has at most {limit} bytes: send fewer pictures at once.", 413)
    if int(declared_length or 0) > limit:
        raise large
    body = bytearray()
    try:
        with anyio.fail_after(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise large
    except TimeoutError as error:
        raise Refused(f"The body did not arrive within {seconds:g} s.", 408) from error
    return bytes(body)
