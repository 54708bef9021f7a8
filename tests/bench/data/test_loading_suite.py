"""``python -m pypkg.bench data-loading`` on a small corpus."""

from __future__ import annotations

import itertools
import json
import time

import pytest

from pypkg.bench.__main__ import main
from pypkg.bench.data import loading_suite
from pypkg.bench.report.page import read_result, render

ARGUMENTS = [
    "data-loading", "--megatokens", "1", "--samples", "64", "--rounds", "2", "--steps", "3",
]  # fmt: skip


def test_measures_reads_and_waits(tmp_path, capsys) -> None:
    file = tmp_path / "result.json"
    assert main([*ARGUMENTS, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["rows"][0]["baseline"] == "pypkg"
    assert all(row["samples_per_second"] > 100 and row["rounds"] == 2 for row in result["rows"])
    assert len(result["waits"]) == 6
    for row in result["waits"]:
        assert row["steps"] == 3 and 0 < row["mean"] <= row["largest"] < 5
    assert render(read_result(file)) in capsys.readouterr().out
    ratio = result["rows"][0]["samples_per_second"] / result["rows"][3]["samples_per_second"]
    assert f" {ratio:.2f} |" in render(result)


def test_other_samples_end_the_run(monkeypatch, capsys) -> None:
    real = loading_suite._numpy_sample
    monkeypatch.setattr(loading_suite, "_numpy_sample", lambda *what: real(*what) + 1)
    assert main(ARGUMENTS) == 1
    assert "error: the samples are not those that NumPy cuts" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_the_wait_is_that_for_the_batch(seconds: float) -> None:
    """All of what a batch takes that is made where it is asked for, and nothing of the loop's."""

    def batches():
        for number in itertools.count():
            time.sleep(seconds)
            yield {"number": number}

    waits = loading_suite._wait_of(batches(), 5)
    assert len(waits) == 5 and min(waits) >= seconds
    assert sorted(waits)[2] < seconds + 0.02  # a round of the loop takes 33 ms
