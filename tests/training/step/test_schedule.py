"""Learning rates: PaddleNLP's, and those worked out by hand at both ends of every piece."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from pypkg.config import Settings
from pypkg.training.step.schedule import learning_rate

LINEAR = Settings(
    learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=4, max_steps=12,
    lr_scheduler_type="linear",
)  # fmt: skip


def rates(settings: Settings, steps: int) -> list[float]:
    """Learning rates of optimizer steps 1 to ``steps``."""
    return [learning_rate(settings, completed) for completed in range(steps)]


# Written by PaddleNLP's own code: tests/golden/make_schedules.py.
SCHEDULES = json.loads(
    (Path(__file__).resolve().parents[2] / "golden/schedules.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize(
    "case",
    SCHEDULES,
    ids=lambda case: "-".join(
        str(case["settings"][name])
        for name in ("lr_scheduler_type", "warmup_steps", "warmup_ratio", "decay_steps")
    ),
)
def test_every_step_has_the_rate_of_paddlenlp(case):
    settings = Settings(**case["settings"])
    found = rates(settings, len(case["rates"]))
    assert found == pytest.approx(case["rates"], rel=1e-14, abs=0)


def test_the_cases_are_every_schedule():
    kinds = next(f for f in dataclasses.fields(Settings) if f.name == "lr_scheduler_type")
    assert {case["settings"]["lr_scheduler_type"] for case in SCHEDULES} == set(
        kinds.metadata["choices"]
    )


def test_linear_warmup_and_linear_decay():
    # Warm-up n / 4 * 1e-3, then from 1e-3 at n = 4 to 1e-4 at n = 12 in steps of 1.125e-4.
    expected = [2.5e-4, 5e-4, 7.5e-4, 1e-3, 8.875e-4, 7.75e-4, 6.625e-4, 5.5e-4, 4.375e-4, 3.25e-4,
                2.125e-4, 1e-4, 1e-4, 1e-4]  # fmt: skip
    assert rates(LINEAR, 14) == pytest.approx(expected, rel=1e-12)
    assert rates(LINEAR, 14)[11:] == [1e-4] * 3


def test_cosine_decay():
    settings = dataclasses.replace(LINEAR, lr_scheduler_type="cosine")
    values = rates(settings, 14)
    assert values[3] == 1e-3
    # Halfway, n = 8, the cosine is 0; at a quarter, n = 6, it is sqrt(1/2).
    assert values[7] == pytest.approx(5.5e-4, rel=1e-12)
    assert values[5] == pytest.approx(1e-4 + 4.5e-4 * (1 + math.sqrt(0.5)), rel=1e-12)
    assert values[11:] == [1e-4] * 3


def test_decay_may_end_before_the_run():
    settings = dataclasses.replace(LINEAR, decay_steps=6.0)
    assert rates(settings, 12)[3:] == pytest.approx([1e-3, 5.5e-4] + [1e-4] * 7, rel=1e-12)


def test_decay_may_end_after_the_run():
    settings = dataclasses.replace(LINEAR, decay_steps=20.0)
    assert rates(settings, 12)[-1] == pytest.approx(5.5e-4, rel=1e-12)


def test_without_warmup_the_first_step_is_already_decayed():
    settings = dataclasses.replace(LINEAR, warmup_steps=0, max_steps=9, decay_steps=9.0)
    assert rates(settings, 9)[0] == pytest.approx(9e-4, rel=1e-12)
    assert rates(settings, 9)[8] == pytest.approx(1e-4, rel=1e-12)


def test_warmup_ratio_counts_only_without_warmup_steps():
    ratio = dataclasses.replace(LINEAR, warmup_steps=0, warmup_ratio=0.125)  # 1.5 steps
    assert rates(ratio, 2)[0] == pytest.approx(1e-3 / 1.5, rel=1e-12)
    assert rates(ratio, 2)[1] == pytest.approx(1e-4 + 9e-4 * (1 - 0.5 / 10.5), rel=1e-12)
    both = dataclasses.replace(LINEAR, warmup_ratio=0.9)
    assert rates(both, 12) == rates(LINEAR, 12)


def test_constant_schedules():
    warm = dataclasses.replace(LINEAR, lr_scheduler_type="constant_with_warmup")
    assert rates(warm, 20) == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4] + [1e-3] * 16, rel=1e-12)
    flat = dataclasses.replace(LINEAR, lr_scheduler_type="constant", warmup_steps=0)
    assert rates(flat, 20) == [1e-3] * 20


def test_warmup_as_long_as_the_decay():
    settings = dataclasses.replace(LINEAR, warmup_steps=12)
    assert rates(settings, 13)[10:] == pytest.approx([11e-3 / 12, 1e-3, 1e-4], rel=1e-12)
