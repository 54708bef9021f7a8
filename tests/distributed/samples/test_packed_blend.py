"""Documents kept apart, and losses by corpus, on several processes against one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from distributed_testing import run_ranks

from pypkg.data import IndexedDatasetWriter

WORKER = Path(__file__).with_name("packed_blend_worker.py")
CASES = ("llama", "baichuan_13b", "opt")  # rotary, ALiBi, learned positions


@pytest.mark.parametrize(
    ("data", "pipeline", "tensor"), [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2)]
)
def test_same_as_one_process(tmp_path, data, pipeline, tensor):
    rng = np.random.default_rng(0)
    for name in ("even", "odd"):
        with IndexedDatasetWriter(str(tmp_path / name), np.uint16) as writer:
            for size in rng.integers(1, 40, 30):
                writer.add_document(rng.integers(0, 1000, size).astype(np.uint16))
            writer.commit()
    arguments = [tmp_path, data, pipeline, tensor, *CASES]
    ranks = run_ranks(WORKER, data * pipeline * tensor, arguments, timeout=90)
    for case, expected in ranks[0]["expected"].items():
        assert set(expected["by_source"]) == {"even", "odd"}
        assert abs(expected["by_source"]["even"] - expected["by_source"]["odd"]) > 1e-3
        losses = []
        for rank in ranks:
            result = rank["results"][case]
            losses.append(result["loss"])
            np.testing.assert_allclose(result["sums"], expected["sums"], rtol=2e-5)
            for name, loss in expected["by_source"].items():
                assert result["by_source"][name] == pytest.approx(loss, rel=2e-5), (case, name)
        assert np.mean(losses) == pytest.approx(expected["loss"], rel=2e-5), case
