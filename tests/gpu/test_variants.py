"""Variants of kernels that differ in a constant."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from pathlib import Path

import pytest
from variants import ROOT, Variant, VariantError

ADAMW = ROOT / "csrc" / "kernels" / "adamw" / "adamw.cu"


def test_one_definition_differs(tmp_path: Path):
    Variant.parse("adamw.cu:kThreads=512").write_sources(tmp_path / "sources")
    original = ADAMW.read_text().splitlines()
    changed = (tmp_path / "sources" / ADAMW.relative_to(ROOT)).read_text().splitlines()
    pairs = [pair for pair in zip(original, changed, strict=True) if pair[0] != pair[1]]
    assert pairs == [("constexpr int kThreads = 256;", "constexpr int kThreads = 512;")]
    same = filecmp.dircmp(ADAMW.parent, tmp_path / "sources" / ADAMW.parent.relative_to(ROOT))
    assert same.diff_files == ["adamw.cu"] and not same.left_only


def test_the_copy_is_all_that_the_build_needs(tmp_path: Path):
    Variant.parse("adamw.cu:kThreads=512").write_sources(tmp_path / "sources")
    configure = [sys.executable, "-m", "cmake", "-S", str(tmp_path / "sources")]
    configure += [
        "-B",
        str(tmp_path / "build"),
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DPYPKG_BUILD_PADDLE_OPS=OFF",
    ]
    done = subprocess.run(configure, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kThreads=512", "reads FILE:CONSTANT=VALUE"),
        ("adamw.cuh:kThreads=512", "none of the kernels' files: adamw.cu"),
        ("adamw.cu:kThread=512", r"defines kThread 0 times; it has .*kThreads"),
    ],
)
def test_what_cannot_be_made(tmp_path: Path, text: str, message: str):
    with pytest.raises(VariantError, match=message):
        Variant.parse(text).write_sources(tmp_path / "sources")
