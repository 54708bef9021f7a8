"""The command that a result is recorded with can be typed on another machine."""

from __future__ import annotations

import pytest

from pypkg.bench.environment import describe_run


@pytest.mark.parametrize(
    ("arguments", "recorded"),
    [
        (["ops", "--op", "rotary"], "ops --op rotary"),
        (
            ["data-index", "--site-packages", "/a/b", "--rounds", "3"],
            "data-index --site-packages FOLDER --rounds 3",
        ),
        (["preprocess", "--paddlenlp=/a/bin/python"], "preprocess --paddlenlp=PYTHON"),
    ],
)
def test_paths_are_left_out(arguments, recorded):
    assert describe_run(arguments, 2)["command"].endswith(f"python -m pypkg.bench {recorded}")


def test_instruction_sets_are_part_of_it(monkeypatch):
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    monkeypatch.setenv("PYPKG_CPU_ISA", "x86-64-v3")
    expected = "PYPKG_CPU_ISA=x86-64-v3 MKL_ENABLE_INSTRUCTIONS=AVX2 python -m pypkg.bench ops"
    assert describe_run(["ops"], 2)["command"] == expected
