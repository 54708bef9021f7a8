"""A folder that appears under its name only when it is complete, and what goes beside weights."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pypkg import files
from pypkg.errors import UserError
from pypkg.files.links import files_named

# Tokenizers, generation settings, and the code of models that ships with their weights.
_COMPANIONS = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "tokenizer.model.v*",
    "tekken.json",
    "*.tiktoken",
    "chat_template.*",
    "generation_config.json",
    "*.py",
)


@contextlib.contextmanager
def new_folder(destination: Path, source: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``destination`` that takes its place at the end.

    If anything fails, ``destination`` is as it was.

    Raises:
        UserError: ``destination`` is not empty and ``overwrite`` false, holds ``source``, or
            cannot be written.
    """
    destination, source = destination.absolute(), source.resolve()
    _check(destination, source, overwrite)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    with files.new_folder(destination, temporary):
        yield temporary


def _check(destination: Path, source: Path, overwrite: bool) -> None:
    if destination.is_symlink() and not os.path.exists(destination):  # also a loop of links
        raise UserError(
            f"{destination} is a link to {os.readlink(destination)}, which is not there; mend or "
            "remove the link, or give another folder"
        )
    if destination.exists() and not destination.is_dir():
        raise UserError(f"{destination} is a file; give the name of a folder to make")
    if source.is_relative_to(destination.resolve()):
        raise UserError(f"{destination} holds the source {source}; write to another folder")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise UserError(
            f"{destination} is not empty; give another folder, or --overwrite to replace it with "
            "all that it holds"
        )


def copy_companions(folder: Path, target: Path) -> list[str]:
    """Copies the files that belong to a model beside config.json and weights.

    Files that ``target`` has already are left.

    Returns:
        The names of the files copied, sorted.

    Raises:
        UserError: one is a link that leads nowhere.
    """
    names = [path.name for path in files_named(folder, _COMPANIONS)]
    copied = [name for name in names if not (target / name).exists()]
    for name in copied:
        shutil.copyfile(folder / name, target / name)
    return copied
