"""GLM-130B (Zeng et al., 2022): DeepNorm, GEGLU, a prefix language model.

The original implementation, SwissArmyTransformer, has no config.json. The keys are its command-line
options (configs/model_glm_130b.sh) with underscores, and ``embedding_gradient_scale``: the
embedding layer gradient shrink of the paper, 0.1 there.
"""

from __future__ import annotations

from typing import Any

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.family import TOKEN_IDS, Family, Keys
from pypkg.models.architecture.megatron_format import by_head, megatron_layers
from pypkg.models.architecture.weight_map import Packing, WeightMap, same_layout


def _weight_map(config: ModelConfig) -> WeightMap:
    weights = same_layout(
        {
            "embed_tokens": "transformer.word_embeddings",
            "norm": "transformer.final_layernorm",
        }
    )
    weights += megatron_layers(
        config,
        "transformer.layers.{}.",
        qkv_packing=by_head(config),
        gate_up_packing=Packing(1, (1, 0)),
    )
    return WeightMap(weights, [r"mixins\.rotary-embedding\.rotary_emb\.inv_freq"])


def _read(keys: Keys) -> dict[str, Any]:
    layers = keys.get("num_layers")
    return {"residual_alpha": (2 * layers) ** 0.5} if isinstance(layers, int) else {}


FAMILIES = (
    Family(
        name="glm-130b",
        keys={
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "intermediate_size": "inner_hidden_size",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_attention_heads",
            "max_position_embeddings": "max_sequence_length",
            "norm_eps": "layernorm_epsilon",
            "embedding_gradient_scale": "embedding_gradient_scale",
            "sop_token_id": "sop_token_id",
            "gmask_token_id": "gmask_token_id",
            "mask_token_id": "mask_token_id",
            **TOKEN_IDS,
            "eos_token_id": "eop_token_id",
        },
        fields={
            "norm": "layer_norm",
            "norm_eps": 1e-5,
            "residual": "normed",
            "prefix_lm": True,
            "qkv_bias": True,
            "attention_output_bias": True,
            "mlp_bias": True,
            "activation": "gelu",
            "tie_word_embeddings": True,
            "initialization": "deepnorm",
        },
        fixed={"layernorm_order": "post"},
        neutral={"tie_word_embeddings": (True,), "use_bias": (True,)},
        unused=("bf16", "fp16", "model_parallel_size"),
        weight_map=_weight_map,
        read_more=_read,
    ),
)
