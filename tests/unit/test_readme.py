"""Every snippet of the README runs, verbatim and in order, in an empty folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from steerfm.cli import main

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str | None, str]]:
    """Return (language, file to write, text) of every fenced block of the README."""
    return [(m[1], m[2], m[3]) for m in BLOCK.finditer((ROOT / "README.md").read_text(encoding="utf-8"))]


def test_the_readme_shows_every_job() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    jobs = ("FlowMapTraining", "RewardFineTuning", "FlowMapTilting", "as_reward", "steerfm compare")
    assert all(job in "".join(block for _, _, block in blocks()) for job in jobs)
    assert "6 GB" in text and "No GPU" in text and "image-reward" in text


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


@pytest.mark.timeout(600)
def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, Any] = {"__name__": "readme"}
    for language, title, text in blocks():
        if title:
            (tmp_path / title).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, "README.md", "exec"), names)
        else:
            for line in text.splitlines():
                command, *arguments = shlex.split(line)
                assert command == "steerfm"
                assert main(arguments) == 0, line
    assert len(names["out"].images) == 4
    assert set(names["out"].parts) == {"clip_score", "top_heavy"}
    page = tmp_path / "runs" / "base_or_tilting" / "page.html"
    assert "<html" in page.read_text(encoding="utf-8")
    with Image.open(next((tmp_path / "runs" / "digits" / "pictures").glob("*.png"))) as picture:
        assert len(set(picture.convert("L").tobytes())) > 16, "the grid of samples is empty"
