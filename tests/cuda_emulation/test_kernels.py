"""The CUDA kernels' own code, run on the CPU against float64, and the CPU kernels beside it."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import attention_cases
import checks
import hopper_cases
import kernel_cases
import numpy as np
import pytest
from guarded_memory import GuardedArray, GuardedBackend

CASES = kernel_cases.small_cases()
HOPPER_BACKWARD = [
    "flash_attention_backward (Hopper, dk, dv, sum of dq)",
    "flash_attention_backward (Hopper, dq of its sum)",
]


SEVEN_PRODUCTS = ["flash_attention_backward (dk, dv)", "flash_attention_backward (dq)"]
FIVE_PRODUCTS = [
    "flash_attention_backward (dk, dv, sum of dq)",
    "flash_attention_backward (dq of its sum)",
]


def operations(emulated: ModuleType) -> list[str]:
    """What was launched since the last call."""
    return [launch.partition(" on shape")[0] for launch in emulated.take_launches()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_cuda_kernels_agree_with_float64(case: checks.Case, emulated: ModuleType):
    emulated.seed(1)
    checks.check(case, GuardedBackend(emulated))


@pytest.mark.parametrize("case", hopper_cases.small_cases(), ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_emulated_hopper_kernels_agree_with_float64(
    case: checks.Case, emulated: ModuleType, seed: int
):
    emulated.take_launches()
    emulated.seed(seed)
    checks.check(case, GuardedBackend(emulated))
    assert operations(emulated) == [
        "flash_attention_forward (Hopper)",
        *2 * ["flash_attention_backward (delta)", *HOPPER_BACKWARD],
    ]


@pytest.mark.parametrize("mask", ["causal", "documents+full+window50+alibi+softcap1"])
@pytest.mark.parametrize(
    ("kib", "dtype", "head_dim", "expected"),
    [
        (163, "bfloat16", 128, FIVE_PRODUCTS),
        (99, "bfloat16", 128, SEVEN_PRODUCTS),
        (99, "float16", 64, FIVE_PRODUCTS),
        (163, "bfloat16", 32, SEVEN_PRODUCTS),
        (163, "float32", 64, SEVEN_PRODUCTS),
    ],
)
def test_backward_kernels_by_shared_memory_of_the_device(
    emulated: ModuleType, mask: str, kib: int, dtype: str, head_dim: int, expected: list[str]
):
    emulated.take_launches()
    emulated.set_shared_memory_limit(kib * 1024)
    try:
        case = attention_cases.attention_case(dtype, mask, 150, heads=(2, 1), head_dim=head_dim)
        checks.check(case, GuardedBackend(emulated))
    finally:
        emulated.set_shared_memory_limit(163 * 1024)
    backward = ["flash_attention_backward (delta)", *expected]
    assert operations(emulated) == ["flash_attention_forward", *2 * backward]


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype in checks.CPU_DTYPES], ids=str)
def test_cpu_kernels_agree_with_float64(case: checks.Case):
    from pypkg import _native

    checks.check(case, GuardedBackend(_native))


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_random_numbers_have_the_bits_of_the_cpu_kernel(dtype: str, emulated: ModuleType):
    from pypkg import _native

    drawn = []
    for kernels in (emulated, _native):
        out = GuardedArray((5 * 700,), dtype)
        kernels.random_normal(
            out,
            **{"key": 2**63 + 1, "stream_id": 2**40, "deviation": 0.02, "first": 2**37 + 5},
            **{"rows": 5, "cols": 600, "out_stride": 700, "index_stride": 1000},
        )
        drawn.append(out.storage.tobytes())
    assert drawn[0] == drawn[1]


def _packed_attention(kernels: ModuleType, dtype: str, is_packed: bool) -> list[bytes]:
    """Rotation, attention and its gradients on heads of one packed matrix, or of three tensors."""
    batch, sequence, heads_q, heads_k, head_dim = 2, 150, 4, 2, 32
    heads = (heads_q, heads_k, heads_k)
    starts = [0, heads_q, heads_q + heads_k, sum(heads)]
    width = sum(heads) * head_dim
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((batch, sequence, sum(heads), head_dim))
    backend = GuardedBackend(kernels)

    def parts(values: np.ndarray) -> tuple[list[GuardedArray], list[object]]:
        """Arrays that hold query, key and value, and the three as arguments."""
        if not is_packed:
            split = [backend.array(values[:, :, i:j], dtype) for i, j in pairwise(starts)]
            return split, list(split)
        whole = backend.array(values, dtype)
        at, item = whole.storage.ctypes.data, whole.storage.itemsize
        named = [
            (at + i * head_dim * item, [batch, sequence, j - i, head_dim], dtype, "cpu")
            for i, j in pairwise(starts)
        ]
        return [whole], named

    stride = width if is_packed else 0
    held, (query, key, value) = parts(qkv)
    angles = rng.uniform(-3, 3, (sequence, head_dim // 2))
    tables = [backend.array(f(angles), "float32") for f in (np.cos, np.sin)]
    if is_packed:  # queries and keys are one run of heads
        both = (query[0], [batch, sequence, heads_q + heads_k, head_dim], dtype, "cpu")
        kernels.rotary_embedding(both, None, *tables, both, None, q_stride=stride)
    else:
        kernels.rotary_embedding(query, key, *tables, query, key)
    shape = (batch, sequence, heads_q, head_dim)
    out, lse = GuardedArray(shape, dtype), GuardedArray((batch, heads_q, sequence), "float32")
    options = {"scale": 0.2, "token_stride": stride}
    kernels.flash_attention_forward(query, key, value, out, lse, **options)
    dout = backend.array(rng.standard_normal(shape), dtype)
    gradients, (dq, dk, dv) = parts(np.full_like(qkv, np.nan))
    floats = kernels.flash_attention_backward_workspace(query, key)
    workspace = GuardedArray((floats,), "float32")
    kernels.flash_attention_backward(
        dout, query, key, value, out, lse, dq, dk, dv, workspace, **options
    )
    results = [np.concatenate([e.numpy() for e in each], axis=2) for each in (held, gradients)]
    return [each.tobytes() for each in (*results, out.numpy(), lse.numpy())]


@pytest.mark.parametrize(
    ("dtype", "kernel"), [("float32", "ampere"), ("float16", "ampere"), ("bfloat16", "hopper")]
)
def test_packed_heads_have_the_bits_of_separate_ones(emulated: ModuleType, dtype: str, kernel: str):
    with hopper_cases.flash_attention_kernel(kernel):
        found = [_packed_attention(emulated, dtype, is_packed) for is_packed in (False, True)]
    assert found[0] == found[1]
