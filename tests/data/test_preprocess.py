"""python -m pypkg.preprocess, from text files to .bin/.idx."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pypkg import preprocess
from pypkg.data import IndexedDataset
from pypkg.data.bpe_training import train_tokenizer
from pypkg.data.tokenize import load_tokenizer

DOCUMENTS = {
    "b.txt": "The second file.\n",
    "a/z.txt": "One in a folder, déjà vu.",
    "a/skip/no.txt": "in an excluded folder",
    "c.py": "import this\n",
    "d.txt": "",
    "notes.md": "not taken",
}


@pytest.fixture
def corpus(tmp_path):
    for name, text in DOCUMENTS.items():
        file = tmp_path / "text" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return tmp_path / "text"


@pytest.fixture
def tokenizer(tmp_path):
    train_tokenizer(iter(DOCUMENTS.values()), 300, tmp_path / "tokenizer", "x")
    return tmp_path / "tokenizer"


def arguments(tmp_path, *options, **values):
    values = {
        "input_path": tmp_path / "text",
        "tokenizer_name_or_path": tmp_path / "tokenizer",
        "output_prefix": tmp_path / "out" / "corpus",
        **values,
    }
    return [*options, *(str(x) for name, value in values.items() for x in (f"--{name}", value))]


def run(tmp_path, *options, **values):
    return preprocess.main(arguments(tmp_path, *options, **values))


def texts(tmp_path, tokenizer, prefix="out/corpus"):
    data = IndexedDataset(tmp_path / prefix)
    return [load_tokenizer(tokenizer).decode(data[i].tolist()) for i in range(len(data))]


def outputs(tmp_path):
    folder = tmp_path / "out"
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


ALL = ["corpus.bin", "corpus.idx", "corpus.meta.json"]


def test_text_files(tmp_path, corpus, tokenizer, capsys):
    assert run(tmp_path, exclude="skip") == 0
    assert texts(tmp_path, tokenizer) == [DOCUMENTS["a/z.txt"], DOCUMENTS["b.txt"]]
    data = IndexedDataset(tmp_path / "out/corpus")
    assert data.tokens.dtype == np.uint16
    assert data.document_indices.tolist() == [0, 1, 2]
    assert outputs(tmp_path) == ALL
    said = capsys.readouterr().out
    size = sum(len(DOCUMENTS[name].encode()) for name in ("a/z.txt", "b.txt"))
    assert "documents        2, 1 empty" in said
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
    "[]": "no text in field 'text'",
    "3": "no text in field 'text'",
    '{"other": "x"}': "no text in field 'text'",
    '{"text": 3}': "no text in field 'text'",
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
    assert f"skipped {file}, line 2: {said}" in err
    assert "documents        2, 1 skipped" in out
    assert run(tmp_path, input_path=file, on_error="stop", output_prefix=tmp_path / "other") == 2
    assert f"error: {file}, line 2: {said}" in capsys.readouterr().err
    assert not list(tmp_path.glob("other*"))


def test_files_that_cannot_be_used(tmp_path, corpus, tokenizer, capsys):
    (corpus / "bad.txt").write_bytes(b"caf\xe9")
    whole = gzip.compress(b'{"text": "first"}\n' + os.urandom(5000).hex().encode())
    (corpus / "cut.jsonl.gz").write_bytes(whole[:2000])
    (corpus / "not.jsonl.gz").write_bytes(b"plain text")
    assert run(tmp_path, exclude="skip,a") == 0
    assert texts(tmp_path, tokenizer) == [DOCUMENTS["b.txt"], "first"]
    assert "documents        2, 3 skipped, 1 empty" in capsys.readouterr().out
    assert run(tmp_path, exclude="skip,a", on_error="stop") == 2
    assert f"error: {corpus / 'bad.txt'}: not UTF-8 at byte 3" in capsys.readouterr().err


def test_many_problems_are_only_counted(tmp_path, tokenizer, capsys):
    file = tmp_path / "c.jsonl"
    file.write_text('{"text": "good"}\n' + "bad\n" * 50)
    assert run(tmp_path, input_path=file) == 0
    out, err = capsys.readouterr()
    assert err.count("not JSON") == 10
    assert "documents        1, 50 skipped" in out


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


@pytest.mark.parametrize("changed", ["input", "option", "tokenizer", "output", "meta"])
def test_running_again_after_a_change(tmp_path, corpus, tokenizer, changed):
    assert run(tmp_path) == 0
    before = modified(tmp_path)
    options = []
    if changed == "input":
        (corpus / "b.txt").write_text("Another text.")
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
    assert "bad.txt: not UTF-8 at byte 0" in capsys.readouterr().err
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
        ({"file_suffix": ".tex"}, "has no file ending in .tex, .jsonl, .jsonl.gz"),
        ({"input_path": "{text}/d.txt"}, "gave no tokens: 1 files, 0 skipped and 1 empty"),
        ({"tokenizer_name_or_path": "nowhere"}, "no tokenizer in nowhere"),
        ({"output_prefix": "{text}/b.txt/deep/corpus"}, "cannot write"),
    ],
)
def test_user_errors(tmp_path, corpus, tokenizer, capsys, values, said):
    values = {name: value.format(text=corpus) for name, value in values.items()}
    assert run(tmp_path, **values) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err
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


def big_input(tmp_path: Path) -> Path:
    file = tmp_path / "big.jsonl"
    line = json.dumps({"text": "several words of text " * 100}) + "\n"
    file.write_text(line * 10_000)
    return file


def command(tmp_path, **values):
    return [sys.executable, "-m", "pypkg.preprocess", *arguments(tmp_path, **values)]


def test_disk_full(tmp_path, tokenizer):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        command(tmp_path, input_path=big_input(tmp_path)),
        preexec_fn=limit, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"error: cannot write {tmp_path / 'out' / 'corpus.bin'}: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert outputs(tmp_path) == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_and_run_again(tmp_path, tokenizer, sent):
    values = {"input_path": big_input(tmp_path), "workers": 1, "log_interval": 1}
    process = subprocess.Popen(command(tmp_path, **values), stderr=subprocess.PIPE, text=True)
    assert "documents" in process.stderr.readline()  # the first batch is written
    process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert err.splitlines()[-1] == "interrupted; nothing half-written is left"
        assert outputs(tmp_path) == []
    else:
        assert outputs(tmp_path) == ["corpus.bin.tmp"]
    small = tmp_path / "small.jsonl"
    small.write_text('{"text": "short"}\n')
    assert run(tmp_path, input_path=small) == 0
    assert texts(tmp_path, tokenizer) == ["short"]
    assert outputs(tmp_path) == ALL


def test_order_and_result_do_not_depend_on_threads(tmp_path, tokenizer):
    results = []
    for workers in (1, 2):
        prefix = tmp_path / f"out{workers}" / "c"
        values = {"input_path": json.__path__[0], "file_suffix": ".py", "workers": workers}
        subprocess.run(command(tmp_path, output_prefix=prefix, **values), check=True)
        results.append([prefix.with_suffix(s).read_bytes() for s in (".bin", ".idx")])
    assert results[0] == results[1]
