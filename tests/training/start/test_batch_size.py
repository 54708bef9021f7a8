"""The global batch of each step while it grows, and what does not fit."""

from __future__ import annotations

import pytest

from pypkg.config import Settings
from pypkg.training.feed.batch_size import BatchSize
from pypkg.training.start.layout import process_problems

RAMP = Settings(
    per_device_train_batch_size=2, gradient_accumulation_steps=8, rampup_batch_size=(8, 8, 72),
    do_train=True,
)  # fmt: skip


def steps(settings: Settings, shards: int, count: int) -> list[int]:
    """Samples of the first steps."""
    size, consumed, found = BatchSize(settings, shards), 0, []
    for _ in range(count):
        found.append(size.samples(consumed))
        consumed += found[-1]
    return found


def test_the_batch_grows_after_equal_parts_of_the_samples():
    """From 8 to 32 samples in three increments, of 24 samples each, on two ranks."""
    # Consumed before: 0 8 16 | 24 40 | 56 | 80 ...
    assert steps(RAMP, 2, 9) == [8, 8, 8, 16, 16, 24, 32, 32, 32]
    size = BatchSize(RAMP, 2)
    assert [size.micro_batches(consumed) for consumed in (0, 24, 48, 72, 10**6)] == [2, 4, 6, 8, 8]
    assert steps(Settings(per_device_train_batch_size=2), 2, 3) == [4, 4, 4]


@pytest.mark.parametrize("settings", [RAMP, Settings(per_device_train_batch_size=16)])
def test_samples_before_and_after_steps(settings):
    size = BatchSize(settings, 2)
    consumed = [0]
    for each in steps(settings, 2, 12):
        consumed.append(consumed[-1] + each)
    for first in range(12):
        for last in range(first, 12):
            assert size.after(consumed[first], last - first) == consumed[last]
            assert size.before(consumed[last], last - first) == consumed[first]
    assert size.after(0, 10**6) - size.after(0, 10**6 - 1) == 32


@pytest.mark.parametrize(
    ("ramp", "words"),
    [
        ((6, 8, 72), ["start 6", "micro batch of 4 samples"]),
        ((8, 6, 72), ["increment 6", "micro batch of 4 samples"]),
        ((8, 16, 72), ["increments of 16 from 8", "global batch of 32 samples"]),
        ((40, 8, 72), ["increments of 8 from 40", "global batch of 32 samples"]),
    ],
)
def test_a_ramp_that_does_not_lead_to_the_batch_is_refused(ramp, words):
    text = " ".join(process_problems(Settings(**(vars(RAMP) | {"rampup_batch_size": ramp})), 2))
    assert all(word in text for word in words), text
    assert process_problems(RAMP, 2) == []
