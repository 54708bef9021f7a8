"""The learning rate as a function of the step: warm-up, then decay to a floor.

Linear and cosine are the schedules that PaddleNLP's run_pretrain builds
(CosineAnnealingWithWarmupDecay and LinearAnnealingWithWarmupDecay, started with last_epoch=0, so
that their first step is at n = 1). The constant ones are those of its trainer (get_scheduler),
whose first step is at n = 0.
"""

from __future__ import annotations

import math

from pypkg.config import Settings


def learning_rate(settings: Settings, completed_steps: int) -> float:
    """The learning rate of the optimizer step that follows ``completed_steps`` others.

    With n = completed_steps + 1, warm-up w and d = decay_steps:

    - n <= w: learning_rate * n / w; step 1 of a warm-up is not 0, and step w is the peak.
    - w < n <= d, linear: min + (1 - r) * (max - min), with r = (n - w) / (d - w).
    - w < n <= d, cosine: min + (1 + cos(pi r)) / 2 * (max - min); both are min at n = d.
    - n > d: min.
    - constant: max.
    - constant_with_warmup: learning_rate * (n - 1) / w for n <= w, so 0 at step 1, and then max.

    w is warmup_steps, or else warmup_ratio * max_steps, which need not be whole. For
    constant_with_warmup its fraction is cut off.

    Raises:
        ValueError: lr_scheduler_type has no schedule here.
    """
    kind = settings.lr_scheduler_type
    if kind not in _DECAYS and kind not in _CONSTANT:
        raise ValueError(f"lr_scheduler_type {kind!r} has no schedule")
    step, peak, floor = completed_steps + 1, settings.learning_rate, settings.min_learning_rate
    warmup = settings.warmup
    if kind in _CONSTANT:
        return peak * completed_steps / warmup if completed_steps < warmup else peak
    if step <= warmup:
        return peak * step / warmup
    last = settings.decay_steps
    assert last is not None  # Settings derives it
    if step > last:
        return floor
    progress = (step - warmup) / (last - warmup)
    remaining = _DECAYS[kind](progress)
    return floor + remaining * (peak - floor)


# Fraction of the range from min_learning_rate to learning_rate that remains, by progress in [0, 1].
_DECAYS = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
_CONSTANT = ("constant", "constant_with_warmup")
