"""Loading tokenizers, and training one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tokenizers

from pypkg.data.tokenizers.load import load_tokenizer
from pypkg.data.tokenizers.train_bpe import MIN_VOCAB_SIZE, is_trained, train_tokenizer
from pypkg.errors import UserError

TEXTS = ["def add(a, b):\n    return a + b\n", "déjà vu — 数据 🙂", "return return return"] * 5


@pytest.fixture
def folder(tmp_path):
    train_tokenizer(iter(TEXTS), 280, tmp_path / "tokenizer", "fingerprint")
    return tmp_path / "tokenizer"


# A normalizer at which the tokenizers library panics, which is no Exception in Python.
PANIC = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    }
)


def change(file, **values):
    contents = json.loads(file.read_text())
    contents.update(values)
    file.write_text(json.dumps(contents))


def test_trained_tokenizer(folder):
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (280, 1, 2)
    for text in [*TEXTS, "", "\x00\t\r\n  never seen: ÿ \U0010ffff"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < 280 for i in ids)
    assert len(tokenizer.encode("return")) == 1
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.decode([*tokenizer.encode("end"), tokenizer.eos_id]) == "end"


def test_file_in_place_of_folder(folder):
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    assert (tokenizer.eos_id, tokenizer.encode("a")) == (2, load_tokenizer(str(folder)).encode("a"))


def test_names_of_special_tokens(folder):
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<unk>", "eos_token": "<s>"})
    )
    change(folder / "tokenizer_config.json", eos_token={"content": "<unk>"}, bos_token=None)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 0)
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder).eos_id == 1
    (folder / "special_tokens_map.json").unlink()
    assert load_tokenizer(folder).eos_id is None


def test_truncation_and_padding_in_the_file_are_not_used(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer.encode("x")) == 1
    assert len(tokenizer.encode("x y z " * 9)) > 9


def test_vocabulary_counts_added_tokens(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["<one>", "<more>"])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 282
    assert tokenizer.encode("<more>") == [281]


def test_the_vocabulary_ends_with_the_largest_id(tmp_path):
    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "far": 9}, unk_token="a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.encode("far")) == (10, [9])


@pytest.mark.parametrize(
    ("file", "contents", "said"),
    [
        ("tokenizer.json", None, "no tokenizer in .*: expected one of tokenizer.json"),
        ("tokenizer.json", "{", "tokenizer.json is not a tokenizer"),
        ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer"),
        ("tokenizer.json", PANIC, "tokenizer.json is not a tokenizer.*precompiled_charsmap"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json is not usable JSON"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json must hold a JSON object, found a l"),
        ("tokenizer_config.json", '{"a": 1, "a": 2}', "'a' occurs more than once; keep one of"),
        ("tokenizer_config.json", '{"eos_token": "\\ud800"}', r"no token '\ud800'.*eos_token"),
        ("tokenizer_config.json", '{"eos_token": "<none>"}', "no token '<none>'.*eos_token"),
    ],
)
def test_wrong_files(folder, file, contents, said):
    (folder / file).unlink()
    if contents is not None:
        (folder / file).write_text(contents)
    with pytest.raises(UserError, match=said):
        load_tokenizer(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_link_that_leads_nowhere(folder, file):
    """It is no missing file: another tokenizer, or none of the special tokens, would be read."""
    (folder / file).unlink()
    (folder / file).symlink_to("blob")
    with pytest.raises(UserError, match=rf"{file} is a link to blob, which does not exist"):
        load_tokenizer(folder)


def test_an_id_beyond_the_32_bits_of_a_corpus(tmp_path):
    for number, said in ((2**31 - 1, None), (2**31, "the largest token id .* is 2147483648")):
        model = {"type": "WordLevel", "vocab": {"a": 0, "far": number}, "unk_token": "a"}
        contents = {"version": "1.0", "added_tokens": [], "model": model}
        (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
        if said is None:
            assert load_tokenizer(tmp_path).encode("far") == [number]
        else:
            with pytest.raises(UserError, match=said):
                load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("prefix", "merge", "is_read"),
    [
        ("#", ["a", "é"], False),  # would end the process
        ("#", "a é", False),
        ("###", ["a", "b"], False),
        ("é", ["a", "é"], True),
        ("#", ["a", "#b"], True),
        (None, ["a", "é"], True),
    ],
)
def test_a_prefix_that_merges_do_not_have(tmp_path, prefix, merge, is_read):
    model = {
        "type": "BPE",
        "continuing_subword_prefix": prefix,
        "vocab": {name: i for i, name in enumerate(("a", "b", "é", "#b", "aé", "ab"))},
        "merges": [merge],
    }
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    if is_read:
        assert load_tokenizer(tmp_path).encode("a")
    else:
        with pytest.raises(UserError, match=r"the merge .* does not have the continuing_subword_p"):
            load_tokenizer(tmp_path)


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer in .*nowhere, which is not there: expected"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"no tokenizer in .*vocab.json \(with merges.txt\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match="cut into words is not known"):
        load_tokenizer(tmp_path)


TRAIN = """
import sys
from pathlib import Path
from pypkg.data.tokenizers.train_bpe import train_tokenizer
files = sorted(Path(sys.argv[1]).glob("*.py"))
train_tokenizer((file.read_text() for file in files), 600, Path(sys.argv[2]), "x")
"""


def test_training_is_deterministic(tmp_path):
    """In processes of their own: hash seeds and numbers of threads differ."""
    made = []
    for threads in ("1", "2"):
        folder = tmp_path / threads
        arguments = [sys.executable, "-c", TRAIN, str(json.__path__[0]), str(folder)]
        subprocess.run(arguments, check=True, env={"RAYON_NUM_THREADS": threads})
        made.append(
            [(folder / name).read_bytes() for name in sorted(p.name for p in folder.iterdir())]
        )
    assert len(made[0]) == 2
    assert made[0] == made[1]


def test_smallest_vocabulary(tmp_path):
    train_tokenizer(iter(["abc"]), MIN_VOCAB_SIZE, tmp_path, "x")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == MIN_VOCAB_SIZE
    assert tokenizer.decode(tokenizer.encode("数据")) == "数据"


def test_a_short_text_gives_fewer_entries(tmp_path):
    entries = train_tokenizer(iter(["abcabc"]), 400, tmp_path, "x")
    assert MIN_VOCAB_SIZE < entries == load_tokenizer(tmp_path).vocab_size < 400


def test_is_trained(folder, tmp_path):
    assert is_trained(folder, "fingerprint")
    assert not is_trained(folder, "another")
    assert not is_trained(tmp_path / "nothing", "fingerprint")
    with open(folder / "tokenizer.json", "a") as file:
        file.write(" ")
    assert not is_trained(folder, "fingerprint")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="was not made by --train_tokenizer"):
        is_trained(folder, "fingerprint")
