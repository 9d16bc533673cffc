"""make install picks an interpreter that runs, and names the fix in one line where none will do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("python3.13", "python3.12", "python3.11", "python3")

MISSING = "exit 127"
TOO_OLD = 'case "$2" in *version_info*) exit 1;; esac; exit 0'
NO_VENV = 'case "$2" in *ensurepip*) exit 1;; *print*) echo python3.11;; esac; exit 0'
USABLE = 'case "$1" in --version) echo Python 3;; -m) exit 9;; esac; exit 0'

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def install(folder: Path, answers: dict[str, str], *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run make install where the only interpreters are shell scripts that answer as told."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "bin").mkdir()
    for name in NAMES:
        script = folder / "bin" / name
        script.write_text(f"#!/bin/sh\n{answers.get(name, MISSING)}\n", encoding="utf-8")
        script.chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    return subprocess.run(
        ["make", "install", *arguments],
        cwd=folder,
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
    )


def complaint(done: subprocess.CompletedProcess) -> str:
    """Return the one line that is not make's own."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_no_interpreter_in_range(tmp_path: Path):
    said = complaint(install(tmp_path, {"python3": TOO_OLD}))
    assert "needs Python 3.11" in said
    assert "Fix: make install PYTHON=" in said


def test_no_venv_module(tmp_path: Path):
    said = complaint(install(tmp_path, {"python3.11": NO_VENV}))
    assert "python3.11 has no venv module" in said
    assert "sudo apt install python3.11-venv" in said


def test_an_interpreter_that_does_not_run_is_passed_over(tmp_path: Path):
    done = install(tmp_path, {"python3.12": USABLE, "python3": NO_VENV}, python="python3")
    assert "making .venv with Python 3" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("make")


def test_the_interpreter_can_be_named(tmp_path: Path):
    said = complaint(install(tmp_path, {"python3.13": USABLE, "python3": NO_VENV}, "PYTHON=python3"))
    assert "python3 has no venv module" in said


def test_other_environments_stay_out(tmp_path: Path):
    show = 'echo "[$VIRTUAL_ENV$CONDA_PREFIX$PYTHONPATH$PYTHONHOME]"; exit 9'
    active = {"VIRTUAL_ENV": "/other", "CONDA_PREFIX": "/conda", "PYTHONPATH": "/path", "PYTHONHOME": "/home"}
    answer = f'case "$1" in -m) {show};; --version) echo Python 3;; esac; exit 0'
    done = install(tmp_path, {"python3.13": answer}, **active)
    assert "[]" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("target", ["install", "test", "lint", "demo", "bench", "parity", "zoo", "clean"])
def test_help_lists_the_target(target: str):
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"  make {target} " in done.stdout
