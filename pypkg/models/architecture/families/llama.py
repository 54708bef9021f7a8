"""LLaMA 1, 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024)."""

from __future__ import annotations

from typing import Any

from pypkg.models.architecture.family import Family, Keys
from pypkg.models.architecture.llama_format import (
    LLAMA_KEYS,
    llama_weight_map,
    read_rope,
    write_rope,
)


def _read(keys: Keys) -> dict[str, Any]:
    has_bias = keys.get("attention_bias", False)
    return {"qkv_bias": has_bias, "attention_output_bias": has_bias, **read_rope(keys)}


FAMILIES = (
    Family(
        name="llama",
        architectures=("LlamaForCausalLM",),
        keys={**LLAMA_KEYS, "mlp_bias": "mlp_bias"},
        fixed={"hidden_act": "silu"},
        dropouts=("attention_dropout",),
        weight_map=llama_weight_map,
        read_more=_read,
        write_more=lambda config: {"attention_bias": config.qkv_bias, **write_rope(config)},
    ),
)
