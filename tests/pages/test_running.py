"""The commands and Python blocks of the pages run as they are written, on tiny models and data."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import forked
import numpy as np
import pytest
from page_blocks import REPO, Block, blocks
from safetensors.numpy import load_file
from sat_writing import write_ranks

GOLDEN = REPO / "tests/golden"
PADDLENLP_RUN = GOLDEN / "paddlenlp/run"
TRAIN_BLOCK = "# Text to data/corpus.bin"  # of README.md; a script, which has a test of its own
QUICKSTART = "quickstart"  # its blocks are one script, which has a test of its own
OWN_TESTS = (QUICKSTART, "several_machines")  # the latter in test_several_machines.py
CONTINUED = "Qwen/Qwen2.5-0.5B"
LARGEST_ID = 300

# Beginning of a command or Python block: why no test of this file runs it.
NOT_RUN = {
    "make ": "the targets install, check or measure the whole repository; .ci/run runs them",
    "pip install": "fetches packages; continuous integration installs the wheel",
    "python -m pypkg.pretrain CONFIG.json '[--key'": "a synopsis with brackets",
    "python -m paddle.distributed.launch --gpus": "needs eight GPUs",
    "python -m paddle.distributed.launch --nnodes": "needs hosts with GPUs; tests/several_hosts "
    "runs the same line over hosts made of network namespaces, on CPUs",
    "pypkg convert import Qwen/": "downloads a model",
    "pypkg checkpoint merge machine0": "needs the parts of two machines, which "
    "distributed/runs/test_local_output.py makes and merges",
    "import lm_eval": "needs lm-eval, which inference/test_lm_eval.py runs where it is installed",
    "torch.save(": "needs torch, which the package does not; it repairs a file of torch alone",
}


def not_run(text: str) -> bool:
    return any(text.startswith(start) for start in NOT_RUN)


def runnable(block: Block) -> list[str]:
    """The command lines of a block that run here, or its Python text."""
    if block.text.startswith(TRAIN_BLOCK) or block.page in OWN_TESTS:
        return []
    texts = [block.text] if block.language == "python" else block.commands
    return [text for text in texts if not not_run(text)]


class Place:
    """A folder with what the pages name, and programs of this checkout to run lines in it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self._destinations = 0

    def run(self, text: str, language: str) -> None:
        """Runs a command line or a Python block.

        DST stands for a new folder each time. Commands of one process are forked; those that
        start ranks or other programs are started as in a shell.
        """
        if language == "python":
            (self.folder / "block.py").write_text(text, encoding="utf-8")
            self._fork(["block.py"])
            return
        if "DST" in text:
            self._destinations += 1
            text = text.replace("DST", f"DST{self._destinations}")
        words = shlex.split(text)
        module = ["-m", *words] if words[0] == "pypkg" else words[1:]
        alone = ("pretrain", "convert", "checkpoint", "generate", "evaluate", "report",
                 "compare-losses")  # fmt: skip
        command = words[1] if words[0] == "pypkg" else module[1].removeprefix("pypkg.")
        if command in alone and "--nproc" not in words:
            self._fork(module)
        else:
            self.shell(text)

    def _fork(self, arguments: list[str]) -> None:
        done = forked.run(arguments, environment=self.environment, timeout=60, cwd=self.folder)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"

    def shell(self, script: str, limit: float = 100) -> None:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=limit,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"

    def edit(self, name: str, **changes: object) -> None:
        """Changes keys of a JSON file."""
        file = self.folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")

    def remove(self, *names: str) -> None:
        for name in names:
            shutil.rmtree(self.folder / name)


def after_training(place: Place) -> None:
    """checkpoints/ of run.json, at its last step."""
    place.run("pypkg pretrain run.json", "bash")


def with_notes(place: Place) -> None:
    (place.folder / "notes.txt").write_text("w1 w2 w3\n", encoding="utf-8")


def with_two_runs(place: Place) -> None:
    """checkpoints/ and four/, as README.md names them."""
    after_training(place)
    shutil.copytree(place.folder / "checkpoints", place.folder / "four")


def with_weights(place: Place) -> None:
    """Weights under the names that docs/weights.md gives to folders."""
    for name in ("FOLDER", "SRC"):
        (place.folder / name).symlink_to(GOLDEN / "llama")
    (place.folder / "bloom-560m").symlink_to(GOLDEN / "bloom")
    write_ranks(place.folder / "glm-130b-sat", load_file(GOLDEN / "glm130b/model.safetensors"), 2)
    (place.folder / "THUDM/glm-130b").mkdir(parents=True)
    shutil.copy(GOLDEN / "glm130b/config.json", place.folder / "THUDM/glm-130b")


def with_a_model_of_the_hub(place: Place) -> None:
    """A tiny Qwen2 with the tokenizer of the template, and continue.json of the page, cut down."""
    shutil.copytree(GOLDEN / "qwen2", place.folder / CONTINUED)
    shutil.copytree(place.folder / "tokenizer", place.folder / CONTINUED, dirs_exist_ok=True)
    (text,) = (block.text for block in blocks() if "cat > continue.json" in block.text)
    written = text.partition("<<'END'\n")[2].partition("END\n")[0]
    (place.folder / "continue.json").write_text(written, encoding="utf-8")
    place.edit("continue.json", max_seq_length=16, gradient_accumulation_steps=1, num_threads=1)


def with_a_run_of_paddlenlp(place: Place) -> None:
    """PADDLENLP_OUTPUT, its data, and its settings as run.json (golden/paddlenlp/ORIGIN.md)."""
    place.remove("data", "model")
    (place.folder / "data").mkdir()
    for name in ("corpus.bin", "corpus.idx"):
        shutil.copy(PADDLENLP_RUN / name, place.folder / "data")
    (place.folder / "model").symlink_to(PADDLENLP_RUN / "start")
    (place.folder / "PADDLENLP_OUTPUT").symlink_to(PADDLENLP_RUN / "plain")
    place.edit(
        "run.json", max_seq_length=32, per_device_train_batch_size=2, max_steps=10, save_steps=5,
        gradient_accumulation_steps=2, split="949,50,1", tokenizer_name_or_path=None, do_eval=False,
    )  # fmt: skip


class Step(NamedTuple):
    """A block of a page: what precedes it, and what has to exist after it."""

    made: tuple[str, ...] = ()
    before: Callable[[Place], None] = lambda place: None


TRAINED = ("checkpoints/checkpoint-100/manifest.json",)
# Blocks that run, by page and beginning, in the order of the page.
STEPS = {
    "README": {
        "pypkg pretrain run.json --max_steps": Step(
            (
                "checkpoints/checkpoint-200/manifest.json",
                "four/checkpoint-100/manifest.json",
                "gpus/checkpoint-100/manifest.json",
            ),
            after_training,
        ),
    },
    "continuing_a_model": {
        "pypkg convert inspect": Step(before=with_a_model_of_the_hub),
        "pypkg preprocess": Step(("new/corpus.bin",)),
        "pypkg evaluate": Step(("before.json",)),
        "pypkg pretrain": Step(("continued/checkpoint-200/manifest.json",)),
        "pypkg evaluate continued": Step(("after.json", "exported/config.json")),
    },
    "data": {
        "python -m pypkg.preprocess --input_path": Step(
            ("data/corpus.bin", "data/corpus.manifest.json"), lambda place: place.remove("data")
        ),
        "python -m pypkg.preprocess inspect": Step(),
        "python -m pypkg.pretrain config.json": Step(TRAINED),
        "from pypkg.data import": Step(("data/index-cache",)),
    },
    "evaluation_and_generation": {
        "pypkg generate checkpoints": Step(before=after_training),
        "from pypkg.models import": Step(before=with_weights),
        "pypkg evaluate checkpoints --data data/corpus --window": Step(
            ("losses.json",), with_notes
        ),
        "pypkg evaluate checkpoints --data data/corpus --nproc": Step(),
    },
    "migrating_from_paddlenlp": {
        "pypkg convert inspect": Step(("llama/config.json", "llama-paddlenlp/config.json")),
        "pypkg pretrain run.json --resume_from_checkpoint": Step(
            ("checkpoints/checkpoint-10/manifest.json",), with_a_run_of_paddlenlp
        ),
    },
    "parallelism": {
        "python -m pypkg.pretrain CONFIG.json --nproc": Step(TRAINED),
        "pypkg plan": Step(),
    },
    "performance": {
        "pypkg plan": Step(),
        "pypkg pretrain run.json --skip_profile_timer": Step(("timed/checkpoint-30",)),
        "pypkg pretrain run.json --profiler_options": Step(("profiled/profile/rank0.trace.json",)),
    },
    "report": {
        "pypkg report checkpoints": Step(("page.html",), with_two_runs),
        "pypkg compare-losses checkpoints four": Step(),
        "pypkg pretrain run.json --profiler_options": Step(
            ("checkpoints/profile/rank0.trace.json",), lambda place: place.remove("checkpoints")
        ),
    },
    "training": {
        "pypkg checkpoint verify": Step(before=after_training),
        "pypkg supervise -- pypkg": Step(TRAINED, lambda place: place.remove("checkpoints")),
    },
    "weights": {
        "from pypkg.models import": Step(("out/config.json",), with_weights),
        "python -m pypkg.convert import glm-130b-sat": Step(("glm-130b/config.json",)),
        "python -m pypkg.convert inspect": Step(tuple(f"DST{n}/config.json" for n in range(1, 5))),
    },
    "debugging_a_loss": {
        "pypkg pretrain run.json --max_steps 20": Step(("checkpoints/report.html",)),
        "pypkg preprocess inspect": Step(),
        "pypkg pretrain run.json --max_steps 40 --loss_spike": Step(),
        "pypkg evaluate checkpoints --data data/corpus": Step(),
        "pypkg pretrain run.json --max_steps 40 --logging_steps 1 --output_dir again": Step(
            ("again/metrics.jsonl", "once-more/metrics.jsonl")
        ),
        "pypkg pretrain run.json --max_steps 40 --logging_steps 1 --output_dir tensor": Step(),
    },
}


def test_every_block_is_run_or_listed():
    found = [(block.page, texts[0]) for block in blocks() if (texts := runnable(block))]
    listed = [(page, start) for page in sorted(STEPS) for start in STEPS[page]]
    found.sort(key=lambda each: each[0])  # the blocks of a page stay in their order
    assert [page for page, _ in found] == [page for page, _ in listed]
    for (_, text), (_, start) in zip(found, listed):
        assert text.startswith(start)


def test_every_reason_not_to_run_has_a_command():
    texts = [text for block in blocks() for text in (block.text, *block.commands)]
    for start in NOT_RUN:
        assert any(text.startswith(start) for text in texts), start


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose ``pypkg`` and ``python`` are those of this checkout."""
    programs = tmp_path_factory.mktemp("bin")
    for name, arguments in (("python", ""), ("pypkg", "-m pypkg ")):
        file = programs / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n', encoding="utf-8")
        file.chmod(0o755)
    hidden = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYPKG_NUM_THREADS")
    return {
        **{name: value for name, value in os.environ.items() if name not in hidden},
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """Text, tokenizer, data, model and settings, under the names that the pages use."""
    folder = tmp_path_factory.mktemp("template")
    words = np.random.default_rng(0).integers(0, 50, (1200, 30))
    (folder / "corpus").mkdir()
    lines = [json.dumps({"text": " ".join(f"w{word}" for word in row)}) for row in words]
    (folder / "corpus/text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    Place(folder, environment).shell(
        f"pypkg preprocess --input_path corpus --append_eos --train_tokenizer {LARGEST_ID} "
        "--tokenizer_name_or_path tokenizer --output_prefix data/corpus --workers 1"
    )
    shutil.copytree(folder / "tokenizer", folder / "my-tokenizer")
    (folder / "model").mkdir()
    model = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 32,
    }  # fmt: skip
    (folder / "model/config.json").write_text(json.dumps(model), encoding="utf-8")
    run = {
        "model_name_or_path": "model", "tokenizer_name_or_path": "tokenizer",
        "input_dir": "data", "output_dir": "checkpoints", "split": "90,10,0",
        "max_seq_length": 16, "per_device_train_batch_size": 1, "max_steps": 100,
        "learning_rate": 3e-3, "save_steps": 50, "do_train": True, "do_eval": True,
        "num_threads": 1,
    }  # fmt: skip
    for name in ("run.json", "config.json", "CONFIG.json"):
        (folder / name).write_text(json.dumps(run), encoding="utf-8")
    for name in ("run_pretrain.py", "tests", "configs"):
        (folder / name).symlink_to(REPO / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", STEPS)
def test_the_blocks_of_a_page_run_in_their_order(
    page: str, template: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    folder = shutil.copytree(template, tmp_path / "place", symlinks=True)
    place, steps = Place(folder, environment), iter(STEPS[page].values())
    for block in blocks():
        if block.page == page and (texts := runnable(block)):
            step = next(steps)
            step.before(place)
            for text in texts:
                place.run(text, block.language)
            missing = [name for name in step.made if not (folder / name).exists()]
            assert not missing, f"{texts} made no {missing}"


@pytest.mark.slow
def test_the_training_block_trains_from_an_empty_folder(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    (block,) = (each.text for each in blocks() if each.text.startswith(TRAIN_BLOCK))
    Place(tmp_path, environment).shell(block, limit=500)
    lines = (tmp_path / "checkpoints/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert losses[0] > 6 and losses[-1] < losses[0] - 1.5


@pytest.mark.slow
def test_the_quickstart_goes_from_an_empty_folder_to_a_model(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    script = "".join(block.text for block in blocks() if block.page == QUICKSTART)
    Place(tmp_path, environment).shell(script, limit=500)
    lines = (tmp_path / "checkpoints/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert losses[-1] < losses[0] - 1
    for made in ("checkpoints/report.html", "held_out.json", "my-model/model.safetensors"):
        assert (tmp_path / made).is_file()
