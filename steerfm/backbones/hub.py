"""Publish what was exported, where somebody asks for it."""

from __future__ import annotations

import re
from pathlib import Path

from steerfm.errors import ConfigError, SteerfmError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def push(folder: str | Path, repository: str, public: bool = False) -> str:
    """Upload a folder of `steerfm export` to the hub, as `hf auth login` allows, and return the commit's address.

    repository: org/name; it is made if it is not there, private unless `public`. Nothing but the model card, JSON and
    safetensors is sent. Raises ConfigError for a name or folder that cannot be one, SteerfmError where the hub refuses
    or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    if not REPOSITORY.fullmatch(repository):
        raise ConfigError(f"A repository on the hub is called org/name, got '{repository}'.")
    if not (Path(folder) / "README.md").is_file():
        raise ConfigError(f"{folder} was not written by steerfm export: it has no README.md.")
    api = HfApi(library_name="steerfm")
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        sent = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=["README.md", "*.json", "*.safetensors", "**/*.json", "**/*.safetensors"],
            commit_message="Exported by steerfm",
        )
    except Exception as error:  # of huggingface_hub, httpx or the system
        reason = " ".join(str(error).split())[:300]
        raise SteerfmError(
            f"{repository} was not published ({type(error).__name__}: {reason}): log in by 'hf auth login', see that "
            f"you may write there, and run steerfm export again, or upload {folder} yourself."
        ) from error
    return str(sent.commit_url)
