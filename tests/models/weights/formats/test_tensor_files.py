"""safetensors files: read and written as the format's own library does, and distrusted."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pypkg.errors import UserError
from pypkg.models.weights.formats import stored_tensor
from pypkg.models.weights.formats.safetensors import TensorSpec, write_tensors
from pypkg.models.weights.formats.stored_tensor import convert
from pypkg.models.weights.formats.tensor_files import INDEX_FILE, SINGLE_FILE, TensorFiles


def _write_raw(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.random((3, 5), np.float32),
        "b": rng.random((4,)).astype(np.float16),
        "c": rng.random((2, 2, 2)),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    save_file(tensors, tmp_path / SINGLE_FILE, {"format": "pt"})
    files = TensorFiles(tmp_path)
    assert files.shapes() == {name: value.shape for name, value in tensors.items()}
    for name, value in tensors.items():
        read = files.read(name, "float32")
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, value.astype(np.float32), err_msg=name)


def test_weights_that_are_there_twice_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / SINGLE_FILE)
    caplog.set_level("INFO")
    TensorFiles(tmp_path)
    assert not caplog.records
    (tmp_path / "model_state.pdparams").write_bytes(b"of another save")
    TensorFiles(tmp_path)
    assert caplog.messages == [
        f"{tmp_path}: the weights are those of model.safetensors; model_state.pdparams is not read"
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_file_shards_without_their_index(tmp_path: Path, count: int) -> None:
    for number in range(1, count + 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({"a": np.zeros(2, np.float32)}, tmp_path / name)
    with pytest.raises(UserError, match=r"no index lists, model-00001-of-00002\.safetensors"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_library_reads_what_is_written(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    tensors = {"z": rng.random((3, 5)).astype(dtype), "a.b": rng.random((7,)).astype(dtype)}
    specs = {name: TensorSpec(dtype, value.shape) for name, value in tensors.items()}
    path = tmp_path / SINGLE_FILE
    assert write_tensors(path, specs, tensors.items()) == 22 * np.dtype(dtype).itemsize
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(read[name], value)
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_bfloat16_survives_and_converts(tmp_path: Path) -> None:
    bits = np.arange(0x3F80, 0x3F90, dtype=np.uint16).reshape(4, 4)
    specs = {"x": TensorSpec("bfloat16", (4, 4))}
    write_tensors(tmp_path / SINGLE_FILE, specs, [("x", bits)])
    files = TensorFiles(tmp_path)
    np.testing.assert_array_equal(files.read("x", "bfloat16"), bits)
    expected = 1 + np.arange(16, dtype=np.float32).reshape(4, 4) / 128
    np.testing.assert_array_equal(files.read("x", "float32"), expected)
    np.testing.assert_array_equal(files.read("x", "float16"), expected.astype(np.float16))


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_rounding_to_bfloat16_is_paddles(values: list[float]) -> None:
    array = np.array(values, np.float32)
    ours = convert(array, "float32", "bfloat16")
    paddles = paddle.to_tensor(array).astype("bfloat16").numpy()
    nan = np.isnan(array)
    np.testing.assert_array_equal(ours[~nan], paddles[~nan])
    assert np.isnan(convert(ours[nan], "bfloat16", "float32")).all()


def test_nan_with_all_bits_set_stays_nan() -> None:
    array = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(convert(convert(array, "float32", "bfloat16"), "bfloat16", "float32")).all()


def test_tensors_must_come_as_announced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected x"):
        specs = {"x": TensorSpec("float32", (2,))}
        write_tensors(tmp_path / "f", specs, [("x", np.zeros(3, np.float32))])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


_HALF = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def _corrupt(header: object, data: bytes = b"\0" * 8) -> Callable[[Path], None]:
    return lambda path: _write_raw(path, header, data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "is truncated: tensor x ends at byte"),
        (lambda path: path.write_bytes(b""), "truncated or not a safetensors file"),
        (lambda path: path.write_bytes(b"abc"), "truncated or not a safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 64), "truncated or not a safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:30]), "truncated or not a safetensors"),
        (_corrupt(b"{not json"), "header is not JSON"),
        (_corrupt(b"\xff\xfe\xfd"), "header is not JSON"),
        (_corrupt([1]), "header is not JSON"),
        (_corrupt({"x": {"dtype": "F32", "shape": [2]}}), "x has no valid header"),
        (_corrupt({"x": 3}), "x has no valid header"),
        *(
            (_corrupt({"x": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}), message)
            for shape, offsets, message in (
                ([float("inf")], [0, 8], r"shape \(inf,\) are not integers"),
                (["2"], [0, 8], r"shape \('2',\) are not integers"),
                ("2", [0, 8], r"shape \('2',\) are not integers"),
                ([2.0], [0, 8], r"shape \(2.0,\) are not integers"),
                ([2], [0, 8.0], "data_offsets 0, 8.0 and shape .* are not integers"),
                ([True, 2], [0, 8], r"shape \(True, 2\) are not integers"),
                (["2"], ["0", "8"], "are not integers"),
                ({"2": 1}, [0, 8], r"shape \('2',\) are not integers"),
                (None, [0, 8], "x has no valid header"),
                ([10**4000, 10**4000], [0, 8], "x has no valid header"),
                ([2], [0, 10**4299], "x has no valid header"),
                ([1] * 100_000, [0, 8], "a shape of 100000 axes"),
            )
        ),
        (_corrupt(b'{"x":' * 100_000), "header is not JSON"),
        (
            _corrupt({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
            r"shape \[3\] and dtype float32 takes 12 bytes, its header says 8",
        ),
        (
            _corrupt({"x": {"dtype": "F32", "shape": [2], "data_offsets": [-16, -8]}}),
            "x has no valid header",
        ),
        # What the format forbids, and its own library refuses.
        (
            _corrupt({"x": _HALF, "y": _HALF}, b"\0" * 4),
            "y begins at byte .*, and tensor x ends at",
        ),
        (_corrupt({"x": _HALF | {"data_offsets": [4, 8]}}), "x begins at byte .*, and the header"),
        (_corrupt({"x": _HALF}), "tensor x ends at byte .*, the file has .* no tensor"),
        (
            _corrupt(b'{"x":%s,"x":%s}' % ((json.dumps(_HALF).encode(),) * 2), b"\0" * 4),
            "names a tensor twice",
        ),
    ],
)
def test_damaged_file_is_named(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / SINGLE_FILE
    save_file({"x": np.arange(6, dtype=np.float32)}, path)
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        TensorFiles(tmp_path)
    assert str(path) in str(error.value)


def test_a_truncated_file_tells_of_the_bytes_of_the_whole_one(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    save_file({"x": np.arange(6, dtype=np.float32)}, path)
    whole = path.stat().st_size
    _cut(path)
    message = f"tensor x ends at byte {whole}, the file has {whole - 3}$"
    with pytest.raises(UserError, match=message):
        TensorFiles(tmp_path)


def test_unsupported_dtype_is_named(tmp_path: Path) -> None:
    save_file({"x": np.arange(6)}, tmp_path / SINGLE_FILE)
    with pytest.raises(UserError, match=r"tensor x is of dtype int64; .*one of float32, float16"):
        TensorFiles(tmp_path).read("x", "float32")


@pytest.mark.parametrize(
    ("value", "dtype"), [(np.float32(70_000), "float16"), (np.float64(1e39), "float32")]
)
def test_values_that_a_dtype_cannot_hold(tmp_path: Path, value: np.floating, dtype: str) -> None:
    """They would become infinite."""
    save_file({"x": np.array([1, value], value.dtype)}, tmp_path / SINGLE_FILE)
    files = TensorFiles(tmp_path)
    assert files.read("x", dtype, [slice(1)]).tolist() == [1]
    with pytest.raises(UserError, match=rf"tensor x .* holds values beyond .* largest of {dtype}"):
        files.read("x", dtype)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin.index.json"])
def test_a_link_that_leads_nowhere(tmp_path: Path, name: str) -> None:
    """Weights in another format beside it are not read in its place."""
    (tmp_path / name).symlink_to("blob")
    (tmp_path / "model_state.pdparams").write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name} is a link to blob, which does not exist"):
        TensorFiles(tmp_path)


def test_the_index_decides_between_files_that_hold_one_tensor(tmp_path: Path) -> None:
    for value, name in enumerate(("a", "b", "c")):
        save_file({"x": np.full(2, value, np.float32)}, tmp_path / name)
    weight_map = {"weight_map": {"x": "b", "y": "a", "z": "c"}}
    (tmp_path / INDEX_FILE).write_text(json.dumps(weight_map))
    with pytest.raises(UserError, match="lists the tensor y, which no file holds"):
        TensorFiles(tmp_path)
    for other, name in (("y", "a"), ("z", "c")):
        save_file({"x": np.full(2, 9, np.float32), other: np.zeros(1)}, tmp_path / name)
    assert TensorFiles(tmp_path).read("x", "float32").tolist() == [1, 1]


SLICES = [
    (),
    (slice(2, 5),),
    (slice(None), slice(1, 3)),
    (slice(1, -1), slice(-3, None)),
    (slice(2, 2), slice(None)),
    (slice(None), slice(3, 1)),
    (slice(6, 99),),
]


@pytest.mark.parametrize("slices", SLICES, ids=str)
@pytest.mark.parametrize("block", [1 << 24, 64, 1])
def test_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slices: tuple[slice, ...], block: int
) -> None:
    """The same as cutting the whole, however few bytes are read at once."""
    monkeypatch.setattr(stored_tensor, "_BLOCK", block)
    rng = np.random.default_rng(0)
    tensors = {"matrix": rng.random((7, 5), np.float32), "cube": rng.random((7, 5, 3), np.float32)}
    save_file(tensors, tmp_path / SINGLE_FILE)
    files = TensorFiles(tmp_path)
    for name, value in tensors.items():
        for dtype in ("float32", "bfloat16"):
            expected = convert(value, "float32", dtype)[slices]
            np.testing.assert_array_equal(files.read(name, dtype, slices), expected)


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize(
    "slices", [(slice(96, 128),), (slice(None), slice(64, 128)), (slice(9, 17), slice(5, 6))]
)
def test_only_the_bytes_of_a_part_are_read(tmp_path: Path, slices: tuple[slice, ...]) -> None:
    """What a rank of tensor parallelism needs: its rows, or its columns."""
    value = np.arange(256 * 512, dtype=np.float32).reshape(256, 512)
    save_file({"x": value}, tmp_path / SINGLE_FILE)
    files = TensorFiles(tmp_path)
    before = _bytes_read()
    part = files.read("x", "float32", slices)
    read = _bytes_read() - before
    np.testing.assert_array_equal(part, value[slices])
    assert part.nbytes <= read <= part.nbytes + 1024  # some are those of /proc/self/io


def test_bad_slices(tmp_path: Path) -> None:
    save_file({"x": np.zeros((2, 2), np.float32)}, tmp_path / SINGLE_FILE)
    files = TensorFiles(tmp_path)
    with pytest.raises(ValueError, match="step"):
        files.read("x", "float32", [slice(None, None, 2)])
    with pytest.raises(ValueError, match=r"3 slices for a tensor of shape \[2, 2\]"):
        files.read("x", "float32", [slice(None)] * 3)


def test_file_that_became_shorter(tmp_path: Path) -> None:
    save_file({"x": np.zeros((64, 64), np.float32)}, tmp_path / SINGLE_FILE)
    files = TensorFiles(tmp_path)
    (tmp_path / SINGLE_FILE).write_bytes(b"")
    with pytest.raises(UserError, match="became shorter"):
        files.read("x", "float32")
    (tmp_path / SINGLE_FILE).unlink()
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        files.read("x", "float32")


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of model.safetensors, model.safetensors.index"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"x": "gone.safetensors"}}, "lists the file gone.safetensors, which is"),
        ({"weight_map": {"x": "one", "y": "one"}}, "lists the tensor y, which no file holds"),
        ({"weight_map": {"x": "../one"}}, "must be the name of a file beside it"),
        ({"weight_map": {"x": 3}}, "must be the name of a file beside it"),
        ({}, "no weight_map"),
    ],
)
def test_bad_index(tmp_path: Path, index: dict, message: str) -> None:
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "one")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        TensorFiles(tmp_path)
