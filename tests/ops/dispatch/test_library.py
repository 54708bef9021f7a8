from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import logging

import paddle
import pytest

from pypkg import __version__, _native, ops
from pypkg.errors import UserError
from pypkg.files import build_info
from pypkg.files.paths import sources_dir
from pypkg.ops.dispatch import library

GOOD_INFO = {
    "pypkg_version": __version__,
    "paddle_version": paddle.version.full_version,
    "cuda_version": None,
    "cuda_architectures": None,
    "compiler": "a compiler",
    build_info.DIGEST: build_info.digest(sources_dir()),
}


@pytest.fixture
def undecided(monkeypatch):
    """As in a fresh process: nothing chosen, nothing in the environment."""
    monkeypatch.setattr(library, "_chosen", None)
    if importlib.util.find_spec("triton") is not None:
        launch = importlib.import_module("pypkg.ops.triton.launch")
        monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.delenv("PYPKG_OPS_BACKEND", raising=False)


@pytest.fixture
def folder(tmp_path, monkeypatch, undecided):
    """An empty folder in place of the one with the compiled library."""
    monkeypatch.setattr(library, "library_dir", lambda: tmp_path)
    return tmp_path


def put_library(folder, **changes) -> None:
    """A library that is not one, so a test that gets as far as loading it fails."""
    (folder / "pypkg_ops.so").write_bytes(b"no library")
    (folder / "build_info.json").write_text(json.dumps({**GOOD_INFO, **changes}))


def put_gpu(monkeypatch, capability) -> None:
    """A GPU as Paddle would tell of it, and Triton installed for it."""
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"of {name}")


def test_choice_is_made_and_logged_once(undecided, caplog):
    with caplog.at_level(logging.INFO, logger="pypkg"):
        names = [ops.backend() for _ in range(3)]
        ops.swiglu(paddle.ones([2, 4]))
    assert names == ["compiled"] * 3
    assert len(caplog.records) == 1
    assert "operators: compiled (pypkg_ops.so built for Paddle" in caplog.text
    assert f", CPU kernels for {_native.cpu_isa()})" in caplog.text


def test_environment_variable(undecided, monkeypatch):
    monkeypatch.setenv("PYPKG_OPS_BACKEND", "reference")
    assert ops.backend() == "reference"


def test_set_backend_goes_before_the_environment(undecided, monkeypatch):
    monkeypatch.setenv("PYPKG_OPS_BACKEND", "reference")
    ops.set_backend("compiled")
    assert ops.backend() == "compiled"


def test_set_backend_is_followed(undecided, monkeypatch):
    calls = []
    monkeypatch.setitem(
        library._PROBES, "compiled", lambda: calls.append(1) or library._Probe(True, "a fake")
    )
    ops.set_backend("reference")
    x = paddle.ones([2, 4])
    assert library.implementation({"reference": "r", "compiled": "c"}, x) == "r"
    ops.set_backend("auto")
    assert library.implementation({"reference": "r", "compiled": "c"}, x) == "c"
    assert library.implementation({"reference": "r", "compiled": "c"}, x.astype("float64")) == "r"
    assert library.implementation({"reference": "r", "compiled": "c"}, x[:0]) == "r"
    assert len(calls) == 1


@pytest.mark.parametrize("how", ["call", "environment"])
def test_unknown_name(undecided, monkeypatch, how):
    with pytest.raises(UserError, match=r"is 'fast'; expected one of auto, compiled, triton, ref"):
        if how == "call":
            ops.set_backend("fast")
        else:
            monkeypatch.setenv("PYPKG_OPS_BACKEND", "fast")
            ops.backend()


def test_without_library_the_reference_runs(folder, caplog):
    with caplog.at_level(logging.INFO, logger="pypkg"):
        assert ops.backend() == "reference"
    assert "operators: reference (the compiled operators are not built" in caplog.text


def test_compiled_asked_for_without_library(folder):
    with pytest.raises(UserError, match=r"asks for 'compiled', but .* not built .*pypkg_ops\.so"):
        ops.set_backend("compiled")


def test_a_failed_request_leaves_the_choice(folder):
    ops.set_backend("reference")
    with pytest.raises(UserError):
        ops.set_backend("compiled")
    assert ops.backend() == "reference"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paddle_version": "2.6.2"}, r"built for Paddle 2\.6\.2, but Paddle .* is running"),
        ({"paddle_version": None}, "built for Paddle None, but Paddle .* is running"),
        ({"pypkg_version": "0.0.0"}, r"belongs to pypkg 0\.0\.0, but the Python code is"),
    ],
)
def test_library_for_something_else(folder, changes, message):
    """Even when nothing was asked for: running 20 times slower in silence helps nobody."""
    put_library(folder, **changes)
    with pytest.raises(UserError, match=message + "(.|\n)*PYPKG_OPS_BACKEND=reference"):
        ops.backend()
    ops.set_backend("reference")
    assert ops.backend() == "reference"


@pytest.mark.parametrize("found", [None, "of sources from last week"])
def test_library_older_than_its_sources(folder, found):
    put_library(folder, **{build_info.DIGEST: found})
    message = "compiled from other sources than those in .*csrc. Run `make build`"
    with pytest.raises(UserError, match=message + ".*PYPKG_OPS_BACKEND=reference"):
        ops.backend()


def test_an_installed_library_has_no_sources_to_compare(folder, monkeypatch):
    """It gets as far as loading the file, which is no library."""
    put_library(folder, **{build_info.DIGEST: "of the sources that made the wheel"})
    monkeypatch.setattr(library, "sources_dir", lambda: None)
    with pytest.raises(UserError, match="cannot be loaded"):
        ops.backend()


def test_cuda_of_another_major_version(folder, monkeypatch):
    put_library(folder, cuda_version="11.8.89")
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.version, "cuda", lambda: "12.6")
    with pytest.raises(UserError, match=r"built with CUDA 11\.8\.89, .* uses CUDA 12\.6"):
        ops.backend()


@pytest.mark.parametrize("text", [None, "not JSON", "{}"])
def test_unreadable_build_info(folder, text):
    put_library(folder)
    path = folder / "build_info.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"build_info\.json cannot be read"):
        ops.backend()


def test_library_that_does_not_load(folder):
    put_library(folder)
    with pytest.raises(UserError, match=r"pypkg_ops\.so cannot be loaded"):
        ops.backend()


@pytest.mark.parametrize(
    ("info", "capability", "reason", "instead"),
    [
        ({"cuda_version": None}, (8, 0), "built without CUDA", "triton"),
        ({"cuda_architectures": "80-real,90a-real"}, (7, 5), "capability 7.5", "reference"),
        ({"cuda_architectures": "80-real,90a-real"}, (10, 0), "capability 10.0", "triton"),
    ],
)
def test_device_that_the_library_is_not_for(
    folder, monkeypatch, caplog, info, capability, reason, instead
):
    put_library(folder, **{"cuda_version": "13.0", **info})
    put_gpu(monkeypatch, capability)
    with caplog.at_level(logging.INFO, logger="pypkg"):
        assert ops.backend() == instead
    assert reason in caplog.text
    with pytest.raises(UserError, match="asks for 'compiled', but .*" + reason):
        ops.set_backend("compiled")


def test_triton_runs_on_a_gpu_without_the_library(folder, monkeypatch, caplog):
    """Chosen without being asked for, and one line says so and why."""
    put_gpu(monkeypatch, (9, 0))
    with caplog.at_level(logging.INFO, logger="pypkg"):
        assert ops.backend() == "triton"
    assert len(caplog.records) == 1
    assert "operators: triton (the compiled operators are not built" in caplog.text
    assert "kernels of Triton of triton" in caplog.text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ops.set_backend("auto")
    assert ops.backend() == "reference"


@pytest.mark.parametrize(
    ("installed", "device", "capability", "reason"),
    [
        (False, "gpu:0", (9, 0), "Triton is not installed"),
        (True, "gpu:0", (7, 5), "needs compute capability 8.0, this device has 7.5"),
        (True, "cpu", None, "Triton needs a GPU"),
    ],
)
def test_triton_asked_for_where_it_cannot_run(
    folder, monkeypatch, installed, device, capability, reason
):
    put_gpu(monkeypatch, capability)
    monkeypatch.setattr(paddle.device, "get_device", lambda: device)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
    if installed and device == "cpu":
        pytest.importorskip("triton")
    with pytest.raises(UserError, match=f"asks for 'triton', but .*{reason}"):
        ops.set_backend("triton")


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 9), True),
        ("80-real", (9, 0), False),
        ("86", (8, 0), False),
        ("90a-real", (9, 0), True),
        ("90a-real", (9, 1), False),
        ("100a-real", (10, 0), True),
        ("100-real", (10, 3), True),
        ("100f-real", (10, 3), True),
        ("100f-virtual", (12, 0), False),
        ("90-virtual", (9, 0), True),
        ("90-virtual", (12, 0), True),
        ("90-virtual", (8, 9), False),
        ("90a-virtual", (10, 0), False),
        ("86", (12, 0), True),
        ("120-virtual", (10, 0), False),
    ],
)
def test_architecture_runs(architecture, capability, runs):
    assert library.architecture_runs(architecture, capability) is runs
