"""The manifest of docs/guides/several_machines.md: its pods as a kubelet starts and stops them.

A pod is a network, a host name, mounts and processes of its own. A file of names stands for DNS.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import netns
import pytest
import yaml
from page_blocks import blocks
from training_testing import Workplace, counting_documents, write_corpus, write_model

REPO = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(netns.obstacle()), reason=str(netns.obstacle())),
]
SETTINGS = {
    "max_steps": 200, "save_steps": 50, "do_eval": False, "gradient_accumulation_steps": 1,
    "share_folder": True, "device": "cpu",
}  # fmt: skip


def block(text: str) -> str:
    (found,) = (
        each.text for each in blocks() if each.page == "several_machines" and text in each.text
    )
    return found


class Job:
    """The indexed Job of the page; the test is its controller."""

    def __init__(self, folder: Path) -> None:
        self.workplace = Workplace(folder, "checkpoints")
        service, job = yaml.safe_load_all(block("kind: Job"))
        self.spec = job["spec"]
        self._name, self._service = job["metadata"]["name"], service["metadata"]["name"]
        self._names = folder / "names"
        self._names.touch()
        write_model(folder / "model")
        write_corpus(folder / "data" / "corpus", counting_documents())
        words = self.workplace.command(**SETTINGS)[3:]
        values = zip((each.removeprefix("--") for each in words[::2]), words[1::2], strict=True)
        (folder / "run.json").write_text(json.dumps(dict(values)), encoding="utf-8")
        (folder / "start.sh").write_text(block("# start.sh:"), encoding="utf-8")
        (folder / "bin").mkdir()
        for name, options in (("python", ""), ("pypkg", "-m pypkg ")):
            program = folder / "bin" / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {options}"$@"\n')
            program.chmod(0o755)

    def publish(self, *hosts: netns.Host) -> None:
        """Gives the names of the pods, by index, the addresses of ``hosts``."""
        lines = [
            f"{host.address} {self._name}-{index}.{self._service}\n"
            for index, host in enumerate(hosts)
        ]
        self._names.write_text("127.0.0.1 localhost\n" + "".join(lines))

    def start(self, index: int, host: netns.Host) -> subprocess.Popen:
        """Starts the container of a pod on ``host``."""
        folder = self.workplace.folder
        (container,) = self.spec["template"]["spec"]["containers"]
        variables = {
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HOME": "/root",
            "JOB_COMPLETION_INDEX": str(index),
            **{each["name"]: each["value"] for each in container["env"]},
            "RANKS": "1",
            "PYTHONPATH": str(REPO),
            "CUDA_VISIBLE_DEVICES": "",
        }
        inside = (
            f"hostname {self._name}-{index} && mount --bind {shlex.quote(str(self._names))} "
            f"/etc/hosts && cd {shlex.quote(str(folder))} && "
            f"exec {shlex.join(container['command'] + container['args'])}"
        )
        isolated = ("unshare", "--pid", "--fork", "--mount-proc", "--uts", "--ipc", "--kill-child")
        with self.log(index).open("ab") as log:
            return host.start([*isolated, "bash", "-c", inside], log, variables, {})

    def log(self, index: int) -> Path:
        return self.workplace.folder / f"pod{index}.log"

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            assert time.monotonic() < deadline, self.log(0).read_text() + self.log(1).read_text()
            time.sleep(0.05)

    def has_step(self, step: int) -> bool:
        file = self.workplace.output_dir / "metrics.jsonl"
        return file.exists() and len(file.read_text().splitlines()) >= step


def stop(pod: subprocess.Popen) -> None:
    """SIGTERM to the first process of a container, as a kubelet sends it."""
    first = Path(f"/proc/{pod.pid}/task/{pod.pid}/children").read_text().split()[0]
    os.kill(int(first), signal.SIGTERM)


def test_an_evicted_pod_and_a_first_pod_with_another_address(tmp_path):
    """All pods save and end with a code that is no failure; then the Job starts new ones.

    The second one starts while the name of the first still has the address of the old one.
    """
    job = Job(tmp_path)
    with netns.network(3) as hosts:
        job.publish(hosts[0], hosts[1])
        pods = [job.start(index, hosts[index]) for index in range(2)]
        job.wait_for(lambda: job.has_step(2))
        stop(pods[1])
        grace = job.spec["template"]["spec"]["terminationGracePeriodSeconds"]
        codes = [pod.wait(grace) for pod in pods]
        (ignored,) = (
            rule["onExitCodes"]["values"]
            for rule in job.spec["podFailurePolicy"]["rules"]
            if rule["action"] == "Ignore" and "onExitCodes" in rule
        )
        assert set(codes) <= set(ignored), job.log(0).read_text() + job.log(1).read_text()
        (step,) = job.workplace.steps()
        assert job.has_step(step) and not job.has_step(step + 1)
        hosts[0].kill()
        second = job.start(1, hosts[1])
        job.wait_for(lambda: job.log(1).read_text().count("Waiting peer start") == 2)
        job.publish(hosts[2], hosts[1])
        first = job.start(0, hosts[2])
        job.wait_for(lambda: first.poll() is not None and second.poll() is not None)
        assert (first.returncode, second.returncode) == (0, 0), job.log(0).read_text()
    alone = Workplace(tmp_path, "alone")
    done = alone.run(**SETTINGS | {"gradient_accumulation_steps": 2})
    assert done.returncode == 0, done.stderr
    assert job.workplace.losses() == pytest.approx(alone.losses(), rel=1e-4)
