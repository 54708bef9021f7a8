"""manifest.json of a checkpoint: the record of its files, by which damage is detected.

It is written last and lists every other file of the folder with its size and checksum. Its last
key is the digest of the manifest itself. Without a shared output_dir, each machine has a manifest
of its part of the checkpoint, which also lists the files of the other machines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pypkg import __version__
from pypkg.errors import UserError
from pypkg.files.checksums import (
    ALGORITHM,
    FileRecord,
    SealError,
    bytes_digest,
    file_records,
    read_sealed_json,
    sealed_json,
)
from pypkg.models.weights.model_folder import CONFIG_FILE
from pypkg.training.state import TrainerState

MANIFEST_FILE = "manifest.json"
MANIFEST_KEY = "manifest"  # key in trainer_state.json: name of the manifest beside it
_FORMAT, _FORMAT_OF_PARTS = 1, 2


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint.

    Attributes:
        step, consumed_samples, consumed_tokens: those of ``TrainerState``.
        model: ``model_fingerprint``; None in a folder without config.json.
        layout: number of ranks on each axis, and options of the axes (``mesh.Degrees``).
        versions: of pypkg and Paddle, by name.
        files: size and checksum of every other file, by path relative to the folder.
        elsewhere: size and checksum of the files on other machines, by a description of the ranks
            that wrote them, such as "ranks 8 to 15 (10.0.0.2)", and by path. Empty if the folder is
            a whole checkpoint.
    """

    step: int
    consumed_samples: int
    consumed_tokens: int
    model: str | None
    layout: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    elsewhere: Mapping[str, Mapping[str, FileRecord]] = field(default_factory=dict)


def write_manifest(
    folder: Path,
    state: TrainerState,
    layout: Mapping[str, Any],
    records: Mapping[str, FileRecord] | None = None,
    elsewhere: Mapping[str, Mapping[str, FileRecord]] | None = None,
) -> None:
    """Writes manifest.json into a folder that is otherwise complete.

    Args:
        layout, elsewhere: as in ``Manifest``.
        records: known sizes and checksums, by relative path; other files are read.

    Raises:
        OSError: a file cannot be read or the disk is full.
    """
    known = dict(records or {})
    others = [path for path in listed_files(folder) if path not in known]
    read = file_records(folder / path for path in others)
    known |= {path: read[folder / path] for path in others}
    manifest = Manifest(
        step=state.global_step,
        consumed_samples=state.consumed_samples,
        consumed_tokens=state.consumed_tokens,
        model=model_fingerprint(folder),
        layout=layout,
        versions={"pypkg": __version__, "paddle": _paddle_version()},
        files=dict(sorted(known.items())),
        elsewhere=elsewhere or {},
    )
    put_manifest(folder, manifest)


def put_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes ``manifest`` into a folder.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    content = asdict(manifest)
    if not manifest.elsewhere:
        del content["elsewhere"]  # so that earlier versions can read whole checkpoints
    form = _FORMAT_OF_PARTS if manifest.elsewhere else _FORMAT
    sealed = sealed_json({"format": form, "checksum": ALGORITHM, **content})
    (folder / MANIFEST_FILE).write_bytes(sealed)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint; None if there is none, as in checkpoints of earlier versions.

    Raises:
        SealError: its content does not match its digest.
        OSError: it cannot be read.
        UserError: a later version of this package has written it.
    """
    path = folder / MANIFEST_FILE
    try:
        content = read_sealed_json(path)
    except FileNotFoundError:
        return None
    known = content.get("format") in (_FORMAT, _FORMAT_OF_PARTS)
    if not known or content.get("checksum") != ALGORITHM:
        raise UserError(
            f"{path} has format {content.get('format')!r} and checksum "
            f"{content.get('checksum')!r}; this version reads {_FORMAT}, {_FORMAT_OF_PARTS} and "
            f"{ALGORITHM}. Use the version of pypkg that wrote it, or set verify_checkpoint to no."
        )
    del content["format"], content["checksum"]
    try:
        files = _records(content.pop("files"))
        elsewhere = {of: _records(each) for of, each in content.pop("elsewhere", {}).items()}
        return Manifest(**content, files=files, elsewhere=elsewhere)
    except (KeyError, TypeError, AttributeError) as error:
        raise SealError(f"{path} does not have the entries of a manifest: {error}") from error


def listed_files(folder: Path) -> list[str]:
    """Sorted paths of all files below ``folder`` except its manifest, relative to ``folder``."""
    found = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in found)
    return sorted(name for name in names if name != MANIFEST_FILE)


def model_fingerprint(folder: Path) -> str | None:
    """Digest of config.json that does not depend on the order of keys; None without the file.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        content = json.loads((folder / CONFIG_FILE).read_bytes())
    except FileNotFoundError:
        return None
    return bytes_digest(json.dumps(content, sort_keys=True).encode())


def _records(content: Mapping[str, Any]) -> dict[str, FileRecord]:
    return {name: FileRecord(**record) for name, record in content.items()}


def _paddle_version() -> str:
    import paddle  # only writing needs it

    return paddle.__version__
