"""Sets CPU threads, MKL's dispatch and memory allocation before Paddle is imported.

Without these settings, Paddle 3.3.1 behaves as follows (measured on an AMD EPYC with AVX-512,
product of two 1024 x 1024 float32 matrices and AdamW, in processor time, which does not depend on
other load):

- Paddle sets OMP_NUM_THREADS to 1 at import if it is not set. Matrix products, AdamW and embedding
  then use one thread. MKL_NUM_THREADS restores threads for matrix products only.
- Its MKL does not detect AMD processors and uses slow kernels: 48 ms of processor time for the
  product, 21 ms with MKL_DEBUG_CPU_TYPE=5, which selects the AVX2 kernels, and 11 ms with 7, which
  selects those for AVX-512.
- FLAGS_paddle_num_threads has no effect.
- glibc returns large blocks to the system at each free, so every activation causes page faults:
  adding two 64 MiB tensors runs at 3 to 8 GB/s, and at 52 GB/s if freed memory is kept.
- Paddle begins every tensor on a page of its own, and a processor has few TLB entries: with huge
  pages a step of ``python -m pypkg.bench train-step --host-time`` takes 20.7 ms instead of 23.9 on
  an Intel Xeon.
- MKL uses Intel's OpenMP, and the kernels of this package use GNU's. Idle threads of each spin for
  up to 200 ms while the other works: the quickstart's step takes 1.7 times as long as with a short
  wait.
- Variables that bind threads to cores make libgomp's threads share the core of the main thread: a
  step of ``python -m pypkg.bench train-step`` takes 1.9 times as long.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import mmap
import os
import sys
import warnings
from pathlib import Path

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "PYPKG_NUM_THREADS",  # read by the kernels of this package
)
# How long idle threads spin before they sleep: milliseconds in Intel's, rounds in GNU's OpenMP.
_IDLE_WAIT = {"KMP_BLOCKTIME": "1", "GOMP_SPINCOUNT": "1000"}
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
# Set by paddle.distributed.launch: processes on this machine.
_LOCAL_PROCESSES = "PADDLE_LOCAL_SIZE"
# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
# Bytes of the heap for which huge pages are requested. It is less than the trim threshold, so that
# free() keeps it. Only the parts that are used take memory.
_HUGE_HEAP = 2**30
_MKL_DISPATCH = "MKL_DEBUG_CPU_TYPE"
# The instructions that MKL's AVX-512 kernels use, as /proc/cpuinfo names them.
_MKL_AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
_PADDLE_COMPLAINTS = ("OMP_NUM_THREADS",)
# These flags make gradients on a GPU bit for bit reproducible. Without them Paddle adds the rows of
# an embedding's gradient, and the query gradient of its flash attention, by atomics: in a random
# order, and in the dtype of the gradient. They have no effect on a CPU.
_DETERMINISTIC = {"FLAGS_embedding_deterministic": "1", "FLAGS_cudnn_deterministic": "1"}


def configure_cpu(num_threads: int = 0) -> str:
    """Sets threads and MKL's dispatch in the environment, and makes glibc keep freed memory.

    Args:
        num_threads: number of threads, which overrides the environment. 0: all cores that this
            process may use; variables that the user has set are not changed.

    Returns:
        One line for the log.

    Raises:
        RuntimeError: Paddle is already imported, so the variables would have no effect.
    """
    if "paddle" in sys.modules:
        raise RuntimeError("configure_cpu has to be called before Paddle is imported")
    cores = max(1, available_cores() // int(os.environ.get(_LOCAL_PROCESSES, "1")))
    _forget_launcher_default()
    if num_threads:
        for name in _THREAD_VARIABLES:
            os.environ[name] = str(num_threads)
    wanted = cpu_environment(num_threads or cores)
    kept = [f"{n}={os.environ[n]}" for n, v in wanted.items() if os.environ.get(n, v) != v]
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    parts = [f"CPU threads: {num_threads or cores} of {cores} available cores"]
    if _MKL_DISPATCH in wanted:
        parts.append(f"{_MKL_DISPATCH}={os.environ[_MKL_DISPATCH]} for an AMD processor")
    if _keep_freed_memory():
        parts.append("freed memory is kept for reuse")
        if _use_huge_pages():
            parts.append("its first GiB asks for huge pages")
    if kept:
        parts.append(f"kept from the environment: {', '.join(kept)}")
    bound = [f"{n}={os.environ[n]}" for n in _BINDING if os.environ.get(n, "false") != "false"]
    if bound and (num_threads or cores) > 1:
        parts.append(f"{' '.join(bound)} makes threads share a core; unset it for full speed")
    return "; ".join(parts)


def cpu_environment(num_threads: int) -> dict[str, str]:
    """The variables that ``configure_cpu`` sets on this machine for ``num_threads`` threads."""
    variables = {name: str(num_threads) for name in _THREAD_VARIABLES} | _IDLE_WAIT
    kernels = _mkl_kernels(cpu_fields())
    return variables | {_MKL_DISPATCH: kernels} if kernels else variables


def cpu_fields() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; empty without that file."""
    first = _read(Path("/proc/cpuinfo")).partition("\n\n")[0]
    parts = [line.partition(":") for line in first.splitlines()]
    return {name.strip(): value.strip() for name, _, value in parts}


def _mkl_kernels(fields: dict[str, str]) -> str:
    """MKL's number of the kernels that it should use on an AMD processor; "" on another one."""
    if fields.get("vendor_id") != "AuthenticAMD":
        return ""
    return "7" if set(fields.get("flags", "").split()) >= _MKL_AVX512 else "5"


def _forget_launcher_default() -> None:
    """Removes the OMP_NUM_THREADS=1 that Paddle's launcher passes on from its import of Paddle."""
    if _LOCAL_PROCESSES in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]


def _keep_freed_memory() -> bool:
    """Makes glibc serve large blocks from its heap and never shrink it; False without glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def _use_huge_pages() -> bool:
    """Grows the heap by ``_HUGE_HEAP`` and requests huge pages for it; False if that fails.

    ``_keep_freed_memory`` must be called before: the block is then part of the heap, and remains
    there when it is freed. glibc has its own setting, glibc.malloc.hugetlb, but reads it only from
    the environment at the start of a process.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    block = libc.malloc(ctypes.c_size_t(_HUGE_HEAP))
    if not block:
        return False
    start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
    size = block + _HUGE_HEAP - start
    refused = libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(block))
    return refused == 0


def import_paddle() -> list[str]:
    """Imports Paddle with deterministic gradients and without two of its warnings.

    They say that OMP_NUM_THREADS is above 1, which is intended, and that ccache is missing, which
    is not needed because nothing is compiled.

    Returns:
        Lines for the log, one for each flag that the user has set to another value.
    """
    os.environ.setdefault("GLOG_minloglevel", "1")  # no lines about Paddle's stores and ports
    kept = [
        f"kept from the environment: {name}={os.environ[name]}; results on a GPU may differ from "
        f"run to run unless it is {value}"
        for name, value in _DETERMINISTIC.items()
        if os.environ.setdefault(name, value) != value
    ]
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No ccache found")
            import paddle  # noqa: F401
    finally:
        for line in output.getvalue().splitlines():
            if not any(each in line for each in _PADDLE_COMPLAINTS):
                print(line, file=sys.stderr)
    return kept


def available_cores() -> int:
    """Number of cores that this process may use: its affinity, limited by a container's quota."""
    quota = cpu_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    cores = len(os.sched_getaffinity(0))
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(membership: Path, mount: Path) -> float | None:
    """The smallest CPU quota of this process's control groups, in cores; None: no quota.

    Args:
        membership: /proc/self/cgroup, with lines "0::/path" (version 2) and
            "N:cpu,cpuacct:/path" (version 1).
        mount: the mount point of the control groups, /sys/fs/cgroup.
    """
    quotas = []
    for line in _read(membership).splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            root, limit = mount, _quota_v2
        elif "cpu" in controllers.split(","):
            root, limit = mount / "cpu", _quota_v1
        else:
            continue
        # In a container the path may not exist below the mount; then the mount is the group.
        group = root / path.lstrip("/")
        folders = [group, *group.parents]
        quotas += [limit(each) for each in folders[: folders.index(root) + 1]]
    return min((each for each in quotas if each is not None), default=None)


def _quota_v2(folder: Path) -> float | None:
    words = _read(folder / "cpu.max").split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def _quota_v1(folder: Path) -> float | None:
    quota = _read(folder / "cpu.cfs_quota_us").strip()
    period = _read(folder / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
