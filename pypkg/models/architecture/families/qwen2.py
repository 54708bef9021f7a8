"""Qwen2 and Qwen2.5 (Yang et al., 2024): LLaMA with biases of query, key and value."""

from __future__ import annotations

from pypkg.models.architecture.family import Family
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

FAMILIES = (
    Family(
        name="qwen2",
        architectures=("Qwen2ForCausalLM",),
        keys=LLAMA_KEYS,
        fields={"qkv_bias": True},
        fixed={"hidden_act": "silu"},
        neutral={"rope_scaling_type": (), "use_mrope": (False,)},
        unused=("rope_scaling_factor", "seq_length"),
        extensions={k: v for k, v in LLAMA_EXTENSIONS.items() if k not in WINDOW_KEYS},
        dropouts=("attention_dropout",),
        weight_map=llama_weight_map,
        reads=(*ROPE_KEYS, *WINDOW_KEYS),
        read_more=lambda keys: {**read_rope(keys), **read_window(keys)},
        write_more=lambda config: {**write_rope(config), **write_window(config)},
    ),
)
