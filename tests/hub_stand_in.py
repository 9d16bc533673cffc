"""A hub that stands in on loopback: what uploading a small folder asks of one (huggingface_hub 1.x).

Not stood in for: large files, checks of what is sent, and permissions beyond a refusal.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StandIn(ThreadingHTTPServer):
    """Hold what the hub was told: repositories with their privacy, and the bytes of the files in each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuses = False
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.unknown: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Answer what `create_repo` and `upload_folder` ask."""

    server: StandIn  # type: ignore[assignment]

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._send(404, {"error": "not found"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub, path = self.server, self.path.split("?")[0]
        if hub.refuses:
            return self._send(403, {"error": "You have no right to write here"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            hub.repositories[name] = asked.get("private") or asked.get("visibility") == "private"
            return self._send(200, {"url": f"{hub.url}/{name}", "name": name, "id": "1"})
        if "/preupload/" in path:
            names = [each["path"] for each in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            return self._send(200, {"files": files, "commitOid": "0" * 40})
        if "/commit/" in path:
            for line in body.decode().splitlines():
                told = json.loads(line)
                if told["key"] == "file":
                    hub.files[told["value"]["path"]] = base64.b64decode(told["value"]["content"])
            address = f"{hub.url}/{next(iter(hub.repositories))}/commit/1"
            return self._send(200, {"commitOid": "1" * 40, "commitUrl": address, "pullRequestUrl": None})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        hub.unknown.append(path)
        return self._send(404, {"error": "not found"})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextlib.contextmanager
def standing() -> Iterator[StandIn]:
    """Serve inside the block."""
    hub = StandIn()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
