"""A folder for each fuzzed test with an evil module in it, watched, in bounded memory."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz import watching


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(300 + 2 * watching.INPUTS))


@pytest.fixture(autouse=True)
def workshop(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the current directory, in which `evil_module` lies, importable and watched for."""
    (workplace / f"{watching.EVIL}.py").write_text("class Net: ...\ndef run(*a, **k): ...\n")
    monkeypatch.syspath_prepend(workplace)
    watching.hook()
    with watching.bounded_memory():
        yield workplace
    sys.modules.pop(watching.EVIL, None)
