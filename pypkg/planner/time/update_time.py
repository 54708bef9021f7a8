"""Seconds of an update of the weights: the counterpart of parallel/optimizer/rules.

The fused AdamW moves each byte once. The other rules are operators one after the other, each of
which reads its inputs and writes its output. Each count below is of the operators of the rule's own
file, in bytes of one element; tests count the same on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from pypkg.config import Settings
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.layer_split import ModelChunk
from pypkg.models.architecture.parameter_shapes import whole_parameters
from pypkg.models.weights.tp_shards import side_by_side
from pypkg.parallel.update_rules import moment_bytes, updated_by_muon
from pypkg.planner.time.gpus import Gpu

# Of float32 operators: one input or two, a choice between two, and a copy to where state is kept.
_ONE, _TWO = 8, 12
_KEPT = _TWO + _ONE
_FLOAT = 4
_NARROW, _WIDEN = 6, 6  # float32 to bfloat16, and back
# csrc/kernels/adamw: weight and moments read and written in float32, and the gradient read; in 16
# bits gradient and weight beside the master are half as wide.
_FUSED_ADAMW = 28
_ITERATIONS = 5  # of Newton-Schulz
_ROUND = _NARROW + 4  # rounding.py, and a copy to where bfloat16 is kept
_LION = 8 * _ONE + 3 * _TWO + _KEPT + _TWO  # lion.py
# adafactor.py: squares and what a rank counts of them, sums by row and column, the direction, its
# squares and their sum, and the new weight.
_ADAFACTOR = 12 * _ONE + 3 * 4 + _TWO + _TWO
# muon.py: momentum and blend; the direction widened and scaled, and the new weight.
_MUON = 5 * _ONE + 2 * _TWO + _KEPT + _NARROW + _WIDEN + 2 * _ONE + _TWO + _TWO
_8BIT = 5  # ops/narrow_state.py: a code and its value, either way


@dataclass(frozen=True)
class UpdateWork:
    """The work of a rank in an update.

    Attributes:
        moved: bytes read and written.
        flops: FLOPs of matrix products in bfloat16.
        sent: bytes to the ranks that hold the other pieces of its matrices.
    """

    moved: float
    flops: float = 0.0
    sent: float = 0.0


def update_work(
    settings: Settings,
    config: ModelConfig,
    held: float,
    pieces: int = 1,
    element_bytes: int = 2,
) -> UpdateWork:
    """The work of a rank that updates its part of the model.

    Args:
        held: elements that it updates.
        pieces: ranks that hold pieces of each matrix, of the tensor group and of ZeRO stage 3.
        element_bytes: of a weight; 2: weights have float32 masters, unless they are rounded
            stochastically.
    """
    optim = settings.optim
    if optim != "muon":
        return UpdateWork(held * bytes_moved(optim, element_bytes, settings.stochastic_rounding))
    share = held / config.num_parameters()
    moved = flops = elements = 0.0
    for rows, columns in _muons(config):
        size, least = rows * columns, min(rows, columns)
        elements += size
        moved += newton_schulz_bytes(rows, columns)
        flops += _ITERATIONS * (4 * least * size + 2 * least**3)
    apart = [bytes_moved(each, element_bytes, settings.stochastic_rounding)
             for each in ("muon", "adamw")]  # fmt: skip
    moved += apart[0] * elements + apart[1] * (config.num_parameters() - elements)
    # Each matrix goes to its owner in bfloat16, and comes back (whole_matrices.py).
    sent = 4 * (pieces - 1) / pieces * elements
    return UpdateWork(share * moved, share * flops, share * sent)


def bytes_moved(optim: str, element_bytes: int, is_stochastic: bool = False) -> float:
    """Bytes that operators move for one element of a parameter, without Newton-Schulz.

    Args:
        element_bytes: bytes of a weight and of its gradient.
        is_stochastic: whether bfloat16 weights have no masters.
    """
    is_half, is_plain = element_bytes == 2, not is_stochastic or element_bytes != 2
    if optim == "adamw" and is_plain:
        return _FUSED_ADAMW
    gradient = _WIDEN if is_half else 0
    new_weight = _NARROW + 4 if is_half else _ONE  # to the parameter
    if not is_plain:
        new_weight = _WIDEN + _ROUND  # read before
    elif is_half and not optim.startswith("adamw"):  # which changes the master in place
        new_weight += _ONE
    rule = {
        "adamw": _FUSED_ADAMW,
        "adamw_16bit_moment": _FUSED_ADAMW + 2 * (_WIDEN + _ROUND),
        "adamw_8bit": _FUSED_ADAMW + 2 * 2 * _8BIT,
        "lion": _LION,
        "adafactor": _ADAFACTOR,
        "muon": _MUON,
    }[optim]
    return gradient + rule + new_weight


def newton_schulz_bytes(rows: int, columns: int) -> float:
    """Bytes that ``orthogonalized`` moves beside its products: bfloat16, sums in float32."""
    size, least = rows * columns, min(rows, columns)
    start = _WIDEN + 4 + _ONE + _NARROW  # the norm, and the matrix divided by it
    each = 2 * _WIDEN + _ONE + _TWO + _NARROW
    square = 2 * _WIDEN + _NARROW + _WIDEN + 2 * _ONE + _TWO + _NARROW
    return size * start + _ITERATIONS * (size * each + least**2 * square)


def update_seconds(work: UpdateWork, gpu: Gpu, rate: float) -> float:
    """Seconds of an update.

    Args:
        rate: bytes per second that a rank sends to those with the other pieces of its matrices.
    """
    products = work.flops / gpu.product_rate(2)
    return work.moved / gpu.memory_rate + products + (work.sent / rate if work.sent else 0.0)


def state_bytes(settings: Settings) -> float:
    """Of the moments and the master weight of one element of a matrix."""
    shape = (4096, 4096)
    moments = moment_bytes(settings.optim, "layers.0.mlp.down_proj.weight", shape, prod(shape))
    return moments / prod(shape) + (0 if settings.stochastic_rounding else _FLOAT)


def saved_bytes(settings: Settings, element_bytes: int) -> int:
    """Of the state of one element of a matrix in a checkpoint, which holds all of it in float32."""
    moments = {"adafactor": 0, "lion": 1, "muon": 1}.get(settings.optim, 2)
    has_master = element_bytes == 2 and not settings.stochastic_rounding
    return _FLOAT * (moments + has_master)


def _muons(config: ModelConfig) -> Iterator[tuple[int, int]]:
    """Rows and columns of each matrix that Muon makes orthogonal."""
    layer = ModelChunk(range(1), is_first=False, is_last=False)
    for each in whole_parameters(config, layer):
        if updated_by_muon(each.name, each.shape):
            axis, widths = side_by_side(config, each.name)
            for width in widths or (each.shape[axis],):
                shape = [*each.shape]
                shape[axis] = width
                yield from [(shape[0], shape[1])] * config.num_hidden_layers
