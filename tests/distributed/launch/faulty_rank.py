"""pypkg.pretrain with a fault: FAULT RANK STEP, then its own arguments.

FAULT happens on RANK in the update of STEP: raise, hang, die, or nan. With slow, it is bringing a
file to the disk, from the one numbered STEP on: the first takes longer than gloo waits.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from pypkg import pretrain
from pypkg.parallel import mesh


def install_slow_disk(number: int) -> None:
    fsync, calls = os.fsync, []

    def slow(descriptor: int) -> None:
        calls.append(None)
        if len(calls) == number:
            time.sleep(33)
        fsync(descriptor)

    os.fsync = slow


def install(fault: str, step: int) -> None:
    if fault == "slow":
        return install_slow_disk(step)
    from pypkg.training.step.engine import Engine

    forward_backward, calls = Engine.forward_backward, []

    def faulty(self, micro_batches):
        loss = forward_backward(self, micro_batches)
        calls.append(None)
        if len(calls) < step:
            return loss
        if fault == "raise":
            raise RuntimeError("broken on purpose")
        if fault == "hang":
            time.sleep(600)
        if fault == "die":
            time.sleep(2)  # a heartbeat is sent every second
            os.kill(os.getpid(), signal.SIGKILL)
        return loss * float("nan")

    Engine.forward_backward = faulty


def main() -> int:
    fault, rank, step, *arguments = sys.argv[1:]
    import_paddle = pretrain.import_paddle

    def import_with_fault() -> list[str]:
        lines = import_paddle()
        if mesh.launched_rank() == int(rank):
            install(fault, int(step))
        return lines

    pretrain.import_paddle = import_with_fault
    return pretrain.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
