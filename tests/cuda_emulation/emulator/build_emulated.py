"""Builds the CUDA kernels as a Python module that runs them on the CPU."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
KERNELS = ROOT / "csrc" / "kernels"
PYTHON = ROOT / "csrc" / "python"
# One compilation, since pybind11's headers take longest, and without optimisation: they compute
# nothing.
BINDINGS = [
    HERE / "module.cc",
    PYTHON / "adamw.cc",
    PYTHON / "flash_attention.cc",
    PYTHON / "kernels.cc",
    PYTHON / "random_normal.cc",
    PYTHON / "arguments.cc",
]
SOURCES = [
    *sorted(KERNELS.rglob("*.cu"), key=lambda path: path.stat().st_size, reverse=True),
    *sorted(set(HERE.glob("*.cc")) - set(BINDINGS)),
]
FLAGS = [
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"),
    # Fibers are switched by longjmp, which the fortified C library takes for an error.
    *("-U_FORTIFY_SOURCE", "-DPYPKG_CUDA_EMULATION"),
    *(f"-I{folder}" for folder in (HERE, KERNELS, PYTHON, pybind11.get_include())),
    f"-I{sysconfig.get_paths()['include']}",
]


def build(compiler: str = "g++") -> Path:
    """Returns the module's path; compiles only what is not in build/cuda_emulation already."""
    headers = sorted(path for folder in (HERE, KERNELS, PYTHON) for path in folder.rglob("*.*h"))
    digest = hashlib.sha256(" ".join([compiler, *FLAGS]).encode())
    for path in [*BINDINGS, *SOURCES, *headers]:
        digest.update(path.read_bytes())
    builds = ROOT / "build" / "cuda_emulation"
    folder = builds / digest.hexdigest()[:16]
    module = folder / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    builds.mkdir(parents=True, exist_ok=True)
    with builds.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the processes of a test run one compiles
        if not module.exists():
            shutil.rmtree(builds)  # builds of older sources
            _compile(compiler, folder, module)
    return module


def _compile(compiler: str, folder: Path, module: Path) -> None:
    folder.mkdir(parents=True)
    bindings = folder / "bindings.cc"
    bindings.write_text("".join(f'#include "{source}"\n' for source in BINDINGS))
    sources = {bindings: "-O0"} | dict.fromkeys(SOURCES, "-O1")
    objects = [folder / f"{source.name}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        flags = [*FLAGS, sources[source]]
        _run([compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    unfinished = module.with_suffix(".tmp")
    _run([compiler, "-shared", *map(str, objects), "-o", str(unfinished)])
    unfinished.rename(module)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-6000:]}")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_emulated", build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
