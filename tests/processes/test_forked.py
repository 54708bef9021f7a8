"""A forked process behaves like a started one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

SCRIPT = Path(__file__).with_name("started_as.py")


def environment(**changes: str) -> dict[str, str]:
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYPKG_NUM_THREADS")
    return {k: v for k, v in os.environ.items() if k not in threads} | changes


def run_code(folder: Path, code: str, **options) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(code)
    return forked.run([script], environment=environment(), timeout=60, **options)


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        (["a b"], {"OMP_NUM_THREADS": "1", "PYPKG_NUM_THREADS": "1"}),
        ([], {"OMP_NUM_THREADS": "3"}),
        (["configure"], {}),
    ],
)
def test_same_as_a_started_process(tmp_path, arguments, variables):
    files = [tmp_path / "forked.json", tmp_path / "started.json"]
    command = [SCRIPT, files[0], *arguments]
    done = forked.run(command, environment=environment(**variables), timeout=60)
    assert done.returncode == 0, done.stderr
    subprocess.run(
        [sys.executable, SCRIPT, files[1], *arguments], env=environment(**variables),
        cwd=forked.REPO, check=True, timeout=60, start_new_session=True,
    )  # fmt: skip
    found, expected = (json.loads(file.read_text()) for file in files)
    assert found["same"] == expected["same"]


def test_random_numbers_differ_between_processes(tmp_path):
    files = [tmp_path / f"{number}.json" for number in range(2)]
    for file in files:
        done = forked.run([SCRIPT, file], environment=environment(), timeout=60)
        assert done.returncode == 0, done.stderr
    first, second = (json.loads(file.read_text())["drawn"] for file in files)
    assert first["numpy"] != second["numpy"] and first["paddle"] != second["paddle"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('out'); import sys; print('err', file=sys.stderr)", (0, "out\n", "err\n")),
        ("import atexit, sys; atexit.register(print, 'last'); sys.exit(7)", (7, "last\n", "")),
        ("import sys; sys.exit('a message')", (1, "", "a message\n")),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", (-9, "", "")),
    ],
)
def test_exit_codes_and_output(tmp_path, code, expected):
    done = run_code(tmp_path, code)
    assert (done.returncode, done.stdout, done.stderr) == expected


def test_an_exception_is_shown(tmp_path):
    done = run_code(tmp_path, "raise ValueError('wrong on purpose')")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: wrong on purpose\n")


def test_signals_and_the_group(tmp_path):
    """SIGINT is KeyboardInterrupt; what is killed takes its own processes with it."""
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(
        "import subprocess, time\n"
        "print(subprocess.Popen(['sleep', '60']).pid, flush=True)\n"
        "try:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('interrupted', flush=True)\n"
        "time.sleep(60)\n"
    )
    with log.open("w") as file:
        process = forked.start([script], environment=environment(), stdout=file, stderr=file)
    until(lambda: "\n" in log.read_text())
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    until(lambda: "interrupted" in log.read_text())
    forked.kill_group(process)
    assert process.returncode == -signal.SIGKILL
    until(lambda: not is_running(int(log.read_text().split()[0])))


def test_time_limit(tmp_path):
    (tmp_path / "script.py").write_text("import time; time.sleep(60)")
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run([tmp_path / "script.py"], environment=environment(), timeout=0.2)


def test_all_end_with_the_session(tmp_path):
    """Even when the session is killed, and so cannot ask for it."""
    (tmp_path / "script.py").write_text(
        "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    )
    session = (
        f"import os, sys, time; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import forked\n"
        f"forked.start([{str(tmp_path / 'script.py')!r}], environment=dict(os.environ),\n"
        "             stdout=sys.stdout, stderr=sys.stderr)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", session], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.kill()
    process.communicate()
    until(lambda: not is_running(child))


def test_a_variable_that_is_read_at_import_is_refused():
    with pytest.raises(AssertionError, match="FLAGS_check_nan_inf"):
        run = environment(FLAGS_check_nan_inf="1")
        forked.run([SCRIPT, "unused"], environment=run, timeout=60)


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """False for one that has ended, whether or not its parent has noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
