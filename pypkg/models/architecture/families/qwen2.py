"""Qwen2 and Qwen2.5 (Yang et al., 2024): LLaMA with biases of query, key and value."""

from __future__ import annotations

from pypkg.models.architecture.family import Family
from pypkg.models.architecture.llama_format import (
    LLAMA_KEYS,
    llama_weight_map,
    read_rope,
    read_window,
    write_rope,
    write_window,
)

FAMILIES = (
    Family(
        name="qwen2",
        architectures=("Qwen2ForCausalLM",),
        keys=LLAMA_KEYS,
        fields={"qkv_bias": True},
        fixed={"hidden_act": "silu"},
        dropouts=("attention_dropout",),
        weight_map=llama_weight_map,
        read_more=lambda keys: {**read_rope(keys), **read_window(keys)},
        write_more=lambda config: {**write_rope(config), **write_window(config)},
    ),
)
