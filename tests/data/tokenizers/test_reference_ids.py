"""Ids of the libraries that write the files, on texts in ten scripts.

``tests/golden/tokenizers`` holds a byte-level vocabulary of 500 entries and the ids that
transformers 5.24.0, mistral_common 1.13.1, PaddleNLP 3.0.0b4 and llama_models 0.3.0 give with it,
and those of tiktoken 0.14.0 with the pattern and special tokens of tokenization_chatglm.py of
THUDM/glm-4-9b-chat. Tests write that vocabulary in the format of each.
"""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from test_tokenizer_kinds import byte_alphabet, train_sentencepiece

from pypkg.data.tokenizers import tiktoken
from pypkg.data.tokenizers.load import find_tokenizer, load_tokenizer, tokenizer_files
from pypkg.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden" / "tokenizers"
REFERENCE = json.loads((GOLDEN / "ids.json").read_text("utf-8"))
TEXTS: dict[str, str] = REFERENCE["texts"]
# The pattern of Mistral's tekken.json files.
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def vocabulary() -> dict[str, int]:
    return json.loads((GOLDEN / "vocab.json").read_text("utf-8"))


def tokens() -> list[bytes]:
    """The tokens by id."""
    byte_of = {letter: byte for byte, letter in enumerate(byte_alphabet())}
    by_id = sorted(vocabulary().items(), key=lambda entry: entry[1])
    return [bytes(byte_of[letter] for letter in token) for token, _ in by_id]


def write_byte_level(folder: Path, tokenizer_class: str | None, **added: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    entries = vocabulary()
    if tokenizer_class != "Qwen2Tokenizer":  # GPT-2's vocabulary holds it, Qwen2's does not
        entries["<|endoftext|>"] = 500
    (folder / "vocab.json").write_text(json.dumps(entries))
    shutil.copy(GOLDEN / "merges.txt", folder)
    if tokenizer_class:
        write_config(folder, tokenizer_class=tokenizer_class)
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added))


def write_config(folder: Path, **values: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def write_ranks(folder: Path) -> None:
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens())]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_text("".join(lines))


def write_tekken(folder: Path, **changes: object) -> None:
    """Ten entries more than fit beside the 20 special tokens, as Mistral's have too many."""
    ordered = sorted(tokens(), key=lambda token: (len(token) > 1, len(token) == 1 and token))
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(ordered)
    ]
    config = {
        "pattern": TEKKEN_WORDS,
        "num_vocab_tokens": 500,
        "default_vocab_size": 510,
        "default_num_special_tokens": 20,
        "version": "v3",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tekken.json").write_text(
        json.dumps({"config": {**config, **changes}, "vocab": entries})
    )


def write(kind: str, folder: Path) -> None:
    if kind in ("GPT2Tokenizer", "GPTTokenizer", "Qwen2Tokenizer"):
        write_byte_level(folder, kind)
    elif kind == "Llama3":  # as Meta ships it, with nothing beside
        write_ranks(folder)
    elif kind in ("Llama3Tokenizer", "ChatGLM4Tokenizer"):
        write_ranks(folder)
        write_config(folder, tokenizer_class=kind)
    else:
        write_tekken(folder, default_vocab_size=490)


@pytest.mark.parametrize("reference", REFERENCE["ids"])
def test_ids_are_those_of_the_reference(tmp_path, reference):
    kind = reference.split()[1]
    write(kind, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    expected = REFERENCE["ids"][reference]
    assert len(expected) == len(TEXTS) >= 10
    for name, text in TEXTS.items():
        assert tokenizer.encode(text) == expected[name], name
        if name != "decomposed" or kind in ("Llama3", "ChatGLM4Tokenizer"):
            # The others put it into Unicode form NFC, or some of them.
            assert tokenizer.decode(expected[name]) == text
    assert tokenizer.encode_batch(list(TEXTS.values())) == list(expected.values())


@pytest.mark.parametrize(
    ("kind", "size", "begin", "end"),
    [
        ("GPT2Tokenizer", 501, 500, 500),
        ("Qwen2Tokenizer", 501, None, 500),
        ("Llama3Tokenizer", 756, 500, 501),
        ("Llama3", 756, 500, 501),
        ("ChatGLM4Tokenizer", 514, None, 500),
        ("Tekkenizer", 490, 1, 2),
    ],
)
def test_sizes_and_document_tokens(tmp_path, kind, size, begin, end):
    write(kind, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (size, begin, end)
    assert tokenizer.decode([*tokenizer.encode("end"), end]) == "end"


def test_special_tokens_in_a_text(tmp_path):
    for kind, token, number in (
        ("GPT2Tokenizer", "<|endoftext|>", 500),
        ("Qwen2Tokenizer", "<|endoftext|>", 500),
        ("Llama3Tokenizer", "<|eot_id|>", 509),
    ):
        write(kind, tmp_path / kind)
        tokenizer = load_tokenizer(tmp_path / kind)
        assert tokenizer.id_of(token) == number
        assert tokenizer.encode(f"a{token}b") == [
            *tokenizer.encode("a"), number, *tokenizer.encode("b"),
        ]  # fmt: skip
    write("Tekkenizer", tmp_path / "tekken")
    assert 2 not in load_tokenizer(tmp_path / "tekken").encode("a</s>b")


def test_added_tokens_of_byte_level_files(tmp_path):
    """Ids of their own, with a gap, as tokenizer_config.json describes them."""
    write_byte_level(tmp_path, "Qwen2Tokenizer", **{"<|endoftext|>": 500, "<|im_start|>": 503})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.encode("a<|im_start|>")[1:]) == (504, [503])
    write_config(
        tmp_path,
        tokenizer_class="Qwen2TokenizerFast",
        eos_token="<|im_end|>",
        added_tokens_decoder={"505": {"content": "<|im_end|>", "lstrip": True, "special": True}},
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.encode("a  <|im_end|>")[1:]) == (505, [505])
    # A corpus is made anew when one of these changes.
    assert [file.name for file in tokenizer.sources] == [
        "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json",
    ]  # fmt: skip
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 7}))
    with pytest.raises(UserError, match=r"give the id 7 to .* and to"):
        load_tokenizer(tmp_path)


def test_the_model_decides_where_no_tokenizer_class_is_named(tmp_path):
    write_byte_level(tmp_path, None)
    with pytest.raises(UserError, match=r"not known: tokenizer_class .* None.*GPT2Tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    ids = REFERENCE["ids"]["transformers GPT2Tokenizer"]["code"]
    assert load_tokenizer(tmp_path).encode(TEXTS["code"]) == ids
    write_config(tmp_path, tokenizer_class="LlamaTokenizer")
    with pytest.raises(UserError, match="'LlamaTokenizer'"):
        load_tokenizer(tmp_path)


def test_glm4_lists_all_special_tokens(tmp_path):
    """GLM-4's tokenizer.model is a rank file, and its special tokens follow the ranks."""
    write_ranks(tmp_path)
    listed = {"500": {"content": "<|endoftext|>"}, "501": {"content": "[gMASK]"}}
    write_config(tmp_path, added_tokens_decoder=listed, eos_token="<|endoftext|>")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (502, 500, None)
    assert tokenizer.encode("a[gMASK]")[1:] == [501]
    assert tokenizer.id_of("<|eot_id|>") is None
    # Without PaddleNLP's class, text stays as it is.
    assert tokenizer.decode(tokenizer.encode(TEXTS["decomposed"])) == TEXTS["decomposed"]


def test_special_tokens_of_glm4(tmp_path):
    """Known from the model's config.json where no tokenizer_config.json lists them."""
    write_ranks(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "chatglm"}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (514, 500, None)
    names = ("[MASK]", "[gMASK]", "<sop>", "<|observation|>", "<|end_of_video|>")
    assert [tokenizer.id_of(name) for name in names] == [501, 502, 504, 509, 513]
    assert [file.name for file in tokenizer.sources] == ["tokenizer.model", "config.json"]


def in_pieces(text: str) -> list[str]:
    """As llama/tokenizer.py of meta-llama/llama3 describes it, a character at a time."""
    begins = []
    run, was_blank = 0, None
    for place, letter in enumerate(text):
        is_blank = letter.isspace()
        run = run + 1 if is_blank is was_blank else 1
        was_blank = is_blank
        if place % 400_000 == 0 or run > 25_000:
            begins.append(place)
            run = 1
    return [text[begin:end] for begin, end in zip(begins, [*begins[1:], None])]


def test_long_texts_of_llama3(tmp_path):
    """Meta's code encodes them in pieces, which no token crosses."""
    write_ranks(tmp_path)
    (tmp_path / "one").mkdir()
    write("ChatGLM4Tokenizer", tmp_path / "one")
    tokenizer = load_tokenizer(tmp_path)
    unbroken = load_tokenizer(tmp_path / "one")
    text = "a xx" + ".in" * 8_400 + " a\u2003in"
    expected = [i for piece in in_pieces(text) for i in unbroken.encode(piece)]
    assert tokenizer.encode(text) == expected != unbroken.encode(text)
    assert tokenizer.encode_batch(["", text, "in"]) == [[], expected, tokenizer.encode("in")]
    for text in ("in " * 133_334, "x" * 25_000, " " * 25_001 + "x", "in \n" * 10 + "x" * 450_000):
        assert tiktoken._cut(text) == in_pieces(text)


@pytest.mark.parametrize("kind", ["Llama3", "Qwen2Tokenizer"])
def test_an_empty_added_token(tmp_path, kind):
    """tiktoken would look for it for ever."""
    write(kind, tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"": 500}')
    with pytest.raises(UserError, match=r"gives the id 500 to an empty token"):
        load_tokenizer(tmp_path)


def test_two_added_tokens_of_one_id(tmp_path):
    write_ranks(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<a>": 501, "<b>": 501}')
    with pytest.raises(UserError, match=r"give the id 501 to '<a>' and to '<b>'"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_without_tokens(tmp_path):
    model = {"type": "BPE", "vocab": {}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    with pytest.raises(UserError, match=r"tokenizer.json holds a tokenizer without any token"):
        load_tokenizer(tmp_path)


def test_ranks_of_other_patterns(tmp_path):
    """A file of OpenAI's or of Llama 4 does not say itself how text is cut into words."""
    known = set(tokens())
    more = [b"%06d" % i for i in range(100_256 - len(known))]
    lines = [base64.b64encode(t) + b" %d\n" % i for i, t in enumerate([*tokens(), *more])]
    (tmp_path / "cl100k_base.tiktoken").write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"100256 ranks of cl100k_base of OpenAI.*tokenizer.json"):
        load_tokenizer(tmp_path / "cl100k_base.tiktoken")


@pytest.mark.parametrize(
    "decoder",
    [{"\u00b2": {"content": "x"}}, {"9" * 5000: {"content": "x"}}, {"-1": {"content": "x"}}],
)
def test_wrong_ids_of_added_tokens(tmp_path, decoder):
    write_byte_level(tmp_path, "Qwen2Tokenizer")
    write_config(tmp_path, tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=decoder)
    with pytest.raises(UserError, match=r"gives the token 'x' the id .*expected a whole number"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name", ["sentencepiece.bpe.model", "tokenizer.model.v3", "tokenizer.model.v11"]
)
def test_other_names_of_sentencepiece_models(tmp_path, name):
    train_sentencepiece(tmp_path / "made.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "made.model"))
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(tmp_path / "made.model", folder / name)
    if name.endswith("v11"):
        (folder / "tokenizer.model.v3").write_text("an older version")
    assert find_tokenizer(folder) == folder / name
    assert folder / name in tokenizer_files(folder)
    tokenizer = load_tokenizer(folder)
    for text in TEXTS.values():
        assert tokenizer.encode(text) == reference.encode(text)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_the_log_names_what_was_taken(tmp_path, caplog):
    write_byte_level(tmp_path, "GPT2Tokenizer")
    write_tekken(tmp_path)
    with caplog.at_level("INFO", logger="pypkg"):
        load_tokenizer(tmp_path / "vocab.json")
        assert not caplog.messages
        load_tokenizer(tmp_path)
    (message,) = caplog.messages
    assert "tekken.json is read; vocab.json beside it: not read" in message
    names = [file.name for file in tokenizer_files(tmp_path)]
    assert names == ["merges.txt", "tekken.json", "tokenizer_config.json", "vocab.json"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"default_vocab_size": None}, "not a tekken.json of Mistral: TypeError"),
        ({"default_vocab_size": 100}, "lacks 176 of the 256 single bytes"),
        ({"default_vocab_size": 10**12}, "ValueError sizes 20 and 1000000000000"),
        ({"default_num_special_tokens": -5}, "ValueError sizes -5 and"),
        ({"pattern": "("}, "not a tokenizer that tiktoken can use"),
    ],
)
def test_wrong_tekken_files(tmp_path, changes, said):
    write_tekken(tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("rank", [-1, 20, 10**12, "1", None])
def test_wrong_ranks_of_special_tokens_of_tekken(tmp_path, rank):
    write_tekken(tmp_path)
    contents = json.loads((tmp_path / "tekken.json").read_text())
    contents["special_tokens"] = [{"token_str": "</s>", "rank": rank}]
    (tmp_path / "tekken.json").write_text(json.dumps(contents))
    with pytest.raises(UserError, match="special tokens whose ranks are not from 0 to 19"):
        load_tokenizer(tmp_path)


def test_an_infinite_rank_of_tekken(tmp_path):
    write_tekken(tmp_path)
    contents = json.loads((tmp_path / "tekken.json").read_text())
    contents["vocab"][7]["rank"] = float("inf")
    (tmp_path / "tekken.json").write_text(json.dumps(contents))
    with pytest.raises(UserError, match=r"not a tekken.json of Mistral: OverflowError"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("YQ== 900\n", "expected a token in base64 that no line before has"),
        ("bm90IHNlZW4= 3\n", "gives 1 of its 501 tokens the rank of another"),
    ],
)
def test_a_token_or_a_rank_that_occurs_twice(tmp_path, line, said):
    write_ranks(tmp_path)
    with (tmp_path / "tokenizer.model").open("a") as file:
        file.write(line)
    with pytest.raises(UserError, match=said):
        load_tokenizer(tmp_path)


def test_text_that_tiktoken_refuses(tmp_path):
    """Its pattern backtracks over two million blanks and gives up, but in Meta's pieces."""
    write_ranks(tmp_path)
    assert load_tokenizer(tmp_path).encode(" " * 2_000_000)
    write("Llama3Tokenizer", tmp_path)
    with pytest.raises(UserError, match=r"tokenizer.model cannot encode a text"):
        load_tokenizer(tmp_path).encode(" " * 2_000_000)


def test_files_that_do_not_belong_together(tmp_path):
    write_byte_level(tmp_path, "GPT2Tokenizer")
    (tmp_path / "merges.txt").write_text("no such\n")
    with pytest.raises(UserError, match=r"vocab.json and merges.txt beside it do not belong"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"merges.txt is missing"):
        load_tokenizer(tmp_path / "vocab.json")
    write_byte_level(tmp_path, "GPT2Tokenizer")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(UserError, match="lacks 255 of the 256 letters"):
        load_tokenizer(tmp_path)
