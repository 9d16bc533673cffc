"""A reward server on this machine, run by uvicorn in a thread, and stopped by the test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

from steerfm.reward import Reward
from steerfm.reward_server import Server, address_of, application, listen


@contextmanager
def served(*rewards: Reward, **options: Any) -> Iterator[str]:
    """Serve rewards by their names on a free port of loopback; yield the address."""
    ready = Event()
    with listen("127.0.0.1", 0) as listening:
        app = application({reward.name: reward for reward in rewards}, **options)
        server = Server(app, ready.set)
        thread = Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert ready.wait(60)
            yield address_of(listening)
        finally:
            server.should_exit = True
            thread.join()
