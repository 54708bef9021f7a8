"""Writes optimizers.json: four steps of the original implementations, in float32.

Muon is torch.optim.Muon, Adafactor that of transformers, Lion lion-pytorch; the map of 8-bit
moments is that of bitsandbytes. Run where these are installed (torch 2.13.0, transformers 5.24.0,
lion-pytorch 0.2.5, bitsandbytes 0.50.2):
``python tests/golden/make_optimizers.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import create_dynamic_map
from lion_pytorch import Lion
from transformers.optimization import Adafactor

RATE, DECAY, STEPS = 0.02, 0.1, 4

MAKE: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "muon": lambda p, decay: torch.optim.Muon(
        p, lr=RATE, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    ),
    "adafactor": lambda p, decay: Adafactor(
        p, lr=RATE, weight_decay=decay, scale_parameter=False, relative_step=False
    ),
    "lion": lambda p, decay: Lion(p, lr=RATE, betas=(0.9, 0.99), weight_decay=decay),
}
SHAPES = {"muon": [(12, 20), (20, 12)], "adafactor": [(6, 10), (7,)], "lion": [(5, 4)]}


def _rounded(values: np.ndarray) -> list:
    """float32 as short decimals of the same value."""
    flat = [float(f"{x:.9g}") for x in values.astype(np.float32).reshape(-1).tolist()]
    return np.array(flat).reshape(values.shape).tolist()


def _case(name: str, shape: Sequence[int]) -> dict:
    generator = np.random.default_rng(len(shape) * 10 + shape[0])
    weight = generator.normal(size=shape).astype(np.float32)
    gradients = generator.normal(size=(STEPS, *shape)).astype(np.float32)
    gradients *= 10.0 ** generator.integers(-3, 1, size=shape)
    parameter = torch.nn.Parameter(torch.tensor(weight))
    optimizer = MAKE[name]([parameter], DECAY if len(shape) > 1 else 0.0)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return {
        "optim": name,
        "weight": _rounded(weight),
        "gradients": _rounded(gradients),
        "updated": _rounded(parameter.detach().numpy()),
    }


def main() -> None:
    """Writes the file beside this script, one case a line."""
    maps = {
        dtype: _rounded(create_dynamic_map(signed=dtype == "int8").numpy())
        for dtype in ("int8", "uint8")
    }
    cases = [json.dumps(_case(name, shape)) for name in MAKE for shape in SHAPES[name]]
    body = ",\n".join(cases)
    text = f'{{"maps": {json.dumps(maps)},\n"cases": [\n{body}\n]}}\n'
    Path(__file__).with_name("optimizers.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
