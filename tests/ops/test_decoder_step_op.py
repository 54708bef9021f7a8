"""A step through all layers of a decoder against the operators of its parts."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from op_testing import TOLERANCE, as_float64, assert_close, random

from pypkg import _native, ops
from pypkg.ops import AttentionMask, KeptTokens

BATCH, HIDDEN, INTERMEDIATE, VOCAB = 3, 36, 52, 70
HEADS_Q, HEADS_K, HEAD_DIM = 4, 2, 20
CAPACITY, POSITION, EPSILON = 32, 21, 1e-5
LAYERS, WINDOWS = 2, (9, None)
SLOPES = paddle.to_tensor([0.5, 0.25, 0.125, 0.0625], "float32")
PADDING = paddle.to_tensor([4, 0, POSITION])


@pytest.fixture(params=_native.cpu_isas())
def each_isa(request, compiled):
    _native.set_cpu_isa(request.param)
    yield
    _native.set_cpu_isa("")


def draw(shape: tuple[int, ...], seed: int, scale: float = 0.4) -> paddle.Tensor:
    return paddle.to_tensor(random(shape, seed, scale), "float32")


def layers(with_all: bool) -> list[ops.LayerWeights]:
    """Weights of layers; ``with_all``: a bias and norms of the heads too."""
    width = (HEADS_Q + 2 * HEADS_K) * HEAD_DIM
    shapes = [(HIDDEN,), (HIDDEN, width), (width,), (HEAD_DIM,), (HEAD_DIM,)]
    shapes += [(HEADS_Q * HEAD_DIM, HIDDEN), (HIDDEN,)]
    shapes += [(HIDDEN, 2 * INTERMEDIATE), (INTERMEDIATE, HIDDEN)]
    found = []
    for number in range(LAYERS):
        tensors = [draw(shape, 10 * number + i) for i, shape in enumerate(shapes)]
        layer = ops.LayerWeights(*tensors)
        optional = {} if with_all else dict.fromkeys(("qkv_bias", "q_norm", "k_norm"))
        found.append(layer._replace(**optional))
    return found


def kept_tokens() -> list[KeptTokens]:
    """Behind the tokens and in the padding there is what must not be read."""
    found = []
    for number in range(LAYERS):
        held = []
        for seed in (50, 60):
            values = random((BATCH, HEADS_K, CAPACITY, HEAD_DIM), seed + number).astype("float32")
            values[:, :, POSITION:] = np.nan
            for row, pad in enumerate(PADDING.tolist()):
                values[row, :, :pad] = np.nan
            held.append(paddle.to_tensor(values))
        found.append(KeptTokens(*held, POSITION, PADDING))
    return found


def rotation(interleaved: bool) -> tuple:
    angles = random((64, HEAD_DIM // 2 - 2), 8)
    tables = [paddle.to_tensor(each(angles), "float32") for each in (np.cos, np.sin)]
    return (*tables, paddle.to_tensor([[17], [21], [0]]), interleaved)


def by_parts(x, of_layers, ends, kept, rotates, slopes, scale, softcap, activation):
    for layer, held, window in zip(of_layers, kept, WINDOWS, strict=True):
        qkv = ops.linear(ops.rms_norm(x, layer.attention_norm, EPSILON), layer.qkv_weight)
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias
        query, key, value = ops.split_heads(qkv, BATCH, HEADS_Q, HEADS_K)
        if layer.q_norm is not None:
            query = ops.rms_norm(query, layer.q_norm, EPSILON)
            key = ops.rms_norm(key, layer.k_norm, EPSILON)
        if rotates is not None:
            *tables, interleaved = rotates
            query, key = ops.rotary_embedding(query, key, *tables, interleaved=interleaved)
        mask = AttentionMask(window=window, alibi_slopes=slopes)
        out = ops.cached_attention(query, key, value, held, mask, scale, softcap)
        x = x + ops.linear(out.reshape([BATCH, 1, -1]), layer.o_weight)
        y = ops.rms_norm(x, layer.mlp_norm, EPSILON)
        x = x + ops.gated_mlp_block(y, layer.gate_up_weight, layer.down_weight, activation)
    return ops.matmul(ops.rms_norm(x, ends[0], EPSILON), ends[1], transpose_y=True)[:, 0]


def run(x, weights, kept, rotates=None, slopes=None, activation="silu", **changes):
    return ops.decoder_step(
        x, weights, kept, WINDOWS, rotates, slopes, 0.3, 2.0, EPSILON, activation, **changes
    )


@paddle.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("case", ["plain", "halves, all", "interleaved", "slopes"])
def test_values(each_isa, case, threads):
    of_layers = layers(with_all="all" in case)
    ends = draw((HIDDEN,), 91), draw((VOCAB, HIDDEN), 92)
    x, kept, own = draw((BATCH, 1, HIDDEN), 93), kept_tokens(), kept_tokens()
    rotates = None if case in ("plain", "slopes") else rotation(case == "interleaved")
    slopes = SLOPES if case == "slopes" else None
    activation = "gelu_tanh" if case == "plain" else "silu"
    expected = by_parts(x, of_layers, ends, kept, rotates, slopes, 0.3, 2.0, activation)
    _native.set_num_threads(threads)
    try:
        weights = ops.DecoderWeights(of_layers, *ends)
        found = run(x, weights, own, rotates, slopes, activation)
    finally:
        _native.set_num_threads(0)
    assert_close(as_float64(found), as_float64(expected), TOLERANCE["float32"], "logits")
    for got, wanted in zip(own, kept, strict=True):
        for name in ("keys", "values"):
            pair = (as_float64(getattr(each, name)) for each in (got, wanted))
            np.testing.assert_allclose(*pair, rtol=0, atol=1e-5, err_msg=name)


@paddle.no_grad()
def test_a_row_and_threads_change_no_bit(each_isa):
    weights = ops.DecoderWeights(layers(True), draw((HIDDEN,), 91), draw((VOCAB, HIDDEN), 92))
    x = draw((BATCH, 1, HIDDEN), 93)
    found = run(x, weights, kept_tokens(), rotation(False)).numpy()
    _native.set_num_threads(1)
    try:
        alone = run(x, weights, kept_tokens(), rotation(False)).numpy()
    finally:
        _native.set_num_threads(0)
    np.testing.assert_array_equal(alone, found)
    *tables, positions, interleaved = rotation(False)
    for row in range(BATCH):
        own = slice(row, row + 1)
        held = [
            KeptTokens(each.keys[own], each.values[own], POSITION, each.first_keys[own])
            for each in kept_tokens()
        ]
        alone = run(x[own], weights, held, (*tables, positions[own], interleaved))
        np.testing.assert_array_equal(alone.numpy()[0], found[row])


def test_where_there_is_no_operator(compiled):
    of_layers, ends = layers(False), (draw((HIDDEN,), 91), draw((VOCAB, HIDDEN), 92))
    weights, kept = ops.DecoderWeights(of_layers, *ends), kept_tokens()
    x = draw((BATCH, 1, HIDDEN), 93)
    assert run(x, weights, kept) is None  # gradients are on
    with paddle.no_grad():
        assert run(draw((9, 1, HIDDEN), 1), weights, kept) is None
        assert run(x.astype("float64"), weights, kept) is None
        wide = of_layers[0]._replace(o_weight=of_layers[0].o_weight.astype("float64"))
        assert run(x, ops.DecoderWeights([wide, of_layers[1]], *ends), kept) is None
        half = [each._replace(keys=each.keys.astype("bfloat16")) for each in kept]
        assert run(x, weights, half) is None
        ops.set_backend("reference")
        assert run(x, weights, kept) is None
    assert all(np.isnan(each.keys.numpy()[:, :, POSITION:]).all() for each in kept)


@paddle.no_grad()
def test_mistakes(compiled):
    of_layers, ends = layers(True), (draw((HIDDEN,), 91), draw((VOCAB, HIDDEN), 92))
    weights, kept, x = ops.DecoderWeights(of_layers, *ends), kept_tokens(), draw((3, 1, HIDDEN), 93)
    *tables, positions, interleaved = rotation(False)
    with pytest.raises(IndexError, match="position 64 of row 1 is outside the cos and sin tables"):
        run(x, weights, kept, (*tables, paddle.to_tensor([[17], [64], [0]]), interleaved))
    assert np.isnan(kept[0].keys.numpy()[:, :, POSITION:]).all()  # nothing is written
    with pytest.raises(ValueError, match="position_ids must hold 3 numbers, got 2"):
        run(x, weights, kept, (*tables, positions[:2], interleaved))
    with pytest.raises(ValueError, match=r"x must have shape \[3, 1, 36\], got \[2, 1, 36\]"):
        run(x[:2], weights, kept)
    far = [each._replace(position=CAPACITY) for each in kept]
    with pytest.raises(ValueError, match="position 32 do not fit keys"):
        run(x, weights, far)
    short = of_layers[1]._replace(down_weight=of_layers[1].down_weight[:-1])
    with pytest.raises(ValueError, match=r"down_weight must have shape \[52, 36\], got \[51, 36\]"):
        run(x, ops.DecoderWeights([of_layers[0], short], *ends), kept)
    unlike = of_layers[1]._replace(k_norm=None)
    with pytest.raises(ValueError, match="k_norm must be given for all layers"):
        run(x, ops.DecoderWeights([of_layers[0], unlike], *ends), kept)
