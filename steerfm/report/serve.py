"""Serve a run's page to this machine's browser, and nothing else of it to nobody else."""

from __future__ import annotations

import html
import http.server
import re
import socket
import sys
import webbrowser
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

from steerfm.errors import RunError
from steerfm.runs import find_run

HOST = "127.0.0.1"
KINDS = {
    "page.html": "text/html; charset=utf-8",
    "pictures.png": "image/png",
    "curves.png": "image/png",
    "table.json": "application/json; charset=utf-8",
    "table.md": "text/markdown; charset=utf-8",
}  # all that is ever served, from the run folder itself
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"\s+content="([^"]+)"')
STRICTEST = "default-src 'none'"  # for what is no page, and for a page that states no policy


def page_of(run: str | Path, root: str | Path = "runs") -> Path:
    """Return the page of a run given by its folder or by its name below `root`; RunError where it has none."""
    folder = find_run(run, root)
    page = folder / "page.html"
    if not page.is_file():
        raise RunError(
            f"The run {folder} has no page.html, which comparisons write: "
            f"steerfm compare 'runs=[{run}]' name=NAME, then steerfm report show NAME."
        )
    return page


class PageServer(http.server.ThreadingHTTPServer):
    """Answer requests for a run's page and the files beside it, on this machine alone.

    port: 0 takes a free one. Raises RunError where the port cannot be had. Files are read anew at every request, so
    that a page that is written again shows what is new.
    """

    daemon_threads = True

    def __init__(self, page: Path, port: int = 0) -> None:
        self.folder = page.parent.resolve()
        try:
            super().__init__((HOST, port), _Answer)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunError(f"Cannot listen on port {port} ({reason}): use --port 0, which takes a free one.") from error

    @property
    def address(self) -> str:
        """Return the URL of the page."""
        return f"http://{HOST}:{self.server_port}/"

    def server_bind(self) -> None:
        """Bind without asking any name server what this machine is called."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = HOST, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a connection that broke, which the browser does, and we do as we stop."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Answer(http.server.BaseHTTPRequestHandler):
    """Answer GET and HEAD; every other method is refused by the base class."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "steerfm", ""
    timeout = 30  # seconds that a silent connection is kept

    def do_GET(self) -> None:
        """Send a listed file."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Send what GET would, without the file."""
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the terminal quiet."""

    def _answer(self, with_body: bool) -> None:
        if not self._asked_here():  # a page elsewhere whose name was made to lead to this machine
            return self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
        name = self.path.partition("?")[0].removeprefix("/") or "page.html"
        body = self._read(name)
        if body is None:
            return self.send_error(HTTPStatus.NOT_FOUND)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", KINDS[name])
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", policy(body) if name == "page.html" else STRICTEST)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if with_body:
            self.wfile.write(body)
        return None

    @property
    def _owner(self) -> PageServer:
        return cast(PageServer, self.server)

    def _asked_here(self) -> bool:
        return self.headers.get("Host", "") in {f"{name}:{self._owner.server_port}" for name in (HOST, "localhost")}

    def _read(self, name: str) -> bytes | None:
        """Return a listed file, or None; a link that leads out of the folder is not followed."""
        path = self._owner.folder / name
        try:
            inside = name in KINDS and path.resolve().parent == self._owner.folder
            return path.read_bytes() if inside else None
        except OSError:
            return None


def policy(page: bytes) -> str:
    """Return the content security policy that a page states in itself, or one that lets nothing load."""
    found = POLICY.search(page.decode("utf-8", "replace"))
    return html.unescape(found[1]) if found else STRICTEST


def open_browser(address: str) -> bool:
    """Open a browser at an address, if this machine has one."""
    try:
        return webbrowser.open(address)
    except webbrowser.Error:
        return False
