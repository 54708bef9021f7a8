"""SAT's rank files of GLM-130B, merged back byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_testing import GOLDEN
from safetensors.numpy import load_file
from sat_writing import write_ranks
from torch_writing import write_torch_file

from pypkg.errors import UserError
from pypkg.models import from_pretrained
from pypkg.models.weights.formats.tensor_files import TensorFiles

GLM = GOLDEN / "glm130b"


@pytest.fixture(scope="module")
def whole() -> dict[str, np.ndarray]:
    return load_file(GLM / "model.safetensors")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_merged_byte_for_byte(tmp_path: Path, whole: dict[str, np.ndarray], ranks: int) -> None:
    write_ranks(tmp_path, whole, ranks)
    files = TensorFiles(tmp_path)
    assert len(files.files) == ranks
    assert files.shapes() == {name: value.shape for name, value in whole.items()}
    for name, value in whole.items():
        assert files.read(name, "float32").tobytes() == value.tobytes(), name


def test_splitting_moves_the_rows_of_gated_layers(
    tmp_path: Path, whole: dict[str, np.ndarray]
) -> None:
    """Joining the ranks without regard for the halves would give another matrix."""
    write_ranks(tmp_path, whole, 2)
    name = "transformer.layers.0.mlp.dense_h_to_4h.weight"
    ranks = []
    for rank in range(2):
        folder = tmp_path / f"only-{rank}"
        folder.mkdir()
        (tmp_path / f"mp_rank_0{rank}_model_states.pt").rename(folder / "rank.pt")
        ranks.append(TensorFiles(folder).read(name, "float32"))
    assert not np.array_equal(np.concatenate(ranks), whole[name])


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_part_is_read_across_ranks(
    tmp_path: Path, whole: dict[str, np.ndarray], ranks: int
) -> None:
    write_ranks(tmp_path, whole, ranks)
    files = TensorFiles(tmp_path)
    for name, value in whole.items():
        for start in (0, 1, len(value) // 2 - 1):
            rows = slice(start, start + len(value) // 2)
            part = files.read(name, "float32", [rows])
            np.testing.assert_array_equal(part, value[rows], err_msg=name)
        if value.ndim == 2:
            slices = [slice(3, -3), slice(5, -5)]
            part = files.read(name, "float32", slices)
            np.testing.assert_array_equal(part, value[3:-3, 5:-5], err_msg=name)


def test_newest_iteration_and_the_model(tmp_path: Path, whole: dict[str, np.ndarray]) -> None:
    """The layout of the release: ``latest`` names the folder of the ranks."""
    write_ranks(tmp_path / "49300", whole, 2)
    (tmp_path / "latest").write_text("49300\n")
    with pytest.raises(UserError, match=r"has no config\.json"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((GLM / "config.json").read_bytes())
    loaded, expected = from_pretrained(tmp_path), from_pretrained(GLM)
    for name, value in expected.state_dict().items():
        assert loaded.state_dict()[name].numpy().tobytes() == value.numpy().tobytes(), name


def test_missing_rank(tmp_path: Path, whole: dict[str, np.ndarray]) -> None:
    write_ranks(tmp_path, whole, 4)
    (tmp_path / "mp_rank_02_model_states.pt").unlink()
    with pytest.raises(
        UserError, match=r"lacks mp_rank_02_model_states\.pt; its highest rank is 3"
    ):
        TensorFiles(tmp_path)


ROW = "transformer.layers.0.attention.dense.weight"
GATED = "transformer.layers.0.mlp.dense_h_to_4h.bias"
NORM = "transformer.final_layernorm.weight"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({NORM: (4,)}, {}, f"only one holds {NORM}"),
        ({NORM: (4,)}, {NORM: (5,)}, rf"{NORM} has shape \[5\] in one and \[4\] in the other"),
        ({ROW: (4, 2)}, {ROW: (5, 2)}, rf"{ROW} has shape \[5, 2\] in one and \[4, 2\]"),
        ({ROW: (4,)}, {ROW: (4,)}, rf"{ROW} has shape \[4\]"),
        ({GATED: (3,)}, {GATED: (3,)}, r"of shape \[3\] is a gated layer, .* must be even"),
    ],
)
def test_ranks_that_do_not_fit(
    tmp_path: Path, first: dict[str, tuple], second: dict[str, tuple], message: str
) -> None:
    for rank, shapes in enumerate((first, second)):
        held = {"same": (1,), **shapes}
        tensors = {name: np.zeros(shape, np.float32) for name, shape in held.items()}
        write_torch_file(tmp_path / f"mp_rank_0{rank}_model_states.pt", tensors, "module")
    with pytest.raises(UserError, match=message):
        TensorFiles(tmp_path)
