"""Finds a model in the cache that Hugging Face's tools download to. Never asks the network.

The layout is ``<cache>/models--<organisation>--<name>/snapshots/<commit>/``, and
``refs/<branch>`` beside ``snapshots`` holds the commit of a branch
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pypkg.errors import UserError

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BRANCH = "main"


def cache_folder() -> Path:
    """The cache that Hugging Face's tools use: HF_HUB_CACHE, HF_HOME/hub, or ~/.cache's."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{general}/huggingface"
    return Path(home).expanduser() / "hub"


def find_weights(name_or_folder: str | Path) -> Path:
    """The folder that holds a model: the one given, or its newest download of branch main.

    A folder wins over a name; the case of a name does not matter.

    Raises:
        UserError: neither is there; the message says where it was looked for.
    """
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    name = str(name_or_folder)
    cache = cache_folder()
    repository = _repository(cache, name) if _NAME.fullmatch(name) else None
    if repository is None:
        raise UserError(
            f"{name!r} is neither a folder nor a model in the Hugging Face cache {cache}. Nothing "
            "is downloaded: give the path of a folder with config.json and the weights, or "
            "download the model where there is a network and set HF_HOME to its cache"
        )
    return _snapshot(repository)


def _repository(cache: Path, name: str) -> Path | None:
    wanted = f"models--{name.replace('/', '--')}"
    if (cache / wanted).is_dir():
        return cache / wanted
    try:
        entries = sorted(cache.iterdir()) if cache.is_dir() else []
    except OSError as error:
        raise UserError(f"cannot read the Hugging Face cache {cache}: {error.strerror}") from error
    same = [entry for entry in entries if entry.name.lower() == wanted.lower() and entry.is_dir()]
    return same[0] if same else None


def _snapshot(repository: Path) -> Path:
    """The snapshot of the branch, or the only one if the cache does not say which that is."""
    snapshots = repository / "snapshots"
    reference = repository / "refs" / _BRANCH
    try:
        found = sorted(path for path in snapshots.iterdir() if path.is_dir())
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{repository} is not a complete download: {error}") from error
    if commit:
        found = [path for path in found if path.name == commit]
    if not found:
        missing = f"commit {commit}, which {reference} names" if commit else "a download"
        raise UserError(f"{snapshots} lacks {missing}; download the model again")
    if len(found) > 1:
        raise UserError(
            f"{snapshots} holds {len(found)} downloads, and no {reference} says which to take; "
            f"give the path of one: {', '.join(path.name for path in found)}"
        )
    return found[0]
