"""Joins the parts of a checkpoint that were written without a shared output_dir, one per machine.

Nothing here imports Paddle.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pypkg.console import progress
from pypkg.errors import UserError
from pypkg.files import new_folder
from pypkg.files.checksums import Checksum, FileRecord, SealError
from pypkg.training.checkpoint.folders import TEMPORARY_PREFIX, step_in_name
from pypkg.training.checkpoint.manifest import Manifest, put_manifest, read_manifest

_BLOCK = 4 << 20  # bytes that are copied at a time


def merge(folders: Sequence[Path], output: Path) -> Manifest:
    """Joins the parts in ``folders`` to a whole checkpoint in ``output``; returns its manifest.

    Checksums are compared while files are copied. ``output`` only appears when it is complete.
    Files that every part has, such as settings.json, are taken from the first part.

    Args:
        folders: the checkpoint-N folder of each machine.

    Raises:
        UserError: a folder is not a part of a checkpoint, or is a part of another save; a file is
            missing or damaged; ``output`` exists, has the name of another step, or cannot be
            written.
    """
    parts = {folder: _manifest_of(folder) for folder in folders}
    first = parts[folders[0]]
    _check_output(output, first)
    for folder, manifest in parts.items():
        _check_same_save(folders[0], first, folder, manifest)
    sources = {name: (folders[0], record) for name, record in first.files.items()}
    for writers, files in first.elsewhere.items():
        for name, record in files.items():
            sources[name] = (_holder(name, record, parts, writers), record)
    whole = replace(
        first,
        files={name: record for name, (_, record) in sorted(sources.items())},
        elsewhere={},
    )
    _write(output, whole, {name: folder for name, (folder, _) in sources.items()})
    return whole


def _manifest_of(folder: Path) -> Manifest:
    try:
        manifest = read_manifest(folder)
    except (SealError, OSError) as error:
        raise UserError(f"{folder} cannot be merged: {error}. Give an undamaged copy.") from error
    if manifest is None:
        raise UserError(
            f"{folder} has no manifest.json, so it is not a part of a checkpoint. Give the "
            "checkpoint-N folder of each machine."
        )
    if not manifest.elsewhere:
        raise UserError(
            f"{folder} is a whole checkpoint, not a part of one; it can be used as it is"
        )
    return manifest


def _check_output(output: Path, manifest: Manifest) -> None:
    if output.exists():
        raise UserError(f"--output {output} exists already. Give a folder that does not.")
    if step_in_name(output) not in (None, manifest.step):
        raise UserError(
            f"--output {output} is named after step {step_in_name(output)}, but the checkpoint is "
            f"of step {manifest.step}. Name it checkpoint-{manifest.step}."
        )


def _check_same_save(one: Path, first: Manifest, other: Path, manifest: Manifest) -> None:
    """Raises UserError if two parts are not of the same save, by their manifests."""
    if manifest.step != first.step:
        raise UserError(
            f"{one} is of step {first.step} and {other} of step {manifest.step}: they are parts "
            "of different checkpoints. Give the parts of one step."
        )
    of_first = _tensor_files(first)
    if of_first != _tensor_files(manifest):
        raise UserError(
            f"{one} and {other} are of step {first.step}, but of different saves: their manifests "
            "list different files. Give the parts of one save."
        )


def _tensor_files(manifest: Manifest) -> dict[str, FileRecord]:
    """The tensor files of the whole checkpoint, on all machines."""
    found = dict(manifest.files) | {
        name: record for files in manifest.elsewhere.values() for name, record in files.items()
    }
    return {name: record for name, record in found.items() if name.endswith(".safetensors")}


def _holder(name: str, record: FileRecord, parts: Mapping[Path, Manifest], writers: str) -> Path:
    for folder, manifest in parts.items():
        if manifest.files.get(name) == record:
            return folder
    raise UserError(
        f"{name} is in none of {', '.join(map(str, parts))}: {writers} wrote it. Give the folder "
        "of that machine as well."
    )


def _write(output: Path, manifest: Manifest, sources: Mapping[str, Path]) -> None:
    temporary = output.with_name(f"{TEMPORARY_PREFIX}{output.name}-{os.getpid()}")
    with new_folder(output, temporary):
        for name, folder in sources.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(folder / name, temporary / name, manifest.files[name])
        put_manifest(temporary, manifest)


def _copy(source: Path, target: Path, expected: FileRecord) -> None:
    """Copies a file.

    Raises:
        UserError: the source cannot be read, or differs from ``expected``.
        OSError: the target cannot be written.
    """
    checksum = Checksum()
    with open(target, "wb") as file:
        for block in _blocks(source):
            checksum.update(block)
            file.write(block)
            progress.report(f"copying {source.name}")
    if checksum.record() != expected:
        raise UserError(
            f"{source} has another size or checksum than when it was written. Give an undamaged "
            "copy, or the parts of an older checkpoint."
        )


def _blocks(source: Path) -> Iterator[bytes]:
    try:
        with open(source, "rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                yield block
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from error
