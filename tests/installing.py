"""Copies of the checkout, and fresh environments to install them into."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOREIGN = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX"}


@dataclass(frozen=True)
class Environment:
    """A fresh virtual environment that finds the dependencies, and not steerfm, in the one that runs the tests."""

    folder: Path

    @property
    def python(self) -> Path:
        """Return the path of its interpreter."""
        return self.folder / "bin" / "python"

    def run(self, *command: str | Path, at: Path, timeout: float = 240) -> str:
        """Run a command of the environment in folder ``at`` and return what it printed; it must succeed."""
        done = self.attempt(*command, at=at, timeout=timeout)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def attempt(self, *command: str | Path, at: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment, named by its file in bin/, and return how it ended."""
        first, *rest = command
        clean = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        return subprocess.run(
            [self.folder / "bin" / first, *rest], cwd=at, env=clean, capture_output=True, text=True, timeout=timeout
        )


def tracked_files() -> list[str]:
    """Return the files of the working tree that git tracks, or would."""
    if not (ROOT / ".git").exists():
        pytest.skip("the packaging tests compare with git ls-files, and this is no git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in listed.split("\0") if name and os.path.lexists(ROOT / name))


def copy_checkout(target: Path, links: bool = True) -> Path:
    """Copy the tracked files into ``target`` and return it; without links, as git does where it cannot make any."""
    for name in tracked_files():
        source, copy = ROOT / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink() and not links:
            copy.write_text(str(source.readlink()), encoding="utf-8")
            continue
        shutil.copy2(source, copy, follow_symlinks=False)
    return target
