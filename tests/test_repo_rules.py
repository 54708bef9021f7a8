"""What no file of the repository may hold, and how long files and functions may grow."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FOLDERS = (".ci", ".github", "cmake", "configs", "csrc", "docs", "pypkg", "tests", "tools")
BINARY = {
    *(".safetensors", ".so", ".bin", ".idx", ".npy", ".npz", ".png", ".pyc"),
    *(".pdparams", ".pdopt"),
}

FILE_LINES = 400
KERNEL_LINES = 600
FUNCTION_LINES = 60
LONGER_FUNCTIONS = {"pypkg/training/trainer.py": 120}
FOLDER_FILES = 13
# Pages and data, one thing a file; a module for each family, a file for each operator.
LARGER_FOLDERS = {
    *(".", "configs/models", "docs", "docs/benchmarks"),
    "tests/golden/paddlenlp_configs",
    "pypkg/models/architecture/families",
}

# Each pattern is written so that it does not match itself.
FORBIDDEN = {
    "a path on a developer's machine": re.compile(r"(?<![\w.])/(?:home|Users|root|work)/[\w.-]"),
    "a folder beside the repository": re.compile(r"\.\./share[d]\b"),
    "the address of a package registry or a mirror": re.compile(
        r"https?://[^\s\"')>]*(?:pyp[i]|/simple\b|mirro[r]|artifactor[y]|/packages/stabl[e])"
        r"|https?://\d+\.\d+\.\d+\.\d+"
    ),
    "a reference to a tracker that readers do not have": re.compile(r"\bissue\s+#?\d", re.I),
    "a term of our own: say heartbeat, every rank, separator": re.compile(
        r"\bsigns? of lif[e]\b|\broll cal[l]\b|\bwhoeve[r]\b|\bwhat stand[s]\b", re.I
    ),
    "work left undone": re.compile(r"\b(?:TOD[O]|FIXM[E]|XX[X])\b"),
}


def text_files() -> list[Path]:
    files = [file for file in REPO.iterdir() if file.is_file()]
    files += [file for folder in FOLDERS for file in (REPO / folder).rglob("*") if file.is_file()]
    left_out = {"_lib", "__pycache__"}
    return sorted(
        file
        for file in files
        if file.suffix not in BINARY and left_out.isdisjoint(file.relative_to(REPO).parts)
    )


FILES = text_files()
SOURCES = [f for f in FILES if f.suffix in {".py", ".h", ".cc", ".cu", ".cuh"}]
PYTHON = [f for f in FILES if f.suffix == ".py"]


def name(file: Path) -> str:
    return str(file.relative_to(REPO))


def forbidden_in(text: str) -> list[str]:
    return [
        f"line {number}: {what}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), start=1)
        for what, pattern in FORBIDDEN.items()
        if pattern.search(line)
    ]


def test_nothing_forbidden():
    found = {name(file): forbidden_in(file.read_text(encoding="utf-8")) for file in FILES}
    assert len(found) > 100
    assert {file: lines for file, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "/ho" "me/ada/data",
        "cd /wo" "rk/project",
        "see ../sha" "red/notes.md",
        "--index" "-url https://py" "pi.org/simple",
        "http://10.0." "0.1:8080/",
        "fixes issue" " #12",
        "# TO" "DO: later",
        "waits for a sign of li" "fe",
        "who" "ever has it",
    ],
)  # fmt: skip
def test_the_patterns_find_what_they_should(line):
    assert len(forbidden_in(line)) == 1


@pytest.mark.parametrize(
    "line", ["https://github.com/PaddlePaddle/Paddle", "open an issue", "/usr/bin/env", "TODOS"]
)
def test_the_patterns_let_pass_what_they_should(line):
    assert forbidden_in(line) == []


def test_file_length():
    """A file beyond its limit has a second idea in it, which wants a room of its own."""
    lengths = {name(file): len(file.read_text(encoding="utf-8").splitlines()) for file in SOURCES}
    assert {
        file: lines
        for file, lines in lengths.items()
        if lines > (KERNEL_LINES if file.startswith("csrc/kernels/") else FILE_LINES)
    } == {}


def folder_sizes(files: Iterable[Path]) -> Counter[str]:
    """Number of files directly in each folder, by its path from the root of the repository."""
    return Counter(file.relative_to(REPO).parent.as_posix() for file in files)


def test_folder_size():
    """A folder beyond the limit has a second idea in it; tests/README.md says where tests go."""
    sizes = folder_sizes(FILES)
    assert sizes["tests/ops"] > 5
    larger = {folder for folder, count in sizes.items() if count > FOLDER_FILES}
    assert larger == LARGER_FOLDERS


def test_rooms_say_what_lives_there():
    """Every folder of the package is a package, and its __init__ has a docstring."""
    folders = {file.parent for file in PYTHON if name(file).startswith("pypkg/")}
    assert len(folders) > 30
    assert [
        folder
        for folder in sorted(folders)
        if not (folder / "__init__.py").is_file()
        or not ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    ] == []


def function_lengths(source: str) -> dict[str, int]:
    """Lines of each function without its docstring, which may be as long as it has to."""
    lengths = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            lengths[node.name] = max(lines, lengths.get(node.name, 0))
    return lengths


def test_function_length():
    assert {
        f"{name(file)}: {function}": lines
        for file in PYTHON
        for function, lines in function_lengths(file.read_text(encoding="utf-8")).items()
        if lines > LONGER_FUNCTIONS.get(name(file), FUNCTION_LINES)
    } == {}


def test_function_length_leaves_out_the_docstring():
    source = 'def f():\n    """One.\n\n    Two.\n    """\n    return 1\n\ndef g():\n    pass\n'
    assert function_lengths(source) == {"f": 2, "g": 2}
