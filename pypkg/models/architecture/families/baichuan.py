"""Baichuan and Baichuan 2 (Yang et al., 2023): LLaMA; ALiBi at 13B; a normalised head in version 2.

The original code has one class per size, and config.json does not contain the differences. They are
derived from the released sizes: vocab_size 125696 means Baichuan 2; hidden_size 5120, or a missing
max_position_embeddings, means ALiBi. For other sizes this package adds the keys ``norm_head`` and
``position_embedding``, which take precedence.
"""

from __future__ import annotations

from typing import Any

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.family import Family, Keys
from pypkg.models.architecture.llama_format import LLAMA_KEYS, llama_weight_map
from pypkg.models.architecture.weight_map import WeightMap

_BAICHUAN2_VOCABULARY = 125696
_ALIBI_HIDDEN_SIZE = 5120


def _weight_map(config: ModelConfig) -> WeightMap:
    return llama_weight_map(config, qkv=("W_pack",))


def _read(keys: Keys) -> dict[str, Any]:
    has_alibi = keys.get("hidden_size") == _ALIBI_HIDDEN_SIZE or not keys.get(
        "max_position_embeddings"
    )
    length = keys.get("max_position_embeddings") or keys.get("model_max_length")
    return {
        **({"max_position_embeddings": length} if length else {}),
        "position_embedding": keys.get("position_embedding", "alibi" if has_alibi else "rope"),
        "norm_head": keys.get("norm_head", keys.get("vocab_size") == _BAICHUAN2_VOCABULARY),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    is_first_7b = config.position_embedding == "rope" and not config.norm_head
    name = "BaiChuan" if is_first_7b else "Baichuan"
    return {
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_baichuan.{name}Config",
            "AutoModelForCausalLM": f"modeling_baichuan.{name}ForCausalLM",
        },
        "position_embedding": config.position_embedding,
        "norm_head": config.norm_head,
        "model_max_length": config.max_position_embeddings,
    }


FAMILIES = (
    Family(
        name="baichuan",
        architectures=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
        keys={
            key: key_there
            for key, key_there in LLAMA_KEYS.items()
            if key not in ("num_key_value_heads", "head_dim")
        },
        fixed={"hidden_act": "silu", "z_loss_weight": 0},
        neutral={"rope_theta": (10000.0,)},
        extensions={"num_key_value_heads": "num_key_value_heads"},
        weight_map=_weight_map,
        reads=("position_embedding", "norm_head", "model_max_length"),
        read_more=_read,
        write_more=_write,
    ),
)
