"""Weights of layers with Megatron-LM's names, which BLOOM, GLM-130B and the ChatGLM models use."""

from __future__ import annotations

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.weight_map import Packing, Weight, linear, same_layout


def by_head(config: ModelConfig) -> Packing:
    """Megatron-LM's packing of query, key and value: head by head."""
    return Packing(config.num_attention_heads, (0, 1, 2))


def megatron_layers(
    config: ModelConfig,
    layer: str,
    attention: str = "attention",
    qkv_packing: Packing | None = None,
    gate_up_packing: Packing | None = None,
) -> list[Weight]:
    """The entries of the weight map for norms, attention and MLP of the layers.

    Args:
        layer: prefix of a layer in the checkpoint, with ``{}`` for its index.
        attention: name of the attention below ``layer``.
        qkv_packing: order of query, key and value; None: query | key | value.
        gate_up_packing: order of gate and up; None: gate | up, or an MLP without a gate.
    """
    ours, mlp_in = "layers.{}.", "gate_up_proj" if config.gated_mlp else "up_proj"
    norms = ("input_layernorm", "post_attention_layernorm")
    weights = same_layout({f"{ours}{norm}": f"{layer}{norm}" for norm in norms})
    weights += linear(
        f"{ours}self_attn.qkv_proj", f"{layer}{attention}.query_key_value", packing=qkv_packing
    )
    weights += linear(f"{ours}self_attn.o_proj", f"{layer}{attention}.dense")
    weights += linear(f"{ours}mlp.{mlp_in}", f"{layer}mlp.dense_h_to_4h", packing=gate_up_packing)
    weights += linear(f"{ours}mlp.down_proj", f"{layer}mlp.dense_4h_to_h")
    return weights
