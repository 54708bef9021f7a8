"""Text from tokens as they come, prompts as tokens, and whole completions."""

from __future__ import annotations

from pathlib import Path

import pytest
from byte_tokenizer import Bytes
from tiny_configs import tiny

from pypkg.errors import UserError
from pypkg.generation.prompts import given_prompts, read_prompts
from pypkg.generation.text import TextStream, complete, encode_prompt, end_tokens
from pypkg.models import from_config
from pypkg.models.sampling import Sampling

GREEDY = Sampling(temperature=0.0)


def pieces(text: str, stops: tuple[str, ...] = ()) -> list[str]:
    """What a stream tells after each token of ``text``, and at its end."""
    stream, found = TextStream(Bytes(), list(b"prompt"), stops), []
    for token in text.encode():
        found.append(stream.add(token))
        if stream.is_stopped:
            break
    return [*found, stream.finish()]


def test_a_character_comes_whole() -> None:
    assert pieces("aé!") == ["a", "", "é", "!", ""]
    assert pieces("日") == ["", "", "日", ""]


def test_what_is_no_character_comes_at_the_end() -> None:
    stream = TextStream(Bytes(), [])
    assert [stream.add(token) for token in (97, 0xE6)] == ["a", ""]
    assert stream.finish() == "\ufffd"
    assert stream.text == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\n\ntwo", ("\n\n",), ["o", "n", "e", "", "", ""]),
        ("one\ntwo", ("\n\n",), ["o", "n", "e", "", "\nt", "w", "o", ""]),
        ("ababc", ("abc",), ["", "", "ab", "", "", ""]),
        ("xab", ("ab", "b"), ["x", "", "", ""]),  # the stop that begins first
        ("abx", ("ab",), ["", "", ""]),  # at the very start
        ("one\n", ("\n\n",), ["o", "n", "e", "", "\n"]),
    ],
)
def test_a_stop_text_is_left_out(text: str, stops: tuple[str, ...], expected: list) -> None:
    assert pieces(text, stops) == expected


def test_spaces_that_depend_on_the_token_before() -> None:
    class Words(Bytes):
        def decode(self, ids) -> str:
            return " ".join(f"w{each}" for each in ids)

    stream = TextStream(Words(), [1, 2])
    assert [stream.add(3), stream.add(4), stream.finish()] == [" w3", " w4", ""]


def test_prompts_as_tokens() -> None:
    config = tiny("llama")
    assert encode_prompt(Bytes(), config, "ab") == [97, 98]
    assert encode_prompt(Bytes(), config, "") == [256]
    assert encode_prompt(Bytes(bos_id=7), config, "") == [7]
    assert encode_prompt(Bytes(bos_id=7), config, "a", with_bos=True) == [7, 97]
    with pytest.raises(UserError, match="names no bos_token"):
        encode_prompt(Bytes(), config, "a", with_bos=True)
    with pytest.raises(UserError, match=r"the token 98, but vocab_size of the model is 98"):
        encode_prompt(Bytes(), config.replace(vocab_size=98), "ab")
    glm = tiny("chatglm")
    assert encode_prompt(Bytes(), glm, "a") == [97, glm.gmask_token_id, glm.sop_token_id]
    assert end_tokens(config, Bytes()) == {2, 256}
    assert end_tokens(config.replace(eos_token_id=[3, 4]), Bytes()) == {3, 4, 256}


def test_completions_end_at_a_stop_an_end_or_a_length() -> None:
    model = from_config(tiny("llama").replace(vocab_size=257, initializer_range=0.5), seed=2)
    model.eval()
    tokenizer, told = Bytes(), {0: "", 1: ""}

    def tell(row: int, text: str) -> None:
        told[row] += text

    prompts = ["once", "upon a time"]
    whole = complete(model, tokenizer, prompts, 30, GREEDY, on_text=tell)
    assert [each.finish for each in whole] == ["length", "length"]
    assert [each.tokens for each in whole] == [30, 30]
    assert [told[0], told[1]] == [each.text for each in whole]
    alone = [complete(model, tokenizer, [prompt], 30, GREEDY)[0] for prompt in prompts]
    assert alone == whole

    stop = whole[0].text[3:6]
    stopped = complete(model, tokenizer, prompts[:1], 30, GREEDY, stops=[stop])[0]
    assert stopped.finish == "stop" and stopped.tokens < 30
    assert stopped.text == whole[0].text[: whole[0].text.index(stop)]

    first = next(each for each in whole[1].text.encode())
    ended = complete(model, tokenizer, prompts[1:], 30, GREEDY, end_ids=[first])[0]
    assert (ended.finish, ended.text, ended.tokens) == ("end", "", 1)
    cut = complete(model, tokenizer, ["xx" + prompts[0]], 30, GREEDY, most_prompt_tokens=4)[0]
    assert cut.text == whole[0].text


def test_prompts_of_files(tmp_path: Path) -> None:
    files = {
        "a.txt": "one\n\ntwo\n",
        "b.jsonl": '"one"\n{"prompt": "two", "id": 3}\n',
        "c.json": '["one", {"prompt": "two"}]',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_prompts(tmp_path / name) == ["one", "two"]
        assert given_prompts([str(tmp_path / name)]) == ["one", "two"]
    assert given_prompts(["a.txt", "b"]) == ["a.txt", "b"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[", "is not JSON"),
        ("a.json", "[]", "holds no list of prompts"),
        ("a.json", '{"prompt": "one"}', "holds no list of prompts"),
        ("a.jsonl", '"one"\n{"text": "two"}\n', "prompt 2 of .* expected a text"),
        ("a.txt", "\n", "holds no list of prompts"),
    ],
)
def test_bad_files_of_prompts(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file_of_prompts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        given_prompts([str(tmp_path / "prompts.txt")])
