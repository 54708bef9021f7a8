"""Checksums of files and of what is written block by block."""

from __future__ import annotations

import numpy as np
import pytest

from pypkg.files.checksums import Checksum, FileRecord, bytes_digest, file_record, file_records

# XXH3 of no bytes with seed 0, a test vector of the reference implementation.
_EMPTY = "99aa06d3014798d86001c324468d497f"


def test_the_digest_is_that_of_xxhsum():
    assert bytes_digest(b"") == _EMPTY


def test_blocks_give_the_record_of_the_whole(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5 << 20) + 3, dtype=np.uint8)
    path = tmp_path / "values"
    path.write_bytes(values.tobytes())
    checksum = Checksum()
    for block in np.array_split(values, 7):
        checksum.update(block.data)
    read: list[int] = []
    assert checksum.record() == file_record(path, read.append)
    assert checksum.record() == FileRecord(values.nbytes, bytes_digest(values.tobytes()))
    assert sum(read) == values.nbytes


def test_sizes_are_bytes_and_not_elements():
    checksum = Checksum()
    checksum.update(np.zeros((3, 5), np.float32).data)
    assert checksum.record().size == 60


def test_every_file_has_its_own_record(tmp_path):
    paths = [tmp_path / str(number) for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * (number * 1000))
    found = file_records(paths)
    assert found == {path: file_record(path) for path in paths}
    assert len(set(found.values())) == 20


def test_a_file_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        file_records([tmp_path / "absent"])
