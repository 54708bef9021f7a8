"""A corpus, a tiny model and the command line, for tests that train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import forked
import numpy as np

from pypkg.config import Settings
from pypkg.data import IndexedDatasetWriter
from pypkg.training.healing.healer import Healer
from pypkg.training.state import TrainerState

ROOT = Path(__file__).resolve().parents[3]
VOCAB_SIZE = 64


class Clock:
    """In place of a clock of ``time``, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class NoWayBack:
    """What a ``Healer`` takes as checkpointer and samples, for runs that never go back."""

    def reload(self, checkpoint: Path) -> TrainerState:
        raise AssertionError(f"{checkpoint} is gone back to")

    def documents(self, first: int, stop: int) -> dict[str, list[int]]:
        return {"corpus": list(range(first, stop))}


def healer(settings: Settings, state: TrainerState) -> Healer:
    return Healer(settings, state, checkpointer=NoWayBack(), samples=NoWayBack(), start=None)


@dataclass
class Workplace:
    """Folders of one run, and its command line."""

    folder: Path
    output: str = "out"

    @property
    def output_dir(self) -> Path:
        return self.folder / self.output

    def command(self, **settings: object) -> list[str]:
        given = {
            "model_name_or_path": self.folder / "model",
            "input_dir": self.folder / "data",
            "output_dir": self.output_dir,
            "split": "80,20,0",
            "max_seq_length": 16,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "per_device_eval_batch_size": 2,
            "learning_rate": 0.01,
            "min_learning_rate": 0.001,
            "warmup_steps": 2,
            "max_steps": 12,
            "logging_steps": 1,
            "eval_steps": 6,
            "eval_iters": 2,
            "save_steps": 4,
            "do_train": True,
            "do_eval": True,
            "num_threads": 1,
        } | settings
        words = [w for k, v in given.items() for w in (f"--{k}", str(v))]
        return [sys.executable, "-m", "pypkg.pretrain", *words]

    def run(self, **settings: object) -> subprocess.CompletedProcess:
        """The command line in a forked process (`forked.py`)."""
        arguments = self.command(**settings)[1:]
        return forked.run(arguments, environment=environment(), timeout=120)

    def execute(self, command: list[str], **options: object) -> subprocess.CompletedProcess:
        """``command`` in a process that an interpreter starts, as users start it."""
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment(),
            **options,
        )  # fmt: skip

    def losses(self, name: str = "loss") -> dict[int, float]:
        rows = map(json.loads, (self.output_dir / "metrics.jsonl").read_text().splitlines())
        return {row["global_step"]: row[name] for row in rows if name in row}

    def steps(self) -> list[int]:
        return sorted(int(f.name.split("-")[1]) for f in self.output_dir.glob("checkpoint-*"))


class SavesAtOnce:
    """What a checkpointer does besides saving, where a checkpoint is complete at once."""

    def poll(self) -> None:
        pass

    def wait(self) -> None:
        pass


def environment() -> dict[str, str]:
    """This process's environment without what importing Paddle here has put into it."""
    hidden = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYPKG_NUM_THREADS")
    return {k: v for k, v in os.environ.items() if k not in hidden}


def write_corpus(prefix: Path, documents: list[np.ndarray], dtype: str = "uint16") -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
        writer.commit()


def write_model(folder: Path, **changes: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-6,
    } | changes
    (folder / "config.json").write_text(json.dumps(config))


def counting_documents(number: int = 60) -> list[np.ndarray]:
    """Documents that count upwards from a random start: something that a model can learn."""
    rng = np.random.default_rng(0)
    return [
        (np.arange(rng.integers(10, 60)) + rng.integers(0, VOCAB_SIZE)) % VOCAB_SIZE
        for _ in range(number)
    ]


def small_workplace(folder: Path) -> Workplace:
    """A workplace in ``folder`` with the corpus of ``counting_documents`` and a tiny model."""
    write_corpus(folder / "data" / "corpus", counting_documents())
    write_model(folder / "model")
    return Workplace(folder)
