"""What every fuzzed call is held to: our errors or none, one line each, soon, in little memory, and nothing run."""

import contextlib
import importlib
import os
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from steerfm.errors import SteerfmError

INPUTS = int(os.environ.get("STEERFM_FUZZ", "100"))
SECONDS = 60  # for one input; a machine may be busy
MEMORY = 2**32  # bytes of address space that inputs may take beyond what there is at the start
EVIL = "evil_module"  # a module that can be imported in every fuzzed test, and never may be
RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pickle.find_class")
SLOW = ("lightning.pytorch.loggers", "steerfm.callbacks", "steerfm.data", "steerfm.modules", "steerfm.rewards.remote")
LINKER = ("/sbin/ldconfig",)  # asked by ctypes where a library is, as libraries of ours are imported
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

often = settings(
    max_examples=INPUTS,
    deadline=None,  # `watched` has its own, which also ends what hangs
    database=None,
    derandomize="STEERFM_FUZZ" not in os.environ,
    phases=[Phase.explicit, Phase.generate],  # shrinking a whole recipe takes longer than reading the traceback
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
)


class _Watch:
    """Hold what the audit hook, which can never be taken off again, is to look for, and what it has seen."""

    folder: Path | None = None
    seen: list[str]
    hooked = False


def _audit(event: str, arguments: tuple[Any, ...], watch: type[_Watch] = _Watch) -> None:
    if watch.folder is None:  # also at the end of the process, when the names of this file are gone already
        return
    if event == "subprocess.Popen" and arguments[0] in LINKER:
        return
    found = event in RUNS or (event == "import" and str(arguments[0]).startswith(EVIL))
    found = found or (event == "socket.connect" and not _is_local(arguments[1]))
    found = found or (event == "open" and _is_write(arguments) and not _is_inside(arguments[0]))
    found = found or (event in CHANGES and not _is_inside(arguments[0]))
    if found:
        watch.seen.append(f"{event} {arguments!r:.300}")


def _is_local(address: Any) -> bool:
    return not isinstance(address, tuple) or str(address[0]) in ("127.0.0.1", "localhost", "::1")


def _is_write(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & WRITES)


def _is_inside(path: Any) -> bool:
    if isinstance(path, int) or _Watch.folder is None:  # a file that is open already
        return True
    place = os.path.realpath(os.fsdecode(path))
    if place.startswith(os.path.join(tempfile.gettempdir(), "torchinductor")):  # made as PyTorch's compiler is imported
        return True
    if f"{os.sep}.hypothesis{os.sep}" in place:  # what Hypothesis keeps of the modules that were imported
        return True
    return place == os.devnull or place.startswith(str(_Watch.folder)) or "__pycache__" in place


@contextlib.contextmanager
def watched(*allowed: type[BaseException]) -> Iterator[None]:
    """Let the block raise our errors, in one line, or `allowed` ones; fail for others, and for what the block did."""
    _Watch.seen = []
    _Watch.folder = Path.cwd().resolve()
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except allowed:
        pass
    except SteerfmError as error:
        check_sentence(str(error))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        _Watch.folder = None
    assert not _Watch.seen, _Watch.seen


def check_sentence(text: str) -> None:
    """Fail unless an error is one line of a length that can be read."""
    assert len(text.splitlines()) == 1, f"not one line: {text!r}"
    assert len(text) < 5000, f"{len(text)} characters: {text[:300]!r}"


def _too_long(number: int, frame: Any) -> None:
    pytest.fail(f"an input took more than {SECONDS} s")


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Let the process take no more than `MEMORY` bytes beyond what it has."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def hook() -> None:
    """Start to watch, once a process, with what hostile targets lead to imported: that takes seconds and memory."""
    if not _Watch.hooked:
        for name in SLOW:
            importlib.import_module(name)
        sys.addaudithook(_audit)
        _Watch.hooked = True
