"""Threads are set before Paddle, from what the process may use, and never against the user."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pypkg.device import threads

VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "PYPKG_NUM_THREADS",
)


@pytest.fixture
def clean(monkeypatch):
    """An environment and a process as a command line finds them."""
    monkeypatch.delitem(sys.modules, "paddle", raising=False)
    set_here = (*VARIABLES, *threads._IDLE_WAIT, "MKL_DEBUG_CPU_TYPE", "PADDLE_LOCAL_SIZE")
    for name in (*set_here, *threads._BINDING):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone at its end
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "_mkl_kernels", lambda fields: "")
    return monkeypatch


def test_threads_are_set_for_every_library(clean):
    line = threads.configure_cpu(3)
    assert [os.environ[name] for name in VARIABLES] == ["3"] * 4
    assert line.startswith("CPU threads: 3 of ")
    assert "MKL_DEBUG_CPU_TYPE" not in os.environ


def test_zero_takes_every_available_core(clean):
    clean.setattr(threads, "available_cores", lambda: 5)
    assert threads.configure_cpu().startswith("CPU threads: 5 of 5 available cores")
    assert os.environ["OMP_NUM_THREADS"] == "5"


def test_what_the_user_has_set_stays_and_is_said(clean):
    clean.setattr(threads, "available_cores", lambda: 2)
    clean.setenv("OMP_NUM_THREADS", "7")
    assert "kept from the environment: OMP_NUM_THREADS=7" in threads.configure_cpu()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["MKL_NUM_THREADS"] == "2"


def test_the_setting_wins_over_the_environment(clean):
    clean.setenv("OMP_NUM_THREADS", "7")
    assert "kept from" not in threads.configure_cpu(2)
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_launched_processes_share_the_cores(clean):
    """The launcher has imported Paddle, which put OMP_NUM_THREADS=1 into what we inherit."""
    clean.setattr(threads, "available_cores", lambda: 8)
    clean.setenv("PADDLE_LOCAL_SIZE", "2")
    clean.setenv("OMP_NUM_THREADS", "1")
    assert "CPU threads: 4 of 4" in threads.configure_cpu()
    assert os.environ["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    ("vendor", "flags", "kernels"),
    [
        ("GenuineIntel", "avx2 avx512f avx512cd avx512bw avx512dq avx512vl", ""),
        ("AuthenticAMD", "sse4_2 avx2 fma", "5"),
        ("AuthenticAMD", "avx2 avx512f avx512cd", "5"),
        ("AuthenticAMD", "avx2 avx512f avx512dq avx512cd avx512bw avx512vl avx512_bf16", "7"),
    ],
)
def test_mkl_is_told_about_amd(clean, vendor, flags, kernels):
    cpuinfo = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\nbugs\t\t: x\n"
    clean.undo()
    clean.setattr(threads, "_read", lambda file: cpuinfo)
    assert threads.cpu_environment(1).get("MKL_DEBUG_CPU_TYPE", "") == kernels


def test_the_log_names_the_kernels_of_mkl(clean):
    clean.setattr(threads, "_mkl_kernels", lambda fields: "7")
    assert "MKL_DEBUG_CPU_TYPE=7 for an AMD processor" in threads.configure_cpu(1)
    assert os.environ["MKL_DEBUG_CPU_TYPE"] == "7"


@pytest.mark.parametrize(
    ("name", "value", "count", "is_slow"),
    [
        ("OMP_PROC_BIND", "close", 2, True),
        ("OMP_PLACES", "cores", 2, True),
        ("GOMP_CPU_AFFINITY", "0-1", 2, True),
        ("OMP_PROC_BIND", "false", 2, False),
        ("OMP_PROC_BIND", "true", 1, False),
    ],
)
def test_threads_that_are_bound_to_cores_are_pointed_out(clean, name, value, count, is_slow):
    clean.setenv(name, value)
    said = f"{name}={value} makes threads share a core; unset it for full speed"
    assert (said in threads.configure_cpu(count)) == is_slow


def test_freed_memory_is_reused_instead_of_faulted_in_again(clean):
    """Page faults of taking and dropping 64 MiB ten times: about 16,384 each time by default."""
    code = (
        "import resource, numpy as np\n"
        "from pypkg.device.threads import configure_cpu\n"
        "configure_cpu(1)\n"
        "np.ones(2**24, np.float32)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): np.ones(2**24, np.float32)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages"
)
def test_the_heap_has_huge_pages_and_takes_memory_where_it_is_used():
    code = (
        "from pypkg.device import threads\n"
        "said = threads.configure_cpu(1)\n"
        "areas = [open('/proc/self/smaps').read()]\n"
        "kept = b'x' * 2**27  # NumPy asks for huge pages itself\n"
        "areas.append(open('/proc/self/smaps').read())\n"
        "print(said, *areas, sep='NEXT')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, *maps = done.stdout.split("NEXT")
    assert "asks for huge pages" in said
    before, after = (_kilobytes_with_huge_pages(each) for each in maps)
    assert before["Size"] > 0.99 * threads._HUGE_HEAP / 1024
    assert before["Rss"] < 16 * 1024
    assert after["Rss"] > 128 * 1024


def _kilobytes_with_huge_pages(smaps: str) -> dict[str, int]:
    """Sums over the areas of /proc/self/smaps that ask for huge pages."""
    areas = [each for each in re.split(r"\n(?=[0-9a-f]+-)", smaps) if re.search(r" hg\b", each)]
    return {
        name: sum(int(re.findall(rf"^{name}: +(\d+) kB", each, re.M)[0]) for each in areas)
        for name in ("Size", "Rss")
    }


def test_too_late_is_an_error(clean):
    clean.setitem(sys.modules, "paddle", object())
    with pytest.raises(RuntimeError, match="before Paddle"):
        threads.configure_cpu()


def test_affinity_is_respected():
    one_core = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{one_core}}})\n"
        "from pypkg.device.threads import available_cores; print(available_cores())"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "1"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"a/b/cpu.max": "max 100000"}, None),
        ({"cpu.max": "250000 100000"}, 2.5),
        ({"a/b/cpu.max": "400000 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "100000"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000",
          "cpu.max": "200000 100000"}, 2.0),
    ],
)  # fmt: skip
def test_quota_of_control_groups(tmp_path, limits, expected):
    membership = tmp_path / "cgroup"
    membership.write_text("5:memory:/m\n2:cpu,cpuacct:/x\n0::/a/b\n", encoding="utf-8")
    for name, text in limits.items():
        file = tmp_path / "mount" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")
    assert threads.cpu_quota(membership, tmp_path / "mount") == expected


def test_a_quota_below_the_cores_limits_them(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for quota, cores in ((None, 8), (2.5, 2), (0.3, 1), (64.0, 8)):
        monkeypatch.setattr(threads, "cpu_quota", lambda *_, quota=quota: quota)
        assert threads.available_cores() == cores


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_paddle_multiplies_and_updates_with_the_threads_it_was_given():
    # Processor time of all threads over that of the main thread: 1.0 with one thread, at most 2.
    # The main thread works alone between the parallel loops, longer where it is interrupted.
    code = """
import time
from pypkg.device.threads import configure_cpu, import_paddle
configure_cpu(2)
import_paddle()
import paddle
a = paddle.rand([1024, 1024])
parameter = paddle.create_parameter([2048, 2048], "float32")
parameter.grad = paddle.rand([2048, 2048])
adamw = paddle.optimizer.AdamW(parameters=[parameter])
for action in (lambda: paddle.matmul(a, a), adamw.step):
    action()
    process, thread = time.process_time(), time.thread_time()
    for _ in range(5):
        action()
    print((time.process_time() - process) / (time.thread_time() - thread))
"""
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    matmul, adamw = map(float, done.stdout.split())
    assert matmul > 1.2
    assert adamw > 1.2
    assert "OMP_NUM_THREADS" not in done.stderr
    assert "ccache" not in done.stderr
    assert time.monotonic() - started < 120


def test_gradients_are_deterministic_unless_the_user_has_said_otherwise(tmp_path):
    """Paddle reads the flags when it is imported; here an empty module stands for it."""
    (tmp_path / "paddle.py").touch()
    code = (
        "import os, sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from pypkg.device.threads import import_paddle\n"
        "print(import_paddle())\n"
        "print(*[os.environ[f'FLAGS_{each}_deterministic'] for each in ('embedding', 'cudnn')])"
    )

    def output(**flags: str) -> list[str]:
        kept = {k: v for k, v in os.environ.items() if k not in threads._DETERMINISTIC}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env=kept | flags,
        )  # fmt: skip
        return done.stdout.splitlines()

    assert output() == ["[]", "1 1"]
    said, flags = output(FLAGS_embedding_deterministic="0")
    assert flags == "0 1"
    assert "kept from the environment: FLAGS_embedding_deterministic=0; " in said


def test_other_output_of_the_import_is_not_swallowed(tmp_path):
    (tmp_path / "paddle.py").write_text(
        "import sys\n"
        "print('WARNING: OMP_NUM_THREADS set to 2', file=sys.stderr)\n"
        "print('something is wrong', file=sys.stderr)\n"
        "raise ImportError('no such library')\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-c", "from pypkg.device.threads import import_paddle; import_paddle()"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 1
    assert "something is wrong" in done.stderr
    assert "no such library" in done.stderr
    assert "WARNING" not in done.stderr


def test_problems_of_the_settings_come_without_warnings_of_paddle(tmp_path):
    """Paddle is imported to ask for the device, where no run will follow."""
    arguments = ["--model_name_or_path", "none", "--input_dir", "data", "--output_dir", "out"]
    arguments += ["--max_steps", "1", "--do_train", "--device", "gpu"]
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}  # neither ccache nor a GPU
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "pypkg", "pretrain", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 2
    assert "2 problems in the settings" in done.stderr and "GPU" in done.stderr
    assert "ccache" not in done.stderr
