"""Which GPUs a build is for: the variable, the defaults of each nvcc, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cuda_architectures import (
    ArchitectureError,
    default_architectures,
    parse_architectures,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("nvcc", "expected"),
    [
        ((11, 0), "80-real 80-virtual"),
        ((11, 8), "80-real 86-real 89-real 90-real 90-virtual"),
        ((12, 0), "80-real 86-real 89-real 90a-real 90-virtual"),
        ((12, 6), "80-real 86-real 89-real 90a-real 90-virtual"),
        ((12, 8), "80-real 86-real 89-real 90a-real 100-real 120-real 120-virtual"),
        ((13, 0), "80-real 86-real 89-real 90a-real 100-real 120-real 120-virtual"),
    ],
)
def test_defaults_are_what_nvcc_knows(nvcc, expected):
    assert default_architectures(nvcc) == expected.split()
    assert parse_architectures(";".join(expected.split()), nvcc) == expected.split()


def test_nvcc_that_is_too_old():
    with pytest.raises(ArchitectureError, match=r"nvcc 10\.2 does not know compute capability"):
        default_architectures((10, 2))


@pytest.mark.parametrize("text", ["80;90a-real", "80, 90a-real", " 80 90a-real\n", "80;90a-real;"])
def test_separators(text):
    assert parse_architectures(text, (13, 0)) == ["80", "90a-real"]


@pytest.mark.parametrize(
    ("text", "nvcc", "message"),
    [
        ("70", (12, 6), "'70', but .* compute capability 8.0 .* V100 and T4 .* PYPKG_WITH_CUDA=0"),
        ("80;75-real", (12, 6), "'75-real', but .* compute capability 8.0"),
        ("90a", (11, 8), r"'90a', which takes nvcc 12\.0 or newer; found nvcc 11\.8"),
        ("80;120", (12, 6), r"'120', which takes nvcc 12\.8 or newer; found nvcc 12\.6"),
        ("8.0+PTX", (12, 6), r"'8\.0\+PTX'; expected numbers such as 80-real"),
        ("sm_80", (12, 6), "'sm_80'; expected numbers"),
        ("80-ptx", (12, 6), "'80-ptx'; expected numbers"),
        ("81", (13, 0), "'81'; known are 80, 86"),
    ],
)
def test_what_is_refused(text, nvcc, message):
    with pytest.raises(ArchitectureError, match=message):
        parse_architectures(text, nvcc)


@pytest.mark.parametrize(
    ("asked", "code", "output"),
    [("", 0, "90a-real;90-virtual\n"), ("89", 0, "89\n"), ("75", 1, "V100 and T4 run the")],
)
def test_cmake_asks_the_nvcc_of_the_environment(tmp_path, asked, code, output):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    environment = {"CUDA_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    ran = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "cuda_architectures.py")],
        env=environment | {"PYPKG_CUDA_ARCHITECTURES": asked}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == code
    assert output in ran.stdout + ran.stderr
