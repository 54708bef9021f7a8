"""The baselines of ``train-step``, and the modules that each needs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pypkg.device.threads import cpu_environment
from pypkg.errors import UserError
from pypkg.files.paths import library_dir

logger = logging.getLogger("pypkg")

# glibc returns large buffers to the system, so that every use causes page faults. With these
# variables it keeps them, as pypkg.device.threads does for pypkg.
_KEEP_BUFFERS = {
    "GLIBC_TUNABLES": f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**31 - 1}"
}
# Prints the versions of installed packages without importing them.
_LIST_VERSIONS = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({each.name: each.version for each in m.distributions()}))"
)


@dataclass(frozen=True)
class Baseline:
    """A training process.

    Args:
        name: in the report.
        stack: "pypkg", "transformers" or "paddlenlp"; a function of the worker.
        autocast: whether matrix products are in bfloat16.
        environment: variables that are set before the process starts.
        cpu_settings: whether the process also gets the variables that pypkg sets for itself.
        needs: modules without which the baseline is left out.
        python: the interpreter of the process; None: this one.
    """

    name: str
    stack: str
    autocast: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    cpu_settings: bool = False
    needs: tuple[str, ...] = ()
    python: str | None = None


_TORCH = ("torch", "transformers")
_COMPILED = Baseline("pypkg", "pypkg", environment={"PYPKG_OPS_BACKEND": "compiled"})
BASELINES = (
    _COMPILED,
    Baseline(
        "pypkg, bfloat16 products", "pypkg", True, environment={"PYPKG_OPS_BACKEND": "compiled"}
    ),
    Baseline("pypkg, reference operators", "pypkg", environment={"PYPKG_OPS_BACKEND": "reference"}),
    Baseline("transformers + torch, float32", "transformers", needs=_TORCH),
    Baseline("transformers + torch, bfloat16 autocast", "transformers", True, needs=_TORCH),
    Baseline(
        "transformers + torch, float32, buffers kept",
        "transformers",
        environment=_KEEP_BUFFERS,
        needs=_TORCH,
    ),
    Baseline(
        "transformers + torch, bfloat16 autocast, buffers kept",
        "transformers",
        True,
        environment=_KEEP_BUFFERS,
        needs=_TORCH,
    ),
    Baseline("PaddleNLP, float32", "paddlenlp"),
    Baseline(
        "PaddleNLP, float32, threads and MKL set, buffers kept",
        "paddlenlp",
        environment=_KEEP_BUFFERS,
        cpu_settings=True,
    ),
)


def choose_baselines(options: argparse.Namespace) -> tuple[list[Baseline], list[str]]:
    """The requested baselines that can run here, and notes on the others.

    Raises:
        UserError: a baseline is unknown, an interpreter has no PaddleNLP, or no baseline is left.
    """
    unknown = sorted(set(options.baseline or ()) - {each.name for each in BASELINES})
    if unknown:
        raise UserError(
            f"--baseline {unknown[0]!r} is unknown; use one of "
            f"{', '.join(repr(each.name) for each in BASELINES)}"
        )
    chosen = [each for each in BASELINES if not options.baseline or each.name in options.baseline]
    foreign = [each for each in chosen if each.stack == "paddlenlp"]
    found, notes = _available([each for each in chosen if each not in foreign])
    if foreign and options.paddlenlp is None:
        notes.append("--paddlenlp was not given: PaddleNLP was left out")
    elif foreign:
        notes.append(f"PaddleNLP: {_paddlenlp_versions(options.paddlenlp)}")
        found += [_in_environment(each, options.paddlenlp, options.threads) for each in foreign]
    if not found:
        raise UserError("none of the baselines can run here: " + "; ".join(notes))
    return found, notes


def _available(baselines: Sequence[Baseline]) -> tuple[list[Baseline], list[str]]:
    """The baselines whose modules are installed, and a note for each of the others."""
    found, notes = [], []
    for each in baselines:
        missing = [name for name in each.needs if importlib.util.find_spec(name) is None]
        if each is _COMPILED and not (library_dir() / "pypkg_ops.so").exists():
            missing.append("the compiled operators")
        if missing:
            notes.append(f"left out: {each.name}, because {' and '.join(missing)} are missing")
            logger.warning(notes[-1])
        else:
            found.append(each)
    return found, notes


def _in_environment(baseline: Baseline, python: str, threads: int) -> Baseline:
    settings = cpu_environment(threads) if baseline.cpu_settings else {}
    return replace(baseline, python=python, environment={**baseline.environment, **settings})


def _paddlenlp_versions(python: str) -> str:
    """The versions of PaddleNLP and Paddle in the environment of an interpreter."""
    try:
        output = subprocess.run([python, "-c", _LIST_VERSIONS], capture_output=True, text=True)
        versions = json.loads(output.stdout)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no Python 3.10 or later"
        raise UserError(
            f"--paddlenlp {python} cannot be run: {reason}; give the interpreter of an environment "
            "in which PaddleNLP is installed, such as /path/to/environment/bin/python"
        ) from error
    if "paddlenlp" not in versions:
        raise UserError(
            f"--paddlenlp {python}: paddlenlp is not installed in its environment; install it "
            "there, or give the interpreter of an environment that has it"
        )
    names = ("paddlenlp", "paddlepaddle", "paddlepaddle-gpu")
    return ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
