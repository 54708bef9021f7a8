"""Qwen3 (Yang et al., 2025): LLaMA with normalised query and key heads."""

from __future__ import annotations

from typing import Any

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.family import Family, Keys
from pypkg.models.architecture.llama_format import (
    LLAMA_EXTENSIONS,
    LLAMA_KEYS,
    ROPE_KEYS,
    WINDOW_KEYS,
    llama_weight_map,
    read_rope,
    read_window,
    write_rope,
    write_window,
)
from pypkg.models.architecture.weight_map import WeightMap

_HEAD_NORMS = {f"self_attn.{name}": f"self_attn.{name}" for name in ("q_norm", "k_norm")}


def _weight_map(config: ModelConfig) -> WeightMap:
    return llama_weight_map(config, layer_norms=_HEAD_NORMS)


def _read(keys: Keys) -> dict[str, Any]:
    has_bias = keys.get("attention_bias", False)
    return {
        "qkv_bias": has_bias,
        "attention_output_bias": has_bias,
        **read_rope(keys),
        **read_window(keys),
    }


FAMILIES = (
    Family(
        name="qwen3",
        architectures=("Qwen3ForCausalLM",),
        keys=LLAMA_KEYS,
        fields={"head_dim": 128, "qk_norm": True},
        fixed={"hidden_act": "silu"},
        extensions={k: v for k, v in LLAMA_EXTENSIONS.items() if k not in WINDOW_KEYS},
        dropouts=("attention_dropout",),
        weight_map=_weight_map,
        reads=(*ROPE_KEYS, *WINDOW_KEYS, "attention_bias"),
        read_more=_read,
        write_more=lambda config: {
            "attention_bias": config.qkv_bias,
            **write_rope(config),
            **write_window(config),
        },
    ),
)
