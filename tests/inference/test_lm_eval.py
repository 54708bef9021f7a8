"""A model for lm-evaluation-harness, on requests and on a task that are made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paddle
import paddle.nn.functional as F
import pytest
from tiny_configs import tiny

from pypkg.data.tokenizers.load import load_tokenizer
from pypkg.data.tokenizers.train_bpe import train_tokenizer
from pypkg.models import from_config, from_pretrained, save_pretrained

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow  # importing it takes seconds

TEXTS = ["the cat sat on the mat\n", "a dog ran in the park\n", "one two three four five\n"] * 9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(TEXTS, 300, folder, "test")
    size = load_tokenizer(folder).vocab_size
    config = tiny("llama").replace(vocab_size=size, initializer_range=0.3)
    save_pretrained(from_config(config, seed=1), folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    from pypkg.inference.lm_eval import PypkgLM

    return PypkgLM(str(checkpoint), batch_size=2, max_length=24)


def requests(kind: str, arguments: list[tuple]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=number)
        for number, each in enumerate(arguments)
    ]


def by_hand(checkpoint: Path, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    model = from_pretrained(checkpoint)
    ids = [*context, *continuation]
    with paddle.no_grad():
        logits = model(paddle.to_tensor([ids[:-1]]))[0, len(context) - 1 :]
    scores = F.log_softmax(logits).numpy()
    greedy = scores.argmax(axis=-1).tolist() == continuation
    return float(sum(row[token] for row, token in zip(scores, continuation, strict=True))), greedy


def test_loglikelihoods(model: Any, checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    pairs = [("the cat", " sat on"), ("a", " dog ran in the park"), ("one two three", " four")]
    found = model.loglikelihood(requests("loglikelihood", pairs))
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
        expected = by_hand(checkpoint, before, whole[len(before) :])
        assert score == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]


def test_a_greedy_continuation_is_told(model: Any, checkpoint: Path) -> None:
    (text,) = model.generate_until(
        requests("generate_until", [("the cat", {"max_gen_toks": 1, "until": []})])
    )
    ((_, greedy),) = model.loglikelihood(requests("loglikelihood", [("the cat", text)]))
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer.encode("the cat" + text)[:-1] == tokenizer.encode("the cat"):
        assert greedy


def test_a_whole_text_in_windows(model: Any, checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    short, long = TEXTS[0], "".join(TEXTS)
    found = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(short,), (long,)]))
    expected = by_hand(checkpoint, [tokenizer.eos_id], tokenizer.encode(short))[0]
    assert found[0] == pytest.approx(expected, abs=1e-4)
    assert found[1] < found[0]


def test_a_task(model: Any, tmp_path: Path) -> None:
    """Multiple choice on data that this test writes."""
    (tmp_path / "questions.jsonl").write_text(
        "".join(f'{{"question": "the cat {n}", "answers": ["sat", "ran"], "gold": {n % 2}}}\n'
                for n in range(4))
    )  # fmt: skip
    task = {
        "task": "made_here",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    results = lm_eval.simple_evaluate(model, tasks=[task], bootstrap_iters=0)
    assert 0 <= results["results"]["made_here"]["acc,none"] <= 1
