"""``python -m pypkg.bench data-index``, on few documents and with baselines made up here."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from pypkg import _native
from pypkg.bench.__main__ import main
from pypkg.bench.data import index_suite
from pypkg.bench.data.index_suite import find_baselines, make_corpus, measure, steps
from pypkg.bench.ops.case import BenchmarkError


class MadeUp:
    """Builds what fast_dataindex builds, as it is called; and prints to standard output."""

    def __init__(self, surplus: int = 0) -> None:
        self._surplus = surplus

    def build_sample_idx(self, sizes, documents, seq_length, epochs, tokens) -> np.ndarray:
        print("using:")
        sizes = sizes.astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(sizes[documents])])
        begins = np.arange((epochs * tokens - 1) // seq_length + 1) * seq_length
        positions = np.searchsorted(ends, begins, side="right") - 1
        rows = np.stack([positions, begins - ends[positions] + self._surplus], axis=1)
        return rows.astype(np.int32)

    def build_blending_indices(self, datasets, samples, weights, count, size, verbose) -> None:
        assert count == len(weights) and not verbose
        datasets[:], samples[:] = _native.build_blending_indices(weights, size)


def test_every_step_and_baseline(tmp_path, monkeypatch, capfd):
    baselines = ({"baseline": (MadeUp(), "1.0")}, ["a note"])
    monkeypatch.setattr(index_suite, "find_baselines", lambda _: baselines)
    output = tmp_path / "result.json"
    arguments = ["--documents", "3000", "--seq", "64", "--rounds", "2", "--json", str(output)]
    assert main(["data-index", *arguments]) == 0
    result = json.loads(output.read_text())
    assert result["baselines"] == {"baseline": "1.0"} and result["notes"] == ["a note"]
    baselines: dict[str, list[str]] = {}
    for row in result["rows"]:
        baselines.setdefault(row["step"], []).append(row["baseline"])
        assert row["count"] == 2 and row["median"] > 0
        assert row["map_bytes"] > 0 and row["peak_bytes"] >= 0
    assert baselines == {
        "document order": ["pypkg", "NumPy"],
        "sample order": ["pypkg", "NumPy"],
        "sample beginnings": ["pypkg", "baseline"],
        "all index maps": ["pypkg", "NumPy + baseline"],
        "blend": ["pypkg", "baseline"],
    }
    printed = capfd.readouterr().out
    assert "NumPy + baseline" in printed and "baseline 1.0" in printed and "a note" in printed


def test_a_baseline_that_builds_something_else():
    corpus = make_corpus(500, 16)
    found = {step.name: step for step in steps(corpus, {"wrong": (MadeUp(surplus=1), "1.0")})}
    for name in ("sample beginnings", "all index maps"):
        with pytest.raises(BenchmarkError, match="wrong builds something else than pypkg"):
            measure(found[name], 1)


def test_memory_that_a_builder_takes():
    step = SimpleNamespace(
        name="s", work="w", builders={"pypkg": lambda: (np.ones(64 << 20, np.uint8),)}
    )
    (row,) = measure(step, 1)
    assert row["map_bytes"] == 64 << 20
    assert 0.9 < row["peak_bytes"] / row["map_bytes"] < 1.5


def test_baselines_are_looked_for_where_one_says(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    baselines, notes = find_baselines([tmp_path])
    assert baselines == {}
    assert len(notes) == 2 and "megatron-core is not installed" in notes[1]
