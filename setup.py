"""Builds the compiled parts with CMake and Ninja into the package.

Environment variables
    PYPKG_PADDLE_PYTHON      interpreter whose Paddle is compiled against (default: looked for)
    PYPKG_BUILD_PADDLE_OPS   0: only the framework-neutral kernels, no Paddle needed
    PYPKG_WITH_CUDA          1 or 0: force the CUDA kernels on or off (default: as the Paddle found)
    PYPKG_CUDA_ARCHITECTURES GPUs to compile for, such as "80-real;90a-real;90-virtual"; by default
                             80, 86, 89, 90a, 100 and 120, as far as nvcc knows them, and PTX of the
                             highest for later GPUs (tools/cuda_architectures.py)
    PYPKG_STRICT_LINK        1: unresolved symbols fail the link (used in CI)
    MAX_JOBS                 parallel compile jobs
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

from cuda_architectures import (  # noqa: E402
    ArchitectureError,
    chosen_architectures,
    find_nvcc,
    nvcc_version,
)
from find_paddle import Paddle, find_paddle, not_found_message  # noqa: E402


class BuildError(SystemExit):
    """Stops the build with a message in place of a traceback."""

    def __init__(self, message: str) -> None:
        rule = "=" * 78
        super().__init__(f"\n{rule}\n{message}\n{rule}")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.build_lib).resolve() / "pypkg"
        # Editable builds get a fresh build_temp each time; a lasting folder makes them incremental.
        build = (
            ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp, "cmake")
        )
        ninja = _require_tool("ninja")
        cmake = _require_tool("cmake")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build.resolve()), "-G", "Ninja",
            # Isolated builds keep ninja in a new folder each time; a cached path would go stale.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYPKG_OUTPUT_DIR={output}",
            f"-DPYPKG_STRICT_LINK={'ON' if _flag('PYPKG_STRICT_LINK') else 'OFF'}",
            *_paddle_options(),
        ]  # fmt: skip
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for command in (configure, [cmake, "--build", str(build), "-j", jobs]):
            if subprocess.run(command).returncode != 0:
                raise BuildError(
                    f"compiling pypkg failed in: {' '.join(command)}\nThe first error is above; "
                    "with pip, add -v to see it."
                )

    def copy_extensions_to_source(self) -> None:
        """An editable install runs from the source folder, so the libraries go there too."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib, "pypkg", "_lib")
        shutil.copytree(built, ROOT / "pypkg" / "_lib", dirs_exist_ok=True)


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable install finds configs/ beside the package
            shutil.copytree(
                ROOT / "configs", Path(self.build_lib, "pypkg", "configs"), dirs_exist_ok=True
            )


def _paddle_options() -> list[str]:
    if _flag("PYPKG_BUILD_PADDLE_OPS") is False:
        cuda = _flag("PYPKG_WITH_CUDA") or False
        return ["-DPYPKG_BUILD_PADDLE_OPS=OFF", *_cuda_options(cuda)]
    paddle = find_paddle()
    if not paddle.found:
        raise BuildError(not_found_message(paddle))
    print(f"pypkg: compiling against Paddle {paddle.version} in {paddle.folder}", flush=True)
    forced = _flag("PYPKG_WITH_CUDA")
    with_cuda = paddle.cuda is not None if forced is None else forced
    if with_cuda:
        _check_nvcc(paddle)
    return [
        "-DPYPKG_BUILD_PADDLE_OPS=ON",
        f"-DPYPKG_PADDLE_DIR={paddle.folder}",
        f"-DPYPKG_PADDLE_VERSION={paddle.version}",
        *_cuda_options(with_cuda),
    ]


def _cuda_options(with_cuda: bool) -> list[str]:
    if not with_cuda:
        return ["-DPYPKG_WITH_CUDA=OFF"]
    try:
        architectures = ";".join(chosen_architectures())
    except ArchitectureError as error:
        raise BuildError(str(error)) from error
    print(f"pypkg: compiling CUDA kernels for {architectures}", flush=True)
    return ["-DPYPKG_WITH_CUDA=ON", f"-DPYPKG_CUDA_ARCHITECTURES={architectures}"]


def _check_nvcc(paddle: Paddle) -> None:
    home = os.environ.get("CUDA_HOME")
    nvcc = find_nvcc()
    skip = "\nTo build without CUDA kernels: PYPKG_WITH_CUDA=0 (slower reference operators on GPU)."
    if nvcc is None:
        raise BuildError(
            f"Paddle {paddle.version} is built for CUDA {paddle.cuda}, but nvcc was found neither "
            f"in CUDA_HOME ({home or 'not set'}) nor on PATH.\nInstall the CUDA {paddle.cuda} "
            f"toolkit or point CUDA_HOME at it.{skip}"
        )
    try:
        major, minor = nvcc_version(nvcc)
    except ArchitectureError as error:
        raise BuildError(str(error)) from error
    if paddle.cuda and str(major) != paddle.cuda.split(".")[0]:
        raise BuildError(
            f"{nvcc} is CUDA {major}.{minor}, but Paddle {paddle.version} is "
            f"built for CUDA {paddle.cuda}: the major versions must agree.\nPoint CUDA_HOME at a "
            f"CUDA {paddle.cuda.split('.')[0]} toolkit.{skip}"
        )


def _require_tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise BuildError(
            f"{name} was not found on PATH. Leave out --no-build-isolation, or type: "
            "pip install cmake ninja pybind11 setuptools wheel"
        )
    return found


def _flag(name: str) -> bool | None:
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "auto"):
        return None
    if value in ("1", "on", "true", "yes"):
        return True
    if value in ("0", "off", "false", "no"):
        return False
    raise BuildError(f"{name} is {value!r}; use 1 or 0.")


setup(
    # Here and not in pyproject.toml, whose spelling for it differs between versions of setuptools.
    license="Apache-2.0",
    ext_modules=[Extension("pypkg._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
)
