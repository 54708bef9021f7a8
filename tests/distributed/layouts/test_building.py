"""Building a model takes what a rank holds and little more, from random numbers and from files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from building_worker import CONFIG, SEED
from distributed_testing import run_ranks

from pypkg.models import from_config, save_pretrained
from pypkg.models.building import parameter_shapes

WORKER = Path(__file__).with_name("building_worker.py")
MODEL = 4 * CONFIG.num_parameters()
LARGEST = 4 * max(int(np.prod(shape)) for shape in parameter_shapes(CONFIG).values())
# Fleet aligns the ends of parameters to 256 bytes, and Paddle's allocator each tensor.
ALIGNMENT = 2 * 512 * len(parameter_shapes(CONFIG))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model = from_config(CONFIG, seed=SEED)
    save_pretrained(model, path)
    np.savez(path / "expected.npz", **{n: p.numpy() for n, p in model.named_parameters()})
    return path


@pytest.mark.parametrize(
    "degrees",
    [
        {"sharding": 2},
        pytest.param({"tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"pipeline": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_peak_memory_and_bytes_read(folder: Path, degrees: dict[str, int]) -> None:
    cases = [{"degrees": degrees, "stored": stored} for stored in (False, True)]
    ranks = run_ranks(WORKER, 2, [folder, json.dumps(cases)], timeout=90)
    assert MODEL > 8 * LARGEST  # so that the whole model would be noticed, and a second copy
    for results in ranks:
        for case, result in zip(cases, results, strict=True):
            assert result["held"] < 0.6 * MODEL, case
            assert result["held"] <= result["kept"] <= result["held"] + ALIGNMENT, (case, result)
            assert result["peak"] <= result["kept"] + 2 * LARGEST, (case, result)
            if case["stored"]:
                assert result["read"] <= 1.05 * result["held"], (case, result)
    for index, case in enumerate(cases):
        equal = {name for results in ranks for name in results[index]["equal"]}
        assert equal == parameter_shapes(CONFIG).keys(), case
