"""Documents from compressed files and Parquet, whole and broken."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from preprocess_testing import read, text_files

from pypkg.data.preprocess.input import files
from pypkg.data.preprocess.input.files import plan_units
from pypkg.errors import UserError

TEXTS = [f"text {number} é" for number in range(300)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def zstd_frames(data: bytes, cut: int) -> bytes:
    compress = zstandard.ZstdCompressor().compress
    return compress(data[:cut]) + compress(data[cut:])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("c.jsonl", LINES),
        ("c.jsonl.gz", gzip.compress(LINES)),
        ("c.json.gz", gzip.compress(LINES[:1000]) + gzip.compress(LINES[1000:])),
        ("c.jsonl.zst", zstd_frames(LINES, 1234)),
    ],
)
def test_json_lines(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    texts, problems, taken = read(tmp_path / name)
    assert texts == TEXTS and not problems
    assert 0 < sum(taken) <= len(data)


@pytest.mark.parametrize("name", ["c.txt.gz", "c.txt.zst"])
def test_compressed_text(tmp_path, name):
    compress = gzip.compress if name.endswith("gz") else zstandard.ZstdCompressor().compress
    (tmp_path / name).write_bytes(compress(b"one\n\ntwo\nlines\n"))
    assert read(tmp_path / name)[0] == ["one\n\ntwo\nlines\n"]
    assert read(tmp_path / name, doc_spliter="")[0] == ["one\n", "two\nlines\n"]


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.jsonl.zst"])
def test_truncated_compressed_file(tmp_path, name):
    compress = gzip.compress if name.endswith("gz") else zstandard.ZstdCompressor().compress
    data = compress(LINES)
    for length in range(0, len(data), 7):  # nor is an empty file an empty text
        (tmp_path / name).write_bytes(data[:length])
        texts, problems, _ = read(tmp_path / name)
        assert texts == TEXTS[: len(texts)]
        assert "broken file, the rest of it is lost" in [each.reason for each in problems]


def write_parquet(path: Path, column: pa.Array, name: str = "text", rows: int = 100) -> None:
    other = pa.array(range(len(column)))
    pq.write_table(pa.table({"id": other, name: column}), path, row_group_size=rows)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()])
def test_parquet(tmp_path, kind):
    write_parquet(tmp_path / "c.parquet", pa.array(TEXTS).cast(kind), "body")
    texts, problems, taken = read(tmp_path / "c.parquet", "body")
    assert texts == TEXTS and not problems
    assert sum(taken) == (tmp_path / "c.parquet").stat().st_size


def test_parquet_in_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LEAST_UNIT", 1000)
    values = [text.encode() for text in TEXTS]
    values[250], values[260] = b"caf\xe9", None
    write_parquet(tmp_path / "c.parquet", pa.array(values, pa.binary()), rows=20)
    units = plan_units(text_files(tmp_path), None)
    assert len(units) > 3
    texts, problems, _ = read(tmp_path / "c.parquet")
    assert texts == [text for number, text in enumerate(TEXTS) if number not in (250, 260)]
    assert [each.describe() for each in problems] == [
        f"{tmp_path / 'c.parquet'}: not UTF-8: row 251: unexpected end of data",
        f"{tmp_path / 'c.parquet'}: no text in the field: row 261 of 'text' is null",
    ]


def test_parquet_without_the_column(tmp_path):
    write_parquet(tmp_path / "c.parquet", pa.array(TEXTS))
    texts, [problem], _ = read(tmp_path / "c.parquet", "body")
    assert not texts
    assert "no text in the field: 'body'; the columns are id, text" in problem.describe()
    texts, [problem], _ = read(tmp_path / "c.parquet", "id")
    assert not texts and "column 'id' holds int64" in problem.describe()


@pytest.mark.parametrize(
    ("module", "name", "package"),
    [("pyarrow.parquet", "c.parquet", "pyarrow"), ("zstandard", "c.jsonl.zst", "zstandard")],
)
def test_missing_package(tmp_path, monkeypatch, module, name, package):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert f"needs the package {package}" in str(error.value)
    assert 'pip install ".[data]"' in str(error.value)


changes = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_parquet(folder / "c.parquet", pa.array(TEXTS[:40]), rows=10)
    short = LINES[:2000]
    (folder / "c.jsonl").write_bytes(short)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(short))
    (folder / "c.jsonl.zst").write_bytes(zstd_frames(short, 700))
    (folder / "c.txt").write_bytes("é\n\nb\n".encode() * 30)
    return folder


@settings(max_examples=150, deadline=None)
@given(flips=changes, cut=st.integers(0, 1500), tail=st.binary(max_size=20), data=st.data())
def test_fuzzed_files(tmp_path_factory, sources, flips, cut, tail, data):
    """Damaged files give documents and problems, nothing else."""
    name = data.draw(
        st.sampled_from(["c.parquet", "c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "c.txt"])
    )
    damaged = bytearray((sources / name).read_bytes())
    damaged = damaged[: max(1, len(damaged) - cut)]
    for position, value in flips:
        damaged[position % len(damaged)] = value
    file = tmp_path_factory.mktemp("fuzz") / name
    file.write_bytes(bytes(damaged) + tail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_LEAST_UNIT", 100)
        texts, problems, _ = read(file, doc_spliter="" if name == "c.txt" else None)
    for text in texts:
        text.encode()
    for problem in problems:
        assert str(file) in problem.describe() and problem.reason in problem.describe()
