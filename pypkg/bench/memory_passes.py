"""``python -m pypkg.bench memory-passes``: bytes that a decoder layer reads and writes.

The operators of the forward pass are recorded as they run. Those of the backward pass are the
nodes of the graph. Each must belong to an operator of ``_COSTS``, so a copy, a split or an addition
in the layer ends the count with an error.

The least is a pass in which each step of the layer (norm with residual, product, attention with
rotation, activation) reads its operands once and writes its results once. The gradient of a product
is two products.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

from pypkg.bench.ops.case import BenchmarkError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.registry import load_config

Sizes = list[int]  # elements of the tensors of an operator
_BYTES = 2  # of an element of a 16-bit dtype
# The layer as its two operators, and as single operators: a hook of a part separates them.
_WAYS: dict[str, Sequence[str]] = {
    "blocks": (),
    "single operators": ("self_attn.o_proj", "mlp.down_proj"),
}


class Moved(NamedTuple):
    """Elements that an operator reads and writes.

    Attributes:
        forward, backward: in each pass.
        least_forward, least_backward: the least possible.
    """

    forward: int
    backward: int
    least_forward: int
    least_backward: int

    @classmethod
    def total(cls, parts: Sequence[Moved]) -> Moved:
        return cls(*map(sum, zip(*parts, strict=True)))

    @property
    def ratio(self) -> float:
        """Elements moved in both passes, relative to the least."""
        least = self.least_forward + self.least_backward
        return (self.forward + self.backward) / least


def _packed_attention(read: Sizes, written: Sizes) -> Moved:
    qkv, out, lse = read[0], written[0], written[2]
    rotary = qkv + out  # queries and keys, (qkv + out) / 2, read and written in place
    least_forward, least_backward = qkv + out + lse, 2 * qkv + 2 * out + lse
    return Moved(least_forward + rotary, least_backward + rotary, least_forward, least_backward)


def _attention_block(read: Sizes, written: Sizes) -> Moved:
    """The products and attention between them: the operator makes each intermediate tensor once."""
    (x, qkv_weight, o_weight), (out, attended, qkv, lse) = read[:3], written
    return Moved.total(
        [
            _product([x, qkv_weight], [qkv]),
            _packed_attention([qkv], [attended, qkv, lse]),
            _product([attended, o_weight], [out]),
        ]
    )


def _mlp_block(read: Sizes, written: Sizes) -> Moved:
    (x, gate_up_weight, down_weight), (out, gate_up) = read, written
    activated = gate_up // 2
    return Moved.total(
        [
            _product([x, gate_up_weight], [gate_up]),
            _activation([gate_up], [activated]),
            _product([activated, down_weight], [out]),
            _again(activated),
        ]
    )


def _normed(block: Callable[[Sizes, Sizes], Moved], read: Sizes, written: Sizes) -> Moved:
    """A block with the norm before it in one operator."""
    (x, residual, weight, *others), (out, stream, rstd, *kept) = read, written
    norm = _norm([x, residual, weight], [stream, x, rstd])
    return Moved.total([norm, block([x, *others], [out, *kept]), _again(x)])


def _again(elements: int) -> Moved:
    """A tensor that the backward pass writes once more, and the forward pass does not keep."""
    return Moved(0, elements, 0, 0)


def _norm(read: Sizes, written: Sizes) -> Moved:
    x, forward = read[0], sum(read) + sum(written)
    # Backward reads h and the gradients of y and h. It writes that of x, and once more as that of
    # the residual.
    return Moved(forward, 5 * x, forward, 4 * x)


def _product(read: Sizes, written: Sizes) -> Moved:
    both = sum(read) + sum(written)
    return Moved(both, 2 * both, both, 2 * both)


def _activation(read: Sizes, written: Sizes) -> Moved:
    forward, backward = read[0] + written[0], 2 * read[0] + written[0]
    return Moved(forward, backward, forward, backward)


_COSTS: dict[str, Callable[[Sizes, Sizes], Moved]] = {
    "pypkg_add_rms_norm": _norm,
    "linear": _product,
    "pypkg_packed_attention": _packed_attention,
    "pypkg_packed_gated_activation": _activation,
    "pypkg_attention_block": _attention_block,
    "pypkg_mlp_block": _mlp_block,
    "pypkg_normed_attention_block": partial(_normed, _attention_block),
    "pypkg_normed_mlp_block": partial(_normed, _mlp_block),
}


def run_memory_passes(options: argparse.Namespace) -> dict[str, Any]:
    """Counts the bytes of a layer of the model that the command line names.

    Raises:
        UserError: the model is unknown.
        BenchmarkError: the layer runs an operator whose bytes are not known.
    """
    config = load_config(options.config)
    ways = {name: count_layer(config, options.seq, hooked) for name, hooked in _WAYS.items()}
    rows = [
        {
            "way": way,
            "operator": name.removeprefix("pypkg_"),
            **{key: count * _BYTES for key, count in moved._asdict().items()},
        }
        for way, operators in ways.items()
        for name, moved in (*operators, ("total", Moved.total([each for _, each in operators])))
    ]
    return {
        "kind": "memory-passes",
        "device": "cpu",
        "workload": f"a layer of {options.config}, {options.seq} tokens, 2 bytes an element",
        "notes": [],
        "rows": rows,
    }


def count_layer(
    config: ModelConfig, tokens: int, hooked: Sequence[str] = ()
) -> list[tuple[str, Moved]]:
    """The operators of the first layer of a decoder in order, and what they move.

    Args:
        config: the model; its layer has norms of type RMSNorm and a gated activation.
        tokens: length of the one sequence.
        hooked: names of sublayers that get a hook. A block with a hook runs as single operators.

    Raises:
        BenchmarkError: the layer runs an operator that is not in ``_COSTS``, forward or backward.
    """
    import paddle

    from pypkg import ops
    from pypkg.models.decoder import Decoder

    ops.set_backend("compiled")
    types = config.layer_types and config.layer_types[:1]
    decoder = Decoder(replace(config, num_hidden_layers=1, layer_types=types, vocab_size=8))
    inputs = decoder._attention_inputs([1, tokens], None, None, None)
    sublayers = dict(decoder.layers[0].named_sublayers())
    for name in hooked:
        sublayers[name].register_forward_pre_hook(_keep_inputs)
    x, residual = (paddle.ones([1, tokens, config.hidden_size]) for _ in range(2))
    x.stop_gradient = residual.stop_gradient = False
    with _recorded() as ran:
        outputs = decoder.layers[0](x, residual, inputs)
    unknown = sorted({name for name, *_ in ran} - _COSTS.keys())
    if unknown:
        raise BenchmarkError(f"the layer runs {', '.join(unknown)}, whose bytes are not counted")
    nodes, expected = _nodes(list(outputs)), Counter(_node(name) for name, *_ in ran)
    if nodes != expected:
        raise BenchmarkError(f"the backward pass runs {dict(nodes)}; expected {dict(expected)}")
    return [(name, _COSTS[name](read, written)) for name, read, written in ran]


def _keep_inputs(layer: Any, inputs: Any) -> Any:
    """A hook that changes nothing."""
    return inputs


@contextlib.contextmanager
def _recorded() -> Iterator[list[tuple[str, Sizes, Sizes]]]:
    """Records the name and the sizes of inputs and outputs of each of Paddle's operators."""
    from unittest import mock

    from paddle import _C_ops

    from pypkg.ops.dispatch import library

    record: list[tuple[str, Sizes, Sizes]] = []

    def recording(name: str, run: Callable) -> Callable:
        def call(*args: Any, **others: Any) -> Any:
            results = run(*args, **others)
            operator, given = (args[0], args[1:]) if name == "custom" else (name, args)
            outputs = results if isinstance(results, (list, tuple)) else [results]
            record.append((operator, _sizes([*given, *others.values()]), _sizes(outputs)))
            return results

        return call

    with contextlib.ExitStack() as stack:
        for name, function in list(vars(_C_ops).items()):
            if callable(function) and not name.startswith("_"):
                stack.enter_context(mock.patch.object(_C_ops, name, recording(name, function)))
        custom = recording("custom", library._run_custom_op)
        stack.enter_context(mock.patch.object(library, "_run_custom_op", custom))
        yield record


def _sizes(values: Sequence[Any]) -> Sizes:
    import paddle

    return [prod(each.shape) for each in values if isinstance(each, paddle.Tensor)]


def _node(operator: str) -> str:
    """Name of the node of the graph that belongs to an operator."""
    return "MatmulGradNode" if operator == "linear" else f"CustomOpGradNode: {operator}_grad"


def _nodes(outputs: list[Any]) -> Counter[str]:
    """Names of the nodes of the graph that do more than accumulate, with their numbers."""
    nodes, waiting = {}, [each.grad_fn for each in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node.node_ptr() not in nodes:
            nodes[node.node_ptr()] = node.name()
            waiting += node.next_functions
    return Counter(name for name in nodes.values() if name != "GradNodeAccumulation")
