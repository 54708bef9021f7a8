"""CPU threads and matrix-product dispatch, chosen on purpose before Paddle is imported.

What happens otherwise with Paddle 3.3.1 (measured on an AMD EPYC with AVX-512, product of two
1024 x 1024 float32 matrices and AdamW, by processor time so that a busy machine does not matter):

- Without OMP_NUM_THREADS, Paddle sets it to 1 at import. Matrix products, AdamW and embedding then
  use one thread. MKL_NUM_THREADS alone brings back threads for matrix products only.
- Its MKL does not know AMD processors and takes a slow path: 57 ms of processor time for the
  product, against 23 ms when MKL_DEBUG_CPU_TYPE=5 tells it to use the AVX2 kernels.
- FLAGS_paddle_num_threads changes nothing.
- glibc gives large blocks back to the system at each free, so every activation is page-faulted in
  anew: adding two 64 MiB tensors runs at 3 to 8 GB/s, and at 52 GB/s when freed memory is kept.
- Paddle begins every tensor on a page of its own, and a processor knows few pages at a time: with
  huge pages a step of ``python -m pypkg.bench train-step --host-time`` takes 20.7 ms instead of
  23.9 on an Intel Xeon.
- MKL brings Intel's OpenMP, our kernels use GNU's. The idle threads of each spin while the other
  works, for up to 200 ms: the quickstart's step takes 1.7 times as long as with a short wait.
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
    "PYPKG_NUM_THREADS",  # read by our own kernels
)
# How long idle threads spin before they sleep: milliseconds in Intel's, rounds in GNU's OpenMP.
_IDLE_WAIT = {"KMP_BLOCKTIME": "1", "GOMP_SPINCOUNT": "1000"}
# Set by paddle.distributed.launch: processes on this machine.
_LOCAL_PROCESSES = "PADDLE_LOCAL_SIZE"
# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
# Of the heap that asks for huge pages; less than the trim threshold, so that free() keeps it. It
# takes memory only where it is used.
_HUGE_HEAP = 2**30
_MKL_DISPATCH = "MKL_DEBUG_CPU_TYPE"
_PADDLE_COMPLAINTS = ("OMP_NUM_THREADS",)
# What makes gradients on a GPU the same bit for bit from run to run: Paddle otherwise adds the rows
# of an embedding's gradient, and the query gradient of its flash attention, by atomics in whatever
# order the threads come, and in the dtype of the gradient. Neither flag changes anything on a CPU.
_DETERMINISTIC = {"FLAGS_embedding_deterministic": "1", "FLAGS_cudnn_deterministic": "1"}


def configure_cpu(num_threads: int = 0) -> str:
    """Sets threads and MKL's dispatch in the environment, and how freed memory is kept.

    Args:
        num_threads: threads to use, whatever the environment says; 0 for every core that this
            process may use, where a variable that the user has set stays as it is.

    Returns:
        One line for the log.

    Raises:
        RuntimeError: Paddle is already imported, and would not notice.
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
    return "; ".join(parts)


def cpu_environment(num_threads: int) -> dict[str, str]:
    """The variables that ``configure_cpu`` sets on this machine for that many threads."""
    variables = {name: str(num_threads) for name in _THREAD_VARIABLES} | _IDLE_WAIT
    return variables | {_MKL_DISPATCH: "5"} if _is_amd() else variables


def _forget_launcher_default() -> None:
    """Drops the OMP_NUM_THREADS=1 that Paddle's launcher hands on from its own import of Paddle."""
    if _LOCAL_PROCESSES in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]


def _keep_freed_memory() -> bool:
    """Tells glibc to serve large blocks from its heap and never to shrink it; False elsewhere."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def _use_huge_pages() -> bool:
    """Makes the heap grow by ``_HUGE_HEAP`` and asks for huge pages there; False where it cannot.

    ``_keep_freed_memory`` has to be called before: the block is then from the heap, and stays there
    when it is freed. glibc can do this by itself, but reads its setting, glibc.malloc.hugetlb, only
    from the environment at the start of a process.
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
    """Imports Paddle with deterministic gradients, without warnings about what is so on purpose.

    These are that OMP_NUM_THREADS is above 1, and that there is no ccache, which speeds up a
    compilation that does not take place.

    Returns:
        Lines for the log: one for each flag of the user that was kept instead of ours.
    """
    os.environ.setdefault("GLOG_minloglevel", "1")  # no lines about its own stores and ports
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
    """Cores this process may use: its affinity, and its share of a container's CPU quota."""
    quota = cpu_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    cores = len(os.sched_getaffinity(0))
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(membership: Path, mount: Path) -> float | None:
    """The smallest CPU quota of this process's control groups, in cores; None without one.

    Args:
        membership: /proc/self/cgroup, with lines "0::/path" (version 2) and
            "N:cpu,cpuacct:/path" (version 1).
        mount: where the control groups are, /sys/fs/cgroup.
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
        # Inside a container the path may not exist below the mount; its root then is the group.
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


def _is_amd() -> bool:
    return "AuthenticAMD" in _read(Path("/proc/cpuinfo"))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
