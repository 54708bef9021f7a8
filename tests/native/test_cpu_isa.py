"""Versions of the CPU kernels: which runs, and that each computes the same."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from pypkg import _native
from pypkg.errors import UserError

ISAS = _native.cpu_isas()


@pytest.fixture(autouse=True)
def restored():
    yield
    _native.set_cpu_isa("")


def started_with(isa: str, statement: str) -> subprocess.CompletedProcess:
    """A new process, where the environment variable is read."""
    return subprocess.run(
        [sys.executable, "-c", f"from pypkg import _native; {statement}"],
        env=os.environ | {"PYPKG_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_variable_chooses(isa):
    done = started_with(isa, "print(_native.cpu_isa())")
    assert done.stdout.split() == [isa], done.stderr


def test_without_a_choice_the_widest_runs():
    assert started_with("", "print(_native.cpu_isa())").stdout.split() == [ISAS[-1]]


def test_a_name_that_is_no_version():
    done = started_with("x86-64-v9", "_native.cpu_isa()")
    message = "PYPKG_CPU_ISA is 'x86-64-v9', but the CPU kernels that this processor can run are"
    assert f"UserError: {message}" in done.stderr
    assert all(isa in done.stderr for isa in ISAS)
    with pytest.raises(UserError, match="the name of the version is 'avx9'"):
        _native.set_cpu_isa("avx9")


def adamw(rng: np.random.Generator) -> list[np.ndarray]:
    arrays = list(rng.uniform(0.1, 1.0, (4, 1001)).astype(np.float32))
    _native.adamw([(*arrays, None, 0.1, 0.9, 0.999)], learning_rate=0.01)
    return arrays


def rms_norm(rng: np.random.Generator) -> list[np.ndarray]:
    x, y = rng.standard_normal((2, 50, 1001), dtype=np.float32)
    weight, rstd = rng.standard_normal(1001, dtype=np.float32), np.empty(50, np.float32)
    _native.rms_norm_forward(x, weight, y, rstd)
    return [y, rstd]


def cross_entropy(rng: np.random.Generator) -> list[np.ndarray]:
    logits, dlogits = rng.standard_normal((2, 5, 1001), dtype=np.float32)
    labels = rng.integers(0, 1001, 5)
    loss, lse = np.empty((2, 5), np.float32)
    _native.cross_entropy_forward(logits, labels, loss, lse)
    _native.cross_entropy_backward(logits, labels, lse, np.ones(5, np.float32), dlogits)
    return [loss, lse, dlogits]


def flash_attention(rng: np.random.Generator) -> list[np.ndarray]:
    q, k, v, out = rng.standard_normal((4, 1, 130, 2, 72), dtype=np.float32)
    lse = np.empty((1, 2, 130), np.float32)
    _native.flash_attention_forward(q, k, v, out, lse, scale=0.1)
    return [out, lse]


def blend(rng: np.random.Generator) -> list[np.ndarray]:
    weights = rng.dirichlet(np.ones(11))
    return list(_native.build_blending_indices(weights, 1000))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kernel", [rms_norm, cross_entropy, flash_attention])
def test_versions_differ_in_roundings_alone(kernel, isa):
    _native.set_cpu_isa(ISAS[0])
    expected = kernel(np.random.default_rng(0))
    _native.set_cpu_isa(isa)
    for actual, wanted in zip(kernel(np.random.default_rng(0)), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kernel", [adamw, blend])
def test_what_every_version_has_the_bits_of(kernel, isa):
    _native.set_cpu_isa(ISAS[0])
    expected = kernel(np.random.default_rng(0))
    _native.set_cpu_isa(isa)
    for actual, wanted in zip(kernel(np.random.default_rng(0)), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_each_version_is_another_one():
    """Sums over another number of lanes round otherwise: the switch does something."""
    results = set()
    for isa in ISAS:
        _native.set_cpu_isa(isa)
        results.add(rms_norm(np.random.default_rng(0))[1].tobytes())
    assert len(results) == len(ISAS)


def test_bfloat16_products_belong_to_the_widest():
    for isa in ISAS:
        _native.set_cpu_isa(isa)
        assert not _native.matmul_bfloat16_supported() or isa == "x86-64-v4"
