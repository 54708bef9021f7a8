"""Losses of whole corpora: each token once, with the context that the windows give it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from byte_tokenizer import Bytes
from tiny_configs import tiny

from pypkg.data.corpus.writer import IndexedDatasetWriter
from pypkg.data.loading.objectives import IGNORED_LABEL
from pypkg.errors import UserError
from pypkg.inference.corpora import Corpus, Reader
from pypkg.inference.evaluate import evaluate, total
from pypkg.inference.windows import Windowing
from pypkg.models import from_config

START = 9


def windowing(family: str, length: int, stride: int) -> Windowing:
    return Windowing(tiny(family), length, stride, START)


@pytest.mark.parametrize("family", ["llama", "chatglm"])
@pytest.mark.parametrize("size", [1, 5, 7, 8, 9, 30])
@pytest.mark.parametrize("stride", [1, 3, 6])
def test_each_token_is_predicted_once(family: str, size: int, stride: int) -> None:
    cut = windowing(family, 7, stride)
    tokens = np.arange(100, 100 + size, dtype=np.uint16)
    found = []
    for window in cut.windows(0, size):
        ids, labels = cut.row(tokens, window)
        assert len(ids) == len(labels) <= 7
        places = np.flatnonzero(labels != IGNORED_LABEL)
        found += labels[places].tolist()
        # What is read up to the place of a label is the text before it.
        text = [each for each in ids[: places[0] + 1].tolist() if each < 200]
        before = labels[places[0]] - 100
        expected = tokens[max(before - len(text), 0) : before].tolist()
        assert text == expected or text == [START, *expected]
        if before:
            assert len(ids) == 7  # all windows but the first are full
    assert found == tokens.tolist()


def test_windows_by_hand() -> None:
    cut = windowing("llama", 4, 2)
    tokens = np.array([11, 12, 13, 14, 15, 16, 17])
    rows = [cut.row(tokens, window) for window in cut.windows(0, 7)]
    none = IGNORED_LABEL
    assert [(ids.tolist(), labels.tolist()) for ids, labels in rows] == [
        ([START, 11, 12, 13], [11, 12, 13, 14]),
        ([12, 13, 14, 15], [none, none, 15, 16]),
        ([13, 14, 15, 16], [none, none, none, 17]),
    ]
    glm = windowing("chatglm", 5, 2)
    mask, sop = glm.config.gmask_token_id, glm.config.sop_token_id
    rows = [glm.row(tokens[:5], window) for window in glm.windows(0, 5)]
    assert [(ids.tolist(), labels.tolist()) for ids, labels in rows] == [
        ([mask, sop, 11, 12, 13], [none, 11, 12, 13, 14]),
        ([12, 13, 14, mask, sop], [none, none, none, none, 15]),
    ]


def corpus(*sizes: int) -> Corpus:
    random = np.random.default_rng(4)
    texts = tuple(random.integers(10, 4000, size) for size in sizes)
    return Corpus("random", texts, len(sizes), 3 * sum(sizes))


@paddle.no_grad()
def test_losses_are_those_of_the_logits() -> None:
    """Of the whole text where a window holds it, and with the context of the window elsewhere."""
    model = from_config(tiny("llama").replace(initializer_range=0.1), seed=1)
    model.eval()
    data = corpus(40, 25)
    (found,) = evaluate(model, [data], windowing("llama", 64, 32), 2)
    expected = 0.0
    for text in data.texts:
        logits = model(paddle.to_tensor([[START, *text[:-1]]]))[0]
        expected += float(F.cross_entropy(logits, paddle.to_tensor(text), reduction="sum"))
    assert found.nats == pytest.approx(expected, rel=1e-6)
    assert found.tokens == 65
    by_four = [
        evaluate(model, [data], windowing("llama", 16, 8), batch)[0].nats for batch in (1, 4)
    ]
    assert by_four[0] == pytest.approx(by_four[1], rel=1e-6)
    assert by_four[0] != pytest.approx(expected, rel=1e-4)


def test_figures() -> None:
    model = from_config(tiny("llama"), seed=1)
    model.eval()
    first, second = evaluate(model, [corpus(30), corpus(10, 5)], windowing("llama", 16, 8), 4)
    figures = first.as_dict()
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert figures["bits_per_byte"] == pytest.approx(figures["loss"] / math.log(2) / 3)
    both = total([first, second])
    assert (both.tokens, both.documents, both.text_bytes) == (45, 3, 135)
    assert both.nats == first.nats + second.nats
    unknown = total([first, replace(second, text_bytes=None)])
    assert unknown.text_bytes is None and unknown.as_dict()["bits_per_byte"] is None


def write_pair(prefix: Path, documents: list[list[int]]) -> None:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(np.asarray(document, dtype=np.uint16))
        writer.commit()


def test_a_text_file_a_folder_and_a_pair_are_the_same_corpus(tmp_path: Path) -> None:
    texts = ["naïve", "text\nof two lines", "third"]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(f'{{"body": {json_text(text)}}}\n' for text in texts))
    ids = [[*text.encode(), 256] for text in texts]
    write_pair(tmp_path / "pair", ids)
    size = sum(len(text.encode()) for text in texts)
    for name in (folder, lines, tmp_path / "pair", tmp_path / "pair.bin"):
        whole = Reader(Bytes(), 257, json_key="body").read(str(name))
        assert [text.tolist() for text in whole.texts] == [list(chain(*ids))]
        assert (whole.documents, whole.num_tokens, whole.text_bytes) == (3, size + 3, size)
        apart = Reader(Bytes(), 257, by_document=True, json_key="body").read(str(name))
        assert [text.tolist() for text in apart.texts] == ids
    assert Reader(None, 257).read(str(tmp_path / "pair")).text_bytes is None


def json_text(text: str) -> str:
    return '"' + text.replace("\n", "\\n") + '"'


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "name", "message"),
    [
        (Bytes(), 257, "missing.txt", "is not there"),
        (None, 257, "a.txt", "needs a tokenizer"),
        (Bytes(), 99, "a.txt", "the token 256, but vocab_size of the model is 99"),
        (Bytes(), 257, "bad.txt", "mend it, or take it out of --data"),
    ],
)
def test_corpora_that_cannot_be_measured(
    tmp_path: Path, tokenizer: Bytes | None, vocab_size: int, name: str, message: str
) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(UserError, match=message):
        Reader(tokenizer, vocab_size).read(str(tmp_path / name))
