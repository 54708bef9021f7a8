"""One rank of test_machines.py: what is said of folders that differ between machines.

Arguments: checkpoints (for a run that writes them), metrics (for one that does not), data or parts
(for a checkpoint of folders of their own), and an output folder or a corpus for each rank; "-"
where a rank reads none.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from distributed_testing import report

from pypkg.data import IndexedDataset
from pypkg.errors import UserError
from pypkg.files.checksums import file_record
from pypkg.models.weights.formats import opening, safetensors, stored_tensor
from pypkg.models.weights.formats.safetensors import TensorSpec
from pypkg.models.weights.formats.tensor_files import TensorFiles
from pypkg.models.weights.model_folder import write_json
from pypkg.models.weights.save_plan import TensorSet, Unit
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_all_ranks
from pypkg.parallel.comm.file_server import RemoteFile
from pypkg.training.checkpoint.lock import LOCK_FILE
from pypkg.training.checkpoint.manifest import put_manifest, read_manifest
from pypkg.training.checkpoint.writing import CheckpointWriting
from pypkg.training.feed.same_data import check_same_data
from pypkg.training.start import output_dir
from pypkg.training.state import TrainerState

NAMES = [f"tensor{number}" for number in range(8)]


def tensors() -> TensorSet:
    """Eight tensors that any rank may write."""
    every = range(mesh.current().world_size)
    values = {name: np.full([64, 16], number, np.float32) for number, name in enumerate(NAMES)}
    spec = TensorSpec("float32", (64, 16))
    units = [Unit(name, spec.shape, {name: spec}, every) for name in NAMES]

    def read(name: str, writer: int) -> np.ndarray | None:
        return values[name] if writer == mesh.current().rank else None

    return TensorSet("model", units, read, lambda name, value: {name: value})


def read_all(folder: Path) -> bool:
    """Whether this rank can read all tensors, and those of the other ranks are right."""
    files = TensorFiles(folder)
    found = [files.read(name, "float32", [slice(8, 40)]) for name in NAMES]
    return all((values == number).all() for number, values in enumerate(found))


def try_parts(place: str, kept: str) -> dict[str, Any]:
    """Saves steps 1 and 2 to ``place``, then damages what is in the folder of the last rank."""
    said: dict[str, Any] = {}
    with output_dir.held_output_dir(place, saves=True, allow_local=True) as output:
        parts, last = output.parts, mesh.current().world_size - 1
        said["locked"] = Path(place, LOCK_FILE).exists()
        for step in (1, 2):
            folder = CheckpointWriting(
                place,
                TrainerState(global_step=step),
                tensor_sets=[tensors()],
                add_files=lambda to: write_json(to / "config.json", {}),
                settings_json="{}",
                keep=1,
                places=parts.places,
            ).finish()
        output.check()
        if mesh.current().rank == 0:
            shutil.copytree(place, kept)
        said["whole"] = parts.verify(folder, "checksums").damage
        opened = count_opened()
        parts.open(folder)
        said["read"] = read_all(folder)
        said["opened"] = sorted(opened)
        file = next(folder.glob("model-*.safetensors"))

        def on_the_last(change: Callable[[], object]) -> list[str]:
            from_all_ranks(lambda: None)  # all have read
            from_all_ranks(lambda: mesh.current().rank == last and change() and None)
            return list(parts.verify(folder, "checksums").damage)

        data = file.read_bytes()
        said["flipped"] = on_the_last(lambda: file.write_bytes(data[:-1] + b"x"))
        said["other save"] = on_the_last(lambda: rewrite(folder, file.name))
        said["gone"] = on_the_last(lambda: folder.rename(folder.with_name("away")))
        said["unchecked"] = list(parts.verify(folder, "no").damage)
    return said


def rewrite(folder: Path, name: str) -> None:
    """Lets the manifest of ``folder`` say that a file is as it is."""
    manifest = read_manifest(folder)
    assert manifest is not None
    files = {**manifest.files, name: file_record(folder / name)}
    put_manifest(folder, replace(manifest, files=files))


def count_opened() -> set[str]:
    """Names of the files that this rank opens under their paths from now on."""
    opened: set[str] = set()
    plain = opening.open_file

    def open_file(path: Path) -> Any:
        file, size = plain(path)
        if not isinstance(file, RemoteFile):
            opened.add(path.name)
        return file, size

    for module in (stored_tensor, safetensors):
        vars(module)["open_file"] = open_file
    return opened


if __name__ == "__main__":
    what, *places = sys.argv[1:]
    place = places[mesh.initialize(mesh.Degrees(data=len(places))).rank]
    output_dir._SECONDS_TO_APPEAR = 0.2
    try:
        if what == "data":
            check_same_data(None if place == "-" else [IndexedDataset(place)])
            report("")
        elif what == "parts":
            report(try_parts(place, places[0] + "-kept"))
        else:
            with output_dir.held_output_dir(place, saves=what == "checkpoints"):
                pass
            report("")
    except UserError as error:
        report(str(error))
