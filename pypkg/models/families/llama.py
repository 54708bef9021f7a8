"""LLaMA 1, 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pypkg.errors import UserError
from pypkg.models.config import ModelConfig, rope_from_huggingface
from pypkg.models.weights import Weight, WeightMap

MODEL_TYPE = "llama"
ARCHITECTURES = ("LlamaForCausalLM",)

# Fields whose key in config.json has the same name.
_SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "mlp_bias",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_REQUIRED = _SAME_NAME[:5]
# Keys that change the computation, with the only value that is supported.
_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0}


def read_config(keys: Mapping[str, Any]) -> ModelConfig:
    """A config.json of either form, transformers 4 or 5."""
    if missing := [key for key in _REQUIRED if keys.get(key) is None]:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    for key, supported in _FIXED.items():
        if keys.get(key, supported) != supported:
            raise UserError(f"{key} is {keys[key]!r}; a {MODEL_TYPE} model needs {supported!r}")
    fields = {key: keys[key] for key in _SAME_NAME if keys.get(key) is not None}
    has_bias = keys.get("attention_bias", False)
    return ModelConfig(
        model_type=MODEL_TYPE,
        qkv_bias=has_bias,
        attention_output_bias=has_bias,
        **fields,
        **rope_from_huggingface(keys),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of ``config``, in the form of transformers 4, which 5 reads as well."""
    if config.qkv_bias != config.attention_output_bias:
        raise UserError(
            f"qkv_bias ({config.qkv_bias}) and attention_output_bias "
            f"({config.attention_output_bias}) differ; a {MODEL_TYPE} config.json has one key, "
            "attention_bias, for both"
        )
    return {
        **{key: getattr(config, key) for key in _SAME_NAME},
        **_FIXED,
        "attention_bias": config.qkv_bias,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
    }


def weight_map(config: ModelConfig) -> WeightMap:
    """Where the tensors of a checkpoint go."""
    layer = "model.layers.{i}"
    weights = [
        Weight("embed_tokens.weight", ("model.embed_tokens.weight",)),
        Weight("norm.weight", ("model.norm.weight",)),
        Weight("lm_head.weight", ("lm_head.weight",)),
    ]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        weights.append(Weight(f"layers.{{i}}.{norm}.weight", (f"{layer}.{norm}.weight",)))
    qkv_sizes = (config.query_size, config.key_value_size, config.key_value_size)
    gate_up_sizes = (config.intermediate_size, config.intermediate_size)
    for ours, theirs, sizes in (
        ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"), qkv_sizes),
        ("self_attn.o_proj", ("o_proj",), ()),
        ("mlp.gate_up_proj", ("gate_proj", "up_proj"), gate_up_sizes),
        ("mlp.down_proj", ("down_proj",), ()),
    ):
        block = ours.partition(".")[0]
        for kind in ("weight", "bias"):
            sources = tuple(f"{layer}.{block}.{name}.{kind}" for name in theirs)
            weights.append(
                Weight(f"layers.{{i}}.{ours}.{kind}", sources, sizes, transpose=kind == "weight")
            )
    # Old exports carry the rotary frequencies; a tied head may be stored a second time.
    ignored = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
    if config.tie_word_embeddings:
        ignored.append(r"lm_head\.weight")
    return WeightMap(weights, ignored)
