"""Which files of a folder are read, what is told of the others, and files that are lost."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preprocess_testing import ALL, outputs, run, texts

from pypkg.data.preprocess import prepare
from pypkg.data.preprocess.input import files, readers


@pytest.fixture
def folder(tmp_path):
    """Makes files of their names' text; what ends in .json* holds a JSON line of it."""

    def make(*names: str) -> Path:
        for name in names:
            file = tmp_path / "text" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"text": name}) if ".json" in name.lower() else name)
        return tmp_path / "text"

    return make


def test_json_lines_by_any_name(tmp_path, folder, tokenizer, capsys):
    names = ["a.json", "b.JSONL", "c.jsonlines", "d.TXT", "e.jsonl"]
    folder(*names)
    assert run(tmp_path) == 0
    assert texts(tmp_path, tokenizer) == names
    assert run(tmp_path, input_path=tmp_path / "text" / "a.json") == 0
    assert texts(tmp_path, tokenizer) == ["a.json"]
    assert "plain text" not in capsys.readouterr().err


def test_json_as_text_on_request(tmp_path, folder, tokenizer, capsys):
    folder("a.json", "b.jsonl")
    assert run(tmp_path) == 0
    assert run(tmp_path, file_suffix=".json") == 0  # the same files, read differently
    assert texts(tmp_path, tokenizer) == ['{"text": "a.json"}', "b.jsonl"]
    assert "--file_suffix names .json: such files are read as plain text" in capsys.readouterr().err


def test_what_is_left_out_is_named(tmp_path, folder, tokenizer, capsys):
    root = folder(
        "a.txt", ".a.txt", ".ipynb_checkpoints/a.txt", "sub/.git/b.txt", "b.md", "sub/c.md",
        "d.tar.gz", "README", "x.bak.txt", "old/e.txt", "sub/old/f.txt", "sub/g.txt",
    )  # fmt: skip
    os.mkfifo(root / "pipe.txt")
    assert run(tmp_path, exclude="*.bak.txt,sub/old") == 0
    assert texts(tmp_path, tokenizer) == ["a.txt", "old/e.txt", "sub/g.txt"]
    said = capsys.readouterr().err
    for line in (
        "left out 3 hidden files and folders, whose names begin with a dot: .a.txt, "
        ".ipynb_checkpoints, sub/.git\n",
        "left out 2 files that end in .md, which --file_suffix does not name: b.md, sub/c.md\n",
        "left out 1 files that end in .tar.gz, which --file_suffix does not name: d.tar.gz\n",
        "left out 1 files without a suffix: README\n",
        "left out 1 that are no files, but devices or the like: pipe.txt\n",
    ):
        assert line in said
    assert said.count("left out") == 5  # not what --exclude names


@pytest.mark.timeout(60)  # a loop that is followed has no end
def test_links_are_followed_once(tmp_path, folder, tokenizer, capsys):
    root = folder("a.txt", "sub/b.txt")
    other = tmp_path / "elsewhere"
    (other / "deep").mkdir(parents=True)
    (other / "deep" / "c.txt").write_text("c")
    (root / "z.txt").symlink_to(other / "deep" / "c.txt")
    (root / "first").symlink_to(other)
    (root / "sub" / "up").symlink_to(root)  # a loop
    (other / "back").symlink_to(root / "sub")
    (other / "deep" / "again").symlink_to(other)
    assert run(tmp_path, on_error="stop") == 0
    assert texts(tmp_path, tokenizer) == ["a.txt", "c", "sub/b.txt", "c"]
    said = capsys.readouterr().err
    assert (
        "left out 3 links to folders that are read already: first/back, first/deep/again, sub/up"
        in said
    )


@pytest.mark.parametrize("on_error", ["skip", "stop"])
def test_a_link_that_leads_nowhere(tmp_path, folder, tokenizer, capsys, on_error):
    root = folder("a.txt")
    (root / "more").symlink_to(tmp_path / "gone")
    assert run(tmp_path, on_error=on_error) == 2
    assert (
        f"error: {root / 'more'} is a link to {tmp_path / 'gone'}, which does not exist"
        in capsys.readouterr().err
    )
    assert run(tmp_path, exclude="more") == 0


def test_a_file_without_permission(tmp_path, folder, tokenizer, capsys, monkeypatch):
    root = folder("a.txt", "b.txt")
    monkeypatch.setattr(files.os, "access", lambda path, mode: Path(path).name != "b.txt")
    assert run(tmp_path) == 2
    assert (
        f"cannot read --input_path {root / 'b.txt'}: Permission denied" in capsys.readouterr().err
    )


@pytest.fixture
def failing_disk(monkeypatch):
    """Makes reading a file fail whose name begins with "unreadable", in this process."""

    def failing_open(file, *mode):
        if Path(file).name.startswith("unreadable"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return open(file, *mode)

    monkeypatch.setattr(readers, "open", failing_open, raising=False)


def lose_truncated(root: Path) -> str:
    (root / "z.jsonl.gz").write_bytes(gzip.compress(os.urandom(3000).hex().encode())[:2000])
    return "z.jsonl.gz: broken file, the rest of it is lost: Compressed file ended"


def lose_unreadable(root: Path) -> str:
    (root / "unreadable-z.txt").write_text("z")
    return "unreadable-z.txt: cannot be read: Input/output error"


def lose_no_column(root: Path) -> str:
    pq.write_table(pa.table({"body": ["x"]}), root / "z.parquet")
    return "z.parquet: no text in the field: 'text'; the columns are body"


def lose_damaged_parquet(root: Path) -> str:
    (root / "z.parquet").write_bytes(b"PAR1 and no more")
    return "z.parquet: broken file, the rest of it is lost"


def lose_utf16(root: Path) -> str:
    (root / "z.txt").write_bytes("z".encode("utf-16"))
    return "z.txt: not UTF-8: it begins as UTF-16; convert it"


@pytest.mark.parametrize(
    "lose", [lose_truncated, lose_unreadable, lose_no_column, lose_damaged_parquet, lose_utf16]
)
@pytest.mark.parametrize("on_error", ["skip", "stop"])
def test_a_run_that_loses_a_file_has_not_finished(
    tmp_path, folder, tokenizer, capsys, monkeypatch, failing_disk, lose, on_error
):
    monkeypatch.setattr(files, "_LEAST_UNIT", 1)
    root = folder("a.txt", "b.txt")
    said = lose(root)
    for _ in range(2):  # nor is it up to date the next time
        assert run(tmp_path, on_error=on_error, workers=1) == 2
        error = capsys.readouterr().err
        assert f"{root}/{said}" in error and "--exclude" in error
        assert not set(outputs(tmp_path)) & set(ALL)
    assert run(tmp_path, on_error=on_error, exclude="*z.*", workers=1) == 0
    assert texts(tmp_path, tokenizer) == ["a.txt", "b.txt"]


def test_all_lost_files_are_named_and_the_rest_is_kept(
    tmp_path, folder, tokenizer, capsys, monkeypatch, failing_disk
):
    monkeypatch.setattr(files, "_LEAST_UNIT", 1)
    root = folder("a.txt", "c.txt", "unreadable-1.txt", "unreadable-2.txt")
    assert run(tmp_path, workers=1) == 2
    error = capsys.readouterr().err
    assert "2 of the files cannot be read to the end" in error
    assert all(f"  {root}/unreadable-{n}.txt: cannot be read" in error for n in (1, 2))
    assert ".parts: the same command goes on from there" in error
    assert run(tmp_path, workers=1) == 2
    assert "2 of 4 units were finished earlier" in capsys.readouterr().err


def test_a_tokenizer_is_not_trained_on_a_part(tmp_path, folder, capsys, failing_disk):
    root = folder("a.txt", "unreadable.txt")
    assert run(tmp_path, train_tokenizer=260) == 2
    assert f"{root}/unreadable.txt: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize("change", ["truncated", "removed", "written"])
def test_input_that_changes_while_it_is_read(
    tmp_path, folder, tokenizer, capsys, monkeypatch, change
):
    root = folder("a.txt", "b.txt")
    encode = prepare._encode_units

    def change_meanwhile(*arguments):
        encode(*arguments)
        if change == "removed":
            (root / "b.txt").unlink()
        else:
            (root / "b.txt").write_text("" if change == "truncated" else "B.txt")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_encode_units", change_meanwhile)
        assert run(tmp_path) == 2
    assert f"error: {root / 'b.txt'} changed while it was read" in capsys.readouterr().err
    assert not set(outputs(tmp_path)) & set(ALL)
    assert run(tmp_path) == 0


@pytest.mark.parametrize("line", ["---", "-", "--x y"])
def test_a_separator_that_begins_with_a_dash(tmp_path, tokenizer, line):
    file = tmp_path / "c.txt"
    file.write_text(f"one\n{line}\ntwo\n")
    assert run(tmp_path, input_path=file, doc_spliter=line) == 0
    assert texts(tmp_path, tokenizer) == ["one\n", "two\n"]


def test_an_option_is_no_separator(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--doc_spliter", "--strip")
    assert "argument --doc_spliter: expected one argument" in capsys.readouterr().err
