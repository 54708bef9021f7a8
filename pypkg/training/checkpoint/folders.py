"""The checkpoint folders of a run: names, completeness, removal.

``output_dir/checkpoint-N/`` is a Hugging Face model folder (config.json, safetensors) that also
holds optimizer.safetensors, trainer_state.json, settings.json and the tokenizer's files. The folder
is written and synced under a temporary name and then renamed. A folder with the final name is
therefore always complete.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from pypkg.errors import UserError
from pypkg.files import sync
from pypkg.models.weights.save_plan import index_name
from pypkg.training.checkpoint.lock import not_writable
from pypkg.training.checkpoint.manifest import MANIFEST_FILE
from pypkg.training.state import TrainerState

OPTIMIZER_STEM = "optimizer"
OPTIMIZER_FILE = f"{OPTIMIZER_STEM}.safetensors"
OPTIMIZER_INDEX = index_name(OPTIMIZER_STEM)  # PaddleNLP has one of the same name
STATE_FILE = "trainer_state.json"
SETTINGS_FILE = "settings.json"
TEMPORARY_PREFIX = "tmp-checkpoint-"
DAMAGED_PREFIX = "damaged-"
_NAME = re.compile(r"checkpoint-(\d+)$")
_REPLACED = re.compile(rf"{TEMPORARY_PREFIX}(\d+)-.*\.old$")  # by files.replace_folder


def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """The complete checkpoints in ``output_dir`` as (step, folder), oldest first."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = []
    for entry in folder.iterdir():
        step = step_in_name(entry)
        if step is not None and is_marked(entry):
            found.append((step, entry))
    return sorted(found)


def is_marked(folder: Path) -> bool:
    """Whether a folder holds the state or manifest of a checkpoint; its files may be damaged."""
    # os.path.isfile returns False for a name that is too long for a path; Path.is_file raises.
    return any(os.path.isfile(folder / name) for name in (STATE_FILE, MANIFEST_FILE))


def step_in_name(folder: Path) -> int | None:
    """N if the folder is named checkpoint-N; else None."""
    match = _NAME.match(folder.name)
    return int(match.group(1)) if match else None


def checkpoint_name(state: TrainerState) -> str:
    """The folder name of a checkpoint of ``state``: checkpoint-N for step N."""
    return f"checkpoint-{state.global_step}"


def prepare_output_dir(output_dir: str | Path) -> None:
    """Creates ``output_dir`` and checks that it can be written.

    Raises:
        UserError: it cannot be created or written.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(output_dir, error.strerror) from error
    require_writable(output_dir)


def require_writable(output_dir: str | Path) -> None:
    """Checks that this process can write into ``output_dir``, which exists.

    Raises:
        UserError: it cannot.
    """
    probe = Path(output_dir, f".write-test-{secrets.token_hex(8)}")  # several may test at once
    try:
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise not_writable(output_dir, error.strerror) from error


def remove_unfinished(output_dir: str | Path) -> None:
    """Removes the temporary folders of killed saves. The caller must hold the lock of output_dir.

    If a save was killed while it replaced a checkpoint of the same step, the old checkpoint is
    renamed back.
    """
    for stale in Path(output_dir).glob(f"{TEMPORARY_PREFIX}*"):
        replaced = _REPLACED.match(stale.name)
        if replaced and not stale.with_name(f"checkpoint-{replaced.group(1)}").exists():
            stale.rename(stale.with_name(f"checkpoint-{replaced.group(1)}"))
        else:
            _remove(stale)


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint. It is renamed first, so no incomplete folder ever has its name.

    If the checkpoint is a symbolic link, only the link is removed.

    Raises:
        UserError: it cannot be renamed.
    """
    aside = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}-{os.getpid()}")
    try:
        os.rename(folder, aside)
        sync(folder.parent)
    except OSError as error:
        raise UserError(f"{folder} cannot be removed: {error.strerror}") from error
    _remove(aside)


def _remove(folder: Path) -> None:
    """Removes a folder. If it is a symbolic link, only the link is removed."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint, so that no run reads or removes it; returns its new path.

    Raises:
        UserError: it cannot be renamed.
    """
    name = f"{DAMAGED_PREFIX}{folder.name}"
    names = (name, *(f"{name}.{number}" for number in range(2, 1000)))
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    try:
        os.rename(folder, aside)
    except OSError as error:
        raise UserError(
            f"{folder} is damaged and cannot be renamed to {aside.name}: {error.strerror}. Move it "
            "away, then start the same command again."
        ) from error
    return aside


def surplus(output_dir: str | Path, keep: int, best: str | None) -> list[Path]:
    """The oldest checkpoints, to be removed so that ``keep`` are left.

    The newest checkpoint and the one with the folder name ``best`` are never among them.
    """
    older = [folder for _, folder in checkpoints(output_dir)][:-1]
    others = [folder for folder in older if folder.name != best]
    places = keep - 1 - (len(older) - len(others))
    return others[: max(len(others) - max(places, 0), 0)]
