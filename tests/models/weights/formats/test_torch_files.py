"""PyTorch's files without PyTorch. Those in torch_files/ were written by it."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from damaged_files import times_told
from model_testing import GOLDEN
from safetensors.numpy import load_file
from torch_writing import (
    dictionary,
    number,
    storage,
    tensor,
    text,
    write_archive,
    write_torch_file,
)

from pypkg.errors import UserError
from pypkg.models import from_pretrained
from pypkg.models.weights.formats.stored_tensor import JoinedTensor
from pypkg.models.weights.formats.tensor_files import TensorFiles
from pypkg.models.weights.formats.torch import read_torch_file

FIXTURES = Path(__file__).parent / "torch_files"
FLOATS = ("float32", "float16", "bfloat16", "float64")


def _folder(tmp_path: Path, fixture: str) -> Path:
    (tmp_path / "pytorch_model.bin").write_bytes((FIXTURES / fixture).read_bytes())
    return tmp_path


def test_reads_what_torch_wrote(tmp_path: Path) -> None:
    """Every dtype, and every layout: transposed, permuted, expanded, a part, a shared storage."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "safetensors").mkdir()
    (tmp_path / "safetensors" / "model.safetensors").write_bytes(
        (FIXTURES / "state_dict.safetensors").read_bytes()
    )
    found = TensorFiles(_folder(tmp_path / "torch", "state_dict.bin"))
    expected = TensorFiles(tmp_path / "safetensors")
    assert found.specs() == expected.specs()
    assert len(found.specs()) == 14
    for name, spec in expected.specs().items():
        if spec.dtype in FLOATS:
            value = found.read(name, spec.dtype)
            np.testing.assert_array_equal(value, expected.read(name, spec.dtype), err_msg=name)


def test_parts_of_any_layout(tmp_path: Path) -> None:
    files = TensorFiles(_folder(tmp_path, "state_dict.bin"))
    for name in ("float32", "transposed", "view", "expanded", "permuted"):
        whole = files.read(name, "float32")
        part = files.read(name, "float32", [slice(1, None), slice(0, 2)])
        np.testing.assert_array_equal(part, whole[1:, :2], err_msg=name)


def test_state_dict_under_a_key(tmp_path: Path) -> None:
    files = TensorFiles(_folder(tmp_path, "wrapped.bin"))
    expected = read_torch_file(FIXTURES / "state_dict.bin")["float32"]
    np.testing.assert_array_equal(
        files.read("weight", "float32"), JoinedTensor((expected,)).read("float32", "float32")
    )


def test_plain_values_beside_tensors_are_left_out(tmp_path: Path) -> None:
    assert TensorFiles(_folder(tmp_path, "mixed.bin")).shapes() == {"w": (3, 5)}


def test_legacy_format_is_told_how_to_be_written_anew(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"before 1\.6 .*torch\.save\(torch\.load\(path") as error:
        TensorFiles(_folder(tmp_path, "legacy.bin"))
    assert str(tmp_path / "pytorch_model.bin") in str(error.value)


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"asks for torch\.nn\.modules\.linear\.Linear.*torch\.save"
    ):
        TensorFiles(_folder(tmp_path, "module.bin"))


def test_needs_no_torch() -> None:
    """Reading imports neither torch nor Paddle."""
    code = (
        "import sys, pathlib; from pypkg.models.weights.formats.torch import read_torch_file; "
        f"read_torch_file(pathlib.Path({str(FIXTURES / 'state_dict.bin')!r})); "
        "sys.exit('torch' in sys.modules or 'paddle' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class _Runs:
    """Pickles as a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self._call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", ["os.system", "eval", "exec", "getattr", "open"])
def test_malicious_pickle_runs_nothing(tmp_path: Path, function: str, protocol: int) -> None:
    trace = tmp_path / "trace"
    command = f"touch {trace}"
    code = f"__import__('os').system({command!r})"
    payload = {
        "os.system": _Runs(os.system, command),
        "eval": _Runs(eval, code),
        "exec": _Runs(exec, code),
        "getattr": _Runs(getattr, "text", "upper"),
        "open": _Runs(open, str(trace), "w"),
    }[function]
    content = pickle.dumps({"weight": payload}, protocol)
    pickle.loads(content)  # it does work where it is trusted
    assert function == "getattr" or trace.exists()
    trace.unlink(missing_ok=True)
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    with pytest.raises(UserError, match=r"was not loaded: it asks for .*may run code"):
        TensorFiles(tmp_path)
    assert not trace.exists()


# The opcodes that set attributes (b) on something that a pickle may name.
_SET = dictionary({"x": number(1)}) + b"b"
_SET_SLOTS = b"(N" + dictionary({"x": number(1)}) + b"tb"
_NAMED = (
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch\nSize\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch\nfloat16\n",
    storage("0"),
    tensor(storage("0"), (2,), (1,)),
)


@pytest.mark.parametrize("change", [_SET, _SET_SLOTS], ids=["dict", "slots"])
@pytest.mark.parametrize("named", _NAMED, ids=lambda named: named[:30].decode("latin1"))
def test_a_pickle_changes_nothing_of_ours(tmp_path: Path, named: bytes, change: bytes) -> None:
    path = tmp_path / "model.bin"
    write_archive(path, dictionary({"w": named + change}), {"0": b"\0" * 8})
    with pytest.raises(UserError, match="is damaged or truncated"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tensor(storage("0"), (3,), (1,)), "reaches beyond its storage"),
        (tensor(storage("0"), (2,), (1,), first=1), "reaches beyond its storage"),
        (tensor(storage("0"), (2, 2), (2, 1)), "reaches beyond its storage"),
        (tensor(storage("0"), (1,), (-1,)), "a tensor with an invalid shape"),
        (tensor(storage("0"), (1,), (1,), first=-1), "a tensor with an invalid shape"),
        (tensor(storage("0"), (1, 1), (1,)), "a tensor with 2 axes and 1 strides"),
        (tensor(text("/etc/passwd"), (1,), (1,)), "a tensor in '/etc/passwd'"),
        (tensor(storage("../0"), (1,), (1,)), "data/../0"),
        (b"(" + text("storage") + text("x") + text("0") + text("cpu") + b"NtQ", "it refers to"),
        (b"\xff", "is damaged"),
        (b"Vabc", "is damaged"),
        (number(3), "holds no tensors by name"),
        (dictionary({"w": number(3)}), "holds no tensors by name"),
    ],
)
def test_bad_content(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.bin"
    if message != "holds no tensors by name":
        content = dictionary({"w": content})
    write_archive(path, content, {"0": b"\0" * 8})
    with pytest.raises(UserError, match=message) as error:
        read_torch_file(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("keep", [0, 1, 100, 2000, 4000, -30, -1])
def test_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes((FIXTURES / "state_dict.bin").read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged") as error:
        TensorFiles(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_is_the_users_error(tmp_path: Path, seed: int) -> None:
    """Whatever bytes change: it is read, or told in one line. Never a traceback, never a hang."""
    content = (FIXTURES / "state_dict.bin").read_bytes()
    # Where the pickle and the directory are, rather than the numbers.
    places = [*range(1500), *range(content.index(b"PK\x01\x02"), len(content))]
    assert times_told(read_torch_file, tmp_path / "model.bin", content, places, seed) > 100


def test_other_zip_files(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(UserError, match=r"not one of PyTorch: it has no data\.pkl"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 1000)
    with pytest.raises(UserError, match="is compressed, which PyTorch never does"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(UserError, match="little-endian"):
        read_torch_file(path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.pth", "anything.pt"])
def test_a_model_loads_from_one_file(tmp_path: Path, file: str) -> None:
    tensors = load_file(GOLDEN / "llama" / "model.safetensors")
    write_torch_file(tmp_path / file, tensors)
    write_torch_file(tmp_path / "optimizer.pt", {"m": np.zeros(2, np.float32)})
    (tmp_path / "config.json").write_bytes((GOLDEN / "llama" / "config.json").read_bytes())
    _assert_same_as_golden_llama(tmp_path)


def test_a_model_loads_from_shards(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "llama" / "model.safetensors")
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "b.bin": names[1::2]}
    for file, held in shards.items():
        write_torch_file(tmp_path / file, {name: tensors[name] for name in held})
    listing = {name: file for file, held in shards.items() for name in held}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": listing}))
    (tmp_path / "config.json").write_bytes((GOLDEN / "llama" / "config.json").read_bytes())
    _assert_same_as_golden_llama(tmp_path)
    (tmp_path / "b.bin").unlink()
    with pytest.raises(UserError, match=r"lists the file b\.bin, which is not in"):
        from_pretrained(tmp_path)


def test_several_files_without_an_index(tmp_path: Path) -> None:
    for file in ("a.bin", "b.bin"):
        write_torch_file(tmp_path / file, {"w": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match=r"but 2 files that no index lists, a\.bin first: get the"):
        TensorFiles(tmp_path)


def _assert_same_as_golden_llama(folder: Path) -> None:
    loaded, expected = from_pretrained(folder), from_pretrained(GOLDEN / "llama")
    for name, value in expected.state_dict().items():
        assert loaded.state_dict()[name].numpy().tobytes() == value.numpy().tobytes(), name
