"""Texts that a model writes as it learns: the file, going back, and what they leave alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from byte_tokenizer import Bytes
from tiny_configs import tiny
from trainer_testing import SETTINGS, Data, Rows, Saver, TimedEngine
from training_testing import Clock, healer

from pypkg.config import load_settings
from pypkg.errors import UserError
from pypkg.models import from_config
from pypkg.models.building import Model
from pypkg.training.reporting.metrics import Throughput
from pypkg.training.reporting.text_samples import TextSamples
from pypkg.training.state import TrainerState
from pypkg.training.trainer import Trainer

PROMPTS = ["once", "naïve"]


@pytest.fixture
def model() -> Model:
    return from_config(tiny("llama").replace(vocab_size=257, initializer_range=0.5), seed=2)


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_each_step_writes_a_line_for_each_prompt(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "samples.jsonl"
    told: list[tuple] = []
    tracker = SimpleNamespace(report_texts=lambda step, texts: told.append((step, texts)))
    samples = TextSamples(model, Bytes(), PROMPTS, 12, 3, file, [tracker])
    with caplog.at_level(logging.INFO, "pypkg"):
        first = samples.write(5)
    assert samples.write(10) == first  # the same weights and random numbers
    assert model.training
    expected = [(step, prompt) for step in (5, 10) for prompt in PROMPTS]
    assert [(row["step"], row["prompt"]) for row in rows(file)] == expected
    assert [row["text"] for row in rows(file)] == 2 * [each.text for each in first]
    texts = [(each.prompt, each.text) for each in first]
    assert told == [(5, texts), (10, texts)]
    assert first[0].text and first[0].text != first[1].text
    assert f"step 5, 'naïve' -> {first[1].text!r}" in caplog.text


def test_going_back_drops_later_steps(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    samples = TextSamples(model, Bytes(), PROMPTS[:1], 4, 0, file)
    samples.rewind(0)
    assert not file.exists()
    for step in (2, 4, 6):
        samples.write(step)
    with file.open("a") as stream:
        stream.write('{"step": 4, "pro')  # of a run that was killed
    samples.rewind(4)
    assert [row["step"] for row in rows(file)] == [2, 4]
    samples.write(6)
    assert [row["step"] for row in rows(file)] == [2, 4, 6]


def test_a_file_of_others_is_named(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text('{"text": "mine"}\n')
    with pytest.raises(UserError, match=r"samples\.jsonl has a line .*mine.*output_dir"):
        TextSamples(model, Bytes(), PROMPTS, 4, 0, file).rewind(0)


def test_a_prompt_that_is_too_long_is_refused_at_the_start(tmp_path: Path) -> None:
    gpt = from_config(tiny("gpt3").replace(max_position_embeddings=8), seed=2)
    with pytest.raises(UserError, match="a prompt has 9 tokens"):
        TextSamples(gpt, Bytes(), ["a" * 9], 4, 0, tmp_path / "samples.jsonl")


class Texts:
    """A text takes 500 s."""

    def __init__(self, clock: Clock) -> None:
        self.steps: list[int] = []
        self._clock = clock

    def write(self, step: int) -> None:
        self.steps.append(step)
        self._clock.seconds += 500


@pytest.mark.parametrize("logging_steps", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(
    ("sample_steps", "expected"), [(5, [5, 10, 12]), (3, [3, 6, 9, 12]), (0, [])]
)
def test_texts_do_not_slow_training(
    clock: Clock, tmp_path: Path, logging_steps: int, sample_steps: int, expected: list[int]
) -> None:
    """16 tokens a second, whichever text comes between two log lines."""
    given = SETTINGS | {"output_dir": tmp_path, "logging_steps": logging_steps}
    if sample_steps:
        given |= {"sample_prompts": "a", "sample_tokens": 1, "sample_steps": sample_steps}
    settings = load_settings(
        [word for key, value in given.items() for word in (f"--{key}", str(value))]
    )
    state, rows, texts = TrainerState(), Rows(), Texts(clock)
    Trainer(
        settings,
        TimedEngine(clock),
        state,
        data=Data(clock),
        checkpointer=Saver(clock),
        healer=healer(settings, state),
        reporters=[rows],
        throughput=Throughput(1.0, None),
        text_samples=texts if sample_steps else None,
    ).train()
    assert texts.steps == expected
    steps = range(logging_steps, 13, logging_steps)
    assert rows.of("tokens_per_second_per_device") == dict.fromkeys(steps, 16.0)
    assert rows.of("consumed_tokens") == {step: 16 * step for step in steps}
