"""Ports for processes that are to meet."""

from __future__ import annotations

import os
import random
import socket


def free_port() -> int:
    """Return a port that nobody holds, below those which systems deal out: nobody is dealt it before it is used."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("none of 100 ports is free")


def with_port() -> dict[str, str]:
    """Return the environment of a command whose processes meet at a port of its own, and are no part of another run.

    Lightning leaves LOCAL_RANK and its like in the environment of a process that it started others from.
    """
    others = {"RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR"}
    own = {name: value for name, value in os.environ.items() if name not in others}
    return {**own, "MASTER_PORT": str(free_port())}
