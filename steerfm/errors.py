"""Every error steerfm raises on purpose: one sentence that says what was wrong, what was got, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

LONGEST = 4000  # characters of a sentence, which may repeat what a stranger wrote


class SteerfmError(Exception):
    """Say what was wrong, what was got, and what to do; the CLI prints it as one sentence without a traceback.

    What it repeats from outside comes out on one line, without anything that a terminal would obey.
    """

    def __str__(self) -> str:
        line = "".join(each if each.isprintable() else " " for each in super().__str__())
        return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


class RewardError(SteerfmError):
    """A reward has the wrong shape, a value that is not finite, or no gradient where one is needed."""


class ConfigError(SteerfmError):
    """A recipe or an argument is wrong."""


class CheckpointError(SteerfmError):
    """A saved file is missing, corrupted, or does not fit what is to be loaded."""


class DataError(SteerfmError):
    """Data are missing or have the wrong form."""


class TrainingError(SteerfmError):
    """Training cannot go on, for example because a loss is not finite."""


class TrustError(SteerfmError):
    """A recipe or a saved map names code that is not trusted."""


class RunError(SteerfmError):
    """A run folder cannot be written, is taken, or is damaged."""


class DerivativeError(SteerfmError):
    """A network cannot be differentiated in forward mode."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, then what it was raised from or while, and so on; once each, should they go in a circle."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the choice most like `name`, or "" when none is near."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def missing_package(package: str, extra: str, needed_for: str) -> SteerfmError:
    """Return the error for an optional package that is not installed, with the command that installs it."""
    return SteerfmError(
        f"{needed_for} needs the package '{package}', which is not installed: pip install 'steerfm[{extra}]'"
    )
