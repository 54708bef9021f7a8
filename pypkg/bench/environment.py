"""The environment that is recorded with a result: machine, versions, commit, date, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pypkg import __version__, _native
from pypkg.device.threads import available_cores, cpu_fields

_PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "torch", "transformers", "numpy")
# Environment variables that restrict the timed libraries to narrower instruction sets.
_INSTRUCTION_SETS = (
    "PYPKG_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
)
_PLACEHOLDERS = {
    "--json": "FILE",
    "--site-packages": "FOLDER",
    "--paddlenlp": "PYTHON",
    "--folder": "FOLDER",
    "--torch": "PYTHON",
}


def describe_run(arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """The description of this run without its measurements; imports no framework."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _command(arguments),
        "machine": {
            "cpu": _cpu_model(),
            "cores": available_cores(),
            "threads": threads,
            "memory_gib": round(
                os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1
            ),
        },
        "versions": {"python": platform.python_version(), **_versions(), "pypkg": __version__},
        "commit": _commit(),
    }


def _command(arguments: Sequence[str]) -> str:
    """The command for the same measurement elsewhere, with placeholders for files and folders."""
    words, last = [], ""
    for word in arguments:
        option, equals, _ = word.partition("=")
        placeholder = _PLACEHOLDERS.get(option if equals else last)
        if placeholder is None:
            words.append(word)
        else:
            words.append(f"{option}={placeholder}" if equals else placeholder)
        last = word
    given = [f"{name}={os.environ[name]}" for name in _INSTRUCTION_SETS if os.environ.get(name)]
    return shlex.join([*given, "python", "-m", "pypkg.bench", *words])


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_device(names_amd: bool = False) -> str:
    """The device of a result on a CPU: "cpu", and the instruction set that the kernels are held to.

    Args:
        names_amd: whether it also says that the processor is AMD's, for which the libraries that
            are timed have other kernels.
    """
    isa, widest = _native.cpu_isa(), _native.cpu_isas()[-1]
    is_amd = cpu_fields().get("vendor_id") == "AuthenticAMD"
    words = ["cpu", "AMD" if names_amd and is_amd else "", "" if isa == widest else isa]
    return " ".join(filter(None, words))


def _cpu_model() -> str:
    fields = cpu_fields()
    if not fields:
        return platform.processor() or platform.machine()
    features = [
        name
        for name in ("avx2", "avx512f", "avx512_bf16")
        if name in fields.get("flags", "").split()
    ]
    model = fields.get("model name", platform.machine())
    return f"{model} ({', '.join(features)})" if features else model


def _commit() -> str | None:
    """The commit of the checkout that contains this package, with a mark if files differ."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # A package installed in an environment within another repository is not tracked there.
    if not git("ls-files", __file__):
        return None
    commit = git("rev-parse", "--short=12", "HEAD")
    return f"{commit} with local changes" if commit and git("status", "--porcelain") else commit
