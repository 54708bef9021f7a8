"""One rank of test_local_output.py: runs of which each rank has an output_dir of its own.

Arguments: which runs (resuming or saving), a folder for their output, and settings of all runs.
``shared`` is the folder of a run
that shares it; ``local0`` and ``local1`` are those of the ranks of a run that does not.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import paddle
import paddle.distributed as dist
from distributed_testing import report
from paddle.distributed.fleet.base import topology
from rollback_worker import PoisonedSamples

from pypkg.config import load_settings
from pypkg.errors import UserError
from pypkg.parallel import mesh
from pypkg.training.checkpoint.writing import CheckpointWriting
from pypkg.training.run import run
from pypkg.training.start import output_dir
from pypkg.training.step.engine import Engine


class Runs:
    """The runs, one after another, in this process."""

    def __init__(self, folder: Path, common: list[str]) -> None:
        self._folder, self._common = folder, common

    def train(self, name: str, *words: str, steps: int = 6) -> int | str:
        """Exit code, or what an error says."""
        topology._HYBRID_PARALLEL_GROUP = None  # lets fleet make the groups of another mesh
        given = ["--output_dir", str(self._folder / name), "--max_steps", str(steps), *words]
        with paddle.utils.unique_name.guard():  # fleet orders parameters by name
            try:
                return run(load_settings([*self._common, *given]))
            except UserError as error:
                return str(error)

    def train_local(self, *words: str, steps: int = 6) -> int | str:
        name = f"local{mesh.launched_rank()}"
        return self.train(name, "--allow_local_output", "true", *words, steps=steps)

    def keep(self, name: str) -> None:
        """Copies what both ranks have now."""
        self.on_first(
            lambda: [
                shutil.copytree(self._folder / f"local{rank}", self._folder / f"{name}{rank}")
                for rank in range(2)
            ]
        )

    def on_first(self, change: Callable[[], object]) -> None:
        dist.barrier()
        if mesh.launched_rank() == 0:
            change()
        dist.barrier()


def damage(checkpoint: Path) -> None:
    file = next(checkpoint.glob("model-*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@contextmanager
def evaluations(*losses: float) -> Iterator[None]:
    """The first validation losses are these."""
    left, evaluate = list(losses), Engine.evaluate

    def evaluated(engine: Engine, batches: Iterable) -> float:
        loss = evaluate(engine, batches)
        return left.pop(0) if left else loss

    Engine.evaluate = evaluated
    try:
        yield
    finally:
        Engine.evaluate = evaluate


@contextmanager
def folder_that_vanishes(folder: Path, name: str) -> Iterator[None]:
    """``folder`` goes on rank 1 when the method ``name`` of the checkpoint of step 4 is called."""
    method = getattr(CheckpointWriting, name)

    def called(writing: CheckpointWriting, *given: object) -> object:
        if mesh.launched_rank() == 1 and writing.folder.name == "checkpoint-4":
            shutil.rmtree(folder)
        return method(writing, *given)

    setattr(CheckpointWriting, name, called)
    try:
        yield
    finally:
        setattr(CheckpointWriting, name, method)


def saving(runs: Runs, folder: Path) -> None:
    """Saves beside training; the first of three checkpoints is the best; folders that vanish."""
    best = ["--do_eval", "true", "--eval_steps", "2", "--load_best_model_at_end", "true"]
    beside = ["--use_async_save", "true"]
    said: dict[str, int | str] = {}
    with evaluations(1.0, 2.0, 3.0):
        said["shared"] = runs.train("shared", *best)
    with evaluations(1.0, 2.0, 3.0):
        said["beside"] = runs.train_local(*best, *beside)
    runs.keep("beside")
    for name, words, method in (
        ("before", [], "_hand_over"),
        ("within", [], "finish"),
        ("written beside", beside, "finish"),
        ("beside before", beside, "_hand_over"),
    ):
        runs.on_first(lambda: [shutil.rmtree(each) for each in folder.glob("local*")])
        with folder_that_vanishes(folder / "local1", method):
            said[name] = runs.train_local("--do_eval", "false", *words)
        runs.on_first(lambda name=name: (folder / "local0").rename(folder / f"{name} 0"))
    report(said)


def resuming(runs: Runs, folder: Path) -> None:
    other = folder / "local1"
    said: dict[str, int | str] = {}
    said["shared"] = runs.train("shared")
    said["local"] = runs.train_local()
    runs.keep("first")
    runs.on_first(lambda: damage(other / "checkpoint-6"))
    said["damaged"] = runs.train_local()
    runs.keep("damaged")
    runs.on_first(lambda: shutil.rmtree(other / "checkpoint-6"))
    said["missing"] = runs.train_local()
    runs.keep("missing")
    said["refused"] = runs.train(f"local{mesh.launched_rank()}")
    said["tensor"] = runs.train_local("--tensor_parallel_degree", "2", steps=8)
    runs.keep("tensor")
    runs.on_first(lambda: other.rename(folder / "away"))
    said["lost"] = runs.train_local(steps=8)
    runs.on_first(lambda: [shutil.rmtree(folder / f"local{rank}") for rank in range(2)])
    with PoisonedSamples():
        said["rollback"] = runs.train_local()
    said["further"] = runs.train("shared", steps=8)
    report(said)


def main(which: str, folder: Path, *common: str) -> None:
    output_dir._SECONDS_TO_APPEAR = 0.2
    run_all = {"resuming": resuming, "saving": saving}[which]
    run_all(Runs(folder, list(common)), folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
