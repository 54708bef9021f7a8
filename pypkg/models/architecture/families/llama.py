"""LLaMA 1, 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024)."""

from __future__ import annotations

from typing import Any

from pypkg.errors import UserError
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

# PaddleNLP's rope_scaling_type -> rope_type. PaddleNLP's ntk changes rope_theta instead.
_PADDLENLP_SCALINGS = {"linear": "linear", "dynamic_ntk": "dynamic"}


def _read(keys: Keys) -> dict[str, Any]:
    has_bias = keys.get("attention_bias", False)
    return {
        "qkv_bias": has_bias,
        "attention_output_bias": has_bias,
        "position_embedding": "alibi" if keys.get("alibi") else "rope",
        **_read_rope(keys),
    }


def _read_rope(keys: Keys) -> dict[str, Any]:
    """``read_rope`` extended by PaddleNLP's keys.

    PaddleNLP's linear and dynamic_ntk are linear and dynamic of transformers. Its ntk multiplies
    the base by factor^(d / (d - 2)) with d = head_dim, for every sequence length.
    """
    kind, factor = keys.get("rope_scaling_type"), keys.get("rope_scaling_factor", 1.0)
    fields = read_rope(keys)
    if kind is None:
        return fields
    if fields["rope_scaling"]:
        raise UserError(
            f"rope_scaling_type is {kind!r} beside rope_scaling {fields['rope_scaling']!r}; keep "
            "one of them"
        )
    if kind == "ntk":
        width = keys.get("head_dim") or keys["hidden_size"] // keys["num_attention_heads"]
        return {**fields, "rope_theta": fields["rope_theta"] * factor ** (width / (width - 2))}
    if kind not in _PADDLENLP_SCALINGS:
        known = ", ".join((*_PADDLENLP_SCALINGS, "ntk"))
        raise UserError(f"rope_scaling_type {kind!r} is not supported; use one of {known}")
    return {**fields, "rope_scaling": {"rope_type": _PADDLENLP_SCALINGS[kind], "factor": factor}}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "attention_bias": config.qkv_bias,
        **({"alibi": True} if config.position_embedding == "alibi" else {}),
        **write_rope(config),
    }


FAMILIES = (
    Family(
        name="llama",
        architectures=("LlamaForCausalLM",),
        keys={**LLAMA_KEYS, "mlp_bias": "mlp_bias"},
        fixed={"hidden_act": "silu"},
        neutral={"rope_interleaved": (False,)},
        unused=("is_llama_config", "max_sequence_length", "pretraining_tp", "seq_length"),
        extensions={k: v for k, v in LLAMA_EXTENSIONS.items() if k != "mlp_bias"},
        dropouts=("attention_dropout",),
        weight_map=llama_weight_map,
        reads=(
            *ROPE_KEYS,
            "attention_bias",
            "alibi",
            "rope_scaling_type",
            "rope_scaling_factor",
        ),
        read_more=_read,
        write_more=_write,
    ),
)
