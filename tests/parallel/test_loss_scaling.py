"""How the loss scale grows and shrinks."""

from __future__ import annotations

import inspect
from dataclasses import replace

import paddle
import pytest

from pypkg.errors import UserError
from pypkg.parallel.optimizer.loss_scaling import MOST_OVERFLOWS, LossScale, LossScaler

FAST = LossScale(initial=16.0, growth_interval=2, backoff_interval=2)


def scales(options: LossScale, skipped: list[bool]) -> list[float]:
    scaler = LossScaler(options)
    found = []
    for each in skipped:
        scaler.update(each)
        found.append(scaler.scale)
    return found


@pytest.mark.parametrize(
    ("skipped", "expected"),
    [
        ([False] * 4, [16, 32, 32, 64]),
        ([True] * 4, [16, 8, 8, 4]),
        ([False, True, False, False], [16, 16, 16, 32]),  # a skipped step starts the count again
        ([True, False, True, True], [16, 16, 16, 8]),
    ],
)
def test_growth_and_backoff(skipped, expected):
    assert scales(FAST, skipped) == expected


def test_the_scale_is_at_least_one():
    assert scales(replace(FAST, initial=2.0, backoff_interval=1), [True] * 3) == [1.0] * 3


def test_overflows_at_the_least_scale_end_the_run():
    """But not those of two bad stretches with a good step between them."""
    scaler = LossScaler(replace(FAST, initial=1.0, backoff_interval=1))
    for _ in range(2):
        for _ in range(MOST_OVERFLOWS - 1):
            scaler.update(True)
        scaler.update(False)
    for _ in range(MOST_OVERFLOWS - 1):
        scaler.update(True)
    with pytest.raises(UserError, match=r"20 steps in a row .* its minimum of 1\. .* bf16"):
        scaler.update(True)


@pytest.mark.parametrize("saved", range(7))
def test_resuming_goes_on(saved):
    straight, first = LossScaler(FAST), LossScaler(FAST)
    pattern = [False, True, True, False, False, True]
    for skipped in pattern:
        straight.update(skipped)
    for skipped in pattern[:saved]:
        first.update(skipped)
    second = LossScaler(FAST)
    second.load_state(first.state())
    for skipped in pattern[saved:]:
        second.update(skipped)
    assert second.state() == straight.state()
    assert second.scale == 16
    assert second.skipped_steps == 3


def test_the_defaults_are_those_of_paddle():
    """But for the initial scale, which is PaddleNLP's scale_loss."""
    paddles = inspect.signature(paddle.amp.GradScaler.__init__).parameters
    ours = LossScale()
    assert ours.growth == paddles["incr_ratio"].default
    assert ours.backoff == paddles["decr_ratio"].default
    assert ours.growth_interval == paddles["incr_every_n_steps"].default
    assert ours.backoff_interval == paddles["decr_every_n_nan_or_inf"].default
    assert ours.initial == 2**15
