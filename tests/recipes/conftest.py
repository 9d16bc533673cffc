"""One kitchen for all tests of recipes: a folder in which a tiny map, CLIP and map of points have been made."""

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
        for name in ("digits", "digits_clip", "moons"):
            assert main(tiny(name)) == 0
    return folder


@pytest.fixture
def here(kitchen: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(kitchen)
    return kitchen
