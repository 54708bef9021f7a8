"""A tiny forward and backward pass of each operator, compared with its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import paddle
from paddle import Tensor

from pypkg import ops
from pypkg.parallel.comm.collective import from_all_ranks
from pypkg.training.doctor.findings import Finding, Severity, by_value, place_of

_Function = Callable[..., Any]  # returns a tensor, or several of which the first is compared
# Largest difference relative to the largest value. A wrong kernel is off by far more. TF32 products
# and another order of summation are off by less.
_TOLERANCE = 2e-2
_ROWS, _WIDTH, _VOCABULARY = 24, 64, 96


def operator_findings() -> list[Finding]:
    """Runs every operator on this rank. All ranks must call this."""
    faults = from_all_ranks(wrong_operators)
    found = []
    for fault, ranks in by_value(faults, tuple):
        where = place_of(ranks, len(faults))
        if fault:
            found += [
                Finding(
                    Severity.ERROR, "operators", each, where,
                    "Set ops_backend to reference, and report it with the GPU and the build",
                )
                for each in fault
            ]  # fmt: skip
        else:
            text = f"{len(_cases())} agree with their references ({ops.backend()})"
            found.append(Finding(Severity.OK, "operators", text, where))
    return found


def wrong_operators() -> list[str]:
    """One sentence for each operator that fails or differs from its reference."""
    faults = []
    for name, function, reference, inputs in _cases():
        try:
            error = _difference(function, reference, inputs)
        except Exception as exception:  # a kernel may fail in any way
            faults.append(f"{name} fails: {str(exception).strip().splitlines()[-1]}")
            continue
        if not error < _TOLERANCE:  # NaN as well
            faults.append(f"{name} differs from its reference by {error:.2g} of the largest value")
    return faults


def _cases() -> list[tuple[str, _Function, _Function, list[Tensor]]]:
    """For each operator: name, function, reference, and inputs that receive a gradient."""
    paddle.seed(1)
    rows, heads = partial(paddle.randn, [_ROWS, _WIDTH]), partial(paddle.randn, [1, _ROWS, 2, 32])
    angle = paddle.outer(paddle.arange(_ROWS, dtype="float32"), 0.5 ** paddle.arange(16.0))
    tables: dict[str, Any] = {"k": None, "cos": angle.cos(), "sin": angle.sin()}
    labels = paddle.arange(_ROWS)
    logits, weight = paddle.randn([_ROWS, _VOCABULARY]), paddle.randn([_VOCABULARY, _WIDTH])
    loss, loss_reference = ops.linear_cross_entropy, ops.linear_cross_entropy_reference
    return [
        ("rms_norm", ops.rms_norm, ops.rms_norm_reference, [rows(), rows()[0]]),
        (
            "rotary_embedding",
            partial(ops.rotary_embedding, **tables),
            partial(ops.rotary_embedding_reference, **tables),
            [heads()],
        ),
        ("swiglu", ops.swiglu, ops.gated_activation_reference, [rows(), rows()]),
        (
            "flash_attention",
            ops.flash_attention,
            ops.flash_attention_reference,
            [heads(), heads(), heads()],
        ),
        (
            "cross_entropy",
            partial(ops.cross_entropy, labels=labels),
            partial(ops.cross_entropy_reference, labels=labels),
            [logits],
        ),
        (
            "linear_cross_entropy",
            partial(loss, labels=labels),
            partial(loss_reference, labels=labels),
            [rows(), weight],
        ),
    ]


def _difference(function: _Function, reference: _Function, inputs: Sequence[Tensor]) -> float:
    """The largest relative difference of output and gradients; NaN if one of them is NaN."""
    errors = [
        float(((own - other).abs().max() / other.abs().max()).numpy())
        for own, other in zip(_run(function, inputs), _run(reference, inputs), strict=True)
    ]
    return next((each for each in errors if each != each), max(errors))


def _run(function: _Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output, and the gradient of its sum of squares with respect to each input."""
    leaves = [each.detach() for each in inputs]
    for leaf in leaves:
        leaf.stop_gradient = False
    result = function(*leaves)
    out: Tensor = result if isinstance(result, Tensor) else result[0]
    (out * out).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
