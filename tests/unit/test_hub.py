"""Publishing on request: what is sent to the hub, and what is said where it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hub_stand_in
import pytest
from huggingface_hub import constants

from steerfm.backbones.hub import push
from steerfm.errors import ConfigError, SteerfmError


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_stand_in.StandIn]:
    with hub_stand_in.standing() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
        yield hub


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """Return a folder as steerfm export writes it, with a file that is no part of it."""
    (tmp_path / "transformer").mkdir()
    files = {
        "README.md": b"# a model\n",
        "transformer/config.json": b"{}",
        "transformer/model.safetensors": b"12345678",
    }
    for name, data in (files | {"notes.txt": b"private", "old.bin": b"pickle"}).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("public", [False, True])
def test_what_was_exported_is_sent_and_nothing_else(hub: hub_stand_in.StandIn, exported: Path, public: bool) -> None:
    assert push(exported, "org/model", public) == f"{hub.url}/org/model/commit/1"
    assert hub.repositories == {"org/model": not public}
    assert hub.files == {
        "README.md": b"# a model\n",
        "transformer/config.json": b"{}",
        "transformer/model.safetensors": b"12345678",
    }


def test_a_refusal_is_one_sentence_that_tells_no_secret(
    hub: hub_stand_in.StandIn, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refuses = True
    with pytest.raises(SteerfmError, match=r"org/model was not published .*hf auth login") as caught:
        push(exported, "org/model")
    assert "hf_aaaa" not in str(caught.value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SteerfmError, match="was not published"):
        push(exported, "org/model")
    assert (exported / "README.md").exists()


@pytest.mark.parametrize("name", ["model", "a/b/c", "../model", "org/mo del"])
def test_other_names_and_folders_are_refused(exported: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="called org/name"):
        push(exported, name)
    (exported / "README.md").unlink()
    with pytest.raises(ConfigError, match="not written by steerfm export"):
        push(exported, "org/model")
