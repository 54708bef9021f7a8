"""A model that saves beside training; as a script, a process that is killed meanwhile."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import paddle
from tiny_configs import tiny

from pypkg.models import from_config
from pypkg.parallel import mesh
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.training.checkpoint.checkpointer import Checkpointer
from pypkg.training.state import TrainerState


class Order:
    def record(self, state: TrainerState) -> None:
        state.data_order = {"kind": "run"}


class Run:
    """A model that is trained, and what saves it."""

    def __init__(self, folder: Path, memory: int | None = 1 << 30) -> None:
        self.layer = from_config(tiny("llama"), seed=1)
        self._model, self.updater = distribute(self.layer, UpdateOptions(), mesh.current())
        self.state = TrainerState()
        self.checkpointer = Checkpointer(
            folder, self.layer, self.updater, Order(),
            tokenizer_files=[], settings_json="{}", keep=1, async_memory=memory,
        )  # fmt: skip

    def step(self) -> None:
        ids = paddle.arange(8, 24).reshape([2, 8])
        self._model.forward_backward([{"input_ids": ids, "labels": ids}], self.updater.scale)
        self.updater.step(1e-2)
        self.state.global_step += 1

    def values(self) -> dict[str, Any]:
        return {name: p.numpy() for name, p in self.layer.named_parameters()}

    def pause_writer(self) -> int:
        """Stops the process that writes; returns its number."""
        self.checkpointer.poll()  # which starts it
        number = self.checkpointer._writer._process.pid
        os.kill(number, signal.SIGSTOP)
        return number


def main(folder: Path) -> None:
    run = Run(folder)
    for _ in range(2):
        run.step()
        run.checkpointer.wait()
        if run.state.global_step == 2:
            print(run.pause_writer(), flush=True)
        run.checkpointer.save(run.state)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
