"""Loads a model in a process of its own and prints what the load took at most, in bytes.

Arguments: folder, dtype.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pypkg.device.threads import configure_cpu, import_paddle


def _memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def main() -> None:
    configure_cpu()
    import_paddle()
    from pypkg.models import ModelConfig, from_config, from_pretrained

    # What Paddle sets up at first use is not the load's.
    tiny = ModelConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    from_config(tiny, sys.argv[2], seed=0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory("VmRSS")
    model = from_pretrained(sys.argv[1], dtype=sys.argv[2])
    print(_memory("VmHWM") - before, len(list(model.parameters())))


if __name__ == "__main__":
    main()
