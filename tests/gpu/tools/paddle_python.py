"""The Python that has paddlepaddle-gpu, beside the one with torch: what is there, and its times."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("paddle_attention.py")
PROBE = (
    "import paddle\n"
    "cuda = paddle.is_compiled_with_cuda()\n"
    "gpus = paddle.device.cuda.device_count() if cuda else 0\n"
    "print(gpus, paddle.version.full_version)"
)
SECONDS = 120.0


def default_python() -> Path:
    """That of ``make install``, or this one."""
    made = ROOT / ".venv" / "bin" / "python"
    return made if made.exists() else Path(sys.executable)


def obstacle(python: Path) -> str | None:
    """Why ``python`` cannot run Paddle on a GPU, or None if it can."""
    try:
        done = subprocess.run(
            [python, "-c", PROBE], capture_output=True, text=True, timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python}: {error}"
    if done.returncode:
        return f"{python} cannot import Paddle"
    gpus, version = done.stdout.split()[-2:]
    return None if int(gpus) else f"Paddle {version} of {python} sees no GPU"


def attention_rows(
    python: Path, rows: Sequence[dict[str, Any]], ours: str, name: str, device: str = "gpu"
) -> list[dict[str, Any]]:
    """Rows of Paddle's flash attention like those of ``ours``, of causal attention in bfloat16.

    Args:
        rows: of ``measure``, all operators.
        name: of the new rows' ``baseline``.

    Raises:
        RuntimeError: the times could not be had.
    """
    from pypkg.bench.timing import summarize

    like = {
        (row["shape"], row["pass"]): row
        for row in rows
        if row["op"] == "flash_attention" and row["dtype"] == "bfloat16"
        if row["baseline"] == ours and row["shape"].endswith(" causal")
    }
    if not like:
        return []
    shapes = list(dict.fromkeys(shape for shape, _ in like))
    command = [python, SCRIPT, *shapes, "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"Paddle's flash attention: {done.stderr.strip()[-400:]}")
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [
        like[each["shape"], each["pass"]]
        | vars(summarize(each["samples"]))
        | {"baseline": name, "error": None}
        for each in found
    ]
