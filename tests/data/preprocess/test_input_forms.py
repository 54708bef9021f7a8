"""Input of unusual forms: marks, line ends, JSON that is not lines, nested fields, bad bytes."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preprocess_testing import read

from pypkg.data.preprocess.input import files

BOM = b"\xef\xbb\xbf"
RECORDS = [{"text": "a é"}, {"text": "b", "n": 1}, {"text": "[c]"}]
TEXTS = [record["text"] for record in RECORDS]
LINES = [json.dumps(record, ensure_ascii=False).encode() for record in RECORDS]


# How the records may lie in a file: its name and its bytes.
JSON_FILES = {
    "mark": ("c.jsonl", BOM + b"\n".join(LINES)),
    "marks of joined files": ("c.jsonl", b"\n".join(BOM + line for line in LINES)),
    "a mark alone on a line": ("c.jsonl", BOM + b"\n" + b"\n".join(LINES)),
    "a mark in a compressed file": ("c.json.gz", gzip.compress(BOM + b"\n".join(LINES), mtime=0)),
    "on one line": ("c.jsonl", b"".join(LINES)),
    "on one line with blanks": ("c.jsonl", b" " + b" ".join(LINES) + b" \n"),
    "CR alone": ("c.jsonl", b"\r".join(LINES)),
    "CR alone to the end": ("c.ndjson", b"\r".join([*LINES, b""])),
    "CR LF": ("c.json", b"\r\n".join([*LINES, b""])),
    "an array": ("c.json", json.dumps(RECORDS).encode()),
    "an array over lines": ("c.json", BOM + json.dumps(RECORDS, indent=2).encode()),
    "a packed array": ("c.json.gz", gzip.compress(json.dumps(RECORDS, indent=1).encode(), mtime=0)),
    "records over lines": (
        "c.json",
        b"\n".join(json.dumps(record, indent=2).encode() for record in RECORDS),
    ),
}


@pytest.mark.parametrize(("name", "data"), JSON_FILES.values(), ids=JSON_FILES)
def test_json(tmp_path, monkeypatch, name, data):
    monkeypatch.setattr(files, "_LEAST_UNIT", 8)  # cuts wherever it can
    (tmp_path / name).write_bytes(data)
    texts, problems, taken = read(tmp_path / name)
    assert texts == TEXTS and not problems
    assert 0 < sum(taken) <= len(data)


@pytest.mark.parametrize("packed", [False, True])
def test_mark_before_text(tmp_path, packed):
    name, pack = ("c.txt.gz", gzip.compress) if packed else ("c.txt", bytes)
    (tmp_path / name).write_bytes(pack(BOM + b"one\n\n" + BOM + b"two\n"))
    assert read(tmp_path / name)[0] == ["one\n\n\ufefftwo\n"]
    assert read(tmp_path / name, doc_spliter="")[0] == ["one\n", "\ufefftwo\n"]


def test_text_with_cr_alone(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"one\rtwo\r----\rthree\r")
    assert read(tmp_path / "c.txt", doc_spliter="----")[0] == ["one\rtwo\r", "three\r"]


def test_places_behind_a_mark(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(BOM + b'{"text": "\xff"}\n{"text": 1}')
    _, problems, _ = read(tmp_path / "c.jsonl")
    assert [(p.line, p.byte) for p in problems] == [(1, 13), (2, 17)]
    (tmp_path / "c.txt").write_bytes(BOM + b"a\xff")
    _, [problem], _ = read(tmp_path / "c.txt")
    assert problem.byte == 4


def test_a_line_that_is_partly_json_is_told_of_once(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}{"text": "b"\n{"text": "c"}{"x": 1}\n')
    texts, problems, _ = read(tmp_path / "c.jsonl")
    assert texts == ["c"]
    assert [(p.reason, p.line) for p in problems] == [
        ("not JSON", 1),
        ("no text in the field", 2),
    ]


def test_a_text_with_two_values_is_told_of(tmp_path):
    """Readers differ in the value that they take; other keys may occur twice."""
    (tmp_path / "c.jsonl").write_bytes(
        b'{"text": "a", "text": "b"}\n{"id": 1, "text": "c", "id": 2}\n'
        b'{"data": {"text": "d"}, "data": {"text": "e"}}{"data": {"text": "f", "text": "f"}}\n'
    )
    texts, problems, _ = read(tmp_path / "c.jsonl")
    assert texts == ["c"]
    assert [(p.reason, p.detail, p.line) for p in problems] == [
        ("a field that the record names more than once", "'text'", 1),
        ("no text in the field", "'text'", 3),
        ("no text in the field", "'text'", 3),
    ]
    texts, problems, _ = read(tmp_path / "c.jsonl", json_key="data.text")
    assert texts == []
    assert [p.detail for p in problems if "more than once" in p.reason] == ["'data'", "'text'"]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"data": {"text": "in"}}, "in"),
        ({"data": {"text": "in"}, "data.text": "flat"}, "flat"),
        ({"data": {"text": None}}, None),
        ({"data": {"text": {"text": "deep"}}}, None),
        ({"data": "text"}, None),
        ({"data": [{"text": "in a list"}]}, None),
        ({"text": "elsewhere"}, None),
    ],
)
def test_nested_json_key(tmp_path, record, text):
    (tmp_path / "c.jsonl").write_text(json.dumps(record))
    texts, problems, _ = read(tmp_path / "c.jsonl", "data.text")
    assert texts == ([] if text is None else [text])
    assert [problem.reason for problem in problems] == (
        ["no text in the field"] if text is None else []
    )


def test_nested_parquet_column(tmp_path):
    rows = [{"n": 1, "text": "a"}, None, {"n": 2, "text": "c"}]
    table = pa.table({"data": pa.array(rows), "flat.text": pa.array(["x", "y", "z"])})
    pq.write_table(table, tmp_path / "c.parquet")
    texts, [problem], _ = read(tmp_path / "c.parquet", "data.text")
    assert texts == ["a", "c"] and problem.detail == "row 2 of 'data.text' is null"
    assert read(tmp_path / "c.parquet", "flat.text")[0] == ["x", "y", "z"]
    for column, said in {
        "data.body": "'data.body'; the columns are data, flat.text",
        "data.text.more": "'data.text.more'; the columns are",
        "data.n": "column 'data.n' holds int64",
        "data": "column 'data' holds struct",
    }.items():
        texts, [problem], _ = read(tmp_path / "c.parquet", column)
        assert not texts and problem.file_lost and said in problem.detail


def test_parquet_column_of_a_name_that_occurs_twice(tmp_path):
    column = pa.array(["x"])
    table = pa.Table.from_arrays([column, column], ["text", "text"])
    pq.write_table(table, tmp_path / "c.parquet")
    texts, [problem], _ = read(tmp_path / "c.parquet")
    assert not texts and problem.file_lost
    assert problem.detail == "'text'; the columns are text, text"


@pytest.mark.parametrize(
    "kind",
    [
        pa.string_view(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.binary(2),
    ],
    ids=str,
)
def test_kinds_of_parquet_columns(tmp_path, kind):
    values = [b"ab", b"cd", None, b"ab"]
    plain = (
        pa.array(values) if kind == pa.binary(2) else pa.array([v and v.decode() for v in values])
    )
    if pa.types.is_dictionary(kind):
        column = plain.cast(kind.value_type).dictionary_encode().cast(kind)
    elif kind == pa.binary_view():
        column = pa.array(values, kind)
    else:
        column = plain.cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "c.parquet")
    texts, [problem], _ = read(tmp_path / "c.parquet")
    assert texts == ["ab", "cd", "ab"] and "row 3" in problem.detail


def test_replacing_what_is_not_utf8(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(
        b'{"text": "caf\xe9!"}\n{"text": "x\\ud800y\\ud83d\\ude00"}\n{"text": "fine"}\n{\n'
    )
    (tmp_path / "d.txt").write_bytes(b"a\xff\n\nb\n")
    pq.write_table(pa.table({"text": pa.array([b"r\xc3", b"s"])}), tmp_path / "e.parquet")
    texts, problems, _ = read(tmp_path, doc_spliter="", replace=True)
    assert texts == ["caf\ufffd!", "x\ufffdy\U0001f600", "fine", "a\ufffd\n", "b\n", "r\ufffd", "s"]
    assert [(p.reason, p.mended) for p in problems] == [
        ("not UTF-8", True),
        ("not UTF-8", True),
        ("not JSON", False),
        ("not UTF-8", True),
        ("not UTF-8", True),
    ]
    texts, problems, _ = read(tmp_path, doc_spliter="")
    assert texts == ["fine", "b\n", "s"]
    assert len(problems) == 5 and not any(p.mended for p in problems)
