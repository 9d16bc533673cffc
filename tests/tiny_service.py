"""A service on this machine that answers as a test tells it to, over a real socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Asked:
    """Hold one request as it came in; headers have lower-case names."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Told:
    """Hold one answer: sent as it is, a piece at a time where `pieces` says so."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: Callable[[], Iterator[bytes]] | None = None


@dataclass
class Service:
    """Hold the address of a running service and what it was asked so far."""

    address: str
    asked: list[Asked] = field(default_factory=list)


@contextmanager
def service(answer: Callable[[Asked], Told]) -> Iterator[Service]:
    """Run a service on loopback that answers every request with `answer(request)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            running.asked.append(Asked(self.command, self.path, headers, self.rfile.read(length)))
            told = answer(running.asked[-1])
            self.send_response(told.status)
            for name, value in told.headers.items():
                self.send_header(name, value)
            if told.pieces is None:
                self.send_header("Content-Length", str(len(told.body)))
            self.end_headers()
            try:
                for piece in [told.body] if told.pieces is None else told.pieces():
                    self.wfile.write(piece)
                    self.wfile.flush()
            except (BrokenPipeError, ConnectionResetError):  # whoever asked has hung up
                pass

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    running = Service(f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield running
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
