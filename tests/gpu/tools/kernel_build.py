"""Builds pypkg._native for GPUs, without Paddle, and loads it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "gpu-check"


def of_this_gpu() -> str:
    """The architecture of the GPU that torch uses, "" without one. Hopper kernels need the "a"."""
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}-real"


def build(source: Path, folder: Path) -> Path:
    """Compiles pypkg._native with CUDA; returns the module's path."""
    for tool in ("nvcc", "cmake", "ninja"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not on PATH; the build needs it")
    package = folder / "pypkg"
    environment = dict(os.environ)
    environment.setdefault("PYPKG_CUDA_ARCHITECTURES", of_this_gpu())
    options = [
        *("-G", "Ninja", f"-DPYPKG_OUTPUT_DIR={package}", f"-DPython_EXECUTABLE={sys.executable}"),
        *("-DPYPKG_WITH_CUDA=ON", "-DPYPKG_BUILD_PADDLE_OPS=OFF", "-DCMAKE_BUILD_TYPE=Release"),
    ]
    for command in (
        ["cmake", "-S", str(source), "-B", str(folder), *options],
        ["cmake", "--build", str(folder)],
    ):
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        if result.returncode != 0:
            sys.exit(f"{' '.join(command)} failed:\n{result.stdout[-8000:]}")
    return next(package.glob("_native*.so"))


def load_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("_native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_kernels(device: str) -> Any:
    if device == "cuda":
        return load_module(build(ROOT, BUILD))
    path = next((ROOT / "pypkg").glob("_native*.so"), None)
    if path is None:
        sys.exit("pypkg is not built here: run `make install` first")
    return load_module(path)
