"""Index maps on disk with several processes, dead ones, and folders that cannot be written to."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import numpy as np
import pytest
from corpora import counting_documents

from pypkg.data import IndexedDatasetWriter
from pypkg.data.index.cache import FOLDER
from pypkg.data.index.lock import LOCK_FILE

WORKER = Path(__file__).with_name("index_cache_worker.py")
NOBODY = 65534


class Process:
    """A running worker, forked; its output goes to pipes, which a limit of file sizes leaves."""

    def __init__(self, options: dict) -> None:
        (out, theirs_out), (err, theirs_err) = os.pipe(), os.pipe()
        self._stdout, self._stderr = os.fdopen(out), os.fdopen(err)
        with open(theirs_out, "w") as stdout, open(theirs_err, "w") as stderr:
            self._process = forked.start(
                [WORKER, json.dumps(options)],
                environment=os.environ, stdout=stdout, stderr=stderr,
            )  # fmt: skip

    def ready(self) -> None:
        """Waits until it is about to build the dataset."""
        assert self._stdout.readline() == "ready\n", self._stderr.read()

    def report(self, timeout: float = 60) -> dict:
        """What it printed at its end, and its log as ``log``."""
        code = self._process.wait(timeout)
        stdout, stderr = self._stdout.read(), self._stderr.read()
        assert code == 0, stderr
        return {**json.loads(stdout.splitlines()[-1]), "log": stderr}

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)

    def end(self) -> None:
        forked.kill_group(self._process)
        self._stdout.close()
        self._stderr.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a corpus that any user can read."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    with IndexedDatasetWriter(str(path / "corpus"), np.uint16) as writer:
        for document in counting_documents([30, 0, 7, 1, 55, 12, 200, 3]):
            writer.add_document(document.astype(np.uint16))
        writer.commit()
    for file in path.iterdir():
        file.chmod(0o644)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


@pytest.fixture
def start(folder) -> Iterator[Callable[..., Process]]:
    """Starts a worker of rank ``rank``, which is the ``local``-th of its machine."""
    processes = []

    def start(rank: int = 0, local: int | None = None, **options) -> Process:
        ranks = {"rank": rank, "local_rank": rank if local is None else local}
        processes.append(Process({"prefix": str(folder / "corpus"), **ranks, **options}))
        return processes[-1]

    yield start
    for process in processes:
        process.end()


@pytest.fixture
def expected(start, tmp_path) -> str:
    """What the samples should be."""
    return start(data_cache=str(tmp_path / "apart")).report()["samples"]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.01)


def test_two_jobs_at_once_build_once(start, expected, tmp_path, folder):
    go = tmp_path / "go"
    jobs = [start(start_after=str(go), build_seconds=0.5) for _ in range(3)]
    for job in jobs:
        job.ready()
    go.touch()
    reports = [job.report() for job in jobs]
    assert [report["samples"] for report in reports] == [expected] * 3
    assert sum(report["built"] for report in reports) == 1
    assert len(list((folder / FOLDER).glob("*.npy"))) == 3


def test_ranks_wait_for_the_first(start, expected):
    others = [start(rank) for rank in (1, 2)]
    for other in others:
        other.ready()
    first = start(0, build_seconds=1)
    reports = [process.report() for process in (first, *others)]
    assert [report["samples"] for report in reports] == [expected] * 3
    assert [report["built"] for report in reports] == [1, 0, 0]


@pytest.mark.parametrize("share_folder", [False, True])
def test_who_goes_first_on_a_second_machine(start, expected, tmp_path, share_folder):
    """Machines with disks of their own each build; with share_folder the first of all builds."""
    caches = [str(tmp_path / name) for name in ("one", "two")]
    options = {"share_folder": share_folder}
    if share_folder:
        caches[1] = caches[0]
    second = start(2, local=0, data_cache=caches[1], **options)
    second.ready()
    first = start(0, data_cache=caches[0], build_seconds=1, **options)
    reports = [first.report(), second.report()]
    assert [report["samples"] for report in reports] == [expected] * 2
    assert [report["built"] for report in reports] == [1, int(not share_folder)]


def test_a_builder_that_is_killed_is_replaced(start, expected, tmp_path, folder):
    begun = tmp_path / "begun"
    dead = start(0, build_seconds=60, built_file=str(begun))
    wait_for(begun)
    same_job, other_job = start(1), start(0)
    same_job.ready(), other_job.ready()
    time.sleep(0.3)
    (folder / FOLDER / "x_doc_idx.npy.host.1.tmp").write_bytes(b"half written")
    dead.kill()
    reports = [same_job.report(), other_job.report()]
    assert [report["samples"] for report in reports] == [expected] * 2
    assert [report["built"] for report in reports] == [0, 1]


def test_a_rank_takes_over_from_a_first_that_never_comes(start, expected):
    report = start(1, head_start=0.1).report()
    assert report["samples"] == expected and report["built"] == 1


def test_every_rank_shows_the_error(start):
    processes = [start(rank, fail="no more of this", head_start=0.1) for rank in (0, 1)]
    assert [process.report()["error"] for process in processes] == ["no more of this"] * 2


def test_waiting_has_a_limit(start, folder):
    (folder / FOLDER).mkdir()
    with open(folder / FOLDER / LOCK_FILE, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 7 on some host")
        lock.flush()
        for rank in (0, 1):
            report = start(rank, time_limit=0.5).report()
            assert "waited 0 s" in report["error"] or "waited 1 s" in report["error"]
            assert "process 7 on some host" in report["error"]
            assert report["built"] == 0


def _ordinary_user() -> dict[str, int]:
    """Root may write anywhere; so a test as root becomes nobody."""
    return {"user": NOBODY} if os.getuid() == 0 else {}


def test_read_only_folder(start, expected, folder):
    folder.chmod(0o555)
    for rank in (0, 1):
        report = start(rank, **_ordinary_user()).report()
        assert report["samples"] == expected and report["built"] == 1
        assert "are not kept on disk" in report["log"] and "Permission denied" in report["log"]
    assert not (folder / FOLDER).exists()


def test_read_only_folder_that_holds_the_maps(start, expected, folder):
    start().report()
    (folder / FOLDER).chmod(0o555)
    folder.chmod(0o555)
    report = start(**_ordinary_user()).report()
    assert report["samples"] == expected and report["built"] == 0
    (folder / FOLDER).chmod(0o755)


def test_read_only_data_cache(start, tmp_path, folder):
    cache = folder / "cache"
    cache.mkdir(mode=0o555)
    for rank in (0, 1):
        report = start(rank, data_cache=str(cache), **_ordinary_user()).report(20)
        assert "data_cache cannot keep" in report["error"]
        assert "Permission denied" in report["error"]


@pytest.mark.parametrize("limit", [0, 100, 200, 450, 700])
def test_full_disk(start, expected, tmp_path, folder, limit):
    """The process may write so many bytes to each file, then no more."""
    report = start(file_size_limit=limit).report()
    assert report["samples"] == expected and report["built"] == 1
    assert "are not kept on disk" in report["log"]
    assert set(os.listdir(folder / FOLDER)) <= {LOCK_FILE}
    report = start(file_size_limit=limit, data_cache=str(tmp_path / "own")).report()
    assert "data_cache cannot keep" in report["error"]
    assert set(os.listdir(tmp_path / "own")) <= {LOCK_FILE}
    again = start().report()  # there is room again
    assert again["samples"] == expected and again["built"] == 1


def test_every_rank_meets_the_full_disk(start, tmp_path):
    options = {"file_size_limit": 200, "data_cache": str(tmp_path / "own"), "head_start": 0.1}
    ranks = [start(rank, **options) for rank in (0, 1)]
    for rank in ranks:
        assert "data_cache cannot keep" in rank.report()["error"]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k,mode=0777", "tmpfs"]
    try:
        subprocess.run(["mount", *options, str(path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here; test_full_disk does without")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_that_fills_up(start, expected, small_disk):
    """Room when building begins, which another program takes before the maps are written."""
    begun = small_disk / "begun"
    builder = start(data_cache=str(small_disk), build_seconds=1, built_file=str(begun))
    wait_for(begun)
    with open(small_disk / "other", "wb", buffering=0) as other:
        while True:
            try:
                other.write(bytes(4096))
            except OSError:
                break
    report = builder.report()
    assert "No space left" in report["error"] and "data_cache cannot keep" in report["error"]
    report = start(1, data_cache=str(small_disk), head_start=0.1).report()
    assert "MiB free of the" in report["error"] and report["built"] == 0
    (small_disk / "other").unlink()
    report = start(1, data_cache=str(small_disk), head_start=0.1).report()
    assert report["samples"] == expected
