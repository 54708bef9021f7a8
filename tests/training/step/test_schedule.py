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


def golden(name: str) -> list[dict]:
    path = Path(__file__).resolve().parents[2] / "golden" / name
    return json.loads(path.read_text(encoding="utf-8"))


# Written by PaddleNLP's own code: tests/golden/make_schedules.py; and by that of transformers:
# tests/golden/make_transformers_schedules.py.
SCHEDULES, OF_TRANSFORMERS = golden("schedules.json"), golden("transformers_schedules.json")


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


@pytest.mark.parametrize("case", OF_TRANSFORMERS, ids=str)
def test_every_step_has_the_rate_of_transformers(case):
    found = rates(Settings(**case["settings"]), len(case["rates"]))
    assert found == pytest.approx(case["rates"], rel=1e-12, abs=1e-18)


def test_the_cases_are_every_schedule():
    kinds = next(f for f in dataclasses.fields(Settings) if f.name == "lr_scheduler_type")
    of_paddlenlp = {case["settings"]["lr_scheduler_type"] for case in SCHEDULES}
    of_transformers = {case["settings"]["lr_scheduler_type"] for case in OF_TRANSFORMERS}
    assert not of_paddlenlp & of_transformers
    assert of_paddlenlp | of_transformers == set(kinds.metadata["choices"])
    styles = {case["settings"].get("lr_wsd_decay_style") for case in OF_TRANSFORMERS}
    assert styles - {None} == {"linear", "cosine", "minus_sqrt"}


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


def test_a_polynomial_falls_to_its_end():
    settings = dataclasses.replace(
        LINEAR, lr_scheduler_type="polynomial", power=2.0, lr_end=2e-4, max_steps=12
    )
    # 0 to 7.5e-4 in 4 steps, then 2e-4 + 8e-4 * (1 - k / 8)^2 for k = 0 to 8.
    decay = [2e-4 + 8e-4 * (1 - k / 8) ** 2 for k in range(9)]
    expected = [0, 2.5e-4, 5e-4, 7.5e-4, *decay, 2e-4]
    assert rates(settings, 14) == pytest.approx(expected, rel=1e-12)
    flat = dataclasses.replace(settings, warmup_steps=12)
    assert rates(flat, 14)[11:] == pytest.approx([11e-3 / 12, 2e-4, 2e-4], rel=1e-12)


def test_restarts_begin_at_the_peak():
    settings = dataclasses.replace(
        LINEAR, lr_scheduler_type="cosine_with_restarts", num_cycles=2.0, warmup_steps=4
    )
    half = [1e-3, 1e-4 + 4.5e-4 * (1 + math.sqrt(0.5)), 5.5e-4,
            1e-4 + 4.5e-4 * (1 - math.sqrt(0.5))]  # fmt: skip
    assert rates(settings, 13)[3:] == pytest.approx([*half, *half, 1e-4, 1e-4], rel=1e-12)
    once = dataclasses.replace(settings, num_cycles=1.0)
    assert rates(once, 14) == rates(dataclasses.replace(once, lr_scheduler_type="cosine"), 14)


def test_the_inverse_square_root_of_the_step():
    settings = dataclasses.replace(LINEAR, lr_scheduler_type="inverse_sqrt")
    assert rates(settings, 16)[3:] == pytest.approx(
        [1e-3 * math.sqrt(4 / n) for n in range(4, 17)], rel=1e-12
    )
    assert rates(settings, 1000)[-1] == 1e-4  # the floor; without it 6.3e-5


@pytest.mark.parametrize("style", ["linear", "cosine", "minus_sqrt"])
def test_a_decay_begins_at_any_step_of_the_plateau(style):
    """A run that is planned longer has the same rates until its own decay begins."""
    long = dataclasses.replace(
        LINEAR, lr_scheduler_type="warmup_stable_decay", max_steps=100, decay_steps=None,
        lr_wsd_decay_steps=10.0, lr_wsd_decay_style=style,
    )  # fmt: skip
    short = dataclasses.replace(long, max_steps=28, decay_steps=28.0, lr_wsd_decay_steps=8.0)
    assert rates(long, 90)[:20] == rates(short, 20)
    assert set(rates(long, 90)[3:]) == {1e-3}
    falls = rates(short, 30)[20:]
    halfway = {"linear": 0.5, "cosine": 0.5, "minus_sqrt": 1 - math.sqrt(0.5)}[style]
    assert falls[3] == pytest.approx(1e-4 + 9e-4 * halfway, rel=1e-12)
    assert falls[:8] == sorted(set(falls[:8]), reverse=True) and falls[0] < 1e-3
    assert falls[7:] == [1e-4] * 3
