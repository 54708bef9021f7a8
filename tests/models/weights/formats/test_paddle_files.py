"""Files of paddle.save without Paddle, and pickles that no one would write in good faith."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
import pytest
from damaged_files import times_told
from model_testing import GOLDEN
from torch_writing import dictionary, number, text, write_archive

from pypkg.errors import UserError
from pypkg.models.weights.formats import pickle_reader
from pypkg.models.weights.formats.paddle import read_paddle_file, read_paddle_object
from pypkg.models.weights.formats.paddle_parts import join_ranks
from pypkg.models.weights.formats.stored_tensor import JoinedTensor, StoredTensor
from pypkg.models.weights.formats.torch import read_torch_file

PARAMETERS = GOLDEN / "paddlenlp/models/llama_pdparams/model_state.pdparams"


def _values(tensor: StoredTensor, dtype: str) -> np.ndarray:
    return JoinedTensor((tensor,)).read("x", dtype)


def test_reads_what_paddle_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.pdparams"
    rng = np.random.default_rng(0)
    arrays = {
        "matrix": rng.random((3, 5), np.float32),
        "half": rng.random(4).astype(np.float16),
        "double": rng.random((2, 1, 2)),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "fortran": np.asfortranarray(rng.random((4, 3), np.float32)),
    }
    state = {name: paddle.to_tensor(value) for name, value in arrays.items()}
    state["fortran"] = arrays["fortran"]  # which NumPy pickles as it lies
    bits = paddle.to_tensor(arrays["matrix"]).astype("bfloat16")
    paddle.save({**state, "bits": bits}, str(path))
    read = read_paddle_file(path)
    assert list(read) == [*arrays, "bits"]
    for name, value in arrays.items():
        assert read[name].shape == value.shape
        assert np.array_equal(_values(read[name], str(value.dtype)), value)
    assert read["bits"].dtype == "bfloat16"
    assert np.array_equal(_values(read["bits"], "bfloat16"), bits.numpy())


def test_reads_the_state_of_an_optimizer(tmp_path: Path) -> None:
    """Tensors of a nested dict are tuples of name and array; beside them are plain values."""
    path = tmp_path / "optimizer.pdopt"
    moment = paddle.to_tensor([1.0, 2.0])
    state = {"moment": moment, "master_weights": {"w": moment}, "LR_Scheduler": {"last_lr": 0.5}}
    paddle.save(state, str(path))
    read = read_paddle_object(path)
    assert _values(read["master_weights"]["w"], "float32").tolist() == [1.0, 2.0]
    assert read["LR_Scheduler"] == {"last_lr": 0.5}
    assert list(read_paddle_file(path)) == ["moment"]


def test_needs_no_paddle() -> None:
    code = (
        "import sys, pathlib; from pypkg.models.weights.formats.paddle import read_paddle_file; "
        f"read_paddle_file(pathlib.Path({str(PARAMETERS)!r})); sys.exit('paddle' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class _Runs:
    def __reduce__(self) -> tuple:
        return eval, ("1 + 1",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.pdparams"
    path.write_bytes(pickle.dumps({"weight": _Runs()}, protocol))
    with pytest.raises(UserError, match=r"was not loaded: it asks for .*eval.*may run code"):
        read_paddle_file(path)


def test_arrays_in_pieces_are_told_how_to_be_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.pdparams"
    path.write_bytes(pickle.dumps({"UnpackBigParamInfor@@": {}}, protocol=4))
    with pytest.raises(UserError, match=r"in pieces.*protocol=4"):
        read_paddle_file(path)


class _Array:
    """Pickled as an array of 3 float32 whose elements take ``num_bytes``."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def __reduce__(self) -> tuple:
        make, arguments, _ = np.zeros(0, np.float32).__reduce__()
        return make, arguments, (1, (3,), np.dtype("<f4"), False, bytes(self.num_bytes))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(3, dtype=">f4"), "an array that is not little-endian"),
        (_Array(8), r"an array of shape \(3,\) in 8 bytes"),
        (_Array(16), r"an array of shape \(3,\) in 16 bytes"),
    ],
)
def test_arrays_that_are_not_what_paddle_writes(
    tmp_path: Path, array: object, message: str
) -> None:
    path = tmp_path / "x.pdparams"
    path.write_bytes(pickle.dumps({"x": array}, protocol=4))
    with pytest.raises(UserError, match=message):
        read_paddle_file(path)
    path.write_bytes(pickle.dumps({"x": _Array(12)}, protocol=4))
    assert _values(read_paddle_file(path)["x"], "float32").tolist() == [0, 0, 0]


def test_zeros_of_two_ranks_are_two_parts(tmp_path: Path) -> None:
    """Equal shards are one whole, which a rank of few heads may hold, but biases begin at 0."""
    shards = {}
    for name, values in {"zeros": np.zeros(4), "values": np.arange(1, 5)}.items():
        for rank in range(2):
            path = tmp_path / f"{name}{rank}.pdparams"
            paddle.save({"k_proj.bias": paddle.to_tensor(values.astype("float32"))}, str(path))
            shards.setdefault(name, []).append(read_paddle_file(path)["k_proj.bias"])
    joined = {name: join_ranks("layers.0.k_proj.bias", pair) for name, pair in shards.items()}
    assert joined["zeros"].read("x", "float32").tolist() == [0] * 8
    assert joined["values"].read("x", "float32").tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("keep", [0, 1, 100, 2000, 50_000, -30, -1])
def test_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.pdparams"
    path.write_bytes(PARAMETERS.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged or truncated") as error:
        read_paddle_file(path)
    assert str(path) in str(error.value)


def test_a_text_file_is_no_pickle(tmp_path: Path) -> None:
    path = tmp_path / "x.pdparams"
    path.write_bytes(b"hello")
    with pytest.raises(UserError, match=r"truncated \(it refers to 101, which is not in it\)"):
        read_paddle_file(path)


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_is_the_users_error(tmp_path: Path, seed: int) -> None:
    """Whatever bytes of the opcodes change: it is read, or told in one line."""
    path = tmp_path / "x.pdparams"
    small = {f"w{i}": np.full((2, 3), i, np.float32) for i in range(20)}
    content = pickle.dumps({**small, "names": {"w0": "linear_0.w_0"}}, protocol=4)
    assert times_told(read_paddle_file, path, content, range(len(content)), seed) > 50


# Pickles of few bytes that take memory or time without a bound where Python's unpickler reads them.
def _memo_index() -> bytes:
    return dictionary({"w": number(1) + b"r" + struct.pack("<I", 2**29)})


def _nested_key() -> bytes:
    """A dict whose key is a tuple of two of the one below, 60 deep: its hash takes 2^60 steps."""
    doubled = b"".join(b"q\x01h\x01\x86" for _ in range(60))
    return b"})" + doubled + number(1) + b"s"


def _nested_value() -> bytes:
    doubled = b"".join(b"q\x01h\x01\x86" for _ in range(60))
    return dictionary({"w": b")" + doubled})


def _nested_shape() -> bytes:
    doubled = b"".join(b"q\x01h\x01\x86" for _ in range(60))
    arguments = b"(" + text("x") + number(0) + b")" + doubled + b")t"
    return dictionary({"w": b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"})


def _dtype_of_a_nested_tuple() -> bytes:
    doubled = b"".join(b"q\x01h\x01\x86" for _ in range(60))
    return dictionary({"w": b"cnumpy\ndtype\n)" + doubled + b"\x85R"})


def _many_arguments() -> bytes:
    """Calls that each take the same 100 000 arguments."""
    return (
        b"(" + b"K\x01" * 100_000 + b"tq\x01" + b"cnumpy.core.multiarray\n_reconstruct\nq\x020"
        b"0}" + b"h\x02h\x01R0" * 200_000
    )


def _shared_dicts() -> bytes:
    """A dict that holds the same dict 3000 times, which holds the same dict 3000 times, ..."""
    items = b"".join(b"M" + struct.pack("<H", key) + b"h\x01" for key in range(3000))
    return b"}q\x01" + (b"0}(" + items + b"uq\x01") * 3


HOSTILE = {
    "memo index": _memo_index,
    "nested key": _nested_key,
    "nested value": _nested_value,
    "nested shape": _nested_shape,
    "nested dtype": _dtype_of_a_nested_tuple,
    "many arguments": _many_arguments,
    "shared dicts": _shared_dicts,
}


@pytest.mark.parametrize("kind", ["paddle", "torch"])
@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_small_pickle_takes_little_time_and_memory(
    tmp_path: Path, make: Callable[[], bytes], kind: str
) -> None:
    path = tmp_path / "model.bin"
    if kind == "torch":
        write_archive(path, make())
    else:
        path.write_bytes(b"\x80\x02" + make() + b".")
    code = (
        "import resource, sys, pathlib\n"
        "from pypkg.errors import UserError\n"
        f"from pypkg.models.weights.formats.{kind} import read_{kind}_file as read\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        f"    read(pathlib.Path({str(path)!r}))\n"
        "except UserError:\n"
        "    pass\n"
        "sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 200 * 1024)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


@pytest.mark.parametrize("read", [read_paddle_file, read_torch_file])
def test_the_number_of_opcodes_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    monkeypatch.setattr(pickle_reader, "MAX_OPCODES", 1000)
    path = tmp_path / "x"
    content = b"}" + b"N0" * 1000
    if read is read_torch_file:
        write_archive(path, content)
    else:
        path.write_bytes(b"\x80\x02" + content + b".")
    start = time.monotonic()
    with pytest.raises(UserError, match="more than 1000 opcodes"):
        read(path)
    assert time.monotonic() - start < 5


def test_a_long_string_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pdparams"
    path.write_bytes(pickle.dumps({"a" * (pickle_reader.MAX_STRING + 1): 1}, protocol=4))
    with pytest.raises(UserError, match="a string of 1048577 bytes"):
        read_paddle_file(path)
