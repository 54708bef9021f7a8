"""Generation: greedy, sampled, until an end, beyond lengths at which a model changes."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest
from model_testing import GOLDEN, overrides
from tiny_configs import tiny

from pypkg.errors import UserError
from pypkg.models import ModelConfig, from_config, from_pretrained
from pypkg.models.building import Model
from pypkg.models.generate import generate, next_logits, stream
from pypkg.models.layers.kv_cache import KVCache
from pypkg.models.sampling import Sampling

PROMPTS = [[5, 3, 8], [1, 2, 60]]
GREEDY = Sampling(temperature=0.0)
BY_TRANSFORMERS = json.loads((GOLDEN / "generation.json").read_text(encoding="utf-8"))


@pytest.fixture
def model(tiny_config: ModelConfig) -> Model:
    return evaluated(tiny_config.replace(initializer_range=0.5))


def evaluated(config: ModelConfig) -> Model:
    model = from_config(config, seed=1)
    model.eval()
    return model


@paddle.no_grad()
def most_likely(model: Model, prompt: list[int], count: int) -> list[int]:
    """``count`` tokens after ``prompt``, each by a pass over the whole row."""
    row = list(prompt)
    for _ in range(count):
        row.append(int(model(paddle.to_tensor([row]))[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("fixture", BY_TRANSFORMERS)
def test_greedy_tokens_are_those_of_transformers(fixture: str) -> None:
    """A batch of prompts of different lengths."""
    model = from_pretrained(GOLDEN / fixture, **overrides(fixture))
    case = BY_TRANSFORMERS[fixture]
    found = generate(model, case["prompts"], len(case["tokens"][0]), GREEDY)
    assert found == case["tokens"]
    padding = [max(map(len, case["prompts"])) - len(prompt) for prompt in case["prompts"]]
    rows = [[0] * pad + row for pad, row in zip(padding, case["prompts"], strict=True)]
    cache, new, highest = KVCache(model.config, padding), np.array(rows), []
    for tokens in np.array(case["tokens"]).T:
        highest.append(next_logits(model, paddle.to_tensor(new), cache).max(axis=-1).numpy())
        new = tokens[:, None]
    np.testing.assert_allclose(np.array(highest).T, case["logits"], rtol=0, atol=1e-4)


def test_transformers_has_made_every_family_that_it_has() -> None:
    assert {fixture.partition("/")[0] for fixture in BY_TRANSFORMERS} == {
        *("bloom", "family_variants", "glm4_glm", "glm4_glm4", "gpt3", "llama", "llama_variants"),
        *("mistral", "opt", "qwen2", "qwen3", "stablelm"),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dynamic_ntk_length": 8, "logn_attention_length": 8},
        {"max_position_embeddings": 8, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ],
)
def test_greedy_takes_the_most_likely(model: Model, changes: dict) -> None:
    """Where the frequencies depend on the length, rows of every length go through them."""
    model = evaluated(model.config.replace(**changes))
    prompts = [[5, 3, 8], [1, 2, 60, 4, 7], [9, 9, 1]]
    found = generate(model, prompts, 18, GREEDY)
    assert found == [most_likely(model, prompt, 18) for prompt in prompts]


def test_lengths_have_to_be_equal_where_frequencies_depend_on_them(model: Model) -> None:
    model = evaluated(model.config.replace(dynamic_ntk_length=8))
    with pytest.raises(UserError, match="prompts of 1 to 2 tokens"):
        next(stream(model, [[1], [1, 2]], 1))


def test_sampling_is_given_by_the_seed_and_the_number(model: Model) -> None:
    first = generate(model, PROMPTS, 20, Sampling(seed=4))
    assert generate(model, PROMPTS, 20, Sampling(seed=4)) == first
    assert generate(model, PROMPTS, 20, Sampling(seed=5)) != first
    assert generate(model, PROMPTS[:1], 20, Sampling(seed=4)) == first[:1]
    alone = stream(model, PROMPTS[1:], 20, Sampling(seed=4), numbers=[1])
    assert [token for (token,) in alone] == first[1]


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [(Sampling(2.0, top_k=4), 4), (Sampling(2.0, top_p=0.6), None), (Sampling(2.0), 61)],
)
def test_frequencies(model: Model, sampling: Sampling, kept: int | None) -> None:
    logits = model(paddle.to_tensor([PROMPTS[0]]))[0, -1].numpy().astype(np.float64) / 2.0
    order = np.argsort(-logits)
    expected = np.exp(logits[order])
    expected /= expected.sum()
    if kept is None:  # the fewest that reach 0.6
        kept = int((np.cumsum(expected) < 0.6).sum()) + 1
        assert 1 < kept < 61
    expected = expected[:kept] / expected[:kept].sum()
    tokens = np.array(generate(model, [PROMPTS[0]] * 4000, 1, sampling))[:, 0]
    counts = np.array([(tokens == token).sum() for token in order[:kept]])
    assert counts.sum() == 4000  # nothing outside of what is kept
    deviation = np.sqrt(expected * (1 - expected) / 4000)
    assert (np.abs(counts / 4000 - expected) < 5 * deviation + 1e-9).all()


def test_a_row_ends_and_the_others_go_on(model: Model) -> None:
    whole = generate(model, PROMPTS, 12, GREEDY)
    end = next(token for token in whole[0][2:] if token not in whole[1])
    place = whole[0].index(end)
    assert generate(model, PROMPTS, 12, GREEDY, [end]) == [whole[0][:place], whole[1]]
    steps = list(stream(model, PROMPTS, 12, GREEDY, [end]))
    assert [first for first, _ in steps] == whole[0][: place + 1] + [None] * (11 - place)
    assert len(list(stream(model, PROMPTS[:1], 12, GREEDY, [end]))) == place + 1


def test_learned_positions_end() -> None:
    model = evaluated(tiny("gpt3").replace(max_position_embeddings=8))
    prompts = [[5, 6, 7, 8, 9, 10], [5, 6]]
    found = generate(model, prompts, 20, GREEDY)
    assert found == [most_likely(model, prompt, 3) for prompt in prompts]
    with pytest.raises(UserError, match=r"9 tokens.*max_position_embeddings \(8\)"):
        generate(model, [list(range(9))], 1)


def test_nothing_is_recorded(model: Model) -> None:
    for _ in stream(model, PROMPTS, 2, GREEDY):
        assert paddle.is_grad_enabled()  # while the caller has its turn
    ids = paddle.to_tensor(PROMPTS)
    assert next_logits(model, ids, KVCache(model.config, [0, 0])).stop_gradient


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -3}, "top_k is -3"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_sampling(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**options)


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_prompts_without_tokens(model: Model, prompts: list) -> None:
    with pytest.raises(UserError, match="holds no token"):
        generate(model, prompts, 1)
