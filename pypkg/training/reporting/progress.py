"""The progress bar, and the log lines that go with it."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

from pypkg.config import Settings

logger = logging.getLogger("pypkg")


class Progress:
    """A tqdm bar on a terminal; log lines that say the same everywhere."""

    def __init__(self, settings: Settings, first_step: int) -> None:
        self._max_steps = settings.max_steps
        self._first_step = first_step
        self._start = time.monotonic()
        self._bar = tqdm(
            total=settings.max_steps,
            initial=first_step,
            unit="step",
            desc="training",
            dynamic_ncols=True,
            disable=bool(settings.disable_tqdm) or not sys.stderr.isatty(),
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        self._bar.update(1)

    def rewind(self, step: int) -> None:
        """The run has gone back to ``step``."""
        self._bar.update(step - self._bar.n)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line for ``metrics`` at ``step``; the latest values stay visible in the bar."""
        if "loss" in metrics:
            self._bar.set_postfix_str(
                f"loss {metrics['loss']:.3f}, "
                f"{metrics['tokens_per_second_per_device']:,.0f} tokens/s"
                + (f", MFU {metrics['mfu']:.1%}" if "mfu" in metrics else "")
            )
        done = f"step {step}/{self._max_steps}"
        values = [_FORMATS[name](value) for name, value in metrics.items() if name in _FORMATS]
        values += [
            f"{name} {value:.4f}"
            for name, value in metrics.items()
            if "/" in name and not name.startswith("grad_norm/")  # too many for a line
        ]
        logger.info(" | ".join([done, *values, f"{_duration(self._seconds_left(step))} left"]))

    def _seconds_left(self, step: int) -> float:
        done = max(step - self._first_step, 1)
        return (time.monotonic() - self._start) / done * (self._max_steps - step)


_FORMATS = {
    "loss": lambda x: f"loss {x:.4f}",
    "learning_rate": lambda x: f"lr {x:.3e}",
    "grad_norm": lambda x: f"grad norm {x:.3f}",
    "tokens_per_second_per_device": lambda x: f"{x:,.0f} tokens/s",
    "mfu": lambda x: f"MFU {x:.1%}",
    "peak_memory_gib": lambda x: f"{x:.2f} GiB",
    "eval_loss": lambda x: f"eval loss {x:.4f}",
    "eval_perplexity": lambda x: f"perplexity {x:.2f}",
}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
