"""One rank of test_building.py: what building a model under a layout takes, and its weights.

Arguments: a folder with the weights of the model, JSON of a list of cases.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from distributed_testing import report
from paddle.base import core
from paddle.distributed.fleet.base import topology
from whole_values import whole_parameters

from pypkg.models import ModelConfig, from_config, from_pretrained
from pypkg.models.building import build_without_memory
from pypkg.models.pretrained import random_weights, stored_weights
from pypkg.models.weights.formats.tensor_files import TensorFiles
from pypkg.parallel import mesh
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.training.tp_sharding import ModelTpSharding

SEED = 5
CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
)


class CountedReads:
    """Bytes that ``TensorFiles.read`` returns, which are those that it reads."""

    def __init__(self) -> None:
        self.count = 0
        self._read = TensorFiles.read

    def __enter__(self) -> CountedReads:
        counted = self

        def read(files: TensorFiles, name: str, dtype: str, slices: Sequence = ()) -> np.ndarray:
            values = counted._read(files, name, dtype, slices)
            counted.count += values.nbytes
            return values

        TensorFiles.read = read
        return self

    def __exit__(self, *_: object) -> None:
        TensorFiles.read = self._read


def held_bytes(model: paddle.nn.Layer) -> int:
    tensors = [getattr(p, "fw_storage", p) for p in model.parameters()]
    return sum(each.size * each.element_size() for each in tensors)


def make(case: Mapping[str, Any], folder: Path) -> paddle.nn.Layer:
    """A model under the case's layout, wrapped in stage 3 of sharding."""
    is_sliced = case["degrees"].get("sharding", 1) > 1
    if not is_sliced:
        return from_pretrained(folder) if case["stored"] else from_config(CONFIG, seed=SEED)
    config, read = CONFIG, random_weights(CONFIG, SEED)
    if case["stored"]:
        config, read = stored_weights(folder)
    model = build_without_memory(config, "float32")
    options, sharding = UpdateOptions(sharding_stage=3), ModelTpSharding(config)
    distribute(model, options, mesh.current(), sharding, read=read)
    return model


def run_case(case: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    topology._HYBRID_PARALLEL_GROUP = None  # lets fleet make the groups of another mesh
    mesh.initialize(mesh.Degrees(**case["degrees"]))
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    before = core.host_memory_stat_current_value("Allocated", 0)
    with CountedReads() as reads, paddle.utils.unique_name.guard():
        model = make(case, folder)
    held = held_bytes(model)
    after = core.host_memory_stat_current_value("Allocated", 0)
    peak = core.host_memory_stat_peak_value("Allocated", 0)
    result = {"held": held, "kept": after - before, "peak": peak - before, "read": reads.count}
    wholes = whole_parameters(CONFIG, dict(model.named_parameters()))
    with np.load(folder / "expected.npz") as expected:
        result["equal"] = [name for name in wholes if np.array_equal(wholes[name], expected[name])]
    return result


def main(folder: Path, cases: list[dict]) -> None:
    report([run_case(case, folder) for case in cases])


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
