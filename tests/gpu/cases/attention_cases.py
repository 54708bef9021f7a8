"""Cases of attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import references as ref
from checks import DTYPES, FLOAT32_ERROR, Backend, Case, Comparison, tolerance


def document_starts(rng: np.random.Generator, batch: int, sequence: int) -> np.ndarray:
    """Start of the document of every token, documents of random length."""
    starts = np.zeros((batch, sequence), np.int64)
    for row in starts:
        cuts = np.sort(rng.choice(sequence, max(1, sequence // 40), replace=False))
        for cut in cuts:
            row[cut:] = cut
    return starts


def mask_rule(mask: str, rng: np.random.Generator, batch: int, tokens: int) -> dict[str, Any]:
    """What ``mask`` hides, as arguments of ``ref.visible``; words as in ``attention_case``."""
    words = mask.split("+")
    rule: dict[str, Any] = {"causal": "full" not in words}
    rule["window"] = next((int(w[6:]) for w in words if w.startswith("window")), 0)
    if "prefix" in words:
        rule["prefix_lengths"] = rng.integers(0, tokens + 1, batch)
    if "documents" in words:
        rule["document_starts"] = document_starts(rng, batch, tokens)
    return rule


def on_device(be: Backend, rule: dict[str, Any]) -> dict[str, Any]:
    """A mask's rule, its arrays as those of the backend."""
    return {
        name: be.array(value, "int32") if isinstance(value, np.ndarray) else value
        for name, value in rule.items()
    }


def soft_cap(mask: str) -> float:
    """0 for none."""
    return next((float(w[7:]) for w in mask.split("+") if w.startswith("softcap")), 0.0)


def attention_case(
    dtype: str,
    mask: str,
    seq_q: int,
    seq_k: int | None = None,
    heads: tuple[int, int] = (2, 2),
    head_dim: int = 64,
    batch: int = 1,
    offsets: tuple[int, int] | None = None,
) -> Case:
    """mask: words joined by +: full, causal, window<n>, prefix, documents, alibi, and softcap<x>,
    which caps scores before. Scores are about 1 in size, so a cap of 1 or 2 bends most of them.

    offsets: positions of the first query and key, of blocks of a longer sequence. The backward pass
    gets the output merged with that for other keys then."""
    seq_k = seq_q if seq_k is None else seq_k
    softcap = soft_cap(mask)

    def run(be: Backend, rng: np.random.Generator) -> Iterator[Comparison]:
        tokens = max(offsets[0] + seq_q, offsets[1] + seq_k) if offsets else seq_k
        rule = mask_rule(mask, rng, batch, tokens)
        if offsets:
            rule |= {"query_offset": offsets[0], "key_offset": offsets[1]}
        seen = ref.visible(batch, seq_q, seq_k, **rule)
        arguments = on_device(be, rule)
        slopes = None
        if "alibi" in mask.split("+"):
            slopes = 2.0 ** -np.arange(1, heads[0] + 1)
            arguments["alibi_slopes"] = be.array(slopes, "float32")
        scale = head_dim**-0.5
        q_shape, k_shape = (batch, seq_q, heads[0], head_dim), (batch, seq_k, heads[1], head_dim)
        q, k, v, dout = (
            be.array(rng.standard_normal(s), dtype) for s in (q_shape, k_shape, k_shape, q_shape)
        )
        out, lse = be.poisoned(q_shape, dtype), be.poisoned((batch, heads[0], seq_q), "float32")
        arguments |= {"scale": scale, "softcap": softcap, "stream": be.stream}
        be.kernels.flash_attention_forward(q, k, v, out, lse, **arguments)
        inputs = [be.numpy(x) for x in (q, k, v)]
        expected_out, expected_lse, p = ref.attention(
            *inputs, scale, seen, slopes, softcap, offsets and offsets[0] - offsets[1]
        )
        # Probabilities are rounded to the dtype, then the output.
        yield Comparison("out", be.numpy(out), expected_out, tolerance(dtype, 2), 2, 1)
        yield Comparison("softmax_lse", be.numpy(lse), expected_lse, FLOAT32_ERROR)

        if offsets:
            out, lse, p = merged(be, rng, be.numpy(out), expected_lse, p, dtype)

        yield from gradient_comparisons(be, dtype, (q, k, v, dout, out, lse), p, arguments)

    label = f"{mask}-{batch}x{seq_q}x{seq_k}-{heads[0]}over{heads[1]}x{head_dim}"
    if offsets:
        label += f"-at{offsets[0]}and{offsets[1]}"
    return Case("flash_attention", dtype, label, run)


def gradient_comparisons(
    be: Backend, dtype: str, tensors: tuple[Any, ...], p: Any, arguments: dict[str, Any]
) -> Iterator[Comparison]:
    """The backward pass, twice. tensors: q, k, v, dout, out and lse; p: the probabilities."""
    q, k, v, dout, out, lse = tensors

    def backward() -> list[np.ndarray]:
        gradients = [be.poisoned(be.numpy(x).shape, dtype) for x in (q, k, v)]
        floats = be.kernels.flash_attention_backward_workspace(q, k)
        workspace = be.poisoned((floats,), "float32")
        be.kernels.flash_attention_backward(
            dout, q, k, v, out, lse, *gradients, workspace, **arguments
        )
        return [be.numpy(x) for x in gradients]

    gradients = backward()
    inputs = [be.numpy(x) for x in (dout, q, k, v, out)]
    expected = ref.attention_gradients(*inputs, p, arguments["scale"], arguments["softcap"])
    # dS is rounded too.
    allowed = tolerance(dtype, 4) + 2 * FLOAT32_ERROR
    per_key = ref.sizes_of_key_sums(p, inputs[2].shape[2])
    for name, got, value, term in zip(
        ("dq", "dk", "dv"), gradients, expected, (1, per_key, per_key)
    ):
        yield Comparison(name, got, value, allowed, 4, term)
    for name, got, again in zip(("dq", "dk", "dv"), gradients, backward()):
        yield Comparison(f"{name} of a second run", again, got, 0.0)


def merged(
    be: Backend, rng: np.random.Generator, out: Any, lse: Any, p: Any, dtype: str
) -> tuple[Any, Any, Any]:
    """out, lse and the probabilities of these keys, merged with random ones of other keys."""
    other_out, other_lse = rng.standard_normal(out.shape), 3 + rng.standard_normal(lse.shape)
    whole_lse = np.logaddexp(lse, other_lse)
    shares = [np.exp(each - whole_lse) for each in (lse, other_lse)]
    own, other = (share.transpose(0, 2, 1)[..., None] for share in shares)
    whole = be.array(own * out + other * other_out, dtype)
    return whole, be.array(whole_lse, "float32"), p * shares[0][..., None]


def block_cases(dtypes: tuple[str, ...] = DTYPES) -> list[Case]:
    """Blocks of a longer sequence, at positions that are no multiples of tiles."""
    cases = []
    for dtype in dtypes:
        cases += [
            attention_case(dtype, "causal", 150, 70, heads=(2, 1), offsets=(190, 77)),
            attention_case(dtype, "causal", 70, 200, head_dim=128, offsets=(100, 33)),
            attention_case(dtype, "causal", 90, 70, head_dim=32, offsets=(10, 60)),  # blind queries
            attention_case(dtype, "causal", 40, 70, heads=(1, 1), offsets=(5, 45)),  # all hidden
            attention_case(dtype, "window100", 130, 90, heads=(2, 1), offsets=(170, 41)),
            attention_case(dtype, "window30", 50, 60, head_dim=32, offsets=(300, 10)),  # all past
            attention_case(dtype, "full+alibi", 50, 90, heads=(3, 1), head_dim=96, offsets=(7, 99)),
            attention_case(dtype, "causal+alibi", 80, 60, heads=(2, 1), offsets=(160, 51)),
            attention_case(
                dtype, "prefix", 70, 130, batch=3, heads=(1, 1), head_dim=24, offsets=(30, 61)
            ),
            attention_case(
                dtype, "documents", 150, 110, batch=2, heads=(1, 1), head_dim=32, offsets=(95, 23)
            ),
            attention_case(
                dtype,
                "documents+full+window50+alibi+softcap1",
                90,
                120,
                head_dim=128,
                offsets=(61, 103),
            ),
            attention_case(dtype, "causal+softcap2", 60, 50, head_dim=256, offsets=(77, 43)),
        ]
    return cases  # fmt: skip


def small_cases() -> list[Case]:
    """Awkward sizes that even the emulation runs in moments."""
    cases = []
    for dtype in ("float32", "bfloat16"):
        cases += [
            attention_case(dtype, "causal", 1, heads=(1, 1), head_dim=8),
            attention_case(dtype, "causal", 200, heads=(2, 1)),
            attention_case(dtype, "full", 70, 150, heads=(3, 1), head_dim=80),
            attention_case(dtype, "causal", 300, 70, head_dim=32),  # queries that see nothing
            attention_case(dtype, "causal", 30, 200, head_dim=128),
            attention_case(dtype, "window24", 300, heads=(1, 1), head_dim=32),
            attention_case(dtype, "window24", 40, 300, head_dim=32),  # keys that nobody sees
            attention_case(dtype, "causal+alibi", 140, heads=(3, 1), head_dim=128),
            attention_case(dtype, "full+alibi", 50, 90, head_dim=96),
            attention_case(dtype, "prefix", 170, batch=3, heads=(1, 1), head_dim=24),
            attention_case(dtype, "documents", 260, batch=2, heads=(1, 1), head_dim=32),
            attention_case(dtype, "documents+full+window50+alibi", 180, heads=(1, 1), head_dim=40),
        ]
    cases += [  # several blocks of 128 keys add to the gradient of a tile of queries
        attention_case("bfloat16", "causal", 270, heads=(2, 1), head_dim=128),
        attention_case("float16", "full", 70, 520, heads=(1, 1), head_dim=96),
        attention_case("bfloat16", "window150", 450, heads=(1, 1), head_dim=64),
        attention_case("bfloat16", "prefix+alibi", 260, batch=2, heads=(1, 1), head_dim=72),
        attention_case("float16", "documents+full+softcap2", 390, heads=(1, 1), head_dim=128),
    ]
    cases += [
        attention_case("float16", "causal", 140, heads=(1, 1), head_dim=64),
        attention_case("float16", "documents+alibi", 140, heads=(4, 2), head_dim=128),
    ]
    for dtype in DTYPES:
        cases += [
            attention_case(dtype, "causal+softcap2", 200, heads=(2, 1)),
            attention_case(dtype, "full+softcap1", 50, 90, head_dim=96),
            attention_case(dtype, "causal+softcap50", 90, 40, heads=(3, 1), head_dim=32),
            attention_case(dtype, "documents+full+window50+alibi+softcap1", 150, head_dim=128),
            attention_case(dtype, "causal", 140, heads=(2, 1), head_dim=256),
            attention_case(dtype, "full", 20, 75, heads=(1, 1), head_dim=136),
            attention_case(dtype, "causal", 90, 40, heads=(1, 1), head_dim=200),
            attention_case(dtype, "prefix+softcap2", 70, batch=2, heads=(2, 1), head_dim=256),
        ]
    return cases + block_cases(("float32", "bfloat16"))


def large_cases(
    dtypes: tuple[str, ...] = DTYPES, head_dims: tuple[int, ...] = (64, 80, 96, 128, 256)
) -> list[Case]:
    """Shapes that fill a GPU more, still quick to check in float64 on the host."""
    cases = []
    for dtype in dtypes:
        for head_dim in head_dims:
            cases += [
                attention_case(dtype, "causal", 1000, heads=(4, 2), head_dim=head_dim),
                attention_case(dtype, "full", 500, 1300, heads=(2, 2), head_dim=head_dim),
                attention_case(dtype, "causal+alibi", 777, heads=(4, 1), head_dim=head_dim),
                attention_case(dtype, "window200", 1024, heads=(2, 1), head_dim=head_dim),
                attention_case(dtype, "prefix", 640, batch=3, head_dim=head_dim),
                attention_case(dtype, "documents", 1024, batch=2, head_dim=head_dim),
                attention_case(dtype, "causal+softcap2", 1000, heads=(4, 2), head_dim=head_dim),
            ]
    return cases
