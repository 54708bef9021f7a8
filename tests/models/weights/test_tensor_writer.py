"""Files that are written in parallel to the thread that supplies tensors."""

from __future__ import annotations

import signal
import threading
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pypkg.errors import UserError
from pypkg.files import block_file
from pypkg.files.checksums import FileRecord, file_record
from pypkg.models.weights import tensor_writer
from pypkg.models.weights.area import AreaSize, Staging, new_area
from pypkg.models.weights.assembly import Assembly
from pypkg.models.weights.formats.safetensors import TensorSpec, write_tensors
from pypkg.models.weights.save_plan import PlannedUnit, as_it_is
from pypkg.models.weights.tensor_writer import (
    BLOCK,
    FileSequence,
    FileToWrite,
    NotFiniteError,
    TensorWriter,
    ThreadWriter,
    all_finite,
    write_units,
)
from pypkg.models.weights.tp_shards import TPShard
from pypkg.models.weights.writer_process import ProcessWriter, WriterProcess


def files_and_tensors(folder: Path) -> tuple[list[FileToWrite], dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    tensors = {
        "a": random.normal(size=(300, 50)).astype(np.float32),
        "turned": random.normal(size=(50, 300)).astype(np.float32).T,
        "scalar": np.ones(1, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    specs = {name: TensorSpec("float32", value.shape) for name, value in tensors.items()}
    first = {name: specs[name] for name in ("a", "turned")}
    second = {name: specs[name] for name in ("scalar", "empty")}
    names = ("one.safetensors", "two.safetensors", "none.safetensors")
    return [
        FileToWrite(folder / name, each)
        for name, each in zip(names, (first, second, {}), strict=True)
    ], tensors


def units_of(files: list[FileToWrite]) -> list[PlannedUnit]:
    """One for each tensor, which rank 0 writes."""
    specs = [item for file in files for item in file.specs.items()]
    return [
        PlannedUnit(number, name, spec.dtype, 0, (0,), Assembly(spec.shape), as_it_is)
        for number, (name, spec) in enumerate(specs)
    ]


def write_all(
    writer: TensorWriter, files: list[FileToWrite], tensors: dict[str, np.ndarray]
) -> None:
    for unit in units_of(files):
        writer.put(unit, tensors[unit.name])


def test_parts_are_joined_a_block_at_a_time(tmp_path):
    """A writer of parts needs memory for a block, not for the whole tensor."""
    whole = np.random.default_rng(0).normal(size=(4096, 3000)).astype(np.float32)
    shards = (
        TPShard(1, ((0, 1000), (2000, 2500)), 1500),
        TPShard(1, ((1000, 2000), (2500, 3000)), 1500),
    )
    parts = [shard.take(whole) for shard in shards]
    assembly = Assembly(whole.shape, shards, parts[0].shape)
    unit = PlannedUnit(0, "a", "float32", 0, (0, 1), assembly, lambda name, value: {name: value.T})
    file = FileToWrite(tmp_path / "a.safetensors", {"a": TensorSpec("float32", whole.T.shape)})
    tracemalloc.start()
    try:
        write_units(FileSequence([file]), [unit], lambda unit, rank: parts[rank], lambda: None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * BLOCK < whole.nbytes / 2
    np.testing.assert_array_equal(load_file(file.path)["a"], whole.T)


def process_writer(
    files: list[FileToWrite], memory: int, process: WriterProcess | None = None
) -> ProcessWriter:
    """Of rank 0, alone on its machine, with an area of so many bytes."""
    units = units_of(files)
    _, place, area = new_area(AreaSize(memory, 1, len(units)))
    area.empty()
    staging = Staging(0, {0: area}, {0: place})
    return ProcessWriter(files, units, staging, process or WriterProcess())


def check_files(
    folder: Path,
    files: list[FileToWrite],
    tensors: dict[str, np.ndarray],
    records: Mapping[str, FileRecord],
) -> None:
    """Each file has the bytes that one call writes, and its record."""
    for file in files:
        write_tensors(folder / "expected", file.specs, [(n, tensors[n]) for n in file.specs])
        assert file.path.read_bytes() == (folder / "expected").read_bytes()
        assert records[file.path.name] == file_record(file.path)


def test_files_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one call writes them, in blocks of a few rows."""
    monkeypatch.setattr(tensor_writer, "BLOCK", 1000)
    monkeypatch.setattr(tensor_writer, "_PIECE", 300)
    monkeypatch.setattr(block_file, "BLOCK", 4096)
    files, tensors = files_and_tensors(tmp_path)
    writer = ThreadWriter(files, units_of(files))
    write_all(writer, files, tensors)
    records = writer.records()
    assert writer.is_done()
    check_files(tmp_path, files, tensors, records)
    assert np.array_equal(load_file(files[0].path)["turned"], tensors["turned"])


def test_tensors_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is larger than the limit is on its way alone."""
    files, tensors = files_and_tensors(tmp_path)
    monkeypatch.setattr(tensor_writer, "_AHEAD", 1000)
    disk, original = threading.Event(), tensor_writer.FileSequence.write

    def slow(self: object, name: str, values: np.ndarray) -> None:
        disk.wait()
        original(self, name, values)

    monkeypatch.setattr(tensor_writer.FileSequence, "write", slow)
    writer = ThreadWriter(files, units_of(files))
    handed = []

    def hand_over() -> None:
        for unit in units_of(files):
            writer.put(unit, tensors[unit.name])
            handed.append(unit.name)

    thread = threading.Thread(target=hand_over)
    thread.start()
    thread.join(0.3)
    assert handed in ([], ["a"])
    disk.set()
    thread.join()
    assert len(writer.records()) == 3


def test_a_failure_is_told_at_the_end(tmp_path: Path) -> None:
    """The ranks go on with what they do together until then."""
    files, tensors = files_and_tensors(tmp_path / "missing")
    writer = ThreadWriter(files, units_of(files))
    write_all(writer, files, tensors)
    with pytest.raises(FileNotFoundError):
        writer.records()


@pytest.mark.parametrize(
    ("put", "message"),
    [(["turned"], "expected a"), (["a"], "turned is missing"), (["a", "turned"], "scalar is miss")],
)
def test_tensors_that_are_not_due(tmp_path: Path, put: list[str], message: str) -> None:
    files, tensors = files_and_tensors(tmp_path)
    writer = ThreadWriter(files, units_of(files))
    for unit in units_of(files):
        if unit.name in put:
            writer.put(unit, tensors[unit.name])
    with pytest.raises(ValueError, match=message):
        writer.records()


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    values = np.zeros((10, 4), np.float32)
    values[7, 1] = np.nan
    files = [FileToWrite(tmp_path / "f", {"w": TensorSpec("float32", (10, 4))})]
    writer = ThreadWriter(files, units_of(files))
    writer.put(units_of(files)[0], values)
    with pytest.raises(UserError, match="w holds values that are NaN or infinite"):
        writer.records()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("sign", [1, -1])
def test_all_finite(dtype: str, sign: int) -> None:
    """Beside values of one sign, the largest that there are; no dtype of integers has others."""
    largest = {"float64": 1.7e308, "float32": 3.4e38, "float16": 65504.0, "bfloat16": 3.38e38}
    values = np.full(100, sign * largest[dtype], np.float64 if dtype == "float64" else np.float32)

    def stored() -> np.ndarray:
        if dtype == "bfloat16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(dtype)

    assert all_finite(stored(), dtype)
    for bad in (np.nan, np.inf, -np.inf):
        values[42] = bad
        assert not all_finite(stored(), dtype)
    assert all_finite(np.full(3, 0xFFFFFFFF, np.uint32), "uint32")
    assert all_finite(stored()[:0], dtype)


@pytest.mark.parametrize("memory", [4096, 1 << 20])
def test_another_process_writes_the_same_files(tmp_path: Path, memory: int) -> None:
    """Whatever fits in the memory at once; the tensors change after they are handed over."""
    files, tensors = files_and_tensors(tmp_path)
    process = WriterProcess()
    for _ in range(2):  # the process is used again
        writer = process_writer(files, memory, process)
        handed = {name: value.copy(order="K") for name, value in tensors.items()}
        write_all(writer, files, handed)
        writer.close()
        for value in handed.values():
            value[...] = 0.0
        records = writer.records()
        assert writer.is_done()
    check_files(tmp_path, files, tensors, records)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_other_process_leaves_signals_to_the_one_that_trains(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Slurm sends SIGTERM to every process of a task, and the run then saves."""
    files, tensors = files_and_tensors(tmp_path)
    process = WriterProcess()
    for _ in range(2):
        writer = process_writer(files, 4096, process)
        write_all(writer, files, {name: value.copy(order="K") for name, value in tensors.items()})
        writer.close()
        records = writer.records()
        assert process._process is not None
        process._process.send_signal(number)
    check_files(tmp_path, files, tensors, records)


def test_failures_of_the_other_process(tmp_path: Path) -> None:
    """A part that nobody takes any more waits for no room."""
    files, tensors = files_and_tensors(tmp_path / "missing")
    writer = process_writer(files, 1024)
    write_all(writer, files, tensors)
    with pytest.raises(FileNotFoundError, match="No such file"):
        writer.records()
    values = np.full((10, 4), np.inf, np.float32)
    files = [FileToWrite(tmp_path / "f", {"w": TensorSpec("float32", (10, 4))})]
    writer = process_writer(files, 1024)
    writer.put(units_of(files)[0], values)
    with pytest.raises(NotFiniteError, match="w holds values that are NaN or infinite"):
        writer.records()
    files, tensors = files_and_tensors(tmp_path)
    writer = process_writer(files, 1024)
    writer.abandon()
    write_all(writer, files, tensors)
    with pytest.raises(UserError, match="has ended with code -9"):
        writer.records()
