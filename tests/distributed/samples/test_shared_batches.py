"""distributed_dataloader: one process reads for those that train on the same samples."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed_testing import run_ranks

WORKER = Path(__file__).with_name("shared_batches_worker.py")


@pytest.mark.parametrize(
    ("data", "pipeline", "tensor"), [(1, 2, 2), (2, 1, 2), (2, 2, 1), (1, 1, 2), (2, 1, 1)]
)
def test_every_process_has_the_batches_of_its_reader(data, pipeline, tensor):
    results = run_ranks(WORKER, data * pipeline * tensor, [data, pipeline, tensor], timeout=90)
    readers = [rank for rank, result in enumerate(results) if result["reads"]]
    assert len(readers) == data and readers[0] == 0
    reader_of = {results[rank]["shard"]: rank for rank in readers}
    assert sorted(reader_of) == list(range(data))
    for result in results:
        first = 1000 * result["shard"]
        assert [batch["input_ids"][0][0] - first for batch in result["batches"]] == [0, 10, 20]
        assert [batch["document_starts"][1][2] for batch in result["batches"]] == [0, 1, 2]
        assert result["batches"] == results[reader_of[result["shard"]]]["batches"]
        assert result["dtypes"] == ["int64", "int32"]
        assert result["told"] == ["corpus", reader_of[result["shard"]]]
        assert result["user_error"] == ["UserError", "a.bin: broken"]
        name, message = result["other_error"]
        assert name == ("OSError" if result["reads"] else "RuntimeError") and "disk" in message
        assert result["after_errors"] == 3
