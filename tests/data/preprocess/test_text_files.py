"""Which files are taken, and how they are cut into pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preprocess_testing import text_files

from pypkg.data.preprocess.input import files
from pypkg.data.preprocess.input.documents import LineCounter
from pypkg.data.preprocess.input.files import JSON_LINES, PARQUET, TEXT, plan_units
from pypkg.data.preprocess.input.readers import read_documents


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(files, "_LEAST_UNIT", 64)


@pytest.mark.parametrize(
    ("name", "kind", "compression"),
    [
        ("a.txt", TEXT, ""),
        ("a.txt.gz", TEXT, ".gz"),
        ("a.txt.zst", TEXT, ".zst"),
        ("a.jsonl", JSON_LINES, ""),
        ("a.jsonl.gz", JSON_LINES, ".gz"),
        ("a.jsonl.zst", JSON_LINES, ".zst"),
        ("a.json.gz", JSON_LINES, ".gz"),
        ("a.json", JSON_LINES, ""),
        ("a.ndjson", JSON_LINES, ""),
        ("a.jsonlines.zst", JSON_LINES, ".zst"),
        ("a.JSONL", JSON_LINES, ""),
        ("a.Json.GZ", JSON_LINES, ".gz"),
        ("a.TXT", TEXT, ""),
        ("a.parquet", PARQUET, ""),
    ],
)
def test_kinds(tmp_path, name, kind, compression):
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "c.tar.gz").write_bytes(b"x")
    [found] = text_files(tmp_path)
    assert (found.name, found.kind, found.compression) == (name, kind, compression)
    [alone] = text_files(tmp_path / name)
    assert (alone.kind, alone.compression) == (kind, compression)


def test_one_file_of_any_name_is_text(tmp_path):
    (tmp_path / "notes").write_bytes(b"x")
    assert text_files(tmp_path / "notes")[0].kind == TEXT


def test_many_small_files_share_a_unit(tmp_path, small_units):
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_bytes(b"0123456789")
    units = plan_units(text_files(tmp_path), None)
    assert [len(unit) for unit in units] == [6, 6, 6, 6, 6, 6, 4]
    assert [span.file.name for unit in units for span in unit] == [f"{n:02}.txt" for n in range(40)]


def documents_of(path: Path, doc_spliter: str | None) -> tuple[list[str], list[str], int]:
    """Documents and problems read unit by unit, and the number of spans."""
    found, problems = [], []
    spans = [s for u in plan_units(text_files(path), doc_spliter) for s in u]
    for span in spans:
        found += [
            document.text
            for document in read_documents(
                span, "text", doc_spliter, lambda p: problems.append(p.describe())
            )
        ]
    return found, problems, len(spans)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuts")


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.text(max_size=60), max_size=30),
    unit=st.integers(1, 300),
    end=st.sampled_from(["", "\n"]),
)
def test_cut_json_lines_lose_nothing(folder, texts, unit, end):
    file = folder / "c.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0) for text in texts]
    file.write_bytes(("\n".join(lines) + end).encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_LEAST_UNIT", unit)
        found, problems, spans = documents_of(file, None)
    assert found == texts and not problems
    assert spans >= 1


@settings(max_examples=150, deadline=None)
@given(
    blocks=st.lists(
        st.lists(st.sampled_from(["a", "bb ", " é", "----", "\t"]), max_size=6), max_size=20
    ),
    unit=st.integers(1, 100),
    separator=st.sampled_from(["", "----"]),
    line_break=st.sampled_from(["\n", "\r\n"]),
)
def test_cut_text_loses_nothing(folder, blocks, unit, separator, line_break):
    file = folder / "c.txt"
    lines = [line + line_break for block in blocks for line in [*block, separator]]
    file.write_bytes("".join(lines).encode())
    expected, document = [], ""
    for line in lines:
        if line.strip() == separator:
            expected += [document] if document else []
            document = ""
        else:
            document += line
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_LEAST_UNIT", unit)
        found, problems, _ = documents_of(file, separator)
    assert found == expected and not problems


def test_lines_are_counted_from_the_beginning_of_the_file(tmp_path, small_units):
    file = tmp_path / "c.jsonl"
    lines = [json.dumps({"text": "x" * 20}).encode() for _ in range(50)]
    lines[41] = b'{"text": "caf\xe9"}'
    lines[45] = b"{"
    file.write_bytes(b"\n".join(lines))
    found, problems, spans = documents_of(file, None)
    assert len(found) == 48 and spans > 10
    at = [sum(len(line) + 1 for line in lines[:n]) for n in (41, 45)]
    assert problems[0].startswith(f"{file}, line 42 (byte {at[0] + 13}): not UTF-8")
    assert problems[1].startswith(f"{file}, line 46 (byte {at[1]}): not JSON")


def test_counting_lines_goes_on_where_it_was(tmp_path):
    file = tmp_path / "c.txt"
    data = b"one\ntwo\n\nthree\n" * 100
    file.write_bytes(data)
    count = LineCounter()
    for end in (0, 10, 700, 700, 300, 1500, 10_000):
        assert count(file, end) == data[:end].count(b"\n")


def test_place_in_separated_text(tmp_path, small_units):
    file = tmp_path / "c.txt"
    blocks = [b"one line\nand two\n" for _ in range(30)]
    blocks[22] = b"one line\nand caf\xe9\n"
    file.write_bytes(b"\n".join(blocks))
    found, problems, spans = documents_of(file, "")
    assert len(found) == 29 and spans > 5
    at = sum(len(block) + 1 for block in blocks[:22]) + 16
    assert problems == [f"{file}, line 68 (byte {at}): not UTF-8: invalid continuation byte"]
