"""What every test gets: no network, offline hubs, fixed seeds, and folders of its own."""

import os
import random
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", COLUMNS="140")
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin are 20 times slower on a busy machine
for _name in list(os.environ):
    if _name.startswith(("SLURM_", "TORCHELASTIC_")) or _name in {
        "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_RUN_ID",
        "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FORCE_COLOR",
    }:  # fmt: skip
        del os.environ[_name]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job, where Ctrl-C is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)

LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "::", "", socket.gethostname()}


def is_local(address: object) -> bool:
    """Return whether a socket address stays on this machine."""
    host = address[0] if isinstance(address, tuple) else None
    return host is None or host in LOCAL_HOSTS or str(host).startswith("127.")


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuse every connection that leaves this machine, so that a test which needs one says so at once."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guarded(original):
        def call(self: socket.socket, address):
            if not is_local(address):
                raise ConnectionRefusedError(f"tests have no network, got a connection to {address}")
            return original(self, address)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(connect))
        patch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
        yield


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same random state, in the libraries that are imported already."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder that is the current directory while the test runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def run_folder(workplace: Path) -> Path:
    """Return ``runs/test`` in an empty current directory; the folder itself is not made."""
    return workplace / "runs" / "test"


@pytest.fixture(scope="session")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what writes small pipelines of diffusers' classes, each once, and loads them; no test changes them."""
    pytest.importorskip("diffusers")
    from tiny_pipelines import Loader

    return Loader(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="session")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of six finished runs, which no test changes."""
    from made_runs import make_runs

    root = tmp_path_factory.mktemp("runs")
    make_runs(root)
    return root
