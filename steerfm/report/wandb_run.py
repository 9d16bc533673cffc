"""A W&B run that never stops the run it tells of: it warns once and goes on offline where W&B fails."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import operator
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from steerfm.errors import RunError
from steerfm.files import cannot_write

log = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]
DATA_VARIABLE = "WANDB_DATA_DIR"
SECONDS_TO_REACH = 20.0  # until a server that does not answer counts as down
SECONDS_TO_SEND = 300.0  # at the end, for what has not been sent yet


def resolve_mode(mode: str | None = None) -> Mode:
    """Return `mode`, else WANDB_MODE, else "online" where WANDB_API_KEY is set and "offline" elsewhere.

    Raises RunError for an unknown mode.
    """
    chosen = mode or os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    chosen = {"dryrun": "offline", "run": "online"}.get(chosen, chosen)  # wandb's old names, which Lightning still sets
    if chosen not in ("online", "offline", "disabled"):
        raise RunError(f"Unknown W&B mode '{chosen}': use online, offline or disabled.")
    return chosen


def run_id(folder: Path, started: str) -> str:
    """Return the id in W&B of the run in a folder that was started then: the same when it is resumed."""
    return hashlib.sha256(f"{folder.resolve()} {started}".encode()).hexdigest()[:12]


class WandbRun:
    """Tell W&B of a run, with files below folder/wandb; what fails is warned of once, and the rest is kept offline.

    given: what `wandb.init` takes, such as project, name, id and config. seconds: to reach the server. seconds_to_send:
    at the end; what is left then stays on disk. quiet: keep wandb's own lines off the terminal, for the rest of the
    program too. Nothing ever asks for a key. Attributes that are not here are those of
    the wandb run, guarded likewise, so that a Lightning logger can take this for one (`experiment=`). Raises RunError
    where the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        mode: Mode,
        *,
        seconds: float | None = None,
        seconds_to_send: float | None = None,
        quiet: bool = False,
        **given: Any,
    ) -> None:
        self.folder = Path(folder)
        self.seconds = SECONDS_TO_REACH if seconds is None else seconds
        self.seconds_to_send = SECONDS_TO_SEND if seconds_to_send is None else seconds_to_send
        self.quiet = quiet
        self.given = given
        self.mode: Mode = mode
        self.warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        self._run: Any = None
        self._begin(mode)

    @property
    def id(self) -> str:
        """Return the run's id in W&B, which an offline run has too."""
        return str(self._known("id", self.given.get("id") or ""))

    @property
    def project(self) -> str:
        """Return the project."""
        return str(self._known("project", self.given.get("project") or ""))

    @property
    def entity(self) -> str:
        """Return who owns the run in W&B, "" while that is not known, as offline."""
        return str(self._known("entity", "") or self.given.get("entity") or "")

    @property
    def url(self) -> str:
        """Return the run's address, "" for one that is not online."""
        return str(self._known("url", "") or "") if self.mode == "online" else ""

    @property
    def kept(self) -> Path | None:
        """Return the folder with the run's files, None where it keeps none."""
        files = None if self.mode == "disabled" else self._known("dir", None)
        return None if files is None else Path(files).parent

    def log(self, data: dict[str, Any], **more: Any) -> None:
        """Log one row of a run's history, as `wandb.Run.log`."""
        self._guarded("log", data, **more)

    def set_summary(self, figures: dict[str, Any]) -> None:
        """Put figures into the run's summary."""
        self._guarded("summary.update", figures)

    def log_artifact(self, artifact: Any, **more: Any) -> None:
        """Log what the run made; without waiting for W&B to have it."""
        self._guarded("log_artifact", artifact, **more)

    def use_artifact(self, artifact: Any) -> None:
        """Log what the run was made from; without waiting for W&B to have it.

        `wandb.Run.use_artifact` would wait, and refuses where the run is offline.
        """
        self._guarded("_log_artifact", artifact, aliases=[], is_user_created=True, use_after_commit=True)

    def finish(self, exit_code: int = 0) -> None:
        """Send what is left, for a bounded time, and end the run."""
        run, kept = self._run, self.kept
        if run is None:
            return
        try:
            with files_in(self.folder):
                run.finish(exit_code=exit_code)
        except Exception as error:  # whatever it is: the run it tells of has ended well
            self._warn(error, f"what it does not have yet is kept: wandb sync {kept}")
            _stop_service()
        self._run = None

    def __enter__(self) -> WandbRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.finish(0 if error is None else 1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._run is None:
            return _Nothing()
        found = getattr(self._run, name)
        return (lambda *given, **more: self._guarded(name, *given, **more)) if callable(found) else found

    def _begin(self, mode: Mode) -> None:
        """Begin the run, or an offline one where that fails, or none."""
        try:
            self._run, self.mode = self._init(mode), mode
        except Exception as error:
            _stop_service()
            if mode == "online":
                self._warn(error, "the run is kept offline")
                self._begin("offline")
            else:
                self._warn(error, "nothing more is kept for it")

    def _init(self, mode: Mode) -> Any:
        import wandb
        from wandb.errors import UsageError

        if self.quiet:
            wandb.setup(wandb.Settings(silent=True))
        if mode == "online" and not has_key():
            raise UsageError("no API key: set WANDB_API_KEY")
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=self.seconds,
            finish_timeout=self.seconds_to_send,
            finish_timeout_raises=True,
        )
        with files_in(self.folder):
            return wandb.init(dir=str(self.folder), mode=mode, settings=settings, reinit="create_new", **self.given)

    def _known(self, name: str, otherwise: Any) -> Any:
        """Return an attribute of the wandb run; `otherwise` where there is none."""
        return otherwise if self._run is None else getattr(self._run, name, otherwise)

    def _guarded(self, path: str, *given: Any, **more: Any) -> Any:
        """Call a method of the wandb run; where an online run fails, go on with an offline one and try there once."""
        for _ in range(2):
            if self._run is None:
                return None
            try:
                with files_in(self.folder):
                    return bounded(self.seconds, operator.attrgetter(path)(self._run), *given, **more)
            except Exception as error:
                if self.mode != "online":
                    self._warn(error, f"a call of {path} was left out")
                    return None
                self._fall_back(error)
        return None

    def _fall_back(self, error: Exception) -> None:
        """Leave an online run whose W&B died and begin an offline one of the same id."""
        self._run = None
        self._warn(error, "the rest of the run is kept offline")
        _stop_service()
        self._begin("offline")

    def _warn(self, error: Exception, what_now: str) -> None:
        """Warn of the first failure; the others follow from it."""
        if self.warned:
            log.debug("W&B: %s", error)
            return
        self.warned = True
        log.warning("W&B could not be reached (%s): %s.", first_line(error), what_now)


def has_key() -> bool:
    """Say whether there is a key for W&B, without asking for one, as `wandb.init` would at a terminal."""
    import wandb

    return bool(os.environ.get("WANDB_API_KEY")) or wandb.login(prompt=False, verify=False)


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextlib.contextmanager
def files_in(folder: Path) -> Iterator[None]:
    """Let wandb keep pictures and artifacts in folder/wandb/data until they are sent, and not in the home directory."""
    before = os.environ.get(DATA_VARIABLE)
    os.environ[DATA_VARIABLE] = str((folder / "wandb" / "data").resolve())
    try:
        yield
    finally:
        os.environ.pop(DATA_VARIABLE)
        if before is not None:
            os.environ[DATA_VARIABLE] = before


class _Nothing:
    """Stand in for a run that W&B no longer has: whatever is asked of it does nothing."""

    def __getattr__(self, name: str) -> _Nothing:
        return self

    def __call__(self, *given: Any, **more: Any) -> _Nothing:
        return self


def bounded(seconds: float, call: Callable[..., Any], *given: Any, **more: Any) -> Any:
    """Return what a call gives; raise TimeoutError where it takes longer, and leave it behind.

    Before a table or an artifact is logged wandb asks its server a question, for as long as that takes.
    """
    answer: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def ask() -> None:
        try:
            answer.put((call(*given, **more), None))
        except BaseException as error:
            answer.put((None, error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        found, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return found


def _stop_service(seconds: float = 5.0) -> None:
    """End wandb's own process, which may be what failed, so that the next run starts another.

    It would go on trying to send for hours, and a pipe behind this program would wait for it. Where the program has a
    wandb run of its own, that process is left alone.
    """
    import wandb
    from wandb.sdk import wandb_setup

    if wandb.run is not None:
        return
    process = getattr(getattr(wandb_setup.singleton(), "_connection", None), "_proc", None)
    with contextlib.suppress(Exception):
        bounded(seconds, wandb.teardown)
    with contextlib.suppress(Exception):
        process._process.kill()  # type: ignore[union-attr]  # wandb has no public way
