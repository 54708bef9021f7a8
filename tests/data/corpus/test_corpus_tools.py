"""inspect, validate, merge and split."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from corpora import GOLDEN, counting_documents

from pypkg import preprocess
from pypkg.data import IndexedDataset, IndexedDatasetWriter
from pypkg.data.corpus.validate import validate
from pypkg.data.tokenizers.load import load_tokenizer
from pypkg.data.tokenizers.train_bpe import train_tokenizer


def write_sentences(prefix: Path, documents: list[list[list[int]]], dtype: str = "u2") -> str:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            for sentence in document:
                writer.add_sequence(np.array(sentence, dtype))
            writer.end_document()
        writer.commit()
    return str(prefix)


def documents_of(prefix: str | Path) -> list[list[list[int]]]:
    corpus = IndexedDataset(prefix)
    starts = corpus.document_indices.tolist()
    return [[corpus[s].tolist() for s in range(first, end)] for first, end in pairwise(starts)]


def write_mask(prefix: str | Path, mask: list[int]) -> None:
    Path(f"{prefix}.lsm").write_bytes(bytes(mask))


# --- inspect


def test_inspect_a_corpus(capsys):
    assert preprocess.main(["inspect", str(GOLDEN / "docs_u16")]) == 0
    out = capsys.readouterr().out
    corpus = IndexedDataset(GOLDEN / "docs_u16")
    assert "dtype      uint16\n" in out
    assert f"documents  {len(corpus.document_indices) - 1:,} of {len(corpus):,} sequences\n" in out
    assert f"tokens     {corpus.num_tokens:,}\n" in out


@pytest.mark.parametrize("suffix", ["", ".idx", ".bin", ".lsm", "/"])
def test_a_corpus_by_the_name_of_a_file(tmp_path, capsys, suffix):
    folder = tmp_path / "c"
    folder.mkdir()
    prefix = write_sentences(folder / "c", [[[1, 2]], [[3]]])
    given = str(folder) if suffix == "/" else prefix + suffix
    assert preprocess.main(["inspect", given]) == 0
    assert f"files      {prefix}.bin, {prefix}.idx" in capsys.readouterr().out
    assert preprocess.main(["validate", given]) == 0
    out = f"{tmp_path}/m{suffix.strip('/')}"
    assert preprocess.main(["merge", given, "--output_prefix", out]) == 0
    assert documents_of(tmp_path / "m") == [[[1, 2]], [[3]]]
    assert preprocess.main(["split", given, "--output_prefix", out, "--valid", "1"]) == 0
    assert documents_of(tmp_path / "m_valid") == [[[3]]]


def test_a_folder_of_two_corpora(tmp_path, capsys):
    for name in "ab":
        write_sentences(tmp_path / name, [[[1]]])
    assert preprocess.main(["inspect", str(tmp_path)]) == 2
    assert f"{tmp_path} holds 2 corpora, a, b; name one of them" in capsys.readouterr().err


def test_inspect_a_document(tmp_path, capsys):
    train_tokenizer(iter(["some text"]), 270, tmp_path / "tokenizer", "x")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    sentences = ["some text", "déjà vu"]
    documents = [[[1]], [tokenizer.encode(text) for text in sentences]]
    prefix = write_sentences(tmp_path / "c", documents)
    show = ["inspect", prefix, "--document", "1"]
    total = sum(map(len, documents[1]))
    assert preprocess.main(show) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"document 1: {total} tokens in 2 sequences",
        *(" ".join(map(str, ids)) for ids in documents[1]),
    ]
    with_text = [*show, "--tokenizer_name_or_path", str(tmp_path / "tokenizer")]
    assert preprocess.main(with_text) == 0
    assert capsys.readouterr().out.splitlines()[1:] == sentences
    assert preprocess.main([*show, "--max_tokens", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        " ".join(map(str, documents[1][0][:2])),
        f"... {total - 2} more tokens; --max_tokens shows them",
    ]
    assert preprocess.main(["inspect", prefix, "--document", "2"]) == 2
    assert "--document is 2" in capsys.readouterr().err
    assert preprocess.main(["inspect", prefix, "--document=-1"]) == 2
    assert "--document is -1" in capsys.readouterr().err


# --- validate


def damaged_corpus(folder: Path, **changes: list[int]) -> str:
    """Three documents of four sequences of two-byte tokens, with other fields than it should."""
    fields = {
        "tokens": [1, 2, 3, 4, 5, 6],
        "sizes": [3, 2, 0, 1],
        "pointers": [0, 6, 10, 10],
        "starts": [0, 1, 3, 4],
        **changes,
    }
    index = struct.pack(
        "<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(fields["sizes"]), len(fields["starts"])
    )
    for name, code in (("sizes", "i"), ("pointers", "q"), ("starts", "q")):
        index += struct.pack(f"<{len(fields[name])}{code}", *fields[name])
    (folder / "c.idx").write_bytes(index)
    (folder / "c.bin").write_bytes(np.array(fields["tokens"], "<u2").tobytes())
    return str(folder / "c")


@pytest.mark.parametrize("name", ["docs_u16", "docs_i32", "old", "modes"])
def test_good_corpora(name):
    assert [p for p in validate(str(GOLDEN / name)) if "empty" not in p] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sizes": [3, 2, 0, 2]}, ["c.bin is shorter"]),
        ({"sizes": [3, -2, 0, 1]}, ["sequence 1 at byte 38: found -2 tokens", "not begin where"]),
        (
            {"pointers": [0, 4, 10, 10]},
            ["1 sequences do not begin", "the first is sequence 1 (at byte 58)", "expected 6"],
        ),
        ({"starts": [0, 3, 1, 4]}, ["document 1 at byte 90: found 3, then 1"]),
        ({"starts": [0, 1, 1, 3, 4]}, ["1 documents have no sequence; the first is document 1"]),
        ({"tokens": [1, 2, 3, 4, 5, 6, 7]}, ["holds 7 tokens", "lists 6"]),
        ({"tokens": [1, 2, 3, 999, 5, 6]}, ["1 token ids", "at byte 6, in sequence 1, is 999"]),
    ],
)
def test_every_problem_is_found(tmp_path, changes, said):
    base = damaged_corpus(tmp_path)
    assert validate(base, 100) == [f"{base}.idx: 1 sequences are empty; the first is sequence 2"]
    text = "\n".join(validate(damaged_corpus(tmp_path, **changes), 100))
    for part in said:
        assert part in text


def test_several_problems_at_once(tmp_path, capsys):
    prefix = damaged_corpus(
        tmp_path, pointers=[0, 4, 10, 10], starts=[0, 3, 1, 4], tokens=[1, 2, 3, 4, 5, 999]
    )
    with open(prefix + ".bin", "ab") as file:
        file.write(b"x")
    write_mask(prefix, [0, 1, 2, 1, 1, 1])
    Path(prefix + ".meta.json").write_text(
        json.dumps({"documents": 3, "tokens": 7, "dtype": "int32"})
    )
    train_tokenizer(iter(["a"]), 260, tmp_path / "tokenizer", "x")
    arguments = ["validate", str(tmp_path), "--tokenizer_name_or_path", str(tmp_path / "tokenizer")]
    assert preprocess.main(arguments) == 1
    out = capsys.readouterr().out
    for part in [
        f"{prefix}: problems: 8",
        "document 1 at byte 90",
        "1 bytes at the end, from byte 12 on",
        "do not begin where",
        "1 sequences are empty",
        "is 999",
        "c.lsm: 1 bytes are neither 0 nor 1; the first, at byte 2, is 2",
        "tells of tokens: 7; ",
        "tells of dtype: int32; ",
    ]:
        assert part in out


def test_validate_what_cannot_be_opened(tmp_path, capsys):
    (tmp_path / "c.idx").write_bytes(b"short")
    assert preprocess.main(["validate", str(tmp_path / "c.idx")]) == 1
    assert "header at byte 0: found 5 bytes" in capsys.readouterr().out
    assert preprocess.main(["validate", str(GOLDEN / "modes")]) in (0, 1)


# --- merge


def test_merge(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parts = [[[[1, 2], [3]], [[], [4]]], [[[5]]], [[[6, 7, 8]], [[9]]]]
    for number, documents in enumerate(parts):
        write_sentences(tmp_path / f"in{number}", documents)
    prefixes = [f"in{number}" for number in range(3)]
    assert preprocess.main(["merge", *prefixes, "--output_prefix", "merged"]) == 0
    assert documents_of("merged") == [each for documents in parts for each in documents]
    assert "merged: 5 documents, 9 tokens (uint16) of 3 corpora" in capsys.readouterr().out
    whole = write_sentences(tmp_path / "whole", [each for documents in parts for each in documents])
    for suffix in (".bin", ".idx"):
        assert Path("merged" + suffix).read_bytes() == Path(whole + suffix).read_bytes()


def test_merge_a_folder_and_other_forms(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_sentences(folder / "b", [[[70000]]], "i4")
    write_sentences(folder / "a", [[[1]], [[2]]], "u2")
    np.save(tmp_path / "n_ids.npy", np.array([3, 4], np.uint16))
    np.savez(tmp_path / "n_idx.npz", lens=np.array([1, 1]), docs=np.array([0, 2]))
    merged = tmp_path / "merged"
    arguments = ["merge", str(folder), str(tmp_path / "n"), "--output_prefix", str(merged)]
    assert preprocess.main(arguments) == 0
    assert documents_of(merged) == [[[1]], [[2]], [[70000]], [[3], [4]]]
    assert IndexedDataset(merged).tokens.dtype == np.int32


def test_merge_follows_the_pointers(tmp_path):
    """Sequences may lie in any order in a .bin, and share tokens."""
    prefix = damaged_corpus(tmp_path, pointers=[4, 0, 2, 10])
    assert preprocess.main(["merge", prefix, prefix, "--output_prefix", str(tmp_path / "m")]) == 0
    assert documents_of(tmp_path / "m") == [[[3, 4, 5]], [[1, 2], []], [[6]]] * 2
    assert validate(str(tmp_path / "m"))[0].startswith(f"{tmp_path / 'm'}.idx: 2 sequences are")


def test_merge_loss_masks(tmp_path):
    first = write_sentences(tmp_path / "a", [[[1, 2]], [[3]]])
    second = write_sentences(tmp_path / "b", [[[4, 5]]])
    write_mask(first, [0, 1, 0])
    merged = tmp_path / "m"
    assert preprocess.main(["merge", first, second, "--output_prefix", str(merged)]) == 0
    assert IndexedDataset(merged).loss_mask.tolist() == [0, 1, 0, 1, 1]
    # A mask of an earlier corpus under this name does not stay.
    assert preprocess.main(["merge", second, "--output_prefix", str(merged)]) == 0
    assert IndexedDataset(merged).loss_mask is None


def test_merge_into_an_input(tmp_path, capsys):
    prefix = write_sentences(tmp_path / "a", [[[1]]])
    assert preprocess.main(["merge", prefix, "--output_prefix", prefix]) == 2
    assert "is the corpus" in capsys.readouterr().err
    assert documents_of(prefix) == [[[1]]]


@pytest.mark.parametrize("prefix", ["", "corpora/", "corpora/.bin", ".."])
@pytest.mark.parametrize(
    "command",
    [
        ["merge", "data/corpus"],
        ["split", "data/corpus"],
        ["--input_path", "data", "--tokenizer_name_or_path", "tokenizer"],
    ],
)
def test_a_prefix_of_hidden_files(capsys, command, prefix):
    assert preprocess.main([*command, "--output_prefix", prefix]) == 2
    error = capsys.readouterr().err
    assert f"--output_prefix is '{prefix}', a folder; expected the path of the files" in error


def test_merge_without_a_common_type(tmp_path, capsys):
    prefixes = [write_sentences(tmp_path / name, [[[1]]], name) for name in ("i8", "u8")]
    assert preprocess.main(["merge", *prefixes, "--output_prefix", str(tmp_path / "m")]) == 2
    assert "no token type that holds those of all" in capsys.readouterr().err


def sparse_corpus(prefix: Path, sizes: list[int], last: int) -> str:
    """One-byte tokens that take no room on the disk, all 0 but the last."""
    sizes = np.array(sizes, np.int32)
    ends = np.cumsum(sizes, dtype=np.int64)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(int(ends[-1]) - 1)
        file.seek(0, 2)
        file.write(bytes([last]))
    with open(f"{prefix}.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 1, len(sizes), len(sizes) + 1))
        file.write(sizes.tobytes() + (ends - sizes).tobytes())
        file.write(np.arange(len(sizes) + 1).tobytes())
    return str(prefix)


@pytest.mark.slow
def test_merge_beyond_2_to_the_31(tmp_path):
    """Both the bytes and the tokens of the result pass the border, in the middle of a document."""
    half = 2**30
    first = sparse_corpus(tmp_path / "a", [half, 5], 7)
    second = sparse_corpus(tmp_path / "b", [half, 9], 8)
    merged = tmp_path / "m"
    assert preprocess.main(["merge", first, second, "--output_prefix", str(merged)]) == 0
    corpus = IndexedDataset(merged)
    assert corpus.num_tokens == 2**31 + 14
    assert corpus.pointers.tolist() == [0, half, half + 5, 2 * half + 5]
    assert corpus[1].tolist() == [0, 0, 0, 0, 7]
    assert corpus[3].tolist() == [0] * 8 + [8]
    for file in tmp_path.glob("m.*"):
        file.unlink()  # 2 GiB


def test_the_longest_sequence(tmp_path):
    prefix = sparse_corpus(tmp_path / "a", [2**31 - 1, 2], 9)
    corpus = IndexedDataset(prefix)
    assert corpus.num_tokens == 2**31 + 1
    assert len(corpus[0]) == 2**31 - 1 and corpus[1].tolist() == [0, 9]
    assert corpus.document_sizes().tolist() == [2**31 - 1, 2]
    with open(prefix + ".idx", "r+b") as file:  # both sequences in one document
        file.seek(34 + 12 * 2 + 8)
        file.write(struct.pack("<q", 2))
    assert IndexedDataset(prefix).document_sizes().tolist() == [2**31 + 1, 0]


# --- split


def test_split_takes_the_last_documents(tmp_path, capsys):
    prefix = write_sentences(tmp_path / "c", [[[n], [n, n]] for n in range(10)])
    out = str(tmp_path / "s")
    arguments = ["split", prefix, "--output_prefix", out, "--valid", "0.2", "--test", "1"]
    assert preprocess.main(arguments) == 0
    whole = documents_of(prefix)
    assert documents_of(out + "_train") == whole[:7]
    assert documents_of(out + "_valid") == whole[7:9]
    assert documents_of(out + "_test") == whole[9:]
    assert f"{out}_train: 7 documents, 21 tokens" in capsys.readouterr().out


def test_split_at_random(tmp_path):
    prefix = write_sentences(tmp_path / "c", [[[n] * (n % 5)] for n in range(100)])
    write_mask(prefix, [n % 2 for n in range(100) for _ in range(n % 5)])
    whole, splits = documents_of(prefix), []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        out = tmp_path / name
        arguments = ["split", prefix, "--output_prefix", str(out), "--valid", "30", "--seed", seed]
        assert preprocess.main(arguments) == 0
        splits.append([documents_of(f"{out}_{part}") for part in ("train", "valid")])
        assert not (tmp_path / f"{name}_test.idx").exists()
        train, valid = splits[-1]
        assert (len(train), len(valid)) == (70, 30)
        assert sorted(train + valid) == sorted(whole)
        corpus = IndexedDataset(f"{out}_valid")
        assert corpus.loss_mask.tolist() == [token % 2 for token in corpus.tokens.tolist()]
    assert splits[0] == splits[1] != splits[2]
    train = [document[0][0] for document in splits[0][0] if document[0]]
    assert train == sorted(train)  # in the order of the corpus


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "expected at least one"),
        (["--valid", "10"], "one left for training"),
        (["--valid", "0.01"], "expected at least one"),
    ],
)
def test_split_that_leaves_nothing(tmp_path, capsys, options, said):
    prefix = write_sentences(
        tmp_path / "c", [[document.tolist()] for document in counting_documents([1] * 10)]
    )
    assert preprocess.main(["split", prefix, "--output_prefix", str(tmp_path / "s"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("s_*"))


def test_split_wrong_share(tmp_path, capsys):
    with pytest.raises(SystemExit):
        preprocess.main(["split", "c", "--output_prefix", "s", "--valid", "1.5"])
    assert "found '1.5', expected a number of documents" in capsys.readouterr().err
