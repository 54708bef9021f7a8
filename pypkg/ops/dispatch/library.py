"""Loads the compiled operators and chooses the backend, once per process.

The probes of ``_PROBES`` run in order. A probe reports whether its backend can run here, and the
reason. Each operator maps backend names to its implementations and calls ``implementation`` to
pick one. A new backend is one probe here and one entry in each operator that has it.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import paddle
from paddle import _C_ops

from pypkg import __version__
from pypkg.errors import UserError
from pypkg.files.build_info import DIGEST, digest
from pypkg.files.paths import library_dir, sources_dir

ENVIRONMENT_VARIABLE = "PYPKG_OPS_BACKEND"
_WAY_OUT = (
    "Build the operators again in this environment, or set "
    f"{ENVIRONMENT_VARIABLE}=reference to run without them."
)

_TRITON_CAPABILITY = (8, 0)  # the oldest compute capability that Triton supports

_logger = logging.getLogger("pypkg")
_chosen: str | None = None  # None: not decided yet


class _Probe(NamedTuple):
    usable: bool
    reason: str


def _load_library(path: Path) -> None:
    from paddle.base import core
    from paddle.base.framework import OpProtoHolder

    try:
        new_operators = core.load_op_meta_info_and_register_op(str(path))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} cannot be loaded: {error}\n{_WAY_OUT}") from error
    if new_operators:  # empty when the library was loaded before
        OpProtoHolder.instance().update_op_proto(new_operators)


def _check_build(info: Mapping[str, object], path: Path) -> None:
    """Raises UserError if the library was built for another Paddle or other Python code.

    In a checkout the version number is not enough, because signatures change between releases. The
    library must then be built from exactly the sources beside the package.
    """
    built_for, running = info["paddle_version"], paddle.version.full_version
    if built_for != running:
        raise UserError(
            f"{path} was built for Paddle {built_for}, but Paddle {running} is running. {_WAY_OUT}"
        )
    if info["pypkg_version"] != __version__:
        raise UserError(
            f"{path} belongs to pypkg {info['pypkg_version']}, but the Python code is pypkg "
            f"{__version__}. {_WAY_OUT}"
        )
    sources = sources_dir()
    if sources is not None and info.get(DIGEST) != digest(sources):
        raise UserError(
            f"{path} was compiled from other sources than those in {sources}. Run `make build` to "
            f"compile them, or set {ENVIRONMENT_VARIABLE}=reference to run without them."
        )
    built_cuda, running_cuda = info.get("cuda_version"), paddle.version.cuda()
    majors = [str(version).split(".")[0] for version in (built_cuda, running_cuda)]
    if built_cuda and paddle.is_compiled_with_cuda() and majors[0] != majors[1]:
        raise UserError(
            f"{path} was built with CUDA {built_cuda}, but the running Paddle uses CUDA "
            f"{running_cuda}. {_WAY_OUT}"
        )


def split_architectures(text: str) -> list[str]:
    """The architectures that ``build_info.json`` lists, divided by ";" or ","."""
    return [each.strip() for each in text.replace(",", ";").split(";")]


def architecture_runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for e.g. "80-real", "90a-real", "90-virtual" or "90" runs on ``capability``.

    Machine code ("-real") runs on devices of the same major version and the same or a later minor
    version. PTX ("-virtual") runs on every later device, whose driver compiles it. A name without
    either is both. Code with the suffix "a" runs on exactly that version, in either form, and with
    "f" on the devices of machine code (CUDA C++ Programming Guide, "Compute Capabilities").
    """
    number, _, form = architecture.partition("-")
    digits = number.rstrip("af")
    version = int(digits[:-1]), int(digits[-1])
    if number.endswith("a"):
        return capability == version
    if capability[0] == version[0]:
        return capability >= version
    return number == digits and form != "real" and capability > version


def _probe_compiled() -> _Probe:
    path = library_dir() / "pypkg_ops.so"
    info_path = library_dir() / "build_info.json"
    if not path.exists():
        return _Probe(False, f"the compiled operators are not built ({path} does not exist)")
    try:
        info = json.loads(info_path.read_text(encoding="utf-8"))
        _check_build(info, path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{info_path} cannot be read ({error!r}), so it is unknown which Paddle {path} was "
            f"built for. {_WAY_OUT}"
        ) from error
    on_gpu = paddle.device.get_device().startswith("gpu")
    if on_gpu:
        if not info.get("cuda_version"):
            return _Probe(False, "the compiled operators were built without CUDA")
        major, minor = paddle.device.cuda.get_device_capability()
        architectures = info["cuda_architectures"]
        if isinstance(architectures, str):
            architectures = split_architectures(architectures)
        if not any(architecture_runs(each, (major, minor)) for each in architectures):
            return _Probe(
                False,
                f"the compiled operators hold code for {', '.join(architectures)}, "
                f"not for this device of compute capability {major}.{minor}",
            )
    _load_library(path)
    if not on_gpu:
        ctypes.CDLL(str(path)).pypkg_use_malloc()  # csrc/paddle/cpu_allocator.cc
    versions = "" if on_gpu else f", CPU kernels for {_cpu_isa()}"
    return _Probe(True, f"{path.name} built for Paddle {info['paddle_version']}{versions}")


def _cpu_isa() -> str:
    """The version of the CPU kernels in use.

    Raises:
        UserError: PYPKG_CPU_ISA names an unknown version.
    """
    from pypkg import _native

    return _native.cpu_isa()


def _probe_triton() -> _Probe:
    """Triton compiles for the current GPU. On a CPU it only interprets, which the tests use."""
    if importlib.util.find_spec("triton") is None:
        return _Probe(False, 'Triton is not installed (pip install "pypkg[triton]")')
    version = importlib.metadata.version("triton")
    if not paddle.device.get_device().startswith("gpu"):
        if not importlib.import_module("pypkg.ops.triton.launch").INTERPRETED:
            return _Probe(False, "Triton needs a GPU")
        return _Probe(True, f"interpreted by Triton {version}")
    capability = tuple(paddle.device.cuda.get_device_capability())
    if capability < _TRITON_CAPABILITY:
        needed, found = (".".join(map(str, each)) for each in (_TRITON_CAPABILITY, capability))
        return _Probe(False, f"Triton needs compute capability {needed}, this device has {found}")
    return _Probe(True, f"kernels of Triton {version}; it has none of attention")


def _probe_reference() -> _Probe:
    return _Probe(True, "composed of Paddle primitives")


_PROBES: dict[str, Callable[[], _Probe]] = {
    "compiled": _probe_compiled,
    "triton": _probe_triton,
    "reference": _probe_reference,
}


def set_backend(name: str) -> None:
    """Chooses the backend of every operator for the whole process.

    ``name`` is "auto" (the first that can run here), "compiled", "triton" or "reference". Without a
    call, the environment variable PYPKG_OPS_BACKEND decides, and without that "auto".

    Raises:
        UserError: an unknown name, or a backend that cannot run here, with the reason.
    """
    global _chosen
    _chosen = _decide(name, "backend")


def backend() -> str:
    """The name of the backend in use, never "auto". The first call chooses and logs it."""
    global _chosen
    if _chosen is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        _chosen = _decide(name, ENVIRONMENT_VARIABLE)
    return _chosen


def _decide(requested: str, setting: str) -> str:
    names = ["auto", *_PROBES]
    if requested not in names:
        raise UserError(f"{setting} is {requested!r}; expected one of {', '.join(names)}")
    if requested != "auto":
        probe = _PROBES[requested]()
        if not probe.usable:
            raise UserError(
                f"{setting} asks for {requested!r}, but {probe.reason}. Use 'auto' to fall back."
            )
        _logger.info("operators: %s (asked for; %s)", requested, probe.reason)
        return requested
    passed_over: list[str] = []
    for name, run_probe in _PROBES.items():
        probe = run_probe()
        if probe.usable:
            _logger.info("operators: %s (%s)", name, "; ".join([*passed_over, probe.reason]))
            return name
        passed_over.append(probe.reason)
    raise AssertionError("the reference backend is always usable")


def implementation(choices: Mapping[str, Callable], x: paddle.Tensor) -> Callable:
    """The implementation of one operator for the chosen backend and the input ``x``.

    Three kinds of input always run on the reference: float64, which gradient checks use and no
    kernel supports; float16 on a CPU, which no CPU kernel supports; and empty tensors, which Paddle
    drops from the optional inputs of a custom operator.

    Raises:
        UserError: the Triton backend is chosen and the graph is static.
    """
    dtype = x.dtype
    is_known = dtype in (paddle.float32, paddle.bfloat16)  # in this order, most need one look
    if 0 in x.shape or (not is_known and dtype == paddle.float64):
        return choices["reference"]
    name = backend()
    if not is_known and name == "compiled" and dtype == paddle.float16 and x.place.is_cpu_place():
        return choices["reference"]
    if name == "triton" and not paddle.in_dynamic_mode():
        raise UserError(
            "the Triton operators run in dynamic graphs only, and this is a static one; set "
            f"{ENVIRONMENT_VARIABLE}=reference, or build the compiled operators"
        )
    return choices[name]


def raw_stream(tensor: paddle.Tensor) -> int | None:
    """The CUDA stream that Paddle uses on the device of ``tensor``; None on a CPU."""
    from paddle.base import core

    if tensor.place.is_cpu_place():
        return None
    current = vars(core)["_get_current_raw_stream"]  # only in the builds for GPUs
    return current(tensor.place.gpu_device_id())


def run_compiled(
    op: str, tensors: Sequence[paddle.Tensor | None], *attributes: object
) -> list[paddle.Tensor]:
    """Runs a compiled operator.

    Paddle records custom operators for the backward pass even under no_grad. In that case the
    inputs are detached, so that nothing is recorded and no tensor is kept alive.
    """
    if not paddle.is_grad_enabled():
        tensors = [
            tensor if tensor is None or tensor.stop_gradient else tensor.detach()
            for tensor in tensors
        ]
    return custom_op(op, *tensors, *attributes)


def custom_op(op: str, *arguments: object) -> list[paddle.Tensor]:
    """Runs the compiled operator ``op`` on tensors, lists of tensors, None and attributes."""
    return _run_custom_op(op, *arguments)


_run_custom_op: Callable[..., list[paddle.Tensor]] = vars(_C_ops)["_run_custom_op"]  # no stub
