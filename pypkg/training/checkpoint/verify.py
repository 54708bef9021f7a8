"""Checks that a checkpoint is complete and undamaged, against its manifest.

Nothing here imports Paddle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pypkg.errors import UserError
from pypkg.files.checksums import FileRecord, SealError, file_record
from pypkg.models.weights.formats.safetensors import read_safetensors
from pypkg.models.weights.formats.tensor_files import TensorFiles
from pypkg.models.weights.model_folder import CONFIG_FILE
from pypkg.training.checkpoint.folders import STATE_FILE, step_in_name
from pypkg.training.checkpoint.manifest import (
    MANIFEST_FILE,
    MANIFEST_KEY,
    Manifest,
    listed_files,
    model_fingerprint,
    read_manifest,
)

_FILES_AT_A_TIME = 8


@dataclass(frozen=True)
class Report:
    """The result of a check of a checkpoint.

    Attributes:
        folder: of the checkpoint.
        manifest: None if it is missing or cannot be read.
        damage: one sentence for each problem; empty if the checkpoint is whole.
        unlisted: files that the manifest does not list, by relative path.
    """

    folder: Path
    manifest: Manifest | None
    damage: tuple[str, ...]
    unlisted: tuple[str, ...] = ()


def verify(
    folder: Path, checks: str = "checksums", on_read: Callable[[int], None] | None = None
) -> Report:
    """Checks a checkpoint, or the part of one that a machine holds.

    A checkpoint of an earlier version or of PaddleNLP has no manifest. It is only checked for
    completeness: its tensor files must have the lengths that their headers give. trainer_state.json
    of this version records that a manifest was written; then a missing manifest is damage.

    Args:
        checks: "checksums" reads every file, "sizes" only compares file sizes.
        on_read: called, from several threads, with the number of bytes of each block read.

    Raises:
        UserError: a later version of this package has written the checkpoint.
    """
    report = survey(folder)
    files = report.manifest.files if report.manifest is not None else {}
    changed = changed_files(folder, files, checks, on_read)
    return replace(report, damage=(*ordered(changed), *report.damage))


def require_whole_weights(folder: Path, checks: str = "checksums") -> None:
    """Compares config.json and the weights of a checkpoint with its manifest.

    It does nothing for a folder that is not a checkpoint, and for a checkpoint without a manifest.

    Args:
        checks: as in ``verify``.

    Raises:
        UserError: a file is damaged, or a later version of this package has written the checkpoint.
    """
    if not (folder / STATE_FILE).is_file():
        return
    try:
        manifest = read_manifest(folder)
        files = manifest.files if manifest is not None else {}
        weights = {name: files[name] for name in files if name.startswith(("config", "model"))}
        damage = ordered(changed_files(folder, weights, checks))
    except (SealError, OSError) as error:
        damage = [str(error)]
    if damage:
        raise UserError(
            f"the checkpoint {folder} is damaged: {'; '.join(damage)}. Use another one; `pypkg "
            f"checkpoint verify {folder.parent}` shows which are undamaged."
        )


def survey(folder: Path) -> Report:
    """``verify`` without comparing files with the manifest.

    Raises:
        UserError: as in ``verify``.
    """
    try:
        manifest = read_manifest(folder)
    except (SealError, OSError) as error:
        return Report(folder, None, (str(error),))
    if manifest is None:
        damage = [*_missing_parts(folder), *_contradictions(folder, None)]
        return Report(folder, None, tuple(damage))
    unlisted = [name for name in listed_files(folder) if name not in manifest.files]
    return Report(folder, manifest, tuple(_contradictions(folder, manifest)), tuple(unlisted))


def changed_files(
    folder: Path,
    files: Mapping[str, FileRecord],
    checks: str,
    on_read: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Compares files with their records.

    Args:
        files: records by path relative to ``folder``.
        checks, on_read: as in ``verify``.

    Returns:
        A sentence about the damage of each file that differs, by path.
    """
    if checks not in ("checksums", "sizes"):
        raise ValueError(f"checks is {checks!r}; expected checksums or sizes")

    def check(name: str) -> str | None:
        return _difference(folder / name, files[name], checks == "checksums", on_read)

    largest_first = sorted(files, key=lambda name: -files[name].size)
    with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
        found = dict(zip(largest_first, pool.map(check, largest_first), strict=True))
    return {name: problem for name, problem in found.items() if problem is not None}


def ordered(changed: Mapping[str, str]) -> list[str]:
    """The sentences of ``changed_files``, in the order of the paths."""
    return [problem for _, problem in sorted(changed.items())]


def _difference(
    path: Path, expected: FileRecord, reads: bool, on_read: Callable[[int], None] | None
) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{path.name} has {size:,} bytes, expected {expected.size:,}"
        if reads and file_record(path, on_read).digest != expected.digest:
            return f"{path.name} has another checksum than when it was written"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def _missing_parts(folder: Path) -> Iterator[str]:
    """The problems of a checkpoint without a manifest: config.json or tensors are missing."""
    if not (folder / CONFIG_FILE).is_file():
        yield f"{CONFIG_FILE} is missing"
    try:
        TensorFiles(folder)
        for path in sorted(folder.glob("*.safetensors")):
            read_safetensors(path)
    except UserError as error:
        yield str(error)


def _contradictions(folder: Path, manifest: Manifest | None) -> Iterator[str]:
    """Contradictions between the folder name, trainer_state.json, manifest and config.json."""
    try:
        state = json.loads((folder / STATE_FILE).read_bytes())
        step = state["global_step"]
    except FileNotFoundError:
        if manifest is None:  # a manifest lists the file, so its absence is reported already
            yield f"{STATE_FILE} is missing"
        return
    except KeyError as error:
        yield f"{STATE_FILE} has no {error}"
        return
    except (OSError, ValueError, TypeError, RecursionError) as error:
        yield f"{STATE_FILE} cannot be read: {error}"
        return
    if manifest is None and MANIFEST_KEY in state:
        yield f"{MANIFEST_FILE} is missing, but {STATE_FILE} says that it was written"
    named = step_in_name(folder)
    if named is not None and named != step:
        yield f"{STATE_FILE} is of step {step!r}, but the folder is named {folder.name}"
    if manifest is not None:
        yield from _differences_from_manifest(folder, state, manifest)


def _differences_from_manifest(
    folder: Path, state: dict[str, Any], manifest: Manifest
) -> Iterator[str]:
    for key, expected in (
        ("global_step", manifest.step),
        ("consumed_samples", manifest.consumed_samples),
        ("consumed_tokens", manifest.consumed_tokens),
    ):
        if state.get(key) != expected:
            yield f"{STATE_FILE} has {key} {state.get(key)!r}, the manifest {expected}"
    try:
        fingerprint = model_fingerprint(folder)
    except (OSError, ValueError, RecursionError) as error:
        yield f"{CONFIG_FILE} cannot be read: {error}"
        return
    if fingerprint not in (None, manifest.model):
        yield f"{CONFIG_FILE} describes another model than the manifest"
