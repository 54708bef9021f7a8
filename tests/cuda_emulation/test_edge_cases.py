"""What the CUDA kernels do at the edges of their contracts."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
from guarded_memory import GuardedArray


def array(values, dtype: str = "float32") -> GuardedArray:
    values = np.asarray(values, float if "float" in dtype else int)
    return GuardedArray(values.shape, dtype).write(values)


def test_a_label_outside_the_vocabulary_gives_nan(emulated: ModuleType):
    logits = array(np.random.default_rng(0).standard_normal((4, 50)), "bfloat16")
    labels = array([3, 50, -100, -1], "int64")
    loss, lse, row_sum = (GuardedArray((4,), "float32") for _ in range(3))
    emulated.cross_entropy_forward(logits, labels, loss, lse, None, row_sum)
    assert list(np.isnan(loss.numpy())) == [False, True, False, True]
    assert list(np.isnan(row_sum.numpy())) == [False, True, False, True]  # survives a merge
    assert loss.numpy()[2] == 0
    dlogits = GuardedArray((4, 50), "bfloat16")
    emulated.cross_entropy_backward(logits, labels, lse, array(np.ones(4)), dlogits)
    rows = dlogits.numpy()
    assert np.isfinite(rows[0]).all() and np.isnan(rows[[1, 3]]).all() and (rows[2] == 0).all()


def test_infinite_logits(emulated: ModuleType):
    values = np.zeros((3, 40))
    values[0] = -np.inf
    values[1, 7] = -np.inf
    values[2, 7] = np.inf
    loss, lse, row_max, row_sum = (GuardedArray((3,), "float32") for _ in range(4))
    labels = array([7, 7, -100], "int64")
    emulated.cross_entropy_forward(array(values), labels, loss, lse, row_max, row_sum)
    assert lse.numpy()[0] == row_max.numpy()[0] == -np.inf and row_sum.numpy()[0] == 0
    assert np.isnan(loss.numpy()[0]) and loss.numpy()[1] == np.inf and loss.numpy()[2] == 0
    dlogits = GuardedArray((3, 40), "float32")
    emulated.cross_entropy_backward(array(values), labels, lse, array(np.ones(3)), dlogits)
    assert (dlogits.numpy()[2] == 0).all()  # ignored, whatever the logits


@pytest.mark.parametrize("head_dim", [16, 6])
def test_a_position_outside_the_table_gives_nan(emulated: ModuleType, head_dim: int):
    q = array(np.ones((1, 3, 2, head_dim)))
    table = array(np.ones((4, head_dim // 2)))
    out = GuardedArray((1, 3, 2, head_dim), "float32")
    positions = array([[3, 4, -1]], "int64")
    emulated.rotary_embedding(q, None, table, table, out, None, positions)
    assert np.isfinite(out.numpy()[:, 0]).all() and np.isnan(out.numpy()[:, 1:]).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_rows_give_a_zero_weight_gradient(emulated: ModuleType, dtype: str):
    empty, weight = GuardedArray((0, 24), dtype), array(np.ones(24), dtype)
    dweight, rstd = GuardedArray((24,), dtype), GuardedArray((0,), "float32")
    emulated.rms_norm_forward(empty, weight, empty, rstd)
    workspace = GuardedArray((emulated.rms_norm_backward_workspace(empty),), "float32")
    emulated.rms_norm_backward(empty, empty, weight, rstd, empty, dweight, workspace)
    assert (dweight.numpy() == 0).all()


@pytest.mark.parametrize(("seq_q", "seq_k"), [(5, 0), (0, 5), (0, 0)])
def test_attention_over_empty_sequences(emulated: ModuleType, seq_q: int, seq_k: int):
    q, out, dq = (GuardedArray((1, seq_q, 2, 16), "bfloat16") for _ in range(3))
    k, v, dk, dv = (GuardedArray((1, seq_k, 1, 16), "bfloat16") for _ in range(4))
    q.write(np.ones(q.storage.shape)), k.write(np.ones(k.storage.shape))
    v.write(np.ones(v.storage.shape))
    lse = GuardedArray((1, 2, seq_q), "float32")
    emulated.flash_attention_forward(q, k, v, out, lse, scale=1.0)
    assert (out.numpy() == 0).all() and (lse.numpy() == -np.inf).all()
    workspace = GuardedArray((emulated.flash_attention_backward_workspace(q, k),), "float32")
    emulated.flash_attention_backward(q, q, k, v, out, lse, dq, dk, dv, workspace, scale=1.0)
    assert all((x.numpy() == 0).all() for x in (dq, dk, dv))


@pytest.mark.parametrize("kernel", ["ampere", "hopper"])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_attention_with_a_scale_that_is_not_positive(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch, kernel: str, scale: float
):
    """As with queries of the other sign."""
    monkeypatch.setenv("PYPKG_FLASH_ATTENTION", kernel)
    rng = np.random.default_rng(0)
    shape = (1, 70, 1, 32)
    q, k, v, dout = (rng.standard_normal(shape) for _ in range(4))

    def attend(queries: np.ndarray, factor: float) -> list[np.ndarray]:
        inputs = [array(x, "bfloat16") for x in (queries, k, v)]
        out, lse = GuardedArray(shape, "bfloat16"), GuardedArray((1, 1, 70), "float32")
        emulated.flash_attention_forward(*inputs, out, lse, scale=factor)
        floats = emulated.flash_attention_backward_workspace(*inputs[:2])
        gradients = [GuardedArray(shape, "bfloat16") for _ in inputs]
        emulated.flash_attention_backward(
            *(array(dout, "bfloat16"), *inputs, out, lse, *gradients),
            GuardedArray((floats,), "float32"),
            scale=factor,
        )
        return [x.numpy() for x in (out, lse, *gradients)]

    out, lse, dq, dk, dv = attend(q, scale)
    expected = attend(-q, -scale)
    for got, wanted in zip((out, lse, -dq, dk, dv), expected):
        np.testing.assert_allclose(got, wanted, atol=2e-2 * max(1.0, np.abs(wanted).max()))
    if scale == 0:
        np.testing.assert_allclose(lse, np.log(np.arange(70) + 1)[None, None], rtol=1e-5)


def test_attention_refuses_what_it_cannot_do(emulated: ModuleType):
    def forward(head_dim: int, misaligned: bool = False, softcap: float = 0.0) -> None:
        q, k, v, out = (GuardedArray((1, 3, 1, head_dim), "float16", misaligned) for _ in range(4))
        lse = GuardedArray((1, 1, 3), "float32")
        emulated.flash_attention_forward(q, k, v, out, lse, scale=1.0, softcap=softcap)

    for head_dim in (12, 264):
        with pytest.raises(ValueError, match="head_dim must be a multiple of 8, at most 256"):
            forward(head_dim)
    for softcap in (-2.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="softcap must be 0"):
            forward(16, softcap=softcap)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        forward(16, misaligned=True)


@pytest.mark.parametrize(
    ("setting", "dtype", "seq_q", "seq_k", "head_dim", "hopper"),
    [
        ("auto", "bfloat16", 3, 4, 16, False),
        ("ampere", "bfloat16", 3, 4, 16, False),
        ("hopper", "bfloat16", 3, 4, 16, True),
        ("hopper", "bfloat16", 3, 4, 128, True),
        ("hopper", "bfloat16", 3, 4, 136, False),
        ("hopper", "float32", 3, 4, 16, False),
        ("hopper", "bfloat16", 3, 0, 16, False),
        ("hopper", "bfloat16", 0, 4, 16, False),
    ],
)
def test_choice_of_the_attention_kernels(
    emulated: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    dtype: str,
    seq_q: int,
    seq_k: int,
    head_dim: int,
    hopper: bool,
):
    monkeypatch.setenv("PYPKG_FLASH_ATTENTION", setting)
    q, k, out, dq, dk, dv = (
        array(np.ones((1, n, 1, head_dim)), dtype)
        for n in (seq_q, seq_k, seq_q, seq_q, seq_k, seq_k)
    )
    floats = emulated.flash_attention_backward_workspace(q, k)
    lse, workspace = (GuardedArray(shape, "float32") for shape in ((1, 1, seq_q), (floats,)))
    emulated.take_launches()
    emulated.flash_attention_forward(q, k, k, out, lse, scale=1.0)
    emulated.flash_attention_backward(out, q, k, k, out, lse, dq, dk, dv, workspace, scale=1.0)
    launched = [name for name in emulated.take_launches() if "(delta)" not in name]
    assert launched and all(("(Hopper" in name) == hopper for name in launched)


def test_an_unknown_attention_kernel_is_refused(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYPKG_FLASH_ATTENTION", "turing")
    q = array(np.ones((1, 3, 1, 16)), "float16")
    with pytest.raises(ValueError, match='must be auto, ampere or hopper, not "turing"'):
        emulated.flash_attention_forward(q, q, q, q, GuardedArray((1, 1, 3), "float32"), scale=1.0)


def test_rms_norm_refuses_a_weight_of_another_16_bit_type(emulated: ModuleType):
    x, y = array(np.ones((1, 8)), "float16"), GuardedArray((1, 8), "float16")
    with pytest.raises(ValueError, match="weight must be float32 or float16, not bfloat16"):
        weight = array(np.ones(8), "bfloat16")
        emulated.rms_norm_forward(x, weight, y, GuardedArray((1,), "float32"))
