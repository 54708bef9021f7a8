"""python -m pypkg.preprocess, from text files to .bin/.idx."""

from __future__ import annotations

import gzip
import json
import os
import subprocess

import numpy as np
import pyarrow.parquet
import pytest
import tokenizers
import zstandard
from preprocess_testing import ALL, DOCUMENTS, command, outputs, run, texts

from pypkg.data import IndexedDataset
from pypkg.data.tokenizers.load import load_tokenizer
from pypkg.data.tokenizers.train_bpe import train_tokenizer


@pytest.fixture
def corpus(tmp_path):
    for name, text in DOCUMENTS.items():
        file = tmp_path / "text" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return tmp_path / "text"


def test_text_files(tmp_path, corpus, tokenizer, capsys):
    assert run(tmp_path, exclude="skip") == 0
    assert texts(tmp_path, tokenizer) == [DOCUMENTS["a/z.txt"], DOCUMENTS["b.txt"]]
    data = IndexedDataset(tmp_path / "out/corpus")
    assert data.tokens.dtype == np.uint16
    assert data.document_indices.tolist() == [0, 1, 2]
    assert outputs(tmp_path) == ALL
    said = capsys.readouterr().out
    size = sum(len(DOCUMENTS[name].encode()) for name in ("a/z.txt", "b.txt"))
    assert "documents        2\ndropped          1 empty\n" in said
    assert f"tokens           {data.num_tokens} (uint16)" in said
    assert f"bytes per token  {size / data.num_tokens:.2f}" in said
    assert f"{tmp_path / 'out' / 'corpus.bin'}, {2 * data.num_tokens} bytes" in said


def test_other_suffixes_and_eos(tmp_path, corpus, tokenizer):
    assert run(tmp_path, "--append_eos", file_suffix=".py,.md", exclude="skip") == 0
    assert texts(tmp_path, tokenizer) == [DOCUMENTS["c.py"], DOCUMENTS["notes.md"]]
    data = IndexedDataset(tmp_path / "out/corpus")
    plain = load_tokenizer(tokenizer).encode(DOCUMENTS["c.py"])
    assert data[0].tolist() == [*plain, 2]


def test_json_lines(tmp_path, tokenizer):
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [json.dumps({"body": text}) for text in ("one", "two\nlines", "trois é")]
    (folder / "a.jsonl").write_text("\n".join([lines[0], "", lines[1]]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write(lines[2] + "\n")
    (folder / "c.txt").write_text("plain")
    assert run(tmp_path, json_key="body") == 0
    assert texts(tmp_path, tokenizer) == ["one", "two\nlines", "trois é", "plain"]
    assert run(tmp_path, json_key="body", input_path=folder / "b.jsonl.gz") == 0
    assert texts(tmp_path, tokenizer) == ["trois é"]


BROKEN_LINES = {
    '{"text": "half': "not JSON",
    "[]": "no text in the field: 'text'",
    "3": "no text in the field: 'text'",
    '{"other": "x"}': "no text in the field: 'text'",
    '{"text": 3}': "no text in the field: 'text'",
    '{"text": "\\ud800"}': "not UTF-8: surrogates not allowed",
    "[" * 100_000: "not JSON",
}


@pytest.mark.parametrize(("line", "said"), BROKEN_LINES.items(), ids=lambda x: x[:20])
def test_broken_json_line(tmp_path, tokenizer, line, said, capsys):
    file = tmp_path / "c.jsonl"
    file.write_text(f'{{"text": "before"}}\n{line}\n{{"text": "after"}}\n')
    assert run(tmp_path, input_path=file) == 0
    assert texts(tmp_path, tokenizer) == ["before", "after"]
    out, err = capsys.readouterr()
    assert f"skipped {file}, line 2 (byte 19): {said}" in err
    assert f"dropped          1 {said.partition(':')[0]}\n" in out
    assert run(tmp_path, input_path=file, on_error="stop", output_prefix=tmp_path / "other") == 2
    assert f"error: {file}, line 2 (byte 19): {said}" in capsys.readouterr().err
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize(
    ("name", "data", "line", "byte"),
    [
        ("c.jsonl", b'{"text": "one"}\n{"text": "caf\xe9"}\n', 2, 29),
        ("c.txt", b"one\n###\ntwo\ncaf\xe9\n", 4, 15),
    ],
)
def test_the_byte_that_is_not_utf8(tmp_path, tokenizer, name, data, line, byte, capsys):
    assert data[byte] == 0xE9
    file = tmp_path / name
    file.write_bytes(data)
    assert run(tmp_path, input_path=file, doc_spliter="###") == 0
    assert texts(tmp_path, tokenizer)[0].strip() == "one"
    assert f"skipped {file}, line {line} (byte {byte}): not UTF-8" in capsys.readouterr().err


def test_documents_that_are_not_utf8(tmp_path, corpus, tokenizer, capsys):
    (corpus / "bad.txt").write_bytes(b"caf\xe9 au lait")
    assert run(tmp_path, exclude="skip,a") == 0
    assert texts(tmp_path, tokenizer) == [DOCUMENTS["b.txt"]]
    said = capsys.readouterr().out
    assert "dropped          1 not UTF-8\n" in said and "mended" not in said
    assert run(tmp_path, exclude="skip,a", on_error="stop") == 2
    assert f"error: {corpus / 'bad.txt'}, byte 3: not UTF-8" in capsys.readouterr().err
    assert run(tmp_path, exclude="skip,a", on_error="replace") == 0
    assert texts(tmp_path, tokenizer) == [DOCUMENTS["b.txt"], "caf\ufffd au lait"]
    said = capsys.readouterr()
    assert "dropped          1 empty\nmended           1 not UTF-8\n" in said.out
    assert f"mended {corpus / 'bad.txt'}, byte 3: not UTF-8" in said.err


def test_many_problems_are_only_counted(tmp_path, tokenizer, capsys):
    file = tmp_path / "c.jsonl"
    file.write_text('{"text": "good"}\n' + "bad\n" * 50)
    assert run(tmp_path, input_path=file) == 0
    out, err = capsys.readouterr()
    assert err.count("not JSON") == 10
    assert "dropped          50 not JSON\n" in out


def test_shuffling_is_a_permutation_by_seed(tmp_path, tokenizer):
    file = tmp_path / "c.jsonl"
    numbers = [str(n) for n in range(200)]
    file.write_text("".join(json.dumps({"text": n}) + "\n" for n in numbers))
    orders = []
    for seed in (1, 1, 2):
        assert run(tmp_path, input_path=file, shuffle_seed=seed) == 0
        orders.append(texts(tmp_path, tokenizer))
    assert orders[0] == orders[1] != orders[2]
    assert numbers not in orders
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(numbers)
    assert orders[0] == [numbers[i] for i in np.random.RandomState(1).permutation(200)]


def modified(tmp_path):
    return {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in outputs(tmp_path)}


def test_running_again_does_nothing(tmp_path, corpus, tokenizer, capsys):
    assert run(tmp_path) == 0
    before = modified(tmp_path)
    first = capsys.readouterr().out.splitlines()
    assert run(tmp_path) == 0
    assert modified(tmp_path) == before
    second = capsys.readouterr().out.splitlines()
    assert second[:-1] == first[:-1]
    assert second[-1].startswith("up to date")


@pytest.mark.parametrize("changed", ["input", "mtime", "option", "tokenizer", "output", "meta"])
def test_running_again_after_a_change(tmp_path, corpus, tokenizer, changed):
    assert run(tmp_path) == 0
    before = modified(tmp_path)
    options = []
    if changed == "input":
        (corpus / "b.txt").write_text("Another text.")
    elif changed == "mtime":
        written = (corpus / "b.txt").stat().st_mtime_ns
        os.utime(corpus / "b.txt", ns=(0, written + 1))
    elif changed == "option":
        options = ["--append_eos"]
    elif changed == "tokenizer":
        train_tokenizer(iter(["other text"]), 270, tokenizer, "y")
    elif changed == "output":
        os.truncate(tmp_path / "out" / "corpus.bin", 3)
    else:
        (tmp_path / "out" / "corpus.meta.json").write_text("{")
    assert run(tmp_path, *options) == 0
    assert all(now > before[name] for name, now in modified(tmp_path).items())
    assert "".join(texts(tmp_path, tokenizer)) == "".join(
        file.read_text() for file in sorted(corpus.rglob("*.txt"))
    )


def test_training_a_tokenizer(tmp_path, corpus):
    assert run(tmp_path, train_tokenizer=290) == 0
    folder = tmp_path / "tokenizer"
    assert load_tokenizer(folder).vocab_size == 290
    assert len(texts(tmp_path, folder)) == 3
    made = (folder / "tokenizer.json").stat().st_mtime_ns
    # An interrupted run has its tokenizer already, and does not train it again.
    (tmp_path / "out" / "corpus.meta.json").unlink()
    assert run(tmp_path, train_tokenizer=290) == 0
    assert (folder / "tokenizer.json").stat().st_mtime_ns == made
    assert run(tmp_path, train_tokenizer=280) == 0
    assert load_tokenizer(folder).vocab_size == 280
    assert IndexedDataset(tmp_path / "out" / "corpus").tokens.max() < 280


def test_training_on_a_part_spread_over_the_input(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(100):
        (folder / f"{number:02}.txt").write_text(f"{'early' if number < 50 else 'later'} " * 20)
    assert run(tmp_path, train_tokenizer=270, tokenizer_train_bytes=1200) == 0
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert [len(tokenizer.encode(word)) for word in (" early", " later")] == [1, 1]


def test_a_foreign_tokenizer_is_not_overwritten(tmp_path, corpus, tokenizer, capsys):
    (tokenizer / "tokenizer_config.json").write_text("{}")
    before = (tokenizer / "tokenizer.json").read_bytes()
    assert run(tmp_path, train_tokenizer=290) == 2
    assert "was not made by --train_tokenizer" in capsys.readouterr().err
    assert (tokenizer / "tokenizer.json").read_bytes() == before


def test_stop_while_training_the_tokenizer(tmp_path, corpus, capsys):
    (corpus / "bad.txt").write_bytes(b"\xff")
    assert run(tmp_path, train_tokenizer=290, on_error="stop") == 2
    assert "bad.txt, byte 0: not UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "tokenizer").exists()


def test_large_vocabulary_takes_four_bytes(tmp_path, corpus, tokenizer):
    file = tokenizer / "tokenizer.json"
    contents = json.loads(file.read_text())
    contents["model"]["vocab"]["far"] = 65536
    file.write_text(json.dumps(contents))
    assert run(tmp_path) == 0
    assert IndexedDataset(tmp_path / "out" / "corpus").tokens.dtype == np.int32
    contents["model"]["vocab"]["far"] = 65535
    file.write_text(json.dumps(contents))
    assert run(tmp_path) == 0
    assert IndexedDataset(tmp_path / "out" / "corpus").tokens.dtype == np.uint16


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"input_path": "nowhere"}, "cannot read --input_path nowhere: No such file"),
        (
            {"file_suffix": ".tex"},
            "has no file ending in .tex, .jsonl, .ndjson, .jsonlines, .json, .parquet",
        ),
        (
            {"input_path": "{text}/d.txt"},
            "gave no tokens: 1 files, no document is left; dropped: 1 empty",
        ),
        ({"tokenizer_name_or_path": "nowhere"}, "no tokenizer in nowhere"),
        ({"output_prefix": "{text}/b.txt/deep/corpus"}, "cannot write"),
    ],
)
def test_user_errors(tmp_path, corpus, tokenizer, capsys, values, said):
    values = {name: value.format(text=corpus) for name, value in values.items()}
    assert run(tmp_path, **values) == 2
    lines = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0]
    assert outputs(tmp_path) == []


def test_append_eos_without_eos(tmp_path, corpus, tokenizer, capsys):
    (tokenizer / "tokenizer_config.json").unlink()
    assert run(tmp_path, "--append_eos") == 2
    assert "name no eos_token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("train_tokenizer", "258", "found '258', expected a whole number from 259"),
        ("workers", "0", "found '0', expected a whole number of at least 1"),
        ("shuffle_seed", "-1", "from 0 to 4294967295"),
        ("exclude", " , ", "expected names separated by commas"),
        ("on_error", "ignore", "invalid choice"),
    ],
)
def test_wrong_options(tmp_path, option, value, said, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, **{option: value})
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_what_is_dropped(tmp_path, tokenizer, capsys):
    file = tmp_path / "c.jsonl"
    given = ["", "ab", " abc ", "abc", "x" * 101, "y" * 100, "one", "abc", "\n" * 200 + "z"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in given) + "bad\n")
    flags = ("--deduplicate", "--strip")
    values = {"min_doc_length": 3, "max_repeated_len": 100, "input_path": file}
    assert run(tmp_path, *flags, **values) == 0
    assert texts(tmp_path, tokenizer) == ["abc", "y" * 100, "one"]
    summary = json.loads((tmp_path / "out" / "corpus.meta.json").read_text())
    assert summary["dropped"] == {
        "duplicate": 2,
        "empty": 1,
        "not JSON": 1,
        "shorter than --min_doc_length": 3,
    }
    out = capsys.readouterr().out
    assert "dropped          2 duplicate\n" in out
    assert summary["text_bytes"] == 106


def test_histogram(tmp_path, tokenizer, capsys):
    file = tmp_path / "c.jsonl"
    sizes = [1, 2, 3, 3, 4, 7, 8, 300]
    file.write_text("".join(json.dumps({"text": "\u0001" * n}) + "\n" for n in sizes))
    assert run(tmp_path, input_path=file) == 0
    summary = json.loads((tmp_path / "out" / "corpus.meta.json").read_text())
    assert summary["lengths"] == [[1, 1], [2, 3], [4, 2], [8, 1], [256, 1]]
    assert "2-3             3  ####" in capsys.readouterr().out


def test_separated_documents(tmp_path, tokenizer):
    file = tmp_path / "c.txt"
    file.write_text("one\ntwo\n\n\nthree\n%% \nfour\n")
    assert run(tmp_path, input_path=file, doc_spliter="") == 0
    assert texts(tmp_path, tokenizer) == ["one\ntwo\n", "three\n%% \nfour\n"]
    assert run(tmp_path, input_path=file, doc_spliter="%%") == 0
    assert texts(tmp_path, tokenizer) == ["one\ntwo\n\n\nthree\n", "four\n"]


def test_every_format_in_one_folder(tmp_path, tokenizer):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"text, packed"))
    (folder / "c.jsonl").write_text('{"text": "line"}\n')
    (folder / "d.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "line, packed"}\n'))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row"]}), folder / "e.parquet")
    assert run(tmp_path) == 0
    assert texts(tmp_path, tokenizer) == ["text", "text, packed", "line", "line, packed", "row"]


def test_order_and_result_do_not_depend_on_threads(tmp_path, tokenizer):
    results = []
    for workers in (1, 2):
        prefix = tmp_path / f"out{workers}" / "c"
        values = {"input_path": json.__path__[0], "file_suffix": ".py", "workers": workers}
        subprocess.run(command(tmp_path, output_prefix=prefix, **values), check=True)
        results.append([prefix.with_suffix(s).read_bytes() for s in (".bin", ".idx")])
    assert results[0] == results[1]


def test_one_process_reads_the_tokenizer_once(tmp_path, corpus, tokenizer, monkeypatch):
    """Reading one of 256,000 entries takes seconds."""
    read = []
    real = tokenizers.Tokenizer.from_file

    class Counting:
        @staticmethod
        def from_file(name):
            read.append(name)
            return real(name)

    monkeypatch.setattr("pypkg.data.tokenizers.json.tokenizers.Tokenizer", Counting)
    assert run(tmp_path, workers=1) == 0
    assert read == [str(tokenizer / "tokenizer.json")]
