"""Which losses and gradient norms are spikes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pypkg.training.healing.spikes import SpikeDetector, robust_z_score

LOSSES = np.random.default_rng(0).normal(2.0, 0.05, 400).tolist()


def test_of_a_normal_distribution_it_is_the_z_score() -> None:
    assert robust_z_score(2.2, LOSSES) == pytest.approx(4.0, rel=0.1)
    assert robust_z_score(1.8, LOSSES) == pytest.approx(-4.0, rel=0.1)


def test_outliers_hardly_move_it() -> None:
    with_outliers = LOSSES[:95] + [1000.0] * 5
    assert robust_z_score(2.2, with_outliers) == pytest.approx(
        robust_z_score(2.2, LOSSES[:95]), rel=0.2
    )


@pytest.mark.parametrize(("value", "expected"), [(2.2, 10.0), (2.0, 0.0)])
def test_values_that_do_not_vary_spread_by_a_hundredth(value: float, expected: float) -> None:
    assert robust_z_score(value, [2.0] * 10) == pytest.approx(expected)


def test_of_zeros_anything_is_a_spike() -> None:
    assert robust_z_score(1e-9, [0.0] * 10) == math.inf


def test_nothing_is_a_spike_unless_asked() -> None:
    detector = SpikeDetector((0.0, 0.0), 8)
    assert [detector.judge(loss, 1.0) for loss in [1.0] * 20 + [1e9]] == [None] * 21
    assert detector.history() == {}


def test_a_spike_is_told_and_later_steps_are_not_compared_with_it() -> None:
    detector = SpikeDetector((8.0, 0.0), 16)
    assert not any(detector.judge(loss, 1.0) for loss in LOSSES[:20])
    for _ in range(2):
        reason = detector.judge(9.0, 1.0)
        assert reason is not None
        assert reason.startswith("the loss is 9, ")
        assert "standard deviations above the median of the 16 steps before" in reason
    assert detector.history() == {"loss": LOSSES[4:20]}
    assert detector.judge(0.1, 1.0) is None  # a fall is none


def test_a_spike_of_the_norm() -> None:
    detector = SpikeDetector((0.0, 8.0), 8)
    assert not any(detector.judge(2.0, norm) for norm in LOSSES[:8])
    assert (detector.judge(2.0, 9.0) or "").startswith("the gradient norm is 9, ")


def test_the_first_steps_are_not_judged() -> None:
    detector = SpikeDetector((8.0, 0.0), 8)
    for loss in [2.0] * 7 + [1e9]:
        assert detector.judge(loss, 1.0) is None
    assert detector.judge(1e9, 1.0) is not None


def test_a_norm_that_a_loss_scale_made_infinite_is_not_judged() -> None:
    detector = SpikeDetector((0.0, 8.0), 8)
    for norm in [1.0] * 8 + [math.inf] * 3:
        assert detector.judge(2.0, norm) is None
    assert detector.history() == {"gradient norm": [1.0] * 8}


def test_resuming_judges_alike() -> None:
    first, second = (SpikeDetector((8.0, 8.0), 16) for _ in range(2))
    for loss in LOSSES[:30]:
        first.judge(loss, loss)
    second.judge(7.0, 7.0)  # is forgotten
    second.load(first.history())
    for loss in [*LOSSES[30:40], 2.4, 2.5, 3.0]:
        assert first.judge(loss, loss) == second.judge(loss, loss)
    assert first.judge(3.0, 2.0) is not None
