"""One kitchen for all tests of recipes: a folder with tiny maps (digits, points, shapes) and a tiny CLIP."""

from pathlib import Path

import pytest
from tiny_recipes import tiny

from steerfm.cli import main


@pytest.fixture(scope="session")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the runs that other recipes need have been made."""
    folder = tmp_path_factory.mktemp("kitchen")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("digits", "digits_clip", "moons", "shapes"):
            assert main(tiny(name)) == 0
    return folder


@pytest.fixture
def here(kitchen: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(kitchen)
    return kitchen
