"""Importing steerfm and asking for help is quick: the heavy libraries come only where they are used."""

import subprocess
import sys
from pathlib import Path

HEAVY = ("lightning", "pytorch_lightning", "hydra", "wandb", "diffusers", "transformers", "open_clip")

# Seconds of its own work, in processor time: a busy machine does not make it larger.
HELP_SECONDS = 0.6

REPORT = "print(' '.join(name for name in {names} if name in sys.modules))"


def run(code: str, folder: Path) -> list[str]:
    """Run code in a fresh interpreter and return the words of the last line it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip("\n").split("\n")[-1].split()


def test_importing_steerfm_is_light(tmp_path: Path):
    assert run(f"import sys, steerfm; {REPORT.format(names=HEAVY)}", tmp_path) == []


def help_of(arguments: list[str]) -> str:
    """Return code that asks the command line for help, then prints seconds and the heavy modules it imported."""
    return "\n".join(
        [
            "import sys, time",
            "start = time.process_time()",
            "from steerfm.cli import main",
            "try:",
            f"    assert not main({arguments!r})",
            "except SystemExit as stop:",
            "    assert not stop.code, stop.code",
            "print()",
            f"print(time.process_time() - start, *(name for name in {(*HEAVY, 'torch')!r} if name in sys.modules))",
        ]
    )


def test_help_answers_at_once(tmp_path: Path):
    answers = [run(help_of(["--help"]), tmp_path) for _ in range(3)]
    assert [answer[1:] for answer in answers] == [[], [], []]
    assert min(float(answer[0]) for answer in answers) < HELP_SECONDS


def test_help_names_every_command(tmp_path: Path):
    code = "import sys; from steerfm.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = ("train", "finetune", "sample", "steer", "compare", "reward", "recipes", "demo", "env")
    assert [name for name in commands if name not in done.stdout] == []
