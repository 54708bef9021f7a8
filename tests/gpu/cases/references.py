"""What the operators compute, in NumPy float64: the yardstick for kernels on any device."""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def rms_norm(h: Array, weight: Array, epsilon: float) -> tuple[Array, Array]:
    """y and rstd."""
    rstd = 1 / np.sqrt((h**2).mean(-1) + epsilon)
    return h * rstd[:, None] * weight, rstd


def rms_norm_gradients(
    dy: Array, dh: Array | None, h: Array, weight: Array, epsilon: float
) -> tuple[Array, Array]:
    """dx and dweight."""
    _, rstd = rms_norm(h, weight, epsilon)
    rstd = rstd[:, None]
    g = dy * weight
    dx = rstd * (g - h * rstd**2 * (g * h).mean(-1, keepdims=True))
    return dx + (0 if dh is None else dh), (dy * h * rstd).sum(0)


def rotary_embedding(
    x: Array, cos: Array, sin: Array, positions: Array, offset: int, interleaved: bool
) -> Array:
    """x [batch, sequence, heads, head_dim], positions [batch, sequence]."""
    half = cos.shape[1]
    c, s = cos[positions][:, :, None], sin[positions][:, :, None]
    out = x.copy()
    if interleaved:
        first = slice(offset, offset + 2 * half, 2)
        second = slice(offset + 1, offset + 2 * half, 2)
    else:
        first, second = slice(offset, offset + half), slice(offset + half, offset + 2 * half)
    a, b = x[..., first], x[..., second]
    out[..., first], out[..., second] = a * c - b * s, b * c + a * s
    return out


_erf = np.vectorize(math.erf, otypes=[np.float64])


def activation(x: Array, name: str) -> tuple[Array, Array]:
    """Value and derivative."""
    if name == "silu":
        sigmoid = np.exp(-np.logaddexp(0, -x))
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    if name == "gelu":
        cdf = 0.5 * (1 + _erf(x / math.sqrt(2)))
        return x * cdf, cdf + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * slope


def log_sum_exp(x: Array) -> tuple[Array, Array, Array]:
    """row_max, row_sum and lse of the last dimension; of a row of -inf: -inf, 0 and -inf."""
    row_max = x.max(-1)
    with np.errstate(divide="ignore"):
        row_sum = np.exp(x - np.where(np.isneginf(row_max), 0, row_max)[..., None]).sum(-1)
        return row_max, row_sum, row_max + np.log(row_sum)


def visible(
    batch: int,
    seq_q: int,
    seq_k: int,
    causal: bool = True,
    window: int = 0,
    prefix_lengths: Array | None = None,
    document_starts: Array | None = None,
) -> Array:
    """bool [batch, seq_q, seq_k]: which keys a query sees."""
    i = np.arange(seq_q)[:, None] + seq_k - seq_q
    j = np.arange(seq_k)[None, :]
    seen = np.ones((batch, seq_q, seq_k), bool)
    if causal:
        seen &= j <= i
        if prefix_lengths is not None:
            seen |= j < prefix_lengths[:, None, None]
    if window:
        seen &= i - j < window
    if document_starts is not None:
        seen &= document_starts[:, :, None] == document_starts[:, None, :]
    return seen


def _by_head(x: Array, repeat: int = 1) -> Array:
    """[batch, sequence, heads, dim] -> [batch, heads * repeat, sequence, dim], and back."""
    return np.repeat(x.transpose(0, 2, 1, 3), repeat, axis=1)


def _capped_scores(q: Array, k: Array, scale: float, softcap: float) -> tuple[Array, Array | float]:
    """[batch, heads_q, seq_q, seq_k], and their derivative by what they are without softcap."""
    scores = scale * _by_head(q) @ _by_head(k, q.shape[2] // k.shape[2]).swapaxes(2, 3)
    if softcap == 0:
        return scores, 1.0
    tangents = np.tanh(scores / softcap)
    return softcap * tangents, 1 - tangents**2


def attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    seen: Array,
    alibi_slopes: Array | None = None,
    softcap: float = 0.0,
) -> tuple[Array, Array, Array]:
    """out [batch, seq_q, heads_q, head_dim], softmax_lse [batch, heads_q, seq_q] and the
    probabilities [batch, heads_q, seq_q, seq_k]."""
    seq_q, seq_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    scores, _ = _capped_scores(q, k, scale, softcap)
    if alibi_slopes is not None:
        distance = np.arange(seq_k)[None, :] - (np.arange(seq_q)[:, None] + seq_k - seq_q)
        scores += alibi_slopes[:, None, None] * distance
    scores = np.where(seen[:, None], scores, -np.inf)
    lse = log_sum_exp(scores)[2]
    p = np.exp(scores - np.where(np.isneginf(lse), 0, lse)[..., None])
    return _by_head(p @ _by_head(v, group)), lse, p


def attention_gradients(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    p: Array,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Array, Array, Array]:
    """dq, dk and dv, given out and the probabilities p of `attention`."""
    batch, seq_k, heads_k, head_dim = k.shape
    group = q.shape[2] // heads_k
    dp = _by_head(dout) @ _by_head(v, group).swapaxes(2, 3)
    delta = (_by_head(dout) * _by_head(out)).sum(-1, keepdims=True)
    ds = scale * p * (dp - delta) * _capped_scores(q, k, scale, softcap)[1]
    dk, dv = ds.swapaxes(2, 3) @ _by_head(q), p.swapaxes(2, 3) @ _by_head(dout)
    grouped = (batch, heads_k, group, seq_k, head_dim)
    dk, dv = (_by_head(x.reshape(grouped).sum(2)) for x in (dk, dv))
    return _by_head(ds @ _by_head(k, group)), dk, dv


def sizes_of_key_sums(p: Array, heads_k: int) -> Array:
    """Of the terms of dk and dv, [batch, seq_k, heads_k, 1], given the probabilities.

    A key that many queries see alone, as ALiBi and keys ahead make it, sums many terms of size 1.
    """
    batch, heads_q, _, seq_k = p.shape
    squares = (p**2).sum(2).reshape(batch, heads_k, heads_q // heads_k, seq_k).sum(2)
    return np.maximum(1, np.sqrt(squares)).transpose(0, 2, 1)[..., None]


def adamw(
    weight: Array,
    moments: tuple[Array, Array],
    grad: Array,
    t: int,
    rate: float,
    betas: tuple[float, float],
    epsilon: float,
    decay: float,
) -> tuple[Array, tuple[Array, Array]]:
    """The weight and both moments after step t."""
    m = betas[0] * moments[0] + (1 - betas[0]) * grad
    v = betas[1] * moments[1] + (1 - betas[1]) * grad**2
    denominator = np.sqrt(v / (1 - betas[1] ** t)) + epsilon
    return weight * (1 - rate * decay) - rate * (m / (1 - betas[0] ** t)) / denominator, (m, v)
