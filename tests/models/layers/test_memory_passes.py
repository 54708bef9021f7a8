"""How many bytes the operators of a decoder layer read and write, beside the least possible.

The operators of the forward pass are recorded as they run, and those of the backward pass are the
nodes of the graph: each has to belong to an operator whose bytes ``COSTS`` knows. A copy, a split
or an addition that finds its way into the layer is in no row and fails the test.

The least is a pass in which each step of the layer (norm with residual, product, attention with
rotation, activation) reads its operands once and writes its results once. The gradient of a product
is two products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import prod

import paddle
import pytest
from paddle import _C_ops

from pypkg import ops
from pypkg.models.decoder import Decoder
from pypkg.ops.dispatch import library

Sizes = list[int]  # elements of the tensors of an operator
# The proportions of a layer of llama-7b at 8192 tokens, divided by 32.
HIDDEN, INTERMEDIATE, TOKENS, HEADS = 128, 344, 256, 4


def _packed(read: Sizes, written: Sizes) -> tuple[int, int, int, int]:
    qkv, out, lse = read[0], written[0], written[2]
    rotary = 2 * (qkv - out)  # queries and keys, read and written in place; heads_k = heads_q
    least_forward, least_backward = qkv + out + lse, 2 * qkv + 2 * out + lse
    return least_forward + rotary, least_backward + rotary, least_forward, least_backward


def _attention_block(read: Sizes, written: Sizes) -> tuple[int, int, int, int]:
    """The products and attention between them: the operator makes each intermediate tensor once."""
    (x, qkv_weight, o_weight), (out, attended, qkv, lse) = read[:3], written
    parts = (
        _product([x, qkv_weight], [qkv]),
        _packed([qkv], [attended, qkv, lse]),
        _product([attended, o_weight], [out]),
    )
    return _total(*parts)


def _mlp_block(read: Sizes, written: Sizes) -> tuple[int, int, int, int]:
    (x, gate_up_weight, down_weight), (out, gate_up, activated) = read, written
    return _total(
        _product([x, gate_up_weight], [gate_up]),
        _activation([gate_up], [activated]),
        _product([activated, down_weight], [out]),
    )


def _normed(block: Callable[[Sizes, Sizes], tuple[int, int, int, int]]) -> Callable:
    """The cost of a block with the norm before it in one operator."""

    def cost(read: Sizes, written: Sizes) -> tuple[int, int, int, int]:
        (x, residual, weight, *others), (out, stream, normed, rstd, *kept) = read, written
        norm = _norm([x, residual, weight], [stream, normed, rstd])
        return _total(norm, block([normed, *others], [out, *kept]))

    return cost


def _total(*parts: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    forward, backward, least_forward, least_backward = map(sum, zip(*parts, strict=True))
    return forward, backward, least_forward, least_backward


def _norm(read: Sizes, written: Sizes) -> tuple[int, int, int, int]:
    x, forward = read[0], sum(read) + sum(written)
    # Reads h and the gradients of y and h; writes that of x, and once more as that of residual.
    return forward, 5 * x, forward, 4 * x


def _product(read: Sizes, written: Sizes) -> tuple[int, int, int, int]:
    both = sum(read) + sum(written)
    return both, 2 * both, both, 2 * both


def _activation(read: Sizes, written: Sizes) -> tuple[int, int, int, int]:
    forward, backward = read[0] + written[0], 2 * read[0] + written[0]
    return forward, backward, forward, backward


# By operator: node of the backward pass, and elements moved forward and backward, and the least.
COSTS: dict[str, tuple[str, Callable[[Sizes, Sizes], tuple[int, int, int, int]]]] = {
    "pypkg_add_rms_norm": ("CustomOpGradNode: pypkg_add_rms_norm_grad", _norm),
    "linear": ("MatmulGradNode", _product),
    "pypkg_packed_attention": ("CustomOpGradNode: pypkg_packed_attention_grad", _packed),
    "pypkg_packed_gated_activation": (
        "CustomOpGradNode: pypkg_packed_gated_activation_grad",
        _activation,
    ),
    "pypkg_attention_block": ("CustomOpGradNode: pypkg_attention_block_grad", _attention_block),
    "pypkg_mlp_block": ("CustomOpGradNode: pypkg_mlp_block_grad", _mlp_block),
    "pypkg_normed_attention_block": (
        "CustomOpGradNode: pypkg_normed_attention_block_grad",
        _normed(_attention_block),
    ),
    "pypkg_normed_mlp_block": (
        "CustomOpGradNode: pypkg_normed_mlp_block_grad",
        _normed(_mlp_block),
    ),
}


@pytest.fixture
def ran(monkeypatch) -> list[tuple[str, Sizes, Sizes]]:
    """Name, sizes of inputs and sizes of outputs of each of Paddle's operators that runs."""
    record: list[tuple[str, Sizes, Sizes]] = []

    def recording(name: str, run: Callable) -> Callable:
        def call(*args):
            results = run(*args)
            given = args[1:] if name == "custom" else args
            outputs = results if isinstance(results, (list, tuple)) else [results]
            record.append((args[0] if name == "custom" else name, _sizes(given), _sizes(outputs)))
            return results

        return call

    for name, function in vars(_C_ops).items():
        if callable(function) and not name.startswith("_"):
            monkeypatch.setattr(_C_ops, name, recording(name, function))
    monkeypatch.setattr(library, "_run_custom_op", recording("custom", library._run_custom_op))
    return record


def _sizes(values) -> Sizes:
    return [prod(each.shape) for each in values if isinstance(each, paddle.Tensor)]


def _nodes(outputs: list[paddle.Tensor]) -> Counter[str]:
    """Names of the nodes of the graph that do more than accumulate, with their numbers."""
    nodes, waiting = {}, [each.grad_fn for each in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node.node_ptr() not in nodes:
            nodes[node.node_ptr()] = node.name()
            waiting += node.next_functions
    return Counter(name for name in nodes.values() if name != "GradNodeAccumulation")


@pytest.mark.parametrize(
    ("hooked", "operators"),
    [
        ((), 2),
        (("input_layernorm", "post_attention_layernorm"), 4),
        (("self_attn.o_proj", "mlp.down_proj"), 8),
    ],
)
def test_a_layer_moves_little_more_than_it_must(tiny_config, ran, hooked, operators) -> None:
    """Two operators where nothing but they is called, and the parts around a hook of a call."""
    ops.set_backend("compiled")
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "head_dim": HIDDEN // HEADS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    decoder = Decoder(replace(tiny_config, **sizes, **heads))
    inputs = decoder._attention_inputs([1, TOKENS], None, None, None)
    sublayers = dict(decoder.layers[0].named_sublayers())
    for name in hooked:
        sublayers[name].register_forward_pre_hook(lambda *_: None)
    x, residual = (paddle.ones([1, TOKENS, HIDDEN]) for _ in range(2))
    x.stop_gradient = residual.stop_gradient = False
    ran.clear()
    outputs = decoder.layers[0](x, residual, inputs)
    moved = least = 0
    for name, read, written in ran:
        *counted, least_forward, least_backward = COSTS[name][1](read, written)
        moved, least = moved + sum(counted), least + least_forward + least_backward
    assert _nodes(list(outputs)) == Counter(COSTS[name][0] for name, *_ in ran)
    assert len(ran) == operators
    assert 1.0 < moved / least <= 1.15, moved / least
