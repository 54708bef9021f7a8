"""Loading takes the model and little more than one tensor, whatever the files are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch_writing import write_torch_file

from pypkg.models import ModelConfig
from pypkg.models.architecture.registry import config_to_huggingface, weight_map
from pypkg.models.building import parameter_shapes
from pypkg.models.weights.formats.safetensors import TensorSpec
from pypkg.models.weights.model_folder import write_model_folder

CONFIG = ModelConfig(
    vocab_size=10_000,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=8,
)
LARGEST = 4 * CONFIG.vocab_size * CONFIG.hidden_size
MODEL = 4 * CONFIG.num_parameters()
# A block of what is read, its conversion, and the noise of the allocator.
SLACK = 48 << 20


def _shapes() -> dict[str, tuple[int, ...]]:
    names = weight_map(CONFIG)
    return {
        source: shape
        for name, of_parameter in parameter_shapes(CONFIG).items()
        for source, shape in names.source_shapes(name, of_parameter).items()
    }


@pytest.mark.parametrize(
    "stored", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16", "torch"]
)
def test_peak_memory(tmp_path: Path, stored: str) -> None:
    shapes = _shapes()
    keys = config_to_huggingface(CONFIG)
    if stored == "torch":
        tensors = {name: np.ones(shape, np.float16) for name, shape in shapes.items()}
        write_torch_file(tmp_path / "pytorch_model.bin", tensors)
        (tmp_path / "config.json").write_text(json.dumps(keys))
    else:
        carrier = {"float32": np.float32, "bfloat16": np.uint16}[stored]
        specs = {name: TensorSpec(stored, shape) for name, shape in shapes.items()}

        def ones() -> Iterator[tuple[str, np.ndarray]]:
            for name, shape in shapes.items():
                yield name, np.ones(shape, carrier)

        write_model_folder(tmp_path, keys, specs, ones())
    script = Path(__file__).with_name("loading_memory.py")
    command = [sys.executable, str(script), str(tmp_path), "float32"]
    result = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    peak = int(result.stdout.split()[-2])
    assert LARGEST + SLACK < MODEL / 2  # so that half a second copy of the model is noticed
    assert MODEL <= peak <= MODEL + LARGEST + SLACK
