"""The command that a result is recorded with can be typed on another machine."""

from __future__ import annotations

import pytest

from pypkg import _native
from pypkg.bench import environment
from pypkg.bench.environment import cpu_device, describe_run


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
    for name in ("ATEN_CPU_CAPABILITY", "MKL_DEBUG_CPU_TYPE", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    monkeypatch.setenv("PYPKG_CPU_ISA", "x86-64-v3")
    expected = "PYPKG_CPU_ISA=x86-64-v3 MKL_ENABLE_INSTRUCTIONS=AVX2 python -m pypkg.bench ops"
    assert describe_run(["ops"], 2)["command"] == expected


@pytest.mark.parametrize(
    ("maker", "isa", "device"),
    [
        ("GenuineIntel", "x86-64-v4", "cpu"),
        ("GenuineIntel", "x86-64-v3", "cpu x86-64-v3"),
        ("AuthenticAMD", "x86-64-v4", "cpu AMD"),
        ("AuthenticAMD", "x86-64-v3", "cpu AMD x86-64-v3"),
    ],
)
def test_machines_that_are_told_apart(monkeypatch, maker, isa, device):
    monkeypatch.setattr(environment, "cpu_fields", lambda: {"vendor_id": maker})
    monkeypatch.setattr(_native, "cpu_isas", lambda: ["x86-64", "x86-64-v3", "x86-64-v4"])
    monkeypatch.setattr(_native, "cpu_isa", lambda: isa)
    assert cpu_device(names_amd=True) == device
    assert cpu_device() == device.replace(" AMD", "")
