"""Runs of preprocessing that fail, are interrupted, resumed, or use several processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from preprocess_testing import ALL, command, outputs, run, texts

from pypkg.data.preprocess import summary
from pypkg.data.preprocess.input import files
from pypkg.data.preprocess.shards import FileShardFolder, FileShardWriter

UNIT_BYTES = 1 << 18


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(files, "_LEAST_UNIT", UNIT_BYTES)


def units_of(tmp_path, number: int = 6) -> Path:
    """A file of as many units; the last documents of three or more repeat the first."""
    file = tmp_path / "big.jsonl"
    texts = [f"several words of text {n % 250:04} " * 100 for n in range(100 * number)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.mark.parametrize("workers", [1, 2])
def test_disk_full(tmp_path, tokenizer, workers):
    done = run_with_limit(
        100_000, command(tmp_path, input_path=units_of(tmp_path, 3), workers=workers)
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot write {tmp_path / 'out' / 'corpus.parts'}")
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
    assert outputs(tmp_path) == []


def test_disk_full_while_file_shards_are_joined(tmp_path, tokenizer, small_units, capsys):
    values = {"input_path": units_of(tmp_path, 3), "workers": 1}
    done = run_with_limit(1_000_000, command(tmp_path, unit=UNIT_BYTES, **values))
    assert done.returncode == 2
    assert f"error: cannot write {tmp_path / 'out' / 'corpus.bin'}: File too large" in done.stderr
    assert outputs(tmp_path) == ["corpus.parts"]
    assert run(tmp_path, **values) == 0
    assert "resumed          3 of 3 units" in capsys.readouterr().out
    assert outputs(tmp_path) == ALL
    assert len(texts(tmp_path, tokenizer)) == 300


def run_with_limit(file_bytes: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command that cannot write larger files, which stands in for a full disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.run(arguments, preexec_fn=limit, capture_output=True, text=True)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_and_run_again(tmp_path, tokenizer, small_units, capsys, sent, workers):
    values = {"input_path": units_of(tmp_path), "workers": workers, "shuffle_seed": 1}
    process = subprocess.Popen(
        command(tmp_path, unit=UNIT_BYTES, **values), stderr=subprocess.PIPE, text=True
    )
    folder = tmp_path / "out" / "corpus.parts"
    while len(list(folder.glob("*.npz"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    assert not (tmp_path / "out" / "corpus.idx").exists()
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert err.splitlines()[-1].startswith("interrupted; nothing half-written is left")
        assert outputs(tmp_path) == ["corpus.parts"]
    finished = {file: file.stat().st_mtime_ns for file in folder.glob("*.npz")}
    # A file shard that is damaged meanwhile is made again.
    damaged = sorted(finished)[0]
    os.truncate(damaged.with_suffix(".bin"), 100)
    del finished[damaged]
    monitored = {}
    original = FileShardFolder.remove

    def remember(self):
        monitored.update({f: f.stat().st_mtime_ns for f in self.path.glob("*.npz")})
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileShardFolder, "remove", remember)
        assert run(tmp_path, **values) == 0
    assert f"resumed          {len(finished)} of 6 units" in capsys.readouterr().out
    assert len(monitored) == 6
    assert {file: monitored[file] for file in finished} == finished
    assert outputs(tmp_path) == ALL
    assert run(tmp_path, **values, output_prefix=tmp_path / "whole" / "corpus") == 0
    for name in ("corpus.bin", "corpus.idx"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_corpus_that_was_damaged_at_the_same_size_is_made_anew(
    tmp_path, tokenizer, capsys, suffix
):
    small = tmp_path / "small.jsonl"
    small.write_text('{"text": "short"}\n')
    assert run(tmp_path, input_path=small) == 0
    file = tmp_path / "out" / f"corpus{suffix}"
    good = file.read_bytes()
    file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    os.utime(file, ns=(1, 1))  # a clock with coarse steps could show no change
    capsys.readouterr()
    assert run(tmp_path, input_path=small) == 0
    captured = capsys.readouterr()
    assert f"made anew: {file} has another checksum than when it was written" in captured.err
    assert "up to date" not in captured.out
    assert file.read_bytes() == good


def test_a_copied_corpus_is_up_to_date(tmp_path, tokenizer, capsys, monkeypatch):
    """Its files have other times, so that their checksums decide, once."""
    small = tmp_path / "small.jsonl"
    small.write_text('{"text": "short"}\n')
    assert run(tmp_path, input_path=small) == 0
    file, meta = (tmp_path / "out" / name for name in ("corpus.bin", "corpus.meta.json"))
    for earlier in (False, True):  # a summary of an earlier version has no times
        os.utime(file, ns=(2 + earlier, 2 + earlier))
        if earlier:
            contents = json.loads(meta.read_text())
            del contents["modified"]
            meta.write_text(json.dumps(contents))
        capsys.readouterr()
        with monkeypatch.context() as patch:
            for _ in range(2):
                assert run(tmp_path, input_path=small) == 0
                assert "up to date" in capsys.readouterr().out
                patch.setattr(summary, "changed_files", None)  # not called again
    # Without a manifest nobody knows whether the files are the same.
    os.utime(file, ns=(1, 1))
    (tmp_path / "out" / "corpus.manifest.json").unlink()
    assert run(tmp_path, input_path=small) == 0
    captured = capsys.readouterr()
    assert "have changed, and it has no manifest" in captured.err
    assert "up to date" not in captured.out


@pytest.mark.parametrize("change", [-2, 2])
def test_a_file_shard_of_another_length_is_not_finished(tmp_path, change):
    folder = FileShardFolder(str(tmp_path / "corpus"), np.dtype(np.uint16))
    assert folder.begin("same", 2) == [0, 1]
    writer = FileShardWriter(folder.path, 0, folder.dtype)
    writer.add(np.array([5, 6, 7]), [2, 1], [1, 1], [3, 2], [])
    writer.finish(Counter(), 0)
    assert folder.begin("same", 2) == [1]
    assert folder.load(0).tokens.tolist() == [5, 6, 7]
    os.truncate(folder.path / "000000.bin", 6 + change)
    assert folder.load(0) is None
    assert folder.begin("same", 2) == [0, 1]


def test_file_shards_of_other_options_are_not_used(tmp_path, tokenizer, capsys):
    folder = tmp_path / "out" / "corpus.parts"
    folder.mkdir(parents=True)
    (folder / "fingerprint").write_text("another")
    (folder / "000000.npz").write_bytes(b"x")
    small = tmp_path / "small.jsonl"
    small.write_text('{"text": "short"}\n')
    assert run(tmp_path, input_path=small) == 0
    assert "is of other input or options: removed" in capsys.readouterr().err
    assert texts(tmp_path, tokenizer) == ["short"]
    assert outputs(tmp_path) == ALL


def test_a_folder_of_someone_else_is_left_alone(tmp_path, tokenizer, capsys):
    folder = tmp_path / "out" / "corpus.parts"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    small = tmp_path / "small.jsonl"
    small.write_text('{"text": "short"}\n')
    assert run(tmp_path, input_path=small) == 2
    assert (
        f"{folder} is where the file shards of corpus go, but holds thesis"
        in capsys.readouterr().err
    )
    assert outputs(tmp_path) == ["corpus.parts"]
    assert (folder / "thesis.tex").exists()


def test_result_does_not_depend_on_processes(tmp_path, tokenizer, small_units):
    file = units_of(tmp_path, 3)
    results = []
    for workers in (1, 2, 4):
        prefix = tmp_path / f"out{workers}" / "c"
        values = {"input_path": file, "workers": workers, "output_prefix": prefix}
        assert run(tmp_path, "--deduplicate", **values) == 0
        summary = json.loads(prefix.with_suffix(".meta.json").read_text())
        assert summary["documents"] == 250
        assert summary["dropped"] == {"duplicate": 50}
        assert sum(count for _, count in summary["lengths"]) == 250
        results.append([prefix.with_suffix(s).read_bytes() for s in (".bin", ".idx")])
    assert results[0] == results[1] == results[2]
    found = texts(tmp_path, tokenizer, "out1/c")
    assert found == [f"several words of text {n:04} " * 100 for n in range(250)]
