"""The destination folder, which appears only when it is complete, and copies of other files."""

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
    """Yields a temporary folder that replaces ``destination`` at the end of the block.

    If the block raises, ``destination`` is unchanged.

    Args:
        source: a folder that is read; it must not be inside ``destination``.

    Raises:
        UserError: ``destination`` is not empty and ``overwrite`` is false, contains ``source``, or
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
        raise UserError(f"{destination} is a file; give the name of a folder to create")
    if source.is_relative_to(destination.resolve()):
        raise UserError(f"{destination} holds the source {source}; write to another folder")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise UserError(
            f"{destination} is not empty; give another folder, or --overwrite to replace it and "
            "all its contents"
        )


def copy_companions(folder: Path, target: Path) -> list[str]:
    """Copies the files of a model other than config.json and weights (``_COMPANIONS``).

    Files that exist in ``target`` are not replaced.

    Returns:
        The names of the copied files, sorted.

    Raises:
        UserError: a file is a broken symbolic link.
    """
    names = [path.name for path in files_named(folder, _COMPANIONS)]
    copied = [name for name in names if not (target / name).exists()]
    for name in copied:
        shutil.copyfile(folder / name, target / name)
    return copied
