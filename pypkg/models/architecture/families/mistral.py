"""Mistral (Jiang et al., 2023): LLaMA with grouped queries and a sliding window."""

from __future__ import annotations

from pypkg.models.architecture.family import Family
from pypkg.models.architecture.llama_format import (
    LLAMA_EXTENSIONS,
    LLAMA_KEYS,
    ROPE_KEYS,
    llama_weight_map,
    read_rope,
    write_rope,
)

FAMILIES = (
    Family(
        name="mistral",
        architectures=("MistralForCausalLM",),
        keys=LLAMA_KEYS,
        fields={"num_key_value_heads": 8},
        fixed={"hidden_act": "silu"},
        extensions={
            **{k: v for k, v in LLAMA_EXTENSIONS.items() if k != "sliding_window"},
            "qkv_bias": "attention_bias",
            "attention_output_bias": "attention_bias",
        },
        dropouts=("attention_dropout",),
        weight_map=llama_weight_map,
        reads=(*ROPE_KEYS, "sliding_window"),
        # A missing key means a window of 4096, null means no window.
        read_more=lambda keys: {
            "sliding_window": keys.get("sliding_window", 4096),
            **read_rope(keys),
        },
        write_more=lambda config: {
            "sliding_window": config.sliding_window,
            **write_rope(config),
        },
    ),
)
