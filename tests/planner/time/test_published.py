"""The profile of PaddleNLP against the eleven runs that it has published."""

from __future__ import annotations

import pytest

from pypkg.models.architecture.registry import load_config
from pypkg.planner.time.published import (
    BUFFER_BYTES,
    NORM_HEAD_BYTES,
    PUBLISHED,
    paddlenlp_memory,
    paddlenlp_time,
)

RUNS = {run.model: run for run in PUBLISHED}


def memory_of(name: str) -> int:
    return sum(paddlenlp_memory(RUNS[name], load_config(name)).values())


def speed_of(name: str) -> float:
    return paddlenlp_time(RUNS[name], load_config(name)).tokens_per_second


@pytest.mark.parametrize("name", RUNS)
def test_memory_of_the_published_runs(name):
    assert memory_of(name) == pytest.approx(RUNS[name].memory, rel=0.03)


@pytest.mark.parametrize("name", RUNS)
def test_speed_of_the_published_runs(name):
    assert speed_of(name) == pytest.approx(RUNS[name].tokens_per_second, rel=0.1)


def test_the_fitted_runs():
    """Each constant gives the run that it was fitted to closely, and a neighbour of it worse."""
    assert (BUFFER_BYTES, NORM_HEAD_BYTES) == (4, 12)
    for name in ("meta-llama/Llama-2-7b", "baichuan-inc/Baichuan2-7B-Base"):
        assert memory_of(name) == pytest.approx(RUNS[name].memory, rel=2e-3)
    llama = RUNS["meta-llama/Llama-2-7b"]
    assert speed_of(llama.model) == pytest.approx(llama.tokens_per_second, rel=5e-3)


def test_what_families_differ_in():
    """Copies of inputs under tensor parallelism, a normalised head, a dense mask, recompute."""
    llama, qwen = (load_config(name) for name in ("meta-llama/Llama-2-7b", "qwen/qwen-7b"))
    run = RUNS["meta-llama/Llama-2-7b"]
    of_llama, of_qwen = (paddlenlp_memory(run, each) for each in (llama, qwen))
    tensor = 2 * run.rows * run.sequence * llama.hidden_size
    # Two inputs of query, key and value fewer, four times two float32 halves more.
    assert of_qwen["activations"] - of_llama["activations"] == 32 * (4 - 2) * tensor
    assert "ALiBi mask" not in of_llama and "normalised head" not in of_llama
    name = "baichuan-inc/Baichuan2-13B-Base"
    of_baichuan = paddlenlp_memory(RUNS[name], load_config(name))
    assert of_baichuan["ALiBi mask"] == 4 * 40 * 4096**2
    assert of_baichuan["activations"] == 40 * 2 * 4096 * 5120
