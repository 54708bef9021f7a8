"""What the compiler makes of the Triton kernels for Ampere and Hopper: no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed; it comes with .[test]")

SCRIPT = Path(__file__).resolve().parent / "compile_triton_kernels.py"
ROOT = SCRIPT.parents[3]
# Loads of one value per row, and the cosines of a few pairs.
PER_ROW = {"b64", "b32", "b16"}
REGISTERS = 65536  # of a multiprocessor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """In a process of its own: in this one Triton interprets."""
    cache = tmp_path_factory.mktemp("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def test_every_kernel_is_compiled_for_both_architectures(compiled):
    kernels = {(each["name"].split()[-1], each["capability"]) for each in compiled}
    names = {"forward_kernel", "backward_kernel", "reduce_kernel", "rotary_kernel"}
    assert kernels == {(name, capability) for name in names for capability in (80, 90)}
    assert len(compiled) >= 100


def test_nothing_lies_in_local_memory(compiled):
    """Neither spilled registers nor arrays."""
    assert {each["name"]: each["local_bytes"] for each in compiled if each["local_bytes"]} == {}


def test_a_multiprocessor_holds_1024_threads_or_a_row_of_the_longest(compiled):
    """So that enough loads are under way to keep device memory busy."""
    for each in compiled:
        threads = REGISTERS // each["registers"]
        backward = "backward" in each["name"] and each["name"].startswith("rms_norm")
        assert threads >= (512 if backward else 1024), each
        assert each["registers"] * each["warps"] * 32 <= REGISTERS, each


def test_matrices_are_moved_in_vectors_of_16_bytes(compiled):
    """All but a value per row, and rows of 24 pairs, whose halves are aligned to 8 bytes alone."""
    for each in compiled:
        narrow = PER_ROW | ({"v2.b32"} if "24 of 96" in each["name"] else set())
        assert each["loads"]["v4.b32"] >= 1, each
        assert set(each["loads"]) <= {"v4.b32"} | narrow, each
        assert sum(each["loads"].get(kind, 0) for kind in PER_ROW) <= 3, each
        wide_stores = each["stores"].get("v4.b32", 0)
        per_row = "reduce" in each["name"] or "cross_entropy" in each["name"]
        assert wide_stores >= 1 or (per_row and "backward" not in each["name"]), each
