"""The optimizers that ``optim`` names: what a run and a plan of its memory both have to know."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

# Form in which AdamW keeps its moments (parallel/optimizer/rules/moments.py), by optimizer.
ADAMW_MOMENTS = {"adamw": "float32", "adamw_16bit_moment": "bfloat16", "adamw_8bit": "8bit"}
OPTIMIZERS = (*ADAMW_MOMENTS, "lion", "adafactor", "muon")
MOMENT_BLOCK = 256  # elements of an 8-bit moment that share a float32 factor
SMALLEST_8BIT = 4096  # parameters with fewer elements keep float32 moments, as in bitsandbytes
_FLOAT = 4


def is_hidden(name: str) -> bool:
    """Whether a parameter is inside the model: not an embedding, and not the head."""
    return not name.startswith(("embed_", "lm_head"))


def is_muons(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon updates a parameter; AdamW updates the others.

    Args:
        shape: of the whole parameter.
    """
    return len(shape) == 2 and is_hidden(name)


def moment_bytes(optim: str, name: str, shape: Sequence[int], held: int) -> int:
    """Bytes of the moments that a rank keeps of a parameter, without scalars.

    Args:
        shape: of the parameter that this rank updates, before ZeRO stage 3 slices it.
        held: elements that this rank updates.
    """
    if optim == "lion" or (optim == "muon" and is_muons(name, shape)):
        return _FLOAT * held
    if optim == "adafactor":
        return _FLOAT * (sum(shape) if len(shape) == 2 else held)
    if optim == "adamw_16bit_moment":
        return 4 * held
    if optim == "adamw_8bit" and prod(shape) >= SMALLEST_8BIT:
        return 2 * (held + _FLOAT * -(-held // MOMENT_BLOCK))
    return 2 * _FLOAT * held


def scalars(optim: str, name: str, shape: Sequence[int]) -> int:
    """Number of float32 scalars in host memory of a parameter: steps, or powers of beta."""
    if optim in ("lion", "adafactor") or (optim == "muon" and is_muons(name, shape)):
        return 1
    return 3 if optim == "adamw_16bit_moment" else 2
