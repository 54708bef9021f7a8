"""The number of samples of each optimizer step, which may grow at the beginning of a run."""

from __future__ import annotations

from bisect import bisect_right

from pypkg.config import Settings


class BatchSize:
    """The global batch size as a function of the consumed samples.

    With rampup_batch_size [start, increment, samples] it grows from ``start`` to the full size in
    equal steps of ``increment`` over the first ``samples`` samples (Megatron-LM's
    rampup-batch-size). It depends on the consumed samples only, so a resumed run continues with
    the batch that it would have had.

    Attributes:
        micro: samples of a micro batch of all ranks.
        full: samples of a step after the ramp.

    Args:
        sample_shards: number of groups of ranks that train on different samples.
    """

    def __init__(self, settings: Settings, sample_shards: int) -> None:
        self.micro = settings.per_device_train_batch_size * sample_shards
        self.full = self.micro * settings.gradient_accumulation_steps
        self._ramp = settings.rampup_batch_size

    def samples(self, consumed: int) -> int:
        """Samples of the step that starts after ``consumed`` samples."""
        if not self._ramp:
            return self.full
        start, increment, length = self._ramp
        increments = (self.full - start) // increment
        done = increments if consumed >= length else consumed * increments // length
        return start + done * increment

    def micro_batches(self, consumed: int) -> int:
        """Micro batches of that step on each rank."""
        return self.samples(consumed) // self.micro

    def before(self, consumed: int, steps: int) -> int:
        """The consumed samples ``steps`` steps before they are ``consumed``; at least 0."""
        path = [0]
        while self._ramp and path[-1] < min(self._ramp[2], consumed):
            path.append(path[-1] + self.samples(path[-1]))
        while steps and consumed > path[-1]:
            consumed, steps = consumed - self.full, steps - 1
        return path[max(bisect_right(path, consumed) - 1 - steps, 0)] if steps else consumed

    def after(self, consumed: int, steps: int) -> int:
        """The consumed samples ``steps`` steps after they are ``consumed``."""
        while self._ramp and steps and consumed < self._ramp[2]:
            consumed, steps = consumed + self.samples(consumed), steps - 1
        return consumed + steps * self.full


def ramp_problems(settings: Settings, sample_shards: int) -> list[str]:
    """Reasons why rampup_batch_size does not fit the other settings, each with a way out."""
    if not settings.rampup_batch_size or not settings.do_train:
        return []
    size = BatchSize(settings, sample_shards)
    start, increment, _ = settings.rampup_batch_size
    of = (
        f"{size.micro} samples (per_device_train_batch_size "
        f"{settings.per_device_train_batch_size} x {sample_shards} ranks with samples of their own)"
    )
    problems = [
        f"rampup_batch_size holds the {name} {value}, which is no multiple of a micro batch of "
        f"{of}; make it one"
        for name, value in (("start", start), ("increment", increment))
        if value % size.micro
    ]
    if start > size.full or (size.full - start) % increment:
        problems.append(
            f"rampup_batch_size is {list(settings.rampup_batch_size)}, but increments of "
            f"{increment} from {start} do not lead to the global batch of {size.full} samples, "
            f"which is gradient_accumulation_steps ({settings.gradient_accumulation_steps}) micro "
            f"batches of {of}; change one of them"
        )
    return problems
