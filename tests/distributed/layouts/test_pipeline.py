"""Models cut into pipeline stages, on CPU processes, against the same models in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed_testing import run_ranks
from parity import FAMILIES
from pipeline_worker import LAYOUTS
from tiny_configs import tiny

from pypkg.errors import UserError
from pypkg.models import from_config
from pypkg.parallel import mesh

WORKER = Path(__file__).with_name("pipeline_worker.py")
# Together they have tied and untied tables, each kind of residual stream and of position, a prefix.
QUICK = [
    ("two", FAMILIES),
    ("four", ("gpt3", "chatglm")),
    ("interleaved", ("llama", "gpt3", "glm130b")),
    ("tensor", ("odd_vocabulary_tied", "baichuan2_13b", "bloom")),
    ("sequence", ("odd_vocabulary_tied", "multi_query", "chatglm")),
    ("data", ("qwen",)),
    ("sharding", ("opt",)),
]
SLOW = [
    ("four", ("llama", "bloom", "opt_350m", "glm130b")),
    ("interleaved", ("bloom", "opt_350m", "chatglm")),
    ("interleaved_four", ("qwen2", "gpt3")),
    ("tensor", ("llama", "gpt3", "opt_350m", "glm130b", "chatglm")),
    ("sequence", ("llama", "gpt3", "bloom", "opt_350m", "glm130b")),
    ("data", ("opt",)),
    ("sharding", ("glm4",)),
]


@pytest.mark.parametrize(
    ("name", "cases"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_same_as_one_process(tmp_path, name, cases):
    degrees = LAYOUTS[name].degrees
    results = run_ranks(WORKER, degrees.world_size, [tmp_path, name, *cases], timeout=150)
    first = results[0]
    for case, expected in first.items():
        of_case = [result[case] for result in results]
        assert all(result["drawn_alike"] for result in of_case), case
        assert expected["saved_alike"], case
        assert expected["losses"] == pytest.approx(expected["expected"], rel=1e-6), case
        assert all(result["tokens"] == expected["expected_tokens"] for result in of_case), case
        last = next(result for result in reversed(of_case) if result["token_losses"])
        if degrees.data == degrees.sharding == 1:
            assert last["token_losses"] == pytest.approx(
                expected["expected_token_losses"], rel=1e-6
            )
        assert all(result.get("same_with_recompute", True) for result in of_case), case
        assert all(result.get("refuses", True) for result in of_case), case
        for difference, parameter in expected["gradients"]:
            assert difference < 1e-5, (case, parameter)
        check_ownership(of_case, degrees.world_size // degrees.pipeline)


def check_ownership(of_case: list[dict], processes_of_a_stage: int) -> None:
    """Every parameter is counted once in a pipeline, under its name in the whole model."""
    names = of_case[0]["names"]
    for result in of_case:
        assert len(result["parameters"]) < len(names)
    counted = [n for result in of_case for n, elsewhere in result["parameters"].items()
               if not elsewhere]  # fmt: skip
    assert sorted(counted) == sorted(names * processes_of_a_stage)


def test_tied_embeddings_have_one_gradient(tmp_path):
    first, middle, last = (
        r["gpt3"] for r in run_ranks(WORKER, 3, [tmp_path, "interleaved", "gpt3"])
    )
    assert first["tied"] == last["tied"] > 0
    assert middle["tied"] is None
    assert not first["parameters"]["embed_tokens.weight"]
    assert last["parameters"]["embed_tokens.weight"]


def test_refuses_what_cannot_be_cut(monkeypatch):
    monkeypatch.setattr(mesh, "_current", mesh.Mesh(mesh.Degrees(pipeline=3)))
    with pytest.raises(UserError, match=r"num_hidden_layers \(2\) is less .* chunks, .* \(3\)"):
        from_config(tiny("llama"), seed=1)
    with pytest.raises(UserError, match="seed is None"):
        from_config(tiny("llama"))
