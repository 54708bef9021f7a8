"""Every kind of tokenizer file behind the same call, on small models that are made here."""

from __future__ import annotations

import base64
import builtins
import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from pypkg.data.tokenizers.json import JsonTokenizer
from pypkg.data.tokenizers.load import find_tokenizer, load_tokenizer, tokenizer_files
from pypkg.data.tokenizers.sentencepiece import ChatGLMTokenizer, SentencePieceTokenizer
from pypkg.data.tokenizers.tiktoken import TiktokenTokenizer
from pypkg.data.tokenizers.train_bpe import train_tokenizer
from pypkg.errors import UserError

TEXTS = {
    "Chinese": "大规模语言模型的预训练需要大量的文本数据。\n第二行、标点「引号」。",
    "English": "Pre-training a language model needs text; it's 1,234 tokens long, they'd say.",
    "code": "def add(a, b):\n\tif a:\n        return   a + b  # sum\n\n\nprint(f'{add(1, 2)}')\r\n",
    "emoji": "🙂👩‍💻🇨🇳 ok 🚀🚀",
    "mixed": "模型 model 🙂 x=1\n",
}
SENTENCES = [line for text in TEXTS.values() for line in text.splitlines()] * 8
CHATGLM_PIECES = [
    *("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"),
    *("<n>", "<|tab|>"),
    *(f"<|blank_{i}|>" for i in range(2, 81)),
]


def train_sentencepiece(file: Path, **options) -> None:
    """Whitespace is kept and unknown characters become bytes, as in LLaMA's model."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(file.with_suffix("")),
        **{
            "vocab_size": 480,
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "num_threads": 1,
            "minloglevel": 2,
        }
        | options,
    )


def write_ranks(file: Path) -> None:
    """The 256 bytes, and merges for some words: every token is two earlier ones."""
    tokens = [bytes([byte]) for byte in range(256)]
    for word in (b"model", b" text", "模型".encode(), "🙂".encode()):
        tokens += [word[:end] for end in range(2, len(word) + 1)]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def make(kind: str, folder: Path) -> None:
    if kind == "json":
        train_tokenizer(iter(SENTENCES), 400, folder, "x")
    elif kind == "tiktoken":
        write_ranks(folder / "qwen.tiktoken")
    elif kind == "chatglm":
        train_sentencepiece(
            folder / "ice_text.model", user_defined_symbols=CHATGLM_PIECES, vocab_size=560
        )
    else:
        train_sentencepiece(folder / kind)


KINDS = {
    "json": JsonTokenizer,
    "tokenizer.model": SentencePieceTokenizer,
    "spiece.model": SentencePieceTokenizer,
    "chatglm": ChatGLMTokenizer,
    "tiktoken": TiktokenTokenizer,
}


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> dict[str, Path]:
    """A folder for each kind."""
    folders = {kind: tmp_path_factory.mktemp("tokenizer") / "folder" for kind in KINDS}
    for kind, folder in folders.items():
        make(kind, folder)
    return folders


@pytest.fixture
def copy_of(made, tmp_path):
    """A folder of its own, to be changed."""
    return lambda kind: Path(shutil.copytree(made[kind], tmp_path / kind))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(made, kind):
    tokenizer = load_tokenizer(made[kind])
    assert type(tokenizer) is KINDS[kind]
    assert tokenizer.eos_id is not None
    for text in [*TEXTS.values(), "", "a", "never seen: ÿ Ω \U0001f9ec"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
    batch = list(TEXTS.values())
    assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]
    assert len(tokenizer.encode("模型")) < len("模型".encode())  # words are merged, not bytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_in_place_of_its_folder(made, kind, tmp_path):
    file = find_tokenizer(made[kind])
    assert load_tokenizer(file).encode("模型 text") == load_tokenizer(made[kind]).encode(
        "模型 text"
    )


def test_tokenizer_json_comes_first(made, copy_of):
    folder = copy_of("tokenizer.model")
    shutil.copy(made["tiktoken"] / "qwen.tiktoken", folder)
    assert find_tokenizer(folder).name == "tokenizer.model"
    shutil.copy(made["json"] / "tokenizer.json", folder)
    assert find_tokenizer(folder).name == "tokenizer.json"
    names = [file.name for file in tokenizer_files(folder)]
    assert names == ["qwen.tiktoken", "tokenizer.json", "tokenizer.model", "tokenizer.vocab"]


def test_sentencepiece_special_tokens(copy_of):
    folder = copy_of("tokenizer.model")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.id_of("<s>"), tokenizer.bos_id, tokenizer.eos_id) == (1, 1, 2)
    assert tokenizer.vocab_size == 480
    assert tokenizer.id_of("[gMASK]") is None
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 480, "[gMASK]": 483}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "eos_token": {"content": "<|end|>"},
                "added_tokens_decoder": {"2": {"content": "</s>"}, "490": {"content": "<|end|>"}},
            }
        )
    )
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.id_of("[gMASK]"), tokenizer.vocab_size) == (490, 483, 491)
    assert tokenizer.decode([483, *tokenizer.encode("a<pad>"), 490]) == "a<pad>"


def test_chatglm_ids(copy_of):
    """Whitespace pieces, and ids shifted by the image tokens that the first release had."""
    folder = copy_of("chatglm")
    shifted = load_tokenizer(folder)
    assert shifted.vocab_size == 20000 + 560
    (folder / "tokenizer_config.json").write_text('{"num_image_tokens": 0, "eos_token": "</s>"}')
    plain = load_tokenizer(folder)
    assert (plain.vocab_size, plain.eos_id, plain.bos_id) == (560, 2, plain.id_of("<sop>"))
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "ice_text.model"))
    assert plain.id_of("[gMASK]") == model.piece_to_id("[gMASK]") > 0
    text = "a\n\tb" + " " * 83 + "c"
    ids = plain.encode(text)
    pieces = [model.id_to_piece(i) for i in ids]
    assert [piece for piece in pieces if piece.startswith(("<n", "<|"))] == [
        "<n>", "<|tab|>", "<|blank_80|>", "<|blank_3|>",
    ]  # fmt: skip
    assert shifted.encode(text) == [i + 20000 for i in ids]
    assert shifted.id_of("[gMASK]") == plain.id_of("[gMASK]") + 20000
    assert shifted.eos_id == shifted.id_of("<eop>")
    assert (
        shifted.decode([3, shifted.id_of("[gMASK]"), shifted.bos_id, *shifted.encode(text)]) == text
    )
    (folder / "tokenizer_config.json").write_text('{"num_image_tokens": "many"}')
    with pytest.raises(UserError, match=r"num_image_tokens.*'many'"):
        load_tokenizer(folder)


def test_qwen_special_tokens_and_normal_form(made):
    tokenizer = load_tokenizer(made["tiktoken"])
    ranks = len((made["tiktoken"] / "qwen.tiktoken").read_text().splitlines())
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (ranks, None, ranks + 208)
    assert tokenizer.id_of("<|im_end|>") == ranks + 2
    assert tokenizer.id_of("<|extra_204|>") == ranks + 207
    assert tokenizer.id_of("model") == tokenizer.encode("model")[0]
    assert tokenizer.id_of("[gMASK]") is None
    assert tokenizer.encode("a<|endoftext|>") == [*tokenizer.encode("a"), ranks]
    decomposed = unicodedata.normalize("NFD", "é")
    assert tokenizer.encode(decomposed) == tokenizer.encode("é")
    # Digits stand alone, a blank belongs to the word after it.
    assert len(tokenizer.encode("12")) == 2
    assert tokenizer.encode(" text")[0] == tokenizer.id_of(" text")


def test_qwen_agrees_with_the_tokenizers_library(made):
    """The same pattern and ranks in another implementation of byte-level BPE."""
    tokenizer = load_tokenizer(made["tiktoken"])
    alphabet = byte_alphabet()
    vocabulary, merges = {}, []
    for line in (made["tiktoken"] / "qwen.tiktoken").read_text().splitlines():
        token, rank = base64.b64decode(line.split()[0]), int(line.split()[1])
        word = "".join(alphabet[byte] for byte in token)
        vocabulary[word] = rank
        if len(word) > 1:
            merges.append((word[:-1], word[-1]))
    other = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    levels = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    other.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, levels])
    for text in TEXTS.values():
        assert other.encode(text).ids == tokenizer.encode(text)


def byte_alphabet() -> list[str]:
    """GPT-2's letters for bytes: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@pytest.mark.parametrize(
    ("name", "contents", "said"),
    [
        ("tokenizer.model", b"no model", "tokenizer.model is not a SentencePiece model"),
        ("ice_text.model", b"", "ice_text.model is not a SentencePiece model"),
        ("qwen.tiktoken", b"YQ== 0\nYg==\n", "line 2 is not a tiktoken rank: found b'Yg=='"),
        ("qwen.tiktoken", b"? 0\n", "line 1 is not a tiktoken rank"),
        ("qwen.tiktoken", b"YQ== 0\n", "lacks 255 of the 256 single bytes"),
    ],
)
def test_files_that_are_no_tokenizers(tmp_path, name, contents, said):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(UserError, match=said):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("kind", "package"), [("tokenizer.model", "sentencepiece"), ("tiktoken", "tiktoken")]
)
def test_missing_package_is_named(made, kind, package, monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name == package:
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=rf"package {package}, .*\[tokenizers-all\]"):
        load_tokenizer(made[kind])
