"""Attention in float64 with the mask as a matrix: what the flash kernels are compared with."""

from __future__ import annotations

import numpy as np


def visible_keys(
    batch: int,
    seq_q: int,
    seq_k: int,
    causal: bool = True,
    window: int = 0,
    prefix_lengths: np.ndarray | None = None,
    document_starts: np.ndarray | None = None,
) -> np.ndarray:
    """Bool [batch, seq_q, seq_k]; query row r has position r + seq_k - seq_q."""
    i = (np.arange(seq_q) + seq_k - seq_q)[:, None]
    j = np.arange(seq_k)[None, :]
    visible = np.ones((batch, seq_q, seq_k), bool)
    if causal:
        visible &= j <= i
        if prefix_lengths is not None:
            visible |= j[None] < prefix_lengths[:, None, None]
    if window > 0:
        visible &= i - j < window
    if document_starts is not None:
        visible &= document_starts[:, :, None] == document_starts[:, None, :]
    return visible


def attention(q, k, v, dout, scale, alibi_slopes=None, softcap=0.0, **mask):
    """out, softmax_lse [b, h, s], dq, dk, dv of float64 inputs [b, s, h, d]."""
    batch, seq_q, heads_q, _ = q.shape
    seq_k, heads_k = k.shape[1:3]
    group = heads_q // heads_k
    k_full, v_full = (np.repeat(x, group, axis=2) for x in (k, v))
    scores = scale * np.einsum("bihd,bjhd->bhij", q, k_full)
    slope = 1.0
    if softcap > 0:
        capped = np.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped**2
    if alibi_slopes is not None:
        i = (np.arange(seq_q) + seq_k - seq_q)[:, None]
        scores += alibi_slopes[:, None, None] * (np.arange(seq_k)[None, :] - i)
    scores = np.where(visible_keys(batch, seq_q, seq_k, **mask)[:, None], scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    p = weights / np.where(total == 0, 1.0, total)
    out = np.einsum("bhij,bjhd->bihd", p, v_full)

    dp = np.einsum("bihd,bjhd->bhij", dout, v_full)
    delta = np.einsum("bihd,bihd->bhi", dout, out)[..., None]
    ds = p * (dp - delta) * slope * scale
    dq = np.einsum("bhij,bjhd->bihd", ds, k_full)
    dk = np.einsum("bhij,bihd->bjhd", ds, q)
    dv = np.einsum("bhij,bihd->bjhd", p, dout)
    dk, dv = (x.reshape(batch, seq_k, heads_k, group, -1).sum(axis=3) for x in (dk, dv))
    return out, lse, dq, dk, dv
