"""Qwen 1 (Bai et al., 2023): LLaMA with biases of query, key and value.

In evaluation, sequences longer than ``seq_length`` have a larger rope_theta (dynamic NTK) and
scaled queries (logn attention).
"""

from __future__ import annotations

from typing import Any

from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.family import TOKEN_IDS, Family, Keys
from pypkg.models.architecture.weight_map import WeightMap, linear, same_layout


def _weight_map(config: ModelConfig) -> WeightMap:
    ours, theirs = "layers.{}.", "transformer.h.{}."
    weights = same_layout(
        {
            "embed_tokens": "transformer.wte",
            f"{ours}input_layernorm": f"{theirs}ln_1",
            f"{ours}post_attention_layernorm": f"{theirs}ln_2",
            "norm": "transformer.ln_f",
            "lm_head": "lm_head",
        }
    )
    weights += linear(f"{ours}self_attn.qkv_proj", f"{theirs}attn.c_attn")
    weights += linear(f"{ours}self_attn.o_proj", f"{theirs}attn.c_proj")
    gate_up = [f"{theirs}mlp.w2", f"{theirs}mlp.w1"]
    weights += linear(f"{ours}mlp.gate_up_proj", gate_up, [config.intermediate_size] * 2)
    weights += linear(f"{ours}mlp.down_proj", f"{theirs}mlp.c_proj")
    ignored = [r"transformer\.rotary_emb\.inv_freq", r"transformer\.h\.\d+\.attn\..*inv_freq"]
    return WeightMap(weights, ignored, prefix="transformer.")


def _read(keys: Keys) -> dict[str, Any]:
    length = keys.get("seq_length", 2048)
    ffn = keys.get("intermediate_size", 0)
    if not isinstance(ffn, int) or ffn % 2:
        raise UserError(
            f"intermediate_size of a qwen model counts gate and up and must be even, found {ffn!r}"
        )
    return {
        "intermediate_size": ffn // 2 or None,
        "max_position_embeddings": max(length, keys.get("max_position_embeddings") or 0),
        "dynamic_ntk_length": length if keys.get("use_dynamic_ntk", True) else None,
        "logn_attention_length": length if keys.get("use_logn_attn", True) else None,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    length = config.dynamic_ntk_length or config.logn_attention_length
    return {
        "intermediate_size": 2 * config.intermediate_size,
        "seq_length": length or config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "use_dynamic_ntk": config.dynamic_ntk_length is not None,
        "use_logn_attn": config.logn_attention_length is not None,
    }


FAMILIES = (
    Family(
        name="qwen",
        architectures=("QWenLMHeadModel",),
        auto_map={
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        keys={
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "num_hidden_layers": "num_hidden_layers",
            "num_attention_heads": "num_attention_heads",
            "head_dim": "kv_channels",
            "norm_eps": "layer_norm_epsilon",
            "rope_theta": "rotary_emb_base",
            "initializer_range": "initializer_range",
            **TOKEN_IDS,
        },
        fields={"qkv_bias": True, "initialization": "scaled_residual"},
        fixed={
            "no_bias": True,
            "rotary_pct": 1.0,
            "scale_attn_weights": True,
            "tie_word_embeddings": False,
        },
        neutral={
            "apply_residual_connection_post_layernorm": (False,),
            "pos_emb": ("rotary",),
            "use_cache_quantization": (False,),
        },
        unused=(
            "bf16",
            "bias_dropout_fusion",
            "fp16",
            "fp32",
            "onnx_safe",
            "softmax_in_fp32",
            "use_cache_kernel",
            "use_flash_attn",
        ),
        dropouts=("attn_dropout_prob", "emb_dropout_prob"),
        weight_map=_weight_map,
        reads=(
            "seq_length",
            "intermediate_size",
            "max_position_embeddings",
            "use_dynamic_ntk",
            "use_logn_attn",
        ),
        read_more=_read,
        write_more=_write,
    ),
)
