"""BLOOM (Scao et al., 2022): ALiBi, and a norm right after the embedding."""

from __future__ import annotations

from typing import Any

from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.family import TOKEN_IDS, Family, Keys
from pypkg.models.architecture.megatron_format import by_head, megatron_layers
from pypkg.models.architecture.weight_map import WeightMap, same_layout


def _weight_map(config: ModelConfig) -> WeightMap:
    weights = same_layout(
        {
            "embed_tokens": "transformer.word_embeddings",
            "embed_norm": "transformer.word_embeddings_layernorm",
            "norm": "transformer.ln_f",
            "lm_head": "lm_head",
        }
    )
    weights += megatron_layers(
        config, "transformer.h.{}.", "self_attention", qkv_packing=by_head(config)
    )
    ignored = [r"lm_head\.weight"] if config.tie_word_embeddings else []
    return WeightMap(weights, ignored, prefix="transformer.")


def _read(keys: Keys) -> dict[str, Any]:
    if keys.get("slow_but_exact") and keys.get("pretraining_tp", 1) > 1:
        raise UserError(
            f"slow_but_exact is true with pretraining_tp {keys['pretraining_tp']}, which the "
            "original implementation computes without some biases; set slow_but_exact to false"
        )
    hidden = keys.get("n_embed") or keys.get("hidden_size") or 0
    from_norm = keys.get("apply_residual_connection_post_layernorm", False)
    return {
        "intermediate_size": 4 * hidden or None,
        "residual": "normed" if from_norm else "pre",
    }


FAMILIES = (
    Family(
        name="bloom",
        architectures=("BloomForCausalLM",),
        keys={
            "vocab_size": "vocab_size",
            "hidden_size": ("hidden_size", "n_embed"),
            "num_hidden_layers": ("n_layer", "num_hidden_layers"),
            "num_attention_heads": ("n_head", "num_attention_heads"),
            "max_position_embeddings": "seq_length",
            "norm_eps": "layer_norm_epsilon",
            "tie_word_embeddings": "tie_word_embeddings",
            "initializer_range": "initializer_range",
            **TOKEN_IDS,
        },
        fields={
            "norm": "layer_norm",
            "norm_eps": 1e-5,
            "embedding_norm": True,
            "position_embedding": "alibi",
            "qkv_bias": True,
            "attention_output_bias": True,
            "mlp_bias": True,
            "activation": "gelu_tanh",
            "gated_mlp": False,
            "tie_word_embeddings": True,
            "initialization": "scaled_residual",
        },
        neutral={"skip_bias_add": (True,), "skip_bias_add_qkv": (False,)},
        unused=(
            "attention_softmax_in_fp32",
            "bias_dropout_fusion",
            "masked_softmax_fusion",
            "offset_alibi",
        ),
        dropouts=("attention_dropout", "hidden_dropout"),
        weight_map=_weight_map,
        reads=("apply_residual_connection_post_layernorm", "slow_but_exact", "pretraining_tp"),
        read_more=_read,
        write_more=lambda config: {
            "apply_residual_connection_post_layernorm": config.residual == "normed"
        },
    ),
)
