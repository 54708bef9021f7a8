"""StableLM (Stability AI, 2023): LLaMA with layer norms and a rotated quarter of each head.

Sizes with ``use_parallel_residual`` or ``qk_layernorm``, such as stablelm-2-12b, are rejected.
"""

from __future__ import annotations

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

_KEYS = {field: key for field, key in LLAMA_KEYS.items() if field != "head_dim"}


def _read(keys: Keys) -> dict[str, Any]:
    return read_rope(keys, rotated_fraction=0.25)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"partial_rotary_factor": config.partial_rotary_factor, **write_rope(config)}


FAMILIES = (
    Family(
        name="stablelm",
        architectures=("StableLmForCausalLM",),
        keys={**_KEYS, "norm_eps": "layer_norm_eps", "qkv_bias": "use_qkv_bias"},
        fields={"norm": "layer_norm", "norm_eps": 1e-5},
        fixed={"hidden_act": "silu"},
        neutral={"qk_layernorm": (False,), "use_parallel_residual": (False,)},
        extensions=LLAMA_EXTENSIONS,
        weight_map=llama_weight_map,
        reads=ROPE_KEYS,
        read_more=_read,
        write_more=_write,
    ),
)
