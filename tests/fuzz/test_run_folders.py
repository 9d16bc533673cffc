"""Run folders that somebody sent, damaged: they are compared as they are or refused, and lead nowhere else."""

import io
import json
import shutil
from pathlib import Path
from random import Random

import pytest
import yaml
from hypothesis import given
from made_runs import make_run
from rich.console import Console

from fuzz.damage import damaged, damaged_bytes, damaged_json, garbage, randoms
from fuzz.test_checkpoints import safetensors_of
from fuzz.watching import often, watched
from steerfm.files import holder
from steerfm.report import compare
from steerfm.report.page import page
from steerfm.report.sources import expand, load
from steerfm.report.terminal import markdown, show

FILES = ("run.json", "config.yaml", "metrics.json", "samples.jsonl", "samples.safetensors", "reference.safetensors")
SECRET = "what no page may show"
LEADS = ("../../outside", "../..", "/dev/zero", "/dev/null", "run.json", ".", "/nowhere", "../base")


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two finished runs."""
    root = tmp_path_factory.mktemp("sent")
    for label in ("base", "best of 16"):
        make_run(root, label, name=label[:4], count=3)
    return root


def damage_run(random: Random, folder: Path) -> None:
    """Damage one to three files of a run, or put links in their places."""
    for _ in range(random.randint(1, 3)):
        path = folder / random.choice([*FILES, "samples.jsonl", "run.json", *(f"images/{i:06d}.png" for i in range(3))])
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b"{}"
        kind = random.randrange(12)
        path.unlink(missing_ok=True)  # never written through a link, which an earlier round may have put here
        if kind == 1:
            path.symlink_to(random.choice(LEADS))
        elif kind > 1:
            path.write_bytes(garbage(random) if kind == 2 else damaged_file(random, path, data))


def damaged_file(random: Random, path: Path, data: bytes) -> bytes:
    """Return a file's bytes, damaged in the way of its kind or anywhere."""
    try:
        if path.suffix == ".jsonl":
            rows = data.decode().splitlines()
            i = random.randrange(len(rows))
            return "\n".join([*rows[:i], damaged_json(random, json.loads(rows[i])).decode(), *rows[i + 1 :]]).encode()
        if path.suffix == ".json":
            return damaged_json(random, json.loads(data))
        if path.suffix == ".yaml":
            return yaml.dump(damaged(random, yaml.safe_load(data))).encode("utf-8", "surrogatepass")
        if path.suffix == ".safetensors":
            return safetensors_of(random, data)
    except (ValueError, IndexError, yaml.YAMLError):  # it was damaged before
        pass
    return damaged_bytes(random, data)


@often
@given(random=randoms)
def test_a_run_folder_is_compared_or_refused(workshop: Path, sent: Path, random: Random):
    root = workshop / "runs"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(sent, root)
    (workshop / "outside").write_text(SECRET)
    damage_run(random, root / "base")
    with watched():
        load("base", root)
        expand(["*", "base"], root)
        holder(root / "base")
        found = compare(["base", "best"], root=root)
        show(found, Console(file=io.StringIO()))
        markdown(found)
        text = page(found, "title")
        assert SECRET not in text
        assert SECRET not in markdown(found)


def test_what_is_whole_is_compared(sent: Path):
    """Nothing that is refused here would say anything if whole runs were refused as well."""
    assert len(compare(["base", "best"], root=sent).sources) == 2
