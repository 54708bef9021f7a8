"""metric_for_best_model: what an evaluation computes, under each name that PaddleNLP gives it."""

from __future__ import annotations

import json

import pytest

from pypkg.config import load_settings
from pypkg.config.support import support_problems


@pytest.mark.parametrize(
    ("metric", "possible"),
    [
        (None, True), ("loss", True), ("eval_loss", True), ("ppl", True), ("eval_ppl", True),
        ("perplexity", True), ("eval_perplexity", True), ("accuracy", False),
        ("eval_accuracy", False), ("Loss", False), ("", False),
    ],
)  # fmt: skip
def test_metrics_that_follow_from_the_loss(tmp_path, metric, possible):
    keys = {"model_name_or_path": "m", "input_dir": "d", "output_dir": "o", "max_steps": 9}
    chosen = {"load_best_model_at_end": True, "metric_for_best_model": metric, "do_eval": True}
    (tmp_path / "run.json").write_text(json.dumps(keys | chosen))
    problems = support_problems(load_settings([str(tmp_path / "run.json")]))
    assert len(problems) == (not possible)
    if not possible:
        assert f"metric_for_best_model is {json.dumps(metric)}" in problems[0]
        assert 'set it to "loss"' in problems[0]
