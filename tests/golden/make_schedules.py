"""Writes schedules.json: the learning rates of PaddleNLP's own schedules, step by step.

Run where PaddleNLP 3.0.0b4 is installed: ``python tests/golden/make_schedules.py``. Linear and
cosine are the classes that run_pretrain makes; the constant ones and polynomial come from
Trainer.create_scheduler, which run_pretrain leaves them to.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from paddle.optimizer.lr import LRScheduler
from paddlenlp.trainer import Trainer
from paddlenlp.transformers.optimization import (
    CosineAnnealingWithWarmupDecay,
    LinearAnnealingWithWarmupDecay,
)

_BEYOND = 3  # steps after max_steps

_DECAYS = {"linear": LinearAnnealingWithWarmupDecay, "cosine": CosineAnnealingWithWarmupDecay}


def _case(kind: str, max_steps: int, **changes: float) -> dict[str, float | str]:
    return {
        "lr_scheduler_type": kind,
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-4,
        "max_steps": max_steps,
        "warmup_steps": 0,
        "warmup_ratio": 0.0,
        "decay_steps": float(max_steps),
        **changes,
    }


CASES = [
    case
    for kind in ("linear", "cosine")
    for case in (
        _case(kind, 12),
        _case(kind, 12, warmup_steps=4),
        _case(kind, 12, warmup_steps=4, warmup_ratio=0.9),
        _case(kind, 30, warmup_ratio=0.15),
        _case(kind, 12, warmup_steps=3, decay_steps=6.0),
        _case(kind, 12, warmup_steps=3, decay_steps=20.0),
        _case(kind, 12, warmup_steps=1, decay_steps=7.5),
        _case(kind, 12, warmup_steps=12),
        _case(kind, 12, warmup_steps=4, min_learning_rate=0.0),
    )
] + [
    _case("constant", 12),
    _case("constant_with_warmup", 12),
    _case("constant_with_warmup", 12, warmup_steps=4),
    _case("constant_with_warmup", 12, warmup_steps=4, warmup_ratio=0.9),
    _case("constant_with_warmup", 30, warmup_ratio=0.15),
    _case("constant_with_warmup", 30, warmup_ratio=0.02),
    _case("constant_with_warmup", 12, warmup_steps=12),
    _case("polynomial", 12),
    _case("polynomial", 12, warmup_steps=4, power=2.0, lr_end=1e-5),
    _case("polynomial", 30, warmup_ratio=0.15, power=0.5),
    _case("polynomial", 12, warmup_steps=3, decay_steps=7.5, power=3.0, lr_end=0.0),
    _case("polynomial", 12, warmup_steps=3, decay_steps=20.0),
]


def _schedule(case: dict) -> LRScheduler:
    """As run_pretrain and its trainer make it."""
    decay = _DECAYS.get(case["lr_scheduler_type"])
    if decay is None:
        unset = {"num_cycles": 0.5, "lr_end": 1e-7, "power": 1.0}
        arguments = SimpleNamespace(**(unset | case))
        trainer = SimpleNamespace(args=arguments, lr_scheduler=None)
        return Trainer.create_scheduler(trainer, case["max_steps"])
    return decay(
        max_lr=case["learning_rate"],
        min_lr=case["min_learning_rate"],
        warmup_step=case["warmup_steps"] or case["warmup_ratio"] * case["max_steps"],
        decay_step=case["decay_steps"],
        last_epoch=0,
    )


def _rates(case: dict) -> list[float]:
    """The rate of each optimizer step; the trainer steps the schedule after the optimizer."""
    schedule = _schedule(case)
    rates = []
    for _ in range(case["max_steps"] + _BEYOND):
        rates.append(float(schedule()))
        schedule.step()
    return rates


def main() -> None:
    """Writes the file beside this script, one case a line."""
    lines = [json.dumps({"settings": case, "rates": _rates(case)}) for case in CASES]
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    Path(__file__).with_name("schedules.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
