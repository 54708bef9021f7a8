"""ChatGLM2-6B and ChatGLM3-6B: multi-query attention, half of each head rotated in pairs."""

from __future__ import annotations

from typing import Any

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.family import TOKEN_IDS, Family, Keys
from pypkg.models.architecture.megatron_format import megatron_layers
from pypkg.models.architecture.weight_map import WeightMap, same_layout

_ROPE_BASE = 10000.0


def _weight_map(config: ModelConfig) -> WeightMap:
    weights = same_layout(
        {
            "embed_tokens": "transformer.embedding.word_embeddings",
            "norm": "transformer.encoder.final_layernorm",
            "lm_head": "transformer.output_layer",
        }
    )
    weights += megatron_layers(config, "transformer.encoder.layers.{}.", "self_attention")
    return WeightMap(weights, [r"transformer\.rotary_pos_emb\.inv_freq"])


def _read(keys: Keys) -> dict[str, Any]:
    has_bias = keys.get("add_bias_linear", False)
    from_norm = keys.get("apply_residual_connection_post_layernorm", False)
    groups = keys.get("multi_query_group_num") if keys.get("multi_query_attention") else None
    return {
        "num_key_value_heads": groups,
        "norm": "rms_norm" if keys.get("rmsnorm", True) else "layer_norm",
        "residual": "normed" if from_norm else "pre",
        "qkv_bias": bool(has_bias or keys.get("add_qkv_bias", False)),
        "attention_output_bias": has_bias,
        "mlp_bias": has_bias,
        "rope_theta": _ROPE_BASE * (keys.get("rope_ratio") or 1),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "multi_query_attention": config.num_key_value_heads != config.num_attention_heads,
        "multi_query_group_num": config.num_key_value_heads,
        "rmsnorm": config.norm == "rms_norm",
        "apply_residual_connection_post_layernorm": config.residual == "normed",
        "add_qkv_bias": config.qkv_bias,
        "add_bias_linear": config.mlp_bias,
        "rope_ratio": config.rope_theta / _ROPE_BASE,
    }


FAMILIES = (
    Family(
        name="chatglm2",
        model_type="chatglm",
        architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
        auto_map={
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        },
        distinctive_key="padded_vocab_size",
        keys={
            "vocab_size": ("padded_vocab_size", "vocab_size"),
            "hidden_size": "hidden_size",
            "intermediate_size": "ffn_hidden_size",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_attention_heads",
            "head_dim": "kv_channels",
            "max_position_embeddings": "seq_length",
            "norm_eps": "layernorm_epsilon",
            "final_norm": "post_layer_norm",
            **TOKEN_IDS,
        },
        fields={
            "norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "rope_interleaved": True,
        },
        fixed={
            "original_rope": True,
            "fp32_residual_connection": False,
            "tie_word_embeddings": False,
        },
        neutral={"interleaved_qkv": (False,), "pre_seq_len": (), "quantization_bit": (0,)},
        unused=(
            "apply_query_key_layer_scaling",
            "attention_softmax_in_fp32",
            "bias_dropout_fusion",
            "hidden_size_per_head",
            "prefix_projection",
        ),
        dropouts=("attention_dropout", "hidden_dropout"),
        weight_map=_weight_map,
        reads=(
            "multi_query_attention",
            "multi_query_group_num",
            "rmsnorm",
            "apply_residual_connection_post_layernorm",
            "add_qkv_bias",
            "add_bias_linear",
            "rope_ratio",
        ),
        read_more=_read,
        write_more=_write,
    ),
)
