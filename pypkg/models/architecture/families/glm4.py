"""GLM-4 (GLM team, 2024) in transformers' own format, and its successor GLM-4-0414.

GLM-4-0414 also normalises the output of each branch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.family import Family, Keys
from pypkg.models.architecture.llama_format import (
    LLAMA_EXTENSIONS,
    LLAMA_KEYS,
    ROPE_KEYS,
    llama_weight_map,
    read_rope,
    write_rope,
)
from pypkg.models.architecture.weight_map import WeightMap

_BRANCH_NORMS = {
    "attention_branch_norm": "post_self_attn_layernorm",
    "mlp_branch_norm": "post_mlp_layernorm",
}


def _weight_map(config: ModelConfig) -> WeightMap:
    return llama_weight_map(config, gate_up=("gate_up_proj",), layer_norms=_BRANCH_NORMS)


def _read(keys: Keys) -> dict[str, Any]:
    has_bias = keys.get("attention_bias", True)
    return {"qkv_bias": has_bias, **read_rope(keys, rotated_fraction=0.5)}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "attention_bias": config.qkv_bias,
        "partial_rotary_factor": config.partial_rotary_factor,
        **write_rope(config),
    }


_family = partial(
    Family,
    keys=LLAMA_KEYS,
    fixed={"hidden_act": "silu"},
    extensions=LLAMA_EXTENSIONS,
    dropouts=("attention_dropout",),
    weight_map=_weight_map,
    reads=(*ROPE_KEYS, "attention_bias"),
    read_more=_read,
    write_more=_write,
)
_FIELDS = {
    "rope_interleaved": True,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "norm_eps": 1.5625e-07,
}
FAMILIES = (
    _family(name="glm", architectures=("GlmForCausalLM",), fields=_FIELDS),
    _family(
        name="glm4",
        architectures=("Glm4ForCausalLM",),
        fields={**_FIELDS, "branch_norm": True},
    ),
)
