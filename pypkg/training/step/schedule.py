"""The learning rate as a function of the step: warm-up, then a plateau or a decay.

Linear and cosine are the schedules that PaddleNLP's run_pretrain builds
(CosineAnnealingWithWarmupDecay and LinearAnnealingWithWarmupDecay, started with last_epoch=0, so
that their first step is at n = 1). The constant ones and polynomial are those of its trainer
(get_scheduler), whose first step is at n = 0. The others are those of transformers
(optimization.py) with a lower limit; like linear and cosine they begin at n = 1.
"""

from __future__ import annotations

import math

from pypkg.config import Settings

_DEFAULT_TIMESCALE = 10_000  # of inverse_sqrt without warm-up, as in transformers


def learning_rate(settings: Settings, completed_steps: int) -> float:
    """The learning rate of the optimizer step that follows ``completed_steps`` others.

    With n = completed_steps + 1, warm-up w, d = decay_steps and r = (n - w) / (d - w), and
    min + f * (max - min) between min_learning_rate and learning_rate:

    - n <= w: learning_rate * n / w; step 1 of a warm-up is not 0, and step w is the peak.
    - w < n <= d, linear: f = 1 - r.
    - w < n <= d, cosine: f = (1 + cos(pi r)) / 2.
    - w < n <= d, cosine_with_restarts: f = (1 + cos(pi q)) / 2, with q the fraction of
      num_cycles * r; it is 0 at n = d.
    - w < n <= d, warmup_stable_decay: max until n = d - D, with D = lr_wsd_decay_steps. Then, with
      q = (n - d + D) / D, f is 1 - q (linear), (1 + cos(pi q)) / 2 (cosine) or 1 - sqrt(q)
      (minus_sqrt).
    - n > d: min.
    - inverse_sqrt: learning_rate * sqrt(t / (n - w + t)), t = w, or 10000 without warm-up; at
      least min. It does not depend on d.
    - constant: max.

    With n - 1 in place of n, and so 0 at step 1 of a warm-up:

    - constant_with_warmup: learning_rate * (n - 1) / w for n <= w, and then max.
    - polynomial: the same warm-up, then lr_end + (1 - (n - 1 - w) / (d - w))^power * (max -
      lr_end), and lr_end from n - 1 = d on.

    w is warmup_steps, or else warmup_ratio * max_steps, which need not be whole. For
    constant_with_warmup and polynomial its fraction is cut off.

    Raises:
        ValueError: lr_scheduler_type has no schedule here.
    """
    kind = settings.lr_scheduler_type
    step, peak, floor = completed_steps + 1, settings.learning_rate, settings.min_learning_rate
    warmup, last = settings.warmup, settings.decay_steps
    assert last is not None  # Settings derives it
    if kind in _FROM_ZERO:
        if kind == "polynomial" and completed_steps >= warmup:
            return _polynomial(settings, completed_steps)
        return peak * completed_steps / warmup if completed_steps < warmup else peak
    if kind not in _DECAYS and kind != "inverse_sqrt":
        raise ValueError(f"lr_scheduler_type {kind!r} has no schedule")
    if step <= warmup:
        return peak * step / warmup
    if kind == "inverse_sqrt":
        timescale = warmup or _DEFAULT_TIMESCALE
        return max(floor, peak * math.sqrt(timescale / (step - warmup + timescale)))
    if step > last:
        return floor
    remaining = _DECAYS[kind](settings, step, warmup, last)
    return floor + remaining * (peak - floor)


def _polynomial(settings: Settings, completed_steps: int) -> float:
    last, warmup = settings.decay_steps, settings.warmup
    assert last is not None
    if completed_steps >= last:
        return settings.lr_end
    remaining = (1 - (completed_steps - warmup) / (last - warmup)) ** settings.power
    return (settings.learning_rate - settings.lr_end) * remaining + settings.lr_end


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _with_restarts(settings: Settings, step: int, warmup: float, last: float) -> float:
    if step == last:
        return 0.0
    return _cosine(settings.num_cycles * (step - warmup) / (last - warmup) % 1.0)


def _stable_then_decay(settings: Settings, step: int, warmup: float, last: float) -> float:
    length = settings.lr_wsd_decay_steps
    assert length is not None  # checked with the settings
    progress = (step - (last - length)) / length
    if settings.lr_wsd_decay_style not in WSD_STYLES:
        raise ValueError(f"lr_wsd_decay_style {settings.lr_wsd_decay_style!r} has no schedule")
    return 1.0 if progress <= 0 else WSD_STYLES[settings.lr_wsd_decay_style](progress)


WSD_STYLES = {
    "linear": _linear,
    "cosine": _cosine,
    "minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
# Fraction of the range from min_learning_rate to learning_rate that remains after the warm-up.
_DECAYS = {
    "linear": lambda _, step, warmup, last: _linear((step - warmup) / (last - warmup)),
    "cosine": lambda _, step, warmup, last: _cosine((step - warmup) / (last - warmup)),
    "cosine_with_restarts": _with_restarts,
    "warmup_stable_decay": _stable_then_decay,
}
_FROM_ZERO = ("constant", "constant_with_warmup", "polynomial")
