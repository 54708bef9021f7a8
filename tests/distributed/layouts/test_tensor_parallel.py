"""Tensor- and sequence-parallel models on CPU processes against the same model in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed_testing import run_ranks
from parity import CASES

from pypkg import _native

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
# Some have fewer key-value heads than there are ranks.
ON_FOUR = ("llama", "qwen3", "chatglm2", "baichuan_13b", "odd_vocabulary_norm_head")


@pytest.mark.parametrize(
    ("nproc", "cases", "sequence_parallel", "overlaps"),
    [
        (2, ON_FOUR, False, True),
        (2, CASES, True, False),
        (4, ON_FOUR, True, True),
        pytest.param(
            *(2, tuple(case for case in CASES if case not in ON_FOUR), False, False),
            marks=pytest.mark.slow,
        ),
        pytest.param(4, ON_FOUR, False, False, marks=pytest.mark.slow),
    ],
)
def test_same_as_one_process(tmp_path, nproc, cases, sequence_parallel, overlaps):
    arguments = [tmp_path, int(sequence_parallel), int(overlaps), *cases]
    results = run_ranks(WORKER, nproc, arguments, timeout=90)
    for rank, by_case in enumerate(results):
        assert sorted(by_case) == sorted(cases)
        for case, result in by_case.items():
            assert result["overlapped"] == overlaps, (rank, case)
            assert result["drawn_alike"] and result["finite"], (rank, case)
        # What overlaps lies between the products of a block.
        expected = [] if overlaps else ["pypkg_attention_block", "pypkg_mlp_block"]
        if "llama" in by_case:
            assert by_case["llama"]["blocks"] == expected, rank
    for case, result in results[0].items():
        assert result["saved_alike"], case
        assert result["loss"] < 1e-5, (case, result)
        assert result["logits"] < 1e-5, (case, result)
        assert result["gradient"] < 1e-4, (case, result)


@pytest.mark.skipif(
    not _native.matmul_bfloat16_supported(), reason="this processor has no AVX512_BF16"
)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_products_follow_the_matmul_precision(sequence_parallel):
    worker = WORKER.with_name("matmul_precision_worker.py")
    for result in run_ranks(worker, 2, [int(sequence_parallel)], timeout=60):
        assert max(result.values()) < 1e-4, result
