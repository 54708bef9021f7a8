"""The cases: kernel by kernel, and which sizes to run where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attention_cases
import numpy as np
import references as ref
from adamw_cases import adamw_case
from checks import DTYPES, FLOAT32_ERROR, Backend, Case, Comparison, tolerance
from narrow_state_cases import narrow_state_case
from random_normal_cases import random_normal_case

# Operations without a Triton kernel.
WITHOUT_TRITON = ("flash_attention", "adamw", "narrow_state", "random_normal")

# --- RMS norm -------------------------------------------------------------------------------------


def rms_norm_case(
    dtype: str,
    rows: int,
    cols: int,
    residual: bool = False,
    weight_dtype: str | None = None,
    misaligned: bool = False,
) -> Case:
    weight_dtype, epsilon = weight_dtype or dtype, 1e-5

    def run(be: Backend, rng: np.random.Generator) -> Iterator[Comparison]:
        def matrix() -> Any:
            return be.array(rng.standard_normal((rows, cols)), dtype, misaligned)

        def empty() -> Any:
            return be.poisoned((rows, cols), dtype, misaligned)

        x, r = matrix(), matrix() if residual else None
        weight = be.array(1 + 0.3 * rng.standard_normal(cols), weight_dtype)
        y, rstd = empty(), be.poisoned((rows,), "float32")
        h = empty() if residual else None
        be.kernels.rms_norm_forward(x, weight, y, rstd, r, h, epsilon=epsilon, stream=be.stream)
        if residual:
            summed = be.numpy(x) + be.numpy(r)
            yield Comparison("residual_out", be.numpy(h), summed, tolerance(dtype))
        h = h if residual else x
        h_values, w_values = be.numpy(h), be.numpy(weight)
        expected_y, expected_rstd = ref.rms_norm(h_values, w_values, epsilon)
        yield Comparison("y", be.numpy(y), expected_y, tolerance(dtype))
        yield Comparison("rstd", be.numpy(rstd), expected_rstd, FLOAT32_ERROR)

        dy, dh = matrix(), matrix() if residual else None
        expected_dx, expected_dweight = ref.rms_norm_gradients(
            be.numpy(dy), be.numpy(dh) if residual else None, h_values, w_values, epsilon
        )
        needed = be.kernels.rms_norm_backward_workspace(h)

        def backward(dy: Any, dx: Any, dresidual: Any = None, y: Any = None) -> np.ndarray:
            workspace = be.poisoned((needed,), "float32")
            dweight = be.poisoned((cols,), weight_dtype)
            be.kernels.rms_norm_backward(
                dy, h, weight, rstd, dx, dweight, workspace, dh, dresidual, y, stream=be.stream
            )
            return be.numpy(dweight)

        dx, dresidual = empty(), empty() if residual else None
        dweight = backward(dy, dx, dresidual)
        if residual:
            yield Comparison("dresidual", be.numpy(dresidual), be.numpy(dx), 0.0)
        yield Comparison("dx", be.numpy(dx), expected_dx, tolerance(dtype))
        yield Comparison("dweight", dweight, expected_dweight, tolerance(weight_dtype))
        y_over_dy = be.array(be.numpy(dy), dtype, misaligned)
        backward(y_over_dy, empty(), y=y_over_dy)
        yield Comparison("y in place of dy", be.numpy(y_over_dy), be.numpy(y), 0.0)
        yield Comparison("dweight of another run", backward(dy, dy), dweight, 0.0)
        yield Comparison("dx in place of dy", be.numpy(dy), be.numpy(dx), 0.0)

    kind = ("residual" if residual else "plain") + ("-misaligned" if misaligned else "")
    label = f"weight_{weight_dtype}-{rows}x{cols}-{kind}"
    return Case("rms_norm", dtype, label, run)


# --- rotary embedding -----------------------------------------------------------------------------


def rotary_case(
    dtype: str,
    heads: tuple[int, int],
    head_dim: int,
    rotary_dim: int,
    offset: int = 0,
    interleaved: bool = False,
    positions: bool = True,
    misaligned: bool = False,
    batch: int = 2,
    sequence: int = 5,
) -> Case:
    def run(be: Backend, rng: np.random.Generator) -> Iterator[Comparison]:
        num_positions = 2 * sequence
        angles = rng.uniform(-3, 3, (num_positions, rotary_dim // 2))
        cos, sin = be.array(np.cos(angles), "float32"), be.array(np.sin(angles), "float32")
        shapes = [(batch, sequence, count, head_dim) for count in heads if count]
        inputs = [be.array(rng.standard_normal(s), dtype, misaligned) for s in shapes]
        ids = np.broadcast_to(np.arange(sequence), (batch, sequence))
        if positions:
            ids = rng.integers(0, num_positions, (batch, sequence))
        id_array = be.array(ids, "int64") if positions else None
        for inverse in (False, True):
            s = be.numpy(sin) * (-1 if inverse else 1)
            expected = [
                ref.rotary_embedding(be.numpy(x), be.numpy(cos), s, ids, offset, interleaved)
                for x in inputs
            ]
            outputs = [be.poisoned(shape, dtype, misaligned) for shape in shapes]
            for targets in (outputs, inputs):
                q, k = [*inputs, None][:2]
                q_out, k_out = [*targets, None][:2]
                be.kernels.rotary_embedding(
                    *(q, k, cos, sin, q_out, k_out, id_array),
                    rotary_offset=offset,
                    interleaved=interleaved,
                    inverse=inverse,
                    stream=be.stream,
                )
            for name, out, in_place, value in zip("qk", outputs, inputs, expected):
                yield Comparison(name, be.numpy(out), value, tolerance(dtype))
                yield Comparison(f"{name} in place", be.numpy(in_place), be.numpy(out), 0.0)

    style = "interleaved" if interleaved else "half"
    label = (
        f"{heads[0]}+{heads[1]}x{head_dim}-{style}{rotary_dim}at{offset}"
        f"{'' if positions else '-no_ids'}{'-misaligned' if misaligned else ''}"
    )
    return Case("rotary_embedding", dtype, label, run)


# --- gated activation -----------------------------------------------------------------------------


def gated_activation_case(
    dtype: str, name: str, rows: int, cols: int, packed: bool = False, misaligned: bool = False
) -> Case:
    def run(be: Backend, rng: np.random.Generator) -> Iterator[Comparison]:
        def two() -> tuple[Any, Any]:
            if not packed:
                shape = (rows, cols)
                return (
                    be.array(2 * rng.standard_normal(shape), dtype, misaligned),
                    be.array(rng.standard_normal(shape), dtype, misaligned),
                )
            both = be.array(rng.standard_normal((rows, 2 * cols)), dtype, misaligned)
            return be.columns(both, 0, cols), be.columns(both, cols, 2 * cols)

        (gate, up), (dgate, dup) = two(), two()
        out = be.poisoned((rows, cols), dtype)
        be.kernels.gated_activation_forward(gate, up, out, name, stream=be.stream)
        value, derivative = ref.activation(be.numpy(gate), name)
        u = be.numpy(up)
        yield Comparison("out", be.numpy(out), value * u, tolerance(dtype))

        dout = be.array(rng.standard_normal((rows, cols)), dtype)
        g = be.numpy(dout)
        backward = be.kernels.gated_activation_backward
        backward(gate, up, dout, dgate, dup, name, stream=be.stream)
        yield Comparison("dgate", be.numpy(dgate), g * u * derivative, tolerance(dtype))
        yield Comparison("dup", be.numpy(dup), g * value, tolerance(dtype))
        backward(gate, up, dout, gate, up, name, dout, stream=be.stream)
        yield Comparison("out in place of dout", be.numpy(dout), be.numpy(out), 0.0)
        yield Comparison("dgate in place", be.numpy(gate), be.numpy(dgate), 0.0)
        yield Comparison("dup in place", be.numpy(up), be.numpy(dup), 0.0)

    suffix = f"{'-packed' if packed else ''}{'-misaligned' if misaligned else ''}"
    return Case("gated_activation", dtype, f"{name}-{rows}x{cols}{suffix}", run)


# --- cross entropy --------------------------------------------------------------------------------


def cross_entropy_case(
    dtype: str, rows: int, cols: int, vocab_start: int = 0, vocab_size: int = 0, shift: bool = False
) -> Case:
    """shift: dlogits starts at another distance from a 16-byte boundary than logits."""

    def run(be: Backend, rng: np.random.Generator) -> Iterator[Comparison]:
        size = vocab_size or vocab_start + cols
        logits_values = 3 * rng.standard_normal((rows, cols))
        logits_values[0, : cols // 2] = -np.inf
        labels_values = rng.integers(0, size, rows)
        labels_values[0] = vocab_start + cols - 1
        labels_values[rows // 2 :: 3] = -100
        logits, labels = be.array(logits_values, dtype), be.array(labels_values, "int64")
        names = ("loss", "lse", "row_max", "row_sum", "target")
        got = {name: be.poisoned((rows,), "float32") for name in names}
        be.kernels.cross_entropy_forward(
            logits, labels, **got, vocab_start=vocab_start, vocab_size=size, stream=be.stream
        )
        x = be.numpy(logits)
        column = labels_values - vocab_start
        ignored = labels_values == -100
        here = ~ignored & (column >= 0) & (column < cols)
        row_max, row_sum, lse = ref.log_sum_exp(x)
        target = np.where(here, x[np.arange(rows), np.clip(column, 0, cols - 1)], 0.0)
        loss = np.where(ignored, 0.0, lse - target)
        for name, value in zip(names, (loss, lse, row_max, row_sum, target)):
            yield Comparison(name, be.numpy(got[name]), value, FLOAT32_ERROR)

        dloss = be.array(rng.standard_normal(rows), "float32")
        backward = be.kernels.cross_entropy_backward
        dlogits = be.poisoned((rows, cols), dtype, shift)
        backward(
            *(logits, labels, got["lse"], dloss, dlogits), vocab_start=vocab_start, stream=be.stream
        )
        softmax = np.exp(x - be.numpy(got["lse"])[:, None])
        onehot = (np.arange(cols) == column[:, None]) & here[:, None]
        expected = (softmax - onehot) * (be.numpy(dloss) * ~ignored)[:, None]
        yield Comparison("dlogits", be.numpy(dlogits), expected, tolerance(dtype))
        backward(
            *(logits, labels, got["lse"], dloss, logits), vocab_start=vocab_start, stream=be.stream
        )
        yield Comparison("dlogits in place", be.numpy(logits), be.numpy(dlogits), 0.0)

    suffix = (
        f"{f'-from{vocab_start}of{vocab_size}' if vocab_size else ''}{'-shift' if shift else ''}"
    )
    return Case("cross_entropy", dtype, f"{rows}x{cols}{suffix}", run)


# --- which cases ----------------------------------------------------------------------------------


def small_cases() -> list[Case]:
    """Awkward sizes that even the emulation runs in moments."""
    cases = []
    for dtype in DTYPES:
        cases += [
            rms_norm_case(dtype, 1, 760),
            rms_norm_case(dtype, 5, 1128, residual=True, weight_dtype="float32"),
            rms_norm_case(dtype, 70, 128, residual=True),
            rms_norm_case(dtype, 40, 1128, residual=True),  # several rows per dweight slot
            rms_norm_case(dtype, 7, 33, residual=True),
            rms_norm_case(dtype, 150, 33),
            rms_norm_case(dtype, 19, 64, misaligned=True),
            rms_norm_case(dtype, 2, 4096, residual=True, weight_dtype="float32"),
            rms_norm_case(dtype, 2, 6144),
            rotary_case(dtype, (5, 2), 128, 128),
            rotary_case(dtype, (3, 1), 64, 32, offset=16, positions=False),
            rotary_case(dtype, (3, 0), 40, 20, interleaved=True),
            rotary_case(dtype, (2, 2), 64, 64, interleaved=True),
            rotary_case(dtype, (2, 1), 64, 64, misaligned=True),
            rotary_case(dtype, (65, 9), 16, 8),
            gated_activation_case(dtype, "silu", 3, 1128),
            gated_activation_case(dtype, "gelu", 9, 24, packed=True),
            gated_activation_case(dtype, "gelu_tanh", 4, 33, packed=True),
            gated_activation_case(dtype, "silu", 2, 64, misaligned=True),
            cross_entropy_case(dtype, 5, 1001),
            cross_entropy_case(dtype, 4, 5000, vocab_start=5000, vocab_size=20000),
            cross_entropy_case(dtype, 3, 7),
            cross_entropy_case(dtype, 4, 96, shift=True),
            adamw_case(dtype, (1, 37, 5003, 4096, 8)),
            adamw_case(dtype, (7,) * 70),  # more than one launch holds
            adamw_case(dtype, (1000, 9), dtype, misaligned=True),
            random_normal_case(dtype, 3, 700, first=2**36 - 1000),
            random_normal_case(dtype, 7, 65, first=61, offset=3, gap=9, index_stride=500),
            random_normal_case(dtype, 1, 1, first=127, misaligned=True),
        ]
    for dtype in ("float16", "bfloat16"):
        cases.append(adamw_case(dtype, (760, 4097, 3), dtype, masters=True))
    cases.append(adamw_case("bfloat16", (760, 4097, 3), "bfloat16"))
    for is_signed in (True, False):
        cases += [
            narrow_state_case(5003, 256, is_signed),
            narrow_state_case(1, 256, is_signed),
            narrow_state_case(700, 33, is_signed, misaligned=True),
        ]
    return cases + attention_cases.small_cases()


def large_cases() -> list[Case]:
    """Shapes that fill a GPU more, still quick to check in float64 on the host."""
    cases = []
    for dtype in DTYPES:
        cases += [
            rms_norm_case(dtype, 3001, 4096, residual=True, weight_dtype="float32"),
            rms_norm_case(dtype, 513, 16384),
            rms_norm_case(dtype, 130, 20000),
            rotary_case(dtype, (32, 8), 128, 128, batch=3, sequence=331),
            gated_activation_case(dtype, "silu", 777, 11008, packed=True),
            cross_entropy_case(dtype, 300, 50257),
            cross_entropy_case(dtype, 200, 32000, shift=True),
            adamw_case(dtype, (3000001, 4096, 500000), dtype, masters=dtype != "float32"),
            random_normal_case(dtype, 4096, 1376, first=2750, gap=5, index_stride=11008),
        ]
    cases += [narrow_state_case(3000001, 256, is_signed) for is_signed in (True, False)]
    return cases + attention_cases.large_cases()
