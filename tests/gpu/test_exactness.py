"""The checks of exactness of `make gpu-smoke`, on the CPU; and that they can fail."""

from __future__ import annotations

import exactness
import paddle
import pytest


def test_they_pass_here():
    rows = exactness.check_exactness()
    assert [row["case"].partition(",")[0] for row in rows] == [
        "main gradient", "product of a weight gradient", "embedding", "attention",
    ]  # fmt: skip
    assert all(row["passed"] for row in rows), rows


@pytest.mark.parametrize(
    "add",
    [
        lambda total, gradient: total.add_(gradient.astype("float32").clone() * 1.0),
        lambda total, gradient: total.add_(gradient.astype("float32") * 1.001),
    ],
    ids=["two copies", "another sum"],
)
def test_what_is_wrong_is_found(monkeypatch, add):
    monkeypatch.setattr(exactness, "add_to", add)
    assert [row["passed"] for row in exactness.check_exactness()] == [False, True, True, True]


def _rounded(total, x, gradient):
    product = paddle.matmul(x, gradient, transpose_x=True).astype("bfloat16").astype("float32")
    return product if total is None else total.add_(product)


@pytest.mark.parametrize(
    "add",
    [_rounded, lambda total, *given: exactness.ops.matmul(*given, transpose_x=True)],
    ids=["rounded first", "not added"],
)
def test_products_that_are_not_added_in_float32_are_found(monkeypatch, add):
    monkeypatch.setattr(exactness, "add_product", add)
    assert [row["passed"] for row in exactness.check_exactness()] == [True, False, True, True]


def test_another_result_in_another_run_is_found():
    assert exactness._repeats(lambda: [paddle.ones([3])])
    assert not exactness._repeats(lambda: [paddle.rand([3])])
