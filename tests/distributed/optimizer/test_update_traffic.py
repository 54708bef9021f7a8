"""What docs/optimizers.md says of the messages of an update, to the last byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed_testing import run_ranks

WORKER = Path(__file__).with_name("update_traffic_worker.py")
BFLOAT16, FLOAT32 = 2, 4


@pytest.mark.slow
def test_bytes_of_an_update_under_tensor_parallelism():
    """Muon: each piece once to its owner and back. Adafactor: rows and columns, one number."""
    ranks = run_ranks(WORKER, 2, [], timeout=60)
    for rank in ranks:
        assert rank["adamw"] == {}
        # Rows, columns and a sum of squares of matrices, and a sum of squares of vectors.
        numbers = rank["rows and columns"] + rank["matrices"] + rank["vectors"]
        # Gathered, so that every rank adds them in the same order.
        assert rank["adafactor"] == {"all_gather": [3, FLOAT32 * numbers]}
    # 4 (n - 1) / n bytes for each element that a rank holds, on the mean over the ranks.
    sent = sum(rank["muon"]["send"][1] for rank in ranks)
    assert sent == sum(2 * BFLOAT16 * rank["muons"] for rank in ranks) // 2
