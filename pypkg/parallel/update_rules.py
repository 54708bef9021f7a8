"""Properties of the optimizers of ``optim`` that both a run and the memory planner need.

Nothing here imports Paddle.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

# Storage of AdamW's moments (parallel/optimizer/rules/moments.py) by value of ``optim``.
ADAMW_MOMENTS = {"adamw": "float32", "adamw_16bit_moment": "bfloat16", "adamw_8bit": "8bit"}
MOMENT_BLOCK = 256  # elements of an 8-bit moment that share a float32 factor
SMALLEST_8BIT = 4096  # parameters with fewer elements keep float32 moments, as in bitsandbytes
_FLOAT = 4  # bytes of a float32


def is_hidden(name: str) -> bool:
    """Whether a parameter belongs to neither an embedding nor the head ("hidden" in muP)."""
    return not name.startswith(("embed_", "lm_head"))


def rate_factor(
    name: str,
    shape: Sequence[int],
    *,
    width: float = 1.0,
    embedding: float = 1.0,
    head: float = 1.0,
) -> float:
    """The factor by which the learning rate of a parameter is multiplied.

    Args:
        name: the parameter's name in the model.
        shape: of the whole parameter.
        width: hidden_size / mup_base_width. Hidden matrices and the head get the factor 1 / width
            (Yang et al., Tensor Programs V, 2022, table 3).
        embedding, head: factors of the token and position embeddings, and of the head.
    """
    if name.startswith("embed_") and len(shape) == 2:
        return embedding
    if name.startswith("lm_head"):
        return head / width
    return 1.0 / width if len(shape) == 2 else 1.0


def updated_by_muon(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon updates a parameter; AdamW updates the others.

    Args:
        shape: of the whole parameter.
    """
    return len(shape) == 2 and is_hidden(name)


def moment_bytes(optim: str, name: str, shape: Sequence[int], held: int) -> int:
    """Bytes of the moments that a rank keeps for a parameter, without ``scalars``.

    Args:
        optim: the setting, such as "adamw".
        name: the parameter's name in the model.
        shape: of the parameter, or of this rank's TP shard of it.
        held: number of elements that this rank updates; fewer than ``shape`` has in ZeRO stage 3.
    """
    if optim == "lion" or (optim == "muon" and updated_by_muon(name, shape)):
        return _FLOAT * held
    if optim == "adafactor":
        return _FLOAT * (sum(shape) if len(shape) == 2 else held)
    if optim == "adamw_16bit_moment":
        return 4 * held
    if optim == "adamw_8bit" and prod(shape) >= SMALLEST_8BIT:
        return 2 * (held + _FLOAT * -(-held // MOMENT_BLOCK))
    return 2 * _FLOAT * held


def scalars(optim: str, name: str, shape: Sequence[int]) -> int:
    """Number of float32 scalars of a parameter in host memory: step counts and powers of beta."""
    if optim in ("lion", "adafactor") or (optim == "muon" and updated_by_muon(name, shape)):
        return 1
    return 3 if optim == "adamw_16bit_moment" else 2
