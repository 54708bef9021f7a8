"""The config.json keys and tensor names of LLaMA, which later families share.

Nothing here imports Paddle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pypkg.errors import UserError
from pypkg.models.architecture.checks import FULL_ATTENTION, SLIDING_ATTENTION
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.family import TOKEN_IDS, Keys
from pypkg.models.architecture.weight_map import WeightMap, linear, same_layout

# Field of ModelConfig -> key in config.json.
LLAMA_KEYS = {
    name: name
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "tie_word_embeddings",
        "initializer_range",
    )
} | {"norm_eps": "rms_norm_eps", **TOKEN_IDS}
# Features of the decoder that the original implementations do not read from config.json.
LLAMA_EXTENSIONS = {
    "sliding_window": "sliding_window",
    "layer_types": "layer_types",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "mlp_bias": "mlp_bias",
}
# The keys that read_rope and read_window read, in addition to those of the sizes.
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def llama_weight_map(
    config: ModelConfig,
    qkv: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    gate_up: Sequence[str] = ("gate_proj", "up_proj"),
    layer_norms: Mapping[str, str] | None = None,
) -> WeightMap:
    """The weight map of a family in the format of LLaMA.

    Args:
        qkv: names below ``self_attn``: one per projection, or one for query | key | value.
        gate_up: names below ``mlp``: one per projection, or one for gate | up.
        layer_norms: name of a norm in a layer here -> name in the checkpoint.
    """
    ours, theirs = "layers.{}.", "model.layers.{}."
    norms = {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        **(layer_norms or {}),
    }
    weights = same_layout(
        {
            "embed_tokens": "model.embed_tokens",
            **{f"{ours}{norm}": f"{theirs}{name}" for norm, name in norms.items()},
            "norm": "model.norm",
            "lm_head": "lm_head",
        }
    )
    sizes = (config.query_size, config.key_value_size, config.key_value_size)
    weights += linear(
        f"{ours}self_attn.qkv_proj",
        [f"{theirs}self_attn.{name}" for name in qkv],
        sizes if len(qkv) > 1 else (),
    )
    weights += linear(f"{ours}self_attn.o_proj", f"{theirs}self_attn.o_proj")
    weights += linear(
        f"{ours}mlp.gate_up_proj",
        [f"{theirs}mlp.{name}" for name in gate_up],
        [config.intermediate_size] * 2 if len(gate_up) > 1 else (),
    )
    weights += linear(f"{ours}mlp.down_proj", f"{theirs}mlp.down_proj")
    # Old exports contain the rotary frequencies. A tied head may be stored twice.
    ignored = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
    if config.tie_word_embeddings:
        ignored.append(r"lm_head\.weight")
    return WeightMap(weights, ignored, prefix="model.")


def read_rope(keys: Keys, rotated_fraction: float = 1.0) -> dict[str, Any]:
    """The fields of the rotary embedding.

    transformers 4 writes ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor``.
    transformers 5 writes all of them into ``rope_parameters``. If a file has both ``rope_scaling``
    and ``rope_parameters``, only ``rope_scaling`` is used, as in transformers 5.

    Args:
        rotated_fraction: the family's default of partial_rotary_factor. 1.0: the family supports
            no other value.

    Raises:
        UserError: a value has the wrong type, or the model does not support a partial rotation.
    """
    scaling = keys.get("rope_scaling") or keys.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise UserError(f"rope_scaling must be an object or null, found {scaling!r}")
    values = {key: value for key, value in {**keys, **scaling}.items() if value is not None}
    fraction = values.get("partial_rotary_factor", rotated_fraction)
    if fraction != 1.0 and rotated_fraction == 1.0:
        raise UserError(f"partial_rotary_factor must be 1.0 for this model, found {fraction!r}")
    return {
        "rope_theta": values.get("rope_theta", 10000.0),
        "rope_scaling": dict(scaling),
        "partial_rotary_factor": fraction,
    }


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The keys of ``read_rope`` as in transformers 4, without partial_rotary_factor."""
    return {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}


def read_window(keys: Keys) -> dict[str, Any]:
    """The fields of the sliding window, which applies only if ``use_sliding_window`` is true.

    ``max_window_layers`` is the number of layers before the first one with a window.
    ``layer_types``, which transformers 5 writes, takes precedence over it.
    """
    types = keys.get("layer_types")
    if not keys.get("use_sliding_window") or keys.get("sliding_window") is None:
        return {"layer_types": types}
    if types is None:
        first = keys.get("max_window_layers", 28)
        types = [
            SLIDING_ATTENTION if layer >= first else FULL_ATTENTION
            for layer in range(keys.get("num_hidden_layers", 0))
        ]
    return {"sliding_window": keys["sliding_window"], "layer_types": types}


def write_window(config: ModelConfig) -> dict[str, Any]:
    """The keys from which ``read_window`` reads the fields of ``config``."""
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": config.layer_types.count(FULL_ATTENTION),
        "layer_types": list(config.layer_types),
    }
