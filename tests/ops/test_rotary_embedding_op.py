from __future__ import annotations

import numpy as np
import paddle
import pytest
from op_testing import check_against_reference, random

from pypkg.ops import rotary_embedding, rotary_embedding_reference

POSITIONS = 50


def tables(rotary_dim: int) -> tuple[paddle.Tensor, paddle.Tensor]:
    angles = np.outer(np.arange(POSITIONS), 100.0 ** (-np.arange(rotary_dim // 2) / rotary_dim))
    return (paddle.to_tensor(f(angles).astype("float32")) for f in (np.cos, np.sin))


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_is_a_rotation_of_the_complex_plane(interleaved):
    x, cos_sin = random((1, 6, 1, 12), 0), list(tables(8))
    out = rotary_embedding_reference(
        paddle.to_tensor(x), None, *cos_sin, interleaved=interleaved, rotary_offset=2
    )[0].numpy()
    first = [2, 4, 6, 8] if interleaved else [2, 3, 4, 5]
    second = [3, 5, 7, 9] if interleaved else [6, 7, 8, 9]
    turn = cos_sin[0].numpy()[:6, None] + 1j * cos_sin[1].numpy()[:6, None]
    expected = (x[..., first] + 1j * x[..., second]) * turn
    np.testing.assert_allclose(out[..., first], expected.real, rtol=1e-12)
    np.testing.assert_allclose(out[..., second], expected.imag, rtol=1e-12)
    np.testing.assert_array_equal(out[..., [0, 1, 10, 11]], x[..., [0, 1, 10, 11]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary_dim", "offset"),
    [((1, 1), 2, 2, 0), ((4, 4), 64, 64, 0), ((6, 2), 80, 20, 0), ((3, 1), 36, 18, 18)],
)
@pytest.mark.parametrize("with_ids", [False, True])
def test_values_and_gradients(
    each_backend, dtype, interleaved, heads, head_dim, rotary_dim, offset, with_ids
):
    cos, sin = tables(rotary_dim)
    ids = paddle.to_tensor(np.random.default_rng(3).integers(0, POSITIONS, (2, 7)))
    settings = (cos, sin, ids if with_ids else None, interleaved, offset)
    arrays = [random((2, 7, each, head_dim), i) for i, each in enumerate(heads)]
    check_against_reference(
        lambda q, k: rotary_embedding(q, k, *settings),
        lambda q, k: rotary_embedding_reference(q, k, *settings),
        arrays,
        dtype,
    )


def test_without_keys(each_backend):
    cos, sin = tables(8)
    q = random((2, 7, 3, 8), 0)
    check_against_reference(
        lambda q: rotary_embedding(q, None, cos, sin)[0],
        lambda q: rotary_embedding_reference(q, None, cos, sin)[0],
        [q],
    )
    assert rotary_embedding(paddle.to_tensor(q.astype("float32")), None, cos, sin)[1] is None


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_used(each_backend, used):
    cos, sin = tables(8)
    arrays = [random((1, 4, 2, 8), 0), random((1, 4, 2, 8), 1)]

    def only(function):
        return lambda q, k: function(q, k, cos, sin)[used] + 0 * q + 0 * k

    check_against_reference(only(rotary_embedding), only(rotary_embedding_reference), arrays)


def test_rotating_back_restores(compiled):
    cos, sin = tables(16)
    q = paddle.to_tensor(random((1, 9, 2, 16), 0).astype("float32"))
    there = rotary_embedding(q, None, cos, sin)[0]
    back = rotary_embedding(there, None, cos, -sin)[0]
    np.testing.assert_allclose(back.numpy(), q.numpy(), atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8)])
def test_empty(each_backend, shape):
    out = rotary_embedding(paddle.zeros(shape), paddle.zeros(shape), *tables(8))
    assert [list(each.shape) for each in out] == [list(shape)] * 2


@pytest.mark.parametrize("position", [-1, POSITIONS])
def test_position_out_of_range(each_backend, position):
    arguments = (paddle.ones([1, 2, 1, 8]), None, *tables(8), paddle.to_tensor([[0, position]]))
    if each_backend == "triton":  # as on a GPU, where to raise would be to wait
        q, _ = rotary_embedding(*arguments)
        assert q[0, 1].isnan().all() and not q[0, 0].isnan().any()
        return
    with pytest.raises(IndexError, match=f"position {position} "):
        rotary_embedding(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": paddle.ones([2, 3, 8])}, ValueError, r"q must have shape .*, got \[2, 3, 8\]"),
        (
            {"k": paddle.ones([2, 4, 1, 8])},
            ValueError,
            r"k must have shape \[2, 3, k_heads, 8\], got \[2, 4, 1, 8\]",
        ),
        ({"k": paddle.ones([2, 3, 1, 8], "bfloat16")}, TypeError, "k must be float32, got bfl"),
        ({"sin": paddle.ones([4, 4])}, ValueError, r"sin must have shape \[50, 4\], got \[4, 4\]"),
        ({"cos": paddle.ones([50, 4], "float64")}, TypeError, "cos must be float32, got float64"),
        ({"rotary_offset": 1}, ValueError, r".* dimensions \[1, 9\), but head_dim is 8"),
        ({"rotary_offset": -1}, ValueError, r".* dimensions \[-1, 7\), but head_dim is 8"),
        (
            {"position_ids": paddle.ones([2, 3], "int32")},
            TypeError,
            "position_ids must be int64, got int32",
        ),
        (
            {"q": paddle.ones([2, 51, 1, 8]), "k": None},
            ValueError,
            "the sequence has 51 tokens, .* 50 pos",
        ),
    ],
)
def test_wrong_inputs(each_backend, change, error, message):
    cos, sin = tables(8)
    good = {"q": paddle.ones([2, 3, 2, 8]), "k": paddle.ones([2, 3, 1, 8]), "cos": cos, "sin": sin}
    with pytest.raises(error, match="rotary_embedding: " + message):
        rotary_embedding(**{**good, **change})
