"""One rank of test_machines.py: what is said of folders that differ between machines.

Arguments: checkpoints (for a run that writes them), metrics (for one that does not), read-only (for
a run whose first rank alone can write; "read-only, local" with allow_local_output), data, parts
(for a checkpoint of folders of their own), ThreadWriter or ProcessWriter (for a rank that ends in a
save), or links, and an output folder or a corpus for each rank; "-" where a rank reads none.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from distributed_testing import report

from pypkg.data import IndexedDataset
from pypkg.errors import UserError
from pypkg.files.checksums import file_record
from pypkg.models.weights import staging
from pypkg.models.weights.assembly import Assembly, Division
from pypkg.models.weights.formats import opening, safetensors, stored_tensor
from pypkg.models.weights.formats.safetensors import TensorSpec
from pypkg.models.weights.formats.tensor_files import TensorFiles
from pypkg.models.weights.model_folder import write_json
from pypkg.models.weights.save_plan import SavePlan, TensorSet, Unit, as_it_is
from pypkg.models.weights.tensor_writer import ThreadWriter
from pypkg.models.weights.writer_process import ProcessWriter, WriterProcess
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_all_ranks
from pypkg.parallel.comm.file_server import RemoteFile
from pypkg.training.checkpoint.lock import LOCK_FILE
from pypkg.training.checkpoint.manifest import put_manifest, read_manifest
from pypkg.training.checkpoint.shared_memory import SharedMemory
from pypkg.training.checkpoint.writing import CheckpointWriting
from pypkg.training.doctor import links
from pypkg.training.doctor.ports import port_findings
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
                plan=SavePlan([tensors()]),
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


def cannot_write(path: Path, data: bytes) -> int:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


def halves() -> TensorSet:
    """As ``tensors``; rank 0 writes all, each rank holds half, and rank 1 ends at the second."""
    spec = TensorSpec("float32", (64, 16))
    division = Division(lambda writer: (0, 1), 64 * 16 * 2, Assembly(spec.shape, slices=2))
    units = [Unit(name, spec.shape, {name: spec}, (0,), division) for name in NAMES]

    def part(name: str) -> np.ndarray:
        if mesh.current().rank == 1 and name == NAMES[1]:
            report("")
            os._exit(0)
        return np.zeros(64 * 8, np.float32)

    return TensorSet("model", units, lambda *_: None, as_it_is, part=part)


def save_to_the_end(place: str, writer: str) -> None:
    """A save in which rank 1 ends, without a watchdog that would end rank 0."""
    staging._SECONDS_BETWEEN_LOOKS = 0.1
    in_process = partial(ProcessWriter, process=WriterProcess())
    CheckpointWriting(
        place,
        TrainerState(global_step=1),
        plan=SavePlan([halves()]),
        add_files=lambda _: None,
        settings_json="{}",
        memory=SharedMemory(1 << 20),
        make_writer=ThreadWriter if writer == "ThreadWriter" else in_process,
    ).finish()


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
        elif what == "links":
            links._BYTES["cpu"] = 2**16
            pairs = [[*pair, rate] for pair, rate in links.pair_rates("data", "cpu", True).items()]
            report([pairs, [finding.line() for finding in port_findings(["a", "b", "b"])]])
        elif what == "parts":
            report(try_parts(place, places[0] + "-kept"))
        elif what.endswith("Writer"):
            save_to_the_end(place, what)
        else:
            if what.startswith("read-only") and mesh.current().rank:
                Path.write_bytes = cannot_write  # type: ignore[assignment, method-assign]
            local = what.endswith("local")
            with output_dir.held_output_dir(place, what != "metrics", local):
                pass
            report("")
    except UserError as error:
        report(str(error))
