"""Writes transformers_schedules.json: rates of the schedules that PaddleNLP lacks, step by step.

Run where torch and transformers are installed (the file was made with transformers 5.24.0):
``python tests/golden/make_transformers_schedules.py``. Their schedules begin at step 0 with the
rate 0; ours begin at step 1, as PaddleNLP's linear and cosine do, so the file begins there.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import optimization

_PEAK = 1e-3
_BEYOND = 3  # steps after the last


def _settings(kind: str, steps: int, **more: float | str) -> dict[str, float | str]:
    common = {"lr_scheduler_type": kind, "learning_rate": _PEAK, "min_learning_rate": 0.0}
    return {**common, "max_steps": steps, **more}


def _restarts(steps: int, warmup: int, cycles: int) -> tuple[dict, dict]:
    given = {"num_warmup_steps": warmup, "num_training_steps": steps, "num_cycles": cycles}
    ours = {"warmup_steps": warmup, "num_cycles": float(cycles)}
    return _settings("cosine_with_restarts", steps, **ours), given


def _inverse_sqrt(steps: int, warmup: int) -> tuple[dict, dict]:
    ours = _settings("inverse_sqrt", steps, warmup_steps=warmup)
    return ours, {"num_warmup_steps": warmup}


def _stable(steps: int, decay: int, style: str, floor: float = 0.0) -> tuple[dict, dict]:
    ours = _settings(
        "warmup_stable_decay", steps, lr_wsd_decay_steps=float(decay), lr_wsd_decay_style=style
    )
    names = {"minus_sqrt": "1-sqrt"}
    given = {
        "num_warmup_steps": 0, "num_training_steps": steps, "num_decay_steps": decay,
        "decay_type": names.get(style, style), "min_lr_ratio": floor,
    }  # fmt: skip
    return ours | {"min_learning_rate": floor * _PEAK}, given


_MAKE = {
    "cosine_with_restarts": optimization.get_cosine_with_hard_restarts_schedule_with_warmup,
    "inverse_sqrt": optimization.get_inverse_sqrt_schedule,
    "warmup_stable_decay": optimization.get_wsd_schedule,
}
CASES = [
    _restarts(13, 3, 3),
    _restarts(12, 0, 1),
    _restarts(20, 4, 2),
    _inverse_sqrt(20, 4),
    _inverse_sqrt(12, 0),
    *(_stable(12, 5, style) for style in ("linear", "cosine", "minus_sqrt")),
    *(_stable(12, 12, style, 0.1) for style in ("linear", "cosine", "minus_sqrt")),
]


def _rates(settings: dict, given: dict) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=_PEAK)
    schedule = _MAKE[settings["lr_scheduler_type"]](optimizer, **given)
    rates = []
    for _ in range(settings["max_steps"] + _BEYOND):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    return rates


def main() -> None:
    """Writes the file beside this script, one case a line."""
    lines = [json.dumps({"settings": ours, "rates": _rates(ours, given)}) for ours, given in CASES]
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    Path(__file__).with_name("transformers_schedules.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
