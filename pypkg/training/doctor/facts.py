"""What a rank observes of its machine and device, without judging it."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import paddle

from pypkg import __version__
from pypkg.device.capabilities import Capabilities
from pypkg.device.threads import available_cores
from pypkg.files.paths import library_dir
from pypkg.parallel import endpoints, mesh
from pypkg.parallel.launch import watchdog

_NVIDIA_DEVICES = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Observations of one rank. Sizes are in bytes; None means unknown or unlimited.

    Attributes:
        clock: seconds since the epoch, read by all ranks at about the same moment.
        driver_cuda: newest CUDA version that the driver supports, (major, minor).
        paddle_cuda, kernels_cuda: CUDA version that Paddle and our kernels were built with.
        architectures: GPU architectures of our kernels in CMake's notation.
        gpus: NVIDIA GPUs in the machine, whether Paddle sees them or not.
        ranks: processes of the run on this machine.
        shared_memory: free space of /dev/shm.
        locked_memory: limit on locked memory (ulimit -l).
        host_free: available memory of the machine.
        disk_free: free space of the disk of output_dir; None without output_dir.
    """

    host: str
    clock: float
    python: str
    package: str
    paddle: str
    kernel_sources: str | None
    device: str
    device_name: str
    capability: tuple[int, int] | None
    device_memory: int
    device_free: int | None
    host_free: int | None
    driver_cuda: tuple[int, int] | None
    paddle_cuda: str | None
    kernels_cuda: str | None
    architectures: str | None
    ops_backend: str
    gpus: int
    cores: int
    ranks: int
    threads: int
    shared_memory: int | None
    locked_memory: int | None
    open_files: int | None
    disk_free: int | None


def observe(capabilities: Capabilities, output_dir: str | None, threads: int) -> Facts:
    """The facts of this rank.

    Args:
        threads: threads per rank; 0: an equal share of the cores.
    """
    build = _build_info()
    cores, ranks = available_cores(), _ranks_here()
    cuda = paddle.version.cuda() if paddle.is_compiled_with_cuda() else None
    watchdog.wait_for_all()
    return Facts(
        clock=time.time(),
        host=endpoints.own_host() if mesh.launched_processes() > 1 else platform.node(),
        python=platform.python_version(),
        package=__version__,
        paddle=capabilities.paddle,
        kernel_sources=capabilities.kernel_sources,
        device=capabilities.device,
        device_name=capabilities.device_name,
        capability=capabilities.compute_capability,
        device_memory=capabilities.memory_bytes,
        device_free=_free_gpu_memory() if capabilities.device == "gpu" else None,
        host_free=_free_memory(),
        driver_cuda=_driver_cuda(),
        paddle_cuda=cuda,
        kernels_cuda=build.get("cuda_version"),
        architectures=build.get("cuda_architectures"),
        ops_backend=capabilities.ops_backend,
        gpus=len(os.listdir(_NVIDIA_DEVICES)) if _NVIDIA_DEVICES.is_dir() else 0,
        cores=cores,
        ranks=ranks,
        threads=threads or max(1, cores // ranks),
        shared_memory=free_space(Path("/dev/shm")),
        locked_memory=_limit(resource.RLIMIT_MEMLOCK),
        open_files=_limit(resource.RLIMIT_NOFILE),
        disk_free=None if output_dir is None else free_space(nearest_folder(Path(output_dir))),
    )


def nearest_folder(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    path = path.absolute()
    return next((each for each in (path, *path.parents) if each.is_dir()), Path("/"))


def free_space(folder: Path) -> int | None:
    """Free bytes of the disk of ``folder``; None if unknown."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _ranks_here() -> int:
    if mesh.launched_processes() == 1:
        return 1
    return max(1, endpoints.hosts().count(endpoints.own_host()))


def _build_info() -> dict[str, str | None]:
    with suppress(OSError, ValueError):
        info: dict[str, str | None] = json.loads(
            (library_dir() / "build_info.json").read_text(encoding="utf-8")
        )
        return info
    return {}


def _limit(name: int) -> int | None:
    soft = resource.getrlimit(name)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _driver_cuda() -> tuple[int, int] | None:
    """Newest CUDA version of the driver, from cuDriverGetVersion, which needs no device."""
    version = ctypes.c_int()
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _free_memory() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return None


def _free_gpu_memory() -> int | None:
    """Free bytes of the GPU, from cuMemGetInfo in the context that Paddle has created."""
    paddle.zeros([1])
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with suppress(OSError, AttributeError):
        query = ctypes.CDLL("libcuda.so.1").cuMemGetInfo_v2
        if query(ctypes.byref(free), ctypes.byref(total)) == 0:
            return free.value
    return None
