"""The notebooks of the guide run from their first cell to their last, with no network, and show what they promise."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NO_NETWORK = """
import socket

_connect = socket.socket.connect


def _guarded(self, address):
    if isinstance(address, tuple) and not str(address[0]).startswith("127."):
        raise ConnectionRefusedError(f"notebooks have no network, got a connection to {address}")
    return _connect(self, address)


socket.socket.connect = _guarded
"""


def outputs(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    """Return what the cells show of one MIME type."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output["data"][kind] for output in found if kind in output.get("data", {})]


@pytest.mark.slow  # `make docs` runs them too
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["comparing", "own_reward"])
def test_a_notebook_runs(name: str, tmp_path: Path) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(NO_NETWORK))
    # Over sockets of the file system: nothing of it can be reached from another machine.
    manager = AsyncKernelManager(transport="ipc", ip=str(tmp_path / "k"))
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, km=manager, timeout=300, resources=place).execute()
    plot, pictures = outputs(notebook, "image/svg+xml")
    assert "Reward against network calls" in plot
    assert pictures.count("<image") >= 3 * 4 * 4
    (table,) = outputs(notebook, "text/html")
    assert "held_out.judge" in table
    said = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stderr"]
    assert said == [], "a reader sees this"
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("k")], "left in the reader's folder"
