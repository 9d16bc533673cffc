"""HTTP to a service that may be slow, down or hostile: bounded in seconds, tries and bytes, with errors that say why.

A token is named by the environment variable that holds it, so that no object, error or run folder does.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import logging
import math
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from steerfm.errors import ConfigError, RewardError

log = logging.getLogger(__name__)

PREFIX = "STEERFM_"  # of the environment variables that may be sent
AGAIN = (429, 502, 503, 504)  # what may pass: too many requests, a gateway's trouble, too busy
LONGEST_PAUSE = 30.0  # seconds between two tries, whatever the service asks for
LONGEST_SAYING = 2**16  # bytes of a refusal that is read as JSON
SAID = 300  # characters of a refusal that are repeated


@dataclass(frozen=True)
class Answer:
    """Hold what a service answered: the body, and its media type in lower case, without parameters."""

    body: bytes
    media_type: str

    def json(self) -> Any:
        """Return the body read as JSON. Raises ValueError for anything else."""
        try:
            return json.loads(self.body)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


@dataclass(frozen=True)
class Client:
    """Ask the service at `address`, "https://host:port/path", which has no credentials in it.

    token_from: the environment variable with the bearer token, read at every request; none is sent where it is
    unset. Its name starts with STEERFM_: a recipe that somebody shares names address and variable, and may not carry
    another secret off. timeout: seconds for one try, from connecting to the last byte. tries: of which all but the
    first follow a failed connection, a timeout or a status of `AGAIN`. pause: seconds before the second try, doubled
    for each further one; a service's Retry-After takes its place, and neither is over `LONGEST_PAUSE`. limit: bytes
    of an answer. Redirects are not followed, and loopback is reached without a proxy. Safe to use from several threads.
    Raises ConfigError.
    """

    address: str
    token_from: str | None = None
    timeout: float = 30.0
    tries: int = 4
    limit: int = 2**28
    pause: float = 0.5

    def __post_init__(self) -> None:
        _check_address(self.address)
        if not (self.token_from or PREFIX).startswith(PREFIX):
            raise ConfigError(
                f"token_from is an environment variable whose name starts with {PREFIX}, so that no recipe can send "
                f"another secret away, got '{self.token_from}': copy its value, export {PREFIX}TOKEN=..."
            )
        if not (0 < self.timeout < math.inf and 0 <= self.pause < math.inf):
            raise ConfigError(f"timeout and pause are seconds, got {self.timeout} and {self.pause}.")
        if self.tries < 1 or self.limit < 1:
            raise ConfigError(f"tries and limit are at least 1, got {self.tries} and {self.limit}.")

    def get(self, path: str) -> Answer:
        """Return the answer to GET `path`, which starts with "/". Raises RewardError."""
        return self._ask("GET", path, {}, None)

    def post(self, path: str, content: bytes, media_type: str) -> Answer:
        """Return the answer to POST `path`; what is asked may be asked twice. Raises RewardError."""
        return self._ask("POST", path, {"Content-Type": media_type}, content)

    def _ask(self, method: str, path: str, headers: dict[str, str], content: bytes | None) -> Answer:
        from anyio.from_thread import start_blocking_portal

        url = self.address.rstrip("/") + path
        headers = {"Accept-Encoding": "identity", **headers, **self._authorisation()}
        start, reason = time.monotonic(), ""
        for number in range(self.tries):
            try:
                with start_blocking_portal() as portal:  # a thread, for a loop may be running in this one
                    return portal.call(self._try, method, url, headers, content)
            except _Failed as failed:
                reason, pause = failed.reason, failed.pause
            if number + 1 < self.tries:
                time.sleep(min(self.pause * 2**number if pause is None else pause, LONGEST_PAUSE))
        tries = "1 try" if self.tries == 1 else f"{self.tries} tries"
        raise RewardError(
            f"{without_query(url)} gave no answer in {tries} and {time.monotonic() - start:.1f} s ({reason}): start "
            "it or correct the address; where it is only slow, raise timeout."
        )

    async def _try(self, method: str, url: str, headers: dict[str, str], content: bytes | None) -> Answer:
        """Return the answer to one request. Raises _Failed if another try may help, RewardError if none will."""
        import anyio
        import httpx

        local = is_loopback(urlsplit(url).hostname or "")
        try:
            with anyio.fail_after(self.timeout):
                async with (
                    httpx.AsyncClient(timeout=None, trust_env=not local, verify=_certificates()) as client,
                    client.stream(method, url, headers=headers, content=content) as response,
                ):
                    body = await self._body(response, url)
        except TimeoutError as error:
            raise _Failed(f"no answer within {self.timeout:g} s") from error
        except httpx.TransportError as error:
            raise _Failed(_printable(str(error)) or type(error).__name__) from error
        if response.status_code in AGAIN:
            raise _Failed(f"status {response.status_code}", _retry_after(response.headers.get("Retry-After", "")))
        if response.status_code != 200:
            raise self._refusal(url, response.status_code, body)
        media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        return Answer(body, media_type)

    async def _body(self, response: Any, url: str) -> bytes:
        """Return the body as it was sent. Raises RewardError where it is too large, or packed and so of any size."""
        packed = response.headers.get("Content-Encoding", "identity")
        if packed != "identity":
            raise RewardError(f"{without_query(url)} answers in '{_printable(packed)}': have it send plain bytes.")
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > self.limit:
                raise RewardError(
                    f"{without_query(url)} answers with more than {self.limit} bytes: ask it for less at once."
                )
        return bytes(body)

    def _refusal(self, url: str, status: int, body: bytes) -> RewardError:
        said = _said(body)
        token = self._token()
        if token:
            said = said.replace(token, "***")
        fix = "correct the request"
        if 300 <= status < 400:
            fix = "redirects are not followed, so give the address that it leads to"
        elif status in (401, 403):
            fix = "pass token_from=, the environment variable with the token"
            if self.token_from is not None:
                fix = f"put {'the right' if token else 'its'} token into the environment variable {self.token_from}"
        elif status == 404:
            fix = "correct the address"
        elif status >= 500:
            fix = "look at its log"
        return RewardError(f"{without_query(url)} answers with status {status}{said and f' ({said})'}: {fix}.")

    def _token(self) -> str:
        return os.environ.get(self.token_from, "") if self.token_from is not None else ""

    def _authorisation(self) -> dict[str, str]:
        token, where = self._token(), urlsplit(self.address)
        if not token:
            return {}
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise ConfigError(f"The token in {self.token_from} has spaces or other than ASCII characters: set it anew.")
        if where.scheme == "http" and not is_loopback(where.hostname or ""):
            _warn_of_plain_text(where.netloc)
        return {"Authorization": f"Bearer {token}"}


class _Failed(Exception):
    """Say why a try failed that may be made again, and the seconds that the service asks to wait, if it does."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.pause = reason, pause


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is this machine itself."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def without_query(url: str) -> str:
    """Return an address as errors name it: without what follows a "?" """
    return url.partition("?")[0]


def _check_address(address: str) -> None:
    """Raise ConfigError, without repeating what may be a password, unless the address is a plain one."""
    fix = "write http://host:port or https://host, and pass a token by token_from="
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"The address of a service cannot be read ({error}): {fix}.") from error
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(f"The address of a service at '{host}' has more than host, port and path in it: {fix}.")
    if parts.scheme not in ("http", "https") or not host or not address.isprintable() or " " in address:
        raise ConfigError(f"The address of a service starts with http:// or https://, got {address!r}: {fix}.")


def _retry_after(text: str) -> float | None:
    """Return the seconds of a Retry-After header, given as a number or a date (RFC 9110, 10.2.3); None for another."""
    with contextlib.suppress(ValueError):
        seconds = float(text)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    return None


def _said(body: bytes) -> str:
    """Return what a refusal says: the text of {"error": ...}, else the start of the body, on one line."""
    text = body[: 4 * SAID].decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(body if len(body) < LONGEST_SAYING else b"")
        error = found.get("error") if isinstance(found, dict) else None
        message = error.get("message") if isinstance(error, dict) else error
        text = message if isinstance(message, str) else text
    return _printable(text).rstrip(".")


def _printable(text: str) -> str:
    """Return the start of a text from outside on one line, with nothing that a terminal would obey."""
    return "".join(each for each in " ".join(text.split()) if each.isprintable())[:SAID]


@functools.cache
def _certificates() -> Any:
    """Return what servers' certificates are checked with; reading them takes longer than a request."""
    import httpx

    return httpx.create_ssl_context()


@functools.cache
def _warn_of_plain_text(host: str) -> None:
    log.warning("The token for %s is sent over http, which others on the way can read: use https.", host)
