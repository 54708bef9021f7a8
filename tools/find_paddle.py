"""Finds the Paddle to compile against, without importing it.

pip builds in isolation, where ``import`` does not find the Paddle of the target environment. So
several interpreters are asked in turn. The first with a Paddle and the same extension ABI is used.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ENVIRONMENT_VARIABLE = "PYPKG_PADDLE_PYTHON"

_PROBE = """
import importlib.util, json, re, sysconfig
from pathlib import Path
answer = {"soabi": sysconfig.get_config_var("SOABI"), "paddle": None}
spec = importlib.util.find_spec("paddle")
if spec is not None and spec.origin:
    folder = Path(spec.origin).parent
    text = (folder / "version" / "__init__.py").read_text()
    value = lambda name: re.search(rf"^{name}\\s*=\\s*['\\"]([^'\\"]*)", text, re.M).group(1)
    answer["paddle"] = str(folder)
    answer["version"] = value("full_version")
    answer["cuda"] = value("cuda_version")
print(json.dumps(answer))
"""


@dataclass
class Paddle:
    """A Paddle (``folder`` is its package, None if none was found) and the places searched."""

    folder: str | None = None
    version: str = ""
    cuda: str | None = None
    looked: list[str] = field(default_factory=list)

    @property
    def found(self) -> bool:
        return self.folder is not None


def find_paddle() -> Paddle:
    result = Paddle()
    for label, command in _candidates():
        answer, problem = _ask(command)
        if answer is None:
            result.looked.append(f"{label}: {problem}")
        elif answer["paddle"] is None:
            result.looked.append(f"{label}: no Paddle")
        elif answer["soabi"] != sysconfig.get_config_var("SOABI"):
            result.looked.append(
                f"{label}: has Paddle {answer['version']}, but is {answer['soabi']}, "
                f"not {sysconfig.get_config_var('SOABI')}"
            )
        else:
            result.looked.append(f"{label}: Paddle {answer['version']}")
            result.folder, result.version = answer["paddle"], answer["version"]
            result.cuda = None if answer["cuda"] in ("False", "") else answer["cuda"]
            return result
    return result


@dataclass
class Process:
    arguments: list[str]
    environment: dict[str, str]


def installer_processes() -> Iterator[Process]:
    """The processes above this one, nearest first; none where there is no /proc."""
    pid = str(os.getppid())
    while pid not in ("0", "1"):
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            environ = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        pairs = (entry.partition("=") for entry in environ.split("\0"))
        yield Process(arguments.split("\0"), {name: value for name, _, value in pairs})
        pid = re.search(r"^PPid:\s*(\d+)", status, flags=re.MULTILINE).group(1)


def _candidates() -> list[tuple[str, list[str]]]:
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        return [(f"{ENVIRONMENT_VARIABLE}={chosen}", [chosen])]
    # -E drops the overlay that pip lays over the target interpreter with PYTHONPATH.
    found = [(f"this interpreter ({sys.executable})", [sys.executable, "-E"])]
    # uv replaces VIRTUAL_ENV by its build environment; the installer itself has the user's.
    for environment in (os.environ, *(p.environment for p in installer_processes())):
        for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
            prefix = environment.get(variable)
            if prefix:
                found.append((f"{variable} ({prefix})", [str(Path(prefix, "bin", "python")), "-E"]))
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        python = shutil.which("python", path=folder) if folder else None
        if python:
            found.append((f"PATH ({python})", [python, "-E"]))
    local = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "python"
    if local.exists():
        found.append((f".venv beside setup.py ({local})", [str(local), "-E"]))
    found.append(("the build environment", [sys.executable]))
    unique: dict[tuple[str, ...], str] = {}
    for label, command in found:
        unique.setdefault(tuple(command), label)
    return [(label, list(command)) for command, label in unique.items()]


def _ask(command: list[str]) -> tuple[dict | None, str]:
    try:
        done = subprocess.run(
            [*command, "-c", _PROBE], capture_output=True, text=True, timeout=60, cwd="/"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    if done.returncode != 0:
        return None, (done.stderr.strip().splitlines() or ["failed"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1]), ""


def not_found_message(result: Paddle) -> str:
    looked = "\n".join(f"  - {line}" for line in result.looked)
    return (
        "pypkg compiles its operators against the Paddle they will run in, and found none.\n"
        f"Looked in:\n{looked}\n"
        "Do one of these, then install again:\n"
        '  - CPU:  pip install ".[cpu]"                (brings CPU Paddle along)\n'
        "  - GPU:  install the paddlepaddle-gpu that fits your CUDA, see paddlepaddle.org.cn\n"
        f"  - Paddle is in another environment: {ENVIRONMENT_VARIABLE}=/path/to/its/python\n"
        "  - only the framework-neutral kernels (pypkg._native): PYPKG_BUILD_PADDLE_OPS=0"
    )
