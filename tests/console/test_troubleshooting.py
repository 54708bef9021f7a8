"""Each error names its section of docs/guides/troubleshooting.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pypkg import supervise
from pypkg.config.reading.parser import load_settings
from pypkg.console.command_line import exit_code
from pypkg.console.message_kinds import KINDS
from pypkg.console.troubleshooting import PAGE, anchor_of, error_text, kinds_of, page
from pypkg.data.corpus.files import open_corpus_files
from pypkg.data.datasets.blend import parse_blend
from pypkg.data.datasets.build import resolve_input_dir
from pypkg.data.optional_packages import require as require_package
from pypkg.data.tokenizers.load import load_tokenizer
from pypkg.errors import UserError
from pypkg.files import file_handles, write_file
from pypkg.files.json_files import read_json
from pypkg.models.architecture.registry import config_from_huggingface, load_config
from pypkg.models.weights.formats.safetensors import read_safetensors
from pypkg.models.weights.formats.tensor_files import TensorFiles, read_file_shards
from pypkg.parallel.launch.launcher import take_nproc
from pypkg.report.collect import check_is_run
from pypkg.training.checkpoint.lock import OutputLock, refuse_if_in_use
from pypkg.training.checkpoint.manifest import MANIFEST_FILE
from pypkg.training.checkpoint.merge import merge
from pypkg.training.reporting.reporters import read_metrics

REPO = Path(__file__).resolve().parents[2]
# Share of the places in the code that raise a UserError with a text of their own whose text belongs
# to a section. The others hand on what another message says, or belong to a single tool.
LEAST_SHARE = 0.9


def anchors(message: str) -> list[str]:
    return [anchor_of(kind) for kind in kinds_of(message)]


def test_the_page_is_made_from_the_kinds() -> None:
    """Else: python -m pypkg.console.troubleshooting > docs/guides/troubleshooting.md"""
    assert (REPO / PAGE).read_text(encoding="utf-8") == page()


def test_every_anchor_is_a_heading_of_its_own() -> None:
    headings = re.findall(r"^## (.+)$", page(), re.M)
    assert len({anchor_of(kind) for kind in KINDS}) == len(KINDS) > 25
    assert headings == [kind.title for kind in KINDS]
    assert all(re.fullmatch(r"[a-z0-9_-]+", anchor_of(kind)) for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=anchor_of)
def test_an_example_belongs_to_its_section(kind) -> None:
    assert kinds_of(kind.example) == [kind]


def file_with(folder: Path, name: str, text: str = "") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def start_twice(folder: Path) -> None:
    lock = OutputLock(folder)
    try:
        refuse_if_in_use(folder)
    finally:
        lock.release()


def open_damaged_corpus(folder: Path) -> None:
    file_with(folder, "a.bin", "ab")
    file_with(folder, "a.idx", "damaged")
    open_corpus_files(str(folder / "a"))


RAISING: dict[str, Callable[[Path], object]] = {
    "unknown-setting": lambda folder: load_settings(["--max_stepz", "3"]),
    "settings-file": lambda folder: load_settings([str(file_with(folder, "run.json", "{,}"))]),
    "layout-and-number-of-processes": lambda folder: load_settings(
        ["--sharding_parallel_degree", "2"]
    ),
    "output_dir-in-use": start_twice,
    "no-run-or-checkpoint": check_is_run,
    "record-of-another-version": lambda folder: read_metrics(
        file_with(folder, "metrics.jsonl", "[]\n")
    ),
    "processes-do-not-meet": lambda folder: take_nproc(["--nproc", "0"]),
    "no-data": lambda folder: resolve_input_dir(str(folder)),
    "corpus-damaged": open_damaged_corpus,
    "launch-line-of-supervise": lambda folder: supervise._output_dir(["ls"]),
    "checkpoint-damaged": lambda folder: merge([file_with(folder, MANIFEST_FILE).parent], folder),
    "blend-of-corpora": lambda folder: parse_blend(["0.3", "a", "0.7"]),
    "tokenizer": lambda folder: load_tokenizer(folder),
    "model-not-found": lambda folder: load_config("no-such-model"),
    "model-not-supported": lambda folder: config_from_huggingface(
        {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    ),
    "weights-do-not-fit": lambda folder: read_file_shards(
        file_with(folder, "model.safetensors.index.json", '{"weight_map": {"w": "absent"}}')
    ),
    "weight-file-damaged": lambda folder: read_safetensors(
        file_with(folder, "model.safetensors", "short")
    ),
    "config-of-the-model": lambda folder: config_from_huggingface(
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    ),
    "package-not-installed": lambda folder: require_package("no_such_module", "absent", "a file"),
    "limit-of-the-system": lambda folder: file_handles.require(10**9, "the corpora"),
    "file-cannot-be-written": lambda folder: write_file(
        file_with(folder, "file") / "below", b"text"
    ),
    "file-cannot-be-read": lambda folder: read_json(folder / "absent.json"),
    "value-not-possible": lambda folder: load_settings(["--split", "a"]),
    "settings-that-do-not-go-together": lambda folder: load_settings(["--fp16", "--bf16"]),
}


@pytest.mark.parametrize("anchor", RAISING)
def test_the_message_of_the_code_belongs_to_its_section(anchor: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        RAISING[anchor](tmp_path)
    assert anchors(str(caught.value)) == [anchor]


def test_what_is_missing_is_no_misfit(tmp_path: Path) -> None:
    """A folder without weights; a setting without the other one that it needs."""
    with pytest.raises(UserError) as caught:
        TensorFiles(tmp_path)
    assert anchors(str(caught.value)) == ["model-not-found"]
    paths = ("model_name_or_path", "input_dir", "output_dir")
    required = ["--max_steps", "9", *(word for name in paths for word in (f"--{name}", "some"))]
    with pytest.raises(UserError, match="lr_wsd_decay_steps is not set") as caught:
        load_settings([*required, "--lr_scheduler_type", "warmup_stable_decay"])
    assert anchors(str(caught.value)) == ["settings-that-do-not-go-together"]


def test_a_list_of_problems_names_the_section_of_each() -> None:
    with pytest.raises(UserError) as caught:
        load_settings(["--max_stepz", "3", "--split", "a", "--sedd", "4"])
    for message in (str(caught.value), f"rank 1 (host b) failed: {caught.value}"):
        assert set(anchors(message)) == {"unknown-setting", "value-not-possible"}


def test_a_message_of_no_kind_is_printed_alone() -> None:
    assert error_text("something else happened") == "error: something else happened"


def test_command_lines_print_the_section(capsys) -> None:
    def fail() -> int:
        raise UserError("unknown setting 'a' on the command line")

    assert exit_code(fail, "") == 2
    error = "error: unknown setting 'a' on the command line"
    assert capsys.readouterr().err == f"{error}\nsee {PAGE}#unknown-setting\n"


def text_of(node: ast.expr) -> str:
    """The text of a message, with "1" for each value in it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "1"


def messages_of(source: str) -> list[str]:
    """The texts of all UserErrors that ``source`` makes; one without words hands on another."""
    found = [
        text_of(node.args[0])
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        and node.func.id == "UserError" and node.args
    ]  # fmt: skip
    return [text for text in found if re.search(r"[a-z]{3}", text)]


def test_most_messages_of_the_code_have_a_section() -> None:
    sources = [file.read_text(encoding="utf-8") for file in (REPO / "pypkg").rglob("*.py")]
    messages = [
        each for source in sources if "UserError(" in source for each in messages_of(source)
    ]
    without = [each for each in messages if not kinds_of(each)]
    assert len(messages) > 300
    assert {kind.title for each in messages for kind in kinds_of(each)} == {
        kind.title for kind in KINDS
    }
    assert len(without) <= (1 - LEAST_SHARE) * len(messages), without


def test_messages_are_found_in_a_source() -> None:
    source = "raise UserError(f'{a} is {b}; expected c')\nx = UserError(str(error))"
    assert messages_of(source) == ["1 is 1; expected c"]
