"""A small checkpoint with every kind of file, and ways to damage one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle

from pypkg.models.weights.formats.safetensors import TensorSpec
from pypkg.models.weights.model_folder import write_model_folder
from pypkg.models.weights.save_plan import SavePlan
from pypkg.parallel import mesh
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.parallel.optimizer.updater import Updater
from pypkg.training.checkpoint.writing import CheckpointWriting, optimizer_tensors
from pypkg.training.state import TrainerState

KINDS = (
    "model.safetensors", "optimizer.safetensors", "trainer_state.json", "settings.json",
    "config.json", "manifest.json", "tokenizer.json", "extra/notes.txt",
)  # fmt: skip


def updater_of(model: paddle.nn.Layer) -> Updater:
    """After one step, so that there is state."""
    _, updater = distribute(model, UpdateOptions(weight_decay=0.1), mesh.current())
    model(paddle.ones([2, model.parameters()[0].shape[0]])).sum().backward()
    updater.step(0.1)
    return updater


def save_model(folder: Path, seed: int = 0) -> None:
    """Weights, configuration and tokenizer as a run saves them, and a folder of another tool."""
    weights = np.random.default_rng(seed).normal(size=(64, 64)).astype(np.float32)
    spec = {"embed_tokens.weight": TensorSpec("float32", weights.shape)}
    config = {"model_type": "llama", "hidden_size": 64}
    write_model_folder(folder, config, spec, [("embed_tokens.weight", weights)])
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("kept as well")


def save(output_dir: Path, step: int, keep: int | None = None) -> Path:
    return CheckpointWriting(
        output_dir,
        TrainerState(step, 4 * step, 64 * step, data_order={"seed": step}),
        plan=SavePlan([optimizer_tensors(updater_of(paddle.nn.Linear(8, 8)))]),
        add_files=lambda folder: save_model(folder, step),
        settings_json='{"max_steps": 100}',
        keep=keep,
    ).finish()


def as_of_an_earlier_version(checkpoint: Path) -> Path:
    """Without a manifest, and without what says that there was one."""
    (checkpoint / "manifest.json").unlink()
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["manifest"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    return checkpoint


def flip(path: Path, random: np.random.Generator) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[random.integers(len(data))] ^= 1 << random.integers(8)
    path.write_bytes(data)


def truncate(path: Path, random: np.random.Generator) -> None:
    """Leaves a part of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: random.integers(len(data))])


def zero(path: Path, random: np.random.Generator) -> None:
    """Puts zeros in place of a block, as a file system does that has lost it."""
    data = bytearray(path.read_bytes())
    first = int(random.integers(len(data)))
    end = min(len(data), first + 4096)
    data[first:end] = bytes(end - first)
    path.write_bytes(data)


def remove(path: Path, random: np.random.Generator) -> None:
    path.unlink()


DAMAGES: tuple[Callable[[Path, np.random.Generator], None], ...] = (flip, truncate, zero)
