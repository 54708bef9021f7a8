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
    query_offset: int | None = None,
    key_offset: int = 0,
) -> Array:
    """bool [batch, seq_q, seq_k]: which keys a query sees.

    The offsets are positions of the first query and key; None aligns queries to the last keys.
    """
    first = seq_k - seq_q if query_offset is None else query_offset
    i = np.arange(first, first + seq_q)[:, None]
    j = np.arange(key_offset, key_offset + seq_k)[None, :]
    seen = np.ones((batch, seq_q, seq_k), bool)
    if causal:
        seen &= j <= i
        if prefix_lengths is not None:
            seen |= j < prefix_lengths[:, None, None]
    if window:
        seen &= i - j < window
    if document_starts is not None:
        of_keys = document_starts[:, key_offset : key_offset + seq_k]
        seen &= document_starts[:, first : first + seq_q, None] == of_keys[:, None, :]
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
    lead: int | None = None,
) -> tuple[Array, Array, Array]:
    """out [batch, seq_q, heads_q, head_dim], softmax_lse [batch, heads_q, seq_q] and the
    probabilities [batch, heads_q, seq_q, seq_k]. lead: positions from the first key to the first
    query; None aligns queries to the last keys."""
    seq_q, seq_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    scores, _ = _capped_scores(q, k, scale, softcap)
    if alibi_slopes is not None:
        distance = np.arange(seq_k)[None, :] - (
            np.arange(seq_q)[:, None] + (seq_k - seq_q if lead is None else lead)
        )
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


def philox4x32(
    counters: Array, stream: int, key: int, rounds: int = 10
) -> tuple[Array, Array, Array, Array]:
    """The four words of 128-bit counters, of which ``stream`` is the upper half (Salmon et al.,
    "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), as uint64."""
    low = np.uint64(0xFFFFFFFF)
    counters = counters.astype(np.uint64)
    c0, c1 = counters & low, counters >> np.uint64(32)
    c2, c3 = (np.full_like(c0, part) for part in (stream & 0xFFFFFFFF, stream >> 32))
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(rounds):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (second >> np.uint64(32)) ^ c1 ^ np.uint64(k0), second & low
        c2, c3 = (first >> np.uint64(32)) ^ c3 ^ np.uint64(k1), first & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def random_normal(indices: Array, stream: int, key: int) -> Array:
    """The numbers of a stream with these indices, by Box and Muller.

    Of 64 numbers, i and i + 16 are one pair, and so are i + 32 and i + 48, for i < 16.
    What the logarithm is taken of has 24 bits; all else is exact.
    """
    words = philox4x32(indices // 64 * 16 + indices % 16, stream, key)
    is_late, is_second = indices % 64 >= 32, indices % 32 >= 16
    radius_word = np.where(is_late, words[2], words[0])
    angle_word = np.where(is_late, words[3], words[1])
    uniform = ((radius_word // np.uint64(2)).astype(np.float32) + np.float32(0.5)) / 2**31
    radius = np.sqrt(-2 * np.log(uniform.astype(np.float64)))
    fraction = angle_word % np.uint64(2**30)  # of a quarter turn, in two's complement
    fraction = np.where(fraction >= 2**29, fraction - 2.0**30, fraction) / 2**29
    sine, cosine = np.sin(np.pi / 4 * fraction), np.cos(np.pi / 4 * fraction)
    cosine = np.where(angle_word >= 2**31, -cosine, cosine)
    is_swapped = angle_word // np.uint64(2**30) % np.uint64(2) == 1
    return radius * np.where(is_swapped ^ is_second, sine, cosine)


def quantize_blockwise(
    values: Array, table: Array, block_size: int, is_signed: bool
) -> tuple[Array, Array]:
    """Places in the float32 table nearest to float32 values over the largest of their block."""
    starts = np.arange(0, values.size, block_size)
    largest = np.maximum.reduceat(np.abs(values), starts)
    divisors = np.repeat(np.where(largest > 0, largest, np.float32(1)), block_size)[: values.size]
    quotients = values / divisors
    places = np.searchsorted((table[1:] + table[:-1]) / 2, quotients)
    return places if is_signed else np.maximum(places, quotients > 0), largest


def stochastic_bfloat16(values: Array, key: int) -> Array:
    """float32 values rounded to bfloat16, up or down by 16 bits of a hash of key and place."""
    x = np.arange(values.size, dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(key)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    noise = (x ^ (x >> np.uint32(16))) & np.uint32(0xFFFF)
    return ((values.view(np.uint32) + noise) & np.uint32(0xFFFF0000)).view(np.float32)
