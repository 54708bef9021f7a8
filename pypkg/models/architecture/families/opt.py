"""OPT (Zhang et al., 2022). opt-350m has norms after its branches and a narrow embedding."""

from __future__ import annotations

from typing import Any

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.family import TOKEN_IDS, Family, Keys
from pypkg.models.architecture.weight_map import WeightMap, linear, same_layout


def _weight_map(config: ModelConfig) -> WeightMap:
    ours, theirs = "layers.{}.", "model.decoder.layers.{}."
    weights = same_layout(
        {
            "embed_tokens": "model.decoder.embed_tokens",
            "embed_positions": "model.decoder.embed_positions",
            f"{ours}input_layernorm": f"{theirs}self_attn_layer_norm",
            f"{ours}post_attention_layernorm": f"{theirs}final_layer_norm",
            "norm": "model.decoder.final_layer_norm",
            "lm_head": "lm_head",
        }
    )
    qkv = [f"{theirs}self_attn.{name}_proj" for name in "qkv"]
    weights += linear("project_in", "model.decoder.project_in")
    weights += linear("project_out", "model.decoder.project_out")
    weights += linear(f"{ours}self_attn.qkv_proj", qkv, [config.query_size] * 3)
    weights += linear(f"{ours}self_attn.o_proj", f"{theirs}self_attn.out_proj")
    weights += linear(f"{ours}mlp.up_proj", f"{theirs}fc1")
    weights += linear(f"{ours}mlp.down_proj", f"{theirs}fc2")
    ignored = [r"lm_head\.weight"] if config.tie_word_embeddings else []
    return WeightMap(weights, ignored, prefix="model.")


def _read(keys: Keys) -> dict[str, Any]:
    has_bias = keys.get("enable_bias", True)
    norms_before = keys.get("do_layer_norm_before", True)
    return {
        "residual": "pre" if norms_before else "post",
        "final_norm": bool(norms_before and not keys.get("_remove_final_layer_norm", False)),
        "qkv_bias": has_bias,
        "attention_output_bias": has_bias,
        "mlp_bias": has_bias,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    norms_before = config.residual == "pre"
    return {
        "do_layer_norm_before": norms_before,
        "_remove_final_layer_norm": norms_before and not config.final_norm,
        "enable_bias": config.qkv_bias,
    }


FAMILIES = (
    Family(
        name="opt",
        architectures=("OPTForCausalLM",),
        keys={
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "intermediate_size": "ffn_dim",
            "num_hidden_layers": "num_hidden_layers",
            "num_attention_heads": "num_attention_heads",
            "embedding_size": "word_embed_proj_dim",
            "max_position_embeddings": "max_position_embeddings",
            "activation": "activation_function",
            "tie_word_embeddings": "tie_word_embeddings",
            "initializer_range": "init_std",
            **TOKEN_IDS,
        },
        fields={
            "norm": "layer_norm",
            "norm_eps": 1e-5,
            "position_embedding": "learned",
            "position_offset": 2,
            "activation": "relu",
            "gated_mlp": False,
            "tie_word_embeddings": True,
            "initialization": "scaled_residual",
        },
        fixed={"layer_norm_elementwise_affine": True},
        unused=("type_vocab_size",),
        dropouts=("dropout", "attention_dropout", "layerdrop"),
        weight_map=_weight_map,
        reads=("do_layer_norm_before", "_remove_final_layer_norm", "enable_bias"),
        read_more=_read,
        write_more=_write,
    ),
)
