"""Which module may import which. docs/architecture.md gives the reasons."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "pypkg"
CSRC = REPO / "csrc"

# Leaves, which anything may import.
_BASE = (
    "pypkg.console.command_line",
    "pypkg.console.markdown",
    "pypkg.console.progress",
    "pypkg.errors",
    "pypkg.files",
    "pypkg.__version__",
)
_ANYTHING = ("pypkg",)


class Rule(NamedTuple):
    """What the modules below ``name`` may import from this package beside themselves and _BASE."""

    name: str
    may_import: tuple[str, ...] = ()
    paddle: bool = False


# For each module, the rule with the longest matching name holds.
_ARCHITECTURE = "pypkg.models.architecture"
RULES = (
    Rule("pypkg.errors"),
    Rule("pypkg.files"),
    Rule("pypkg.console"),
    Rule("pypkg.console.completion", ("pypkg.__main__", "pypkg.config")),
    Rule("pypkg.config"),
    Rule("pypkg.device"),
    Rule("pypkg.device.threads", paddle=True),  # imports it after the threads are set
    Rule("pypkg.device.capabilities", ("pypkg.config", "pypkg.device.threads", "pypkg.ops"),
         paddle=True),
    Rule("pypkg.ops", ("pypkg._native",), paddle=True),
    Rule("pypkg.ops.triton"),  # loads by itself where there is torch and no Paddle
    Rule("pypkg.parallel", ("pypkg.config", "pypkg.ops", "pypkg.console.logs",
                            "pypkg.console.troubleshooting"), paddle=True),
    Rule("pypkg.data", ("pypkg.config", "pypkg._native")),
    Rule(_ARCHITECTURE),
    Rule(f"{_ARCHITECTURE}.families",
         tuple(f"{_ARCHITECTURE}.{name}" for name in
               ("config", "family", "llama_format", "megatron_format", "weight_map"))),
    Rule("pypkg.models.weights", (_ARCHITECTURE,)),
    Rule("pypkg.models.weights.staging", ("pypkg._native", "pypkg.models.weights.area")),
    Rule("pypkg.models.weights.initialization",
         (_ARCHITECTURE, "pypkg.models.weights.tp_shards", "pypkg.ops"), paddle=True),
    Rule("pypkg.models", ("pypkg.ops", "pypkg.parallel.comm", "pypkg.parallel.context",
                          "pypkg.parallel.tp_layers",
                          "pypkg.parallel.mesh", "pypkg.parallel.pipeline",
                          "pypkg.parallel.tied_copies", "pypkg.parallel.host_memory"),
         paddle=True),
    Rule("pypkg.planner", ("pypkg.config", _ARCHITECTURE, "pypkg.models.weights.tp_shards",
                           "pypkg.parallel.mesh", "pypkg.parallel.update_rules",
                           "pypkg.console.svg")),
    Rule("pypkg.training", ("pypkg.config", "pypkg.data", "pypkg.device", "pypkg.models",
                            "pypkg.ops", "pypkg.parallel", "pypkg.planner", "pypkg.console.logs",
                            "pypkg.generation"),
         paddle=True),
    Rule("pypkg.generation", ("pypkg.data.tokenizers", "pypkg.models")),
    Rule("pypkg.inference", ("pypkg.data", "pypkg.device", "pypkg.generation", "pypkg.models",
                             "pypkg.ops", "pypkg.parallel.comm", "pypkg.parallel.mesh",
                             "pypkg.training.checkpoint.folders",
                             "pypkg.training.checkpoint.verify",
                             "pypkg.training.start.attention"),
         paddle=True),
    Rule("pypkg.report", ("pypkg.config", _ARCHITECTURE, "pypkg.parallel.mesh",
                          "pypkg.training.checkpoint", "pypkg.training.ledger",
                          "pypkg.training.reporting", "pypkg.console.logs")),
    Rule("pypkg.conversion", ("pypkg.models", "pypkg.data.tokenizers")),
    Rule("pypkg.bench", _ANYTHING, paddle=True),
    # Command lines: parse, call, report.
    Rule("pypkg.pretrain", _ANYTHING),
    Rule("pypkg.preprocess", _ANYTHING),
    Rule("pypkg.convert", _ANYTHING),
    Rule("pypkg.supervise", _ANYTHING),
    Rule("pypkg.doctor", _ANYTHING),
    Rule("pypkg.checkpoint", _ANYTHING),
    Rule("pypkg.generate", _ANYTHING),
    Rule("pypkg.evaluate", _ANYTHING),
    Rule("pypkg.__main__"),  # runs the others by name
    Rule("pypkg.plan", _ANYTHING),
)  # fmt: skip
# The rooms of a package from the highest to the lowest: a module imports from its own room and from
# those below it. What a package lacks here has no rooms.
ROOMS = {
    "pypkg.device": ("attention_choice", "capabilities", "attention_record", "threads"),
    "pypkg.ops": ("blocks", "decoder_step", "attention", "loss", "adamw", "gated_activation",
                  "matmul", "narrow_state", "random_normal", "rms_norm", "rotary_embedding",
                  "squared_l2_norm", "dispatch", "triton"),
    "pypkg.data": ("corpus_tools", "preprocess", "loading", "datasets", "index", "corpus",
                   "tokenizers", "optional_packages"),
    "pypkg.models": ("__main__", "docs_page", "generate", "sampling", "pretrained", "division",
                     "building", "pipeline_decoder", "cached_step", "cached_pass", "decoder",
                     "layers", "weights", "architecture"),
    "pypkg.parallel": ("optimizer", "pipeline", "tied_copies", "tp_layers", "linear_gradients",
                       "context", "comm", "launch", "mesh", "update_rules", "gloo",
                       "host_memory", "process_end", "endpoints"),
    "pypkg.training": ("supervisor", "run", "doctor", "final_report", "start", "trainer",
                       "evaluator", "healing", "step", "feed", "checkpoint", "reporting",
                       "interrupt", "tp_sharding", "ledger", "state"),
    "pypkg.generation": ("text", "prompts"),
    "pypkg.inference": ("lm_eval", "evaluate", "windows", "corpora", "loading"),
    "pypkg.report": ("__main__", "compare_losses", "comparison", "server", "page", "collect",
                     "parts", "layout", "settings",
                     "curves", "document"),
    "pypkg.planner": ("output", "search", "time", "memory", "extension", "step", "sliced_layers",
                      "zero", "pipeline", "decoder", "layer", "parallel", "blocks", "micro_batch",
                      "operators", "engine", "tape"),
    "pypkg.bench": ("__main__", "report", "generate", "learning_curves", "memory_passes",
                    "train_step", "checkpoint", "data", "ops", "environment", "timing"),
}  # fmt: skip
COMMAND_LINES = (
    "pypkg.pretrain",
    "pypkg.supervise",
    "pypkg.doctor",
    "pypkg.preprocess",
    "pypkg.convert",
    "pypkg.plan",
    "pypkg.checkpoint",
    "pypkg.generate",
    "pypkg.evaluate",
)

# These run where no Paddle is installed. (The rules above look at each file, this at all that it
# draws in.)
WITHOUT_PADDLE = ("pypkg", "pypkg.device.attention_choice", "pypkg.device.attention_record",
                  "pypkg.device.capabilities", "pypkg.device.threads",
                  "pypkg.config", "pypkg.errors", "pypkg.models.architecture.config",
                  "pypkg.models.architecture.registry",
                  "pypkg.models.weights.formats.tensor_files", "pypkg.models.weights.model_folder",
                  "pypkg.models.weights.hub", "pypkg.models.weights.writer_process",
                  "pypkg.models.architecture.layer_split",
                  "pypkg.conversion.inspection", "pypkg.data", "pypkg.models.weights.tp_shards",
                  "pypkg.parallel.mesh", "pypkg.planner.memory", "pypkg.convert",
                  "pypkg.checkpoint", "pypkg.preprocess", "pypkg.pretrain", "pypkg.supervise",
                  "pypkg.doctor", "pypkg.plan", "pypkg.generate", "pypkg.evaluate",
                  "pypkg.report.__main__", "pypkg.__main__",
                  "pypkg.console.completion")  # fmt: skip


def module_name(file: Path) -> str:
    parts = file.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_below(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def rule_of(module: str) -> Rule | None:
    fitting = [rule for rule in RULES if is_below(module, rule.name)]
    return max(fitting, key=lambda rule: len(rule.name), default=None)


def imported(source: str, module: str, is_package: bool) -> set[str]:
    """Dotted names that ``source`` imports anywhere, functions included; relative ones resolved.

    "from a import b" counts as a.b, which may be a module or a name in a.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + int(is_package)]
                base = ".".join([*parts, base] if base else parts)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    rule = rule_of(module)
    if rule is None:
        return [f"{module} has no rule; give it one in {Path(__file__).name}"]
    problems = []
    for name in sorted(imported(source, module, is_package)):
        if is_below(name, "paddle"):
            allowed = rule.paddle
        elif is_below(name, "pypkg"):
            allowed = any(is_below(name, each) for each in (rule.name, *_BASE, *rule.may_import))
            others = [each for each in COMMAND_LINES if each != rule.name]
            allowed = allowed and not any(is_below(name, each) for each in others)
        else:
            allowed = True
        if not allowed:
            problems.append(f"{module} may not import {name}")
    families = f"{_ARCHITECTURE}.families"
    if is_below(module, families) and module != families:
        others = [
            name
            for name in imported(source, module, is_package)
            if is_below(name, families) and not is_below(name, module)
        ]
        problems += [f"{module} may not import {name}: families stand alone" for name in others]
    return problems + upward_imports(source, module, is_package)


def upward_imports(source: str, module: str, is_package: bool) -> list[str]:
    """Imports of a room above the module's own, in a package of ROOMS."""
    package, inside = ".".join(module.split(".")[:2]), module.split(".")[2:]
    if package not in ROOMS or not inside:
        return []
    rooms = ROOMS[package]
    if inside[0] not in rooms:
        return [f"{module} is in no room; add {inside[0]!r} to ROOMS in {Path(__file__).name}"]
    above = rooms[: rooms.index(inside[0])]
    return [
        f"{module} may not import {name}: {room} is a room above"
        for name in sorted(imported(source, module, is_package))
        for room in above
        if is_below(name, f"{package}.{room}")
    ]


PYTHON_FILES = sorted(
    file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"
)  # fmt: skip


def test_python_imports():
    assert len(PYTHON_FILES) > 40
    assert [
        problem
        for file in PYTHON_FILES
        for problem in violations(
            file.read_text(encoding="utf-8"), module_name(file), file.name == "__init__.py"
        )
    ] == []


def package_graph(files: list[Path]) -> dict[str, set[str]]:
    """Each package or module of pypkg -> those that it imports, without the leaves of _BASE."""
    graph: dict[str, set[str]] = {}
    for file in files:
        module = module_name(file)
        own = module.split(".")[1]
        for name in imported(file.read_text(encoding="utf-8"), module, file.name == "__init__.py"):
            parts = name.split(".")
            if parts[0] != "pypkg" or any(is_below(name, each) for each in _BASE):
                continue
            if parts[1:2] not in ([], [own]):
                graph.setdefault(own, set()).add(parts[1])
    return graph


def test_packages_import_in_one_direction():
    graph = package_graph(PYTHON_FILES)
    assert "training" in graph["inference"]
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the cycle
    graph["training"].add("inference")
    with pytest.raises(graphlib.CycleError, match="inference"):
        graphlib.TopologicalSorter(graph).prepare()


def test_the_package_itself_imports_nothing():
    assert imported((PACKAGE / "__init__.py").read_text(encoding="utf-8"), "pypkg", True) <= {
        "__future__.annotations"
    }


@pytest.mark.parametrize(
    ("module", "source", "forbidden"),
    [
        ("pypkg.config.reading.parser", "import paddle.nn", "paddle.nn"),
        ("pypkg.config.reading.parser", "def f():\n    from pypkg import ops", "pypkg.ops"),
        ("pypkg.parallel.mesh", "from pypkg.models import decoder", "pypkg.models.decoder"),
        (
            "pypkg.models.decoder",
            "from pypkg.parallel import optimizer",
            "pypkg.parallel.optimizer",
        ),
        ("pypkg.models.decoder", "from pypkg.training.trainer import Trainer", "pypkg.training"),
        ("pypkg.models.architecture.families.glm", "from .llama import f", "families.llama.f"),
        ("pypkg.models.architecture.families.glm", "from pypkg import ops", "pypkg.ops"),
        ("pypkg.models.architecture.config", "import paddle", "paddle"),
        ("pypkg.ops.rms_norm", "from ..models.decoder import Decoder", "pypkg.models.decoder"),
        ("pypkg.data.loading.loader", "import paddle", "paddle"),
        ("pypkg.data.index.cache", "from pypkg.parallel import mesh", "pypkg.parallel.mesh"),
        ("pypkg.planner.memory", "from pypkg.models.decoder import Decoder", "pypkg.models"),
        ("pypkg.pretrain", "import paddle", "paddle"),
        ("pypkg.convert", "from pypkg.pretrain import main", "pypkg.pretrain.main"),
        ("pypkg.training.trainer", "from pypkg import bench", "pypkg.bench"),
        ("pypkg.training.run", "from pypkg.inference import loading", "pypkg.inference.loading"),
        ("pypkg.newcomer", "", "has no rule"),
        ("pypkg.data.newcomer.file", "", "in no room"),
        ("pypkg.data.index.cache", "from pypkg.data.datasets import build", "room above"),
        ("pypkg.models.layers.mlp", "from pypkg.models.decoder import Decoder", "room above"),
        ("pypkg.ops.dispatch.library", "from pypkg.ops.rms_norm import rms_norm", "room above"),
        ("pypkg.files.atomic", "from pypkg.console.completion import main", "completion.main"),
    ],
)
def test_the_rules_bite(module, source, forbidden):
    found = violations(source, module)
    assert found
    assert any(forbidden in each for each in found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pypkg.models.decoder", "import paddle\nfrom pypkg import ops"),
        ("pypkg.models.decoder", "from pypkg.parallel.tp_layers import column_linear"),
        ("pypkg.config.reading.parser", "import json\nfrom pypkg.errors import UserError"),
        ("pypkg.config.reading.parser", "from pypkg.config.settings import Settings"),
        ("pypkg.training.run", "import paddle\nfrom pypkg import models, data, ops"),
    ],
)
def test_the_rules_let_pass_what_they_should(module, source):
    assert violations(source, module) == []


@pytest.mark.parametrize("module", WITHOUT_PADDLE)
def test_imports_without_paddle(module):
    code = f"import sys, {module}; sys.exit('paddle' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# Standard headers have neither folder nor suffix, save these.
_STANDARD = re.compile(r"[a-z_0-9]+|omp\.h|immintrin\.h|stdlib\.h")
_CUDA = re.compile(r"cuda_?[a-z0-9_]*\.h|mma\.h|cooperative_groups\.h|cuda/[a-z_/]+")
_INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
# Folder of csrc to: folders of csrc it may include from, and what else.
_INCLUDES_OF = {
    "kernels": (("kernels",), _CUDA),
    "paddle": (("kernels", "paddle"), re.compile(r"paddle/.+|cuda_?[a-z0-9_]*\.h|dlfcn\.h")),
    "python": (("kernels", "python"),
               re.compile(r"pybind11/.+|cuda_?[a-z0-9_]*\.h|(fcntl|unistd|sys/mman|sys/stat)\.h")),
}  # fmt: skip
# The header that stands in for CUDA in tests that run kernels on a CPU.
_EMULATION = "cuda_emulation.h"
C_FILES = sorted(
    file for file in CSRC.rglob("*") if file.suffix in {".h", ".cc", ".cu", ".cuh"}
)  # fmt: skip


def include_violations(source: str, folder: str) -> list[str]:
    if folder not in _INCLUDES_OF:
        return [f"csrc/{folder} has no rule; give it one in {Path(__file__).name}"]
    own, other = _INCLUDES_OF[folder]
    return [
        f"csrc/{folder} may not include {name}"
        for quote, name in _INCLUDE.findall(source)
        if not (quote == "<" and _STANDARD.fullmatch(name))
        and not other.fullmatch(name)
        and not any((CSRC / each / name).is_file() for each in own)
        and not (folder == "kernels" and name == _EMULATION)
    ]


def test_includes():
    assert len(C_FILES) > 20
    assert [
        f"{file.name}: {problem}"
        for file in C_FILES
        for problem in include_violations(
            file.read_text(encoding="utf-8"), file.relative_to(CSRC).parts[0]
        )
    ] == []


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("kernels", '#include "paddle/extension.h"'),
        ("kernels", "#  include <torch/extension.h>"),
        ("kernels", "#include <pybind11/pybind11.h>"),
        ("kernels", '#include "tensors.h"'),
        ("paddle", "#include <pybind11/pybind11.h>"),
        ("python", '#include "paddle/phi/api/all.h"'),
        ("elsewhere", ""),
    ],
)
def test_the_include_rules_bite(folder, source):
    assert len(include_violations(source, folder)) == 1
