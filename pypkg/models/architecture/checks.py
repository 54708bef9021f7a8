"""Checks of the fields of ``ModelConfig``: types, choices, and contradictions between fields."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from pypkg.errors import UserError

_Choice = TypeVar("_Choice")

# Required and optional keys of each rope scaling. The formulas are in positions.py.
_ROPE_SCALING_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset(
            {
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            }
        ),
        frozenset(),
    ),
    "yarn": (
        frozenset(),
        frozenset(
            {
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            }
        ),
    ),
}
# Further keys in files. They repeat other fields, or no formula reads them.
_ROPE_SCALING_IGNORED = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "embedding_size",
    "max_position_embeddings",
)
_POSITIVE_NUMBERS = (
    "norm_eps",
    "residual_alpha",
    "rope_theta",
    "partial_rotary_factor",
    "embedding_gradient_scale",
    "initializer_range",
)
_OPTIONAL_NUMBERS = ("query_pre_attn_scalar", "attn_logit_softcapping")
_CHOICES = {
    "norm": ("rms_norm", "layer_norm"),
    "residual": ("pre", "post", "normed"),
    "position_embedding": ("rope", "alibi", "learned", "none"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    "initialization": ("normal", "scaled_residual", "deepnorm"),
}
_FLAGS = (
    "embedding_norm",
    "branch_norm",
    "final_norm",
    "qk_norm",
    "rope_interleaved",
    "position_encoding_2d",
    "prefix_lm",
    "qkv_bias",
    "attention_output_bias",
    "mlp_bias",
    "gated_mlp",
    "tie_word_embeddings",
    "norm_head",
)
_OPTIONAL_SIZES = ("sliding_window", "dynamic_ntk_length", "logn_attention_length")
_COUNTS = ("position_offset",)
_TOKEN_IDS = (
    "bos_token_id",
    "pad_token_id",
    "sop_token_id",
    "gmask_token_id",
    "mask_token_id",
)
_NO_TOKEN_ID = "{} must be {}, found {!r}; leave it out or set it to null if there is no such token"
# Far above every real model, and low enough that a configuration fits into memory.
_MOST_LAYERS, _LARGEST_SIZE, _MOST_PARAMETERS = 10_000, 2**31 - 1, 10**14
FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"
_LAYER_TYPES = (FULL_ATTENTION, SLIDING_ATTENTION)


def chosen(name: str, value: str, choices: Mapping[str, _Choice]) -> _Choice:
    """``choices[value]`` for the value of the field ``name``.

    Raises:
        UserError: ``value`` is not a key of ``choices``. The message names field, value and keys.
    """
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, found {value!r}")
    return choices[value]


def check_size(name: str, value: Any) -> None:
    """Raises UserError unless ``value`` is a positive integer up to the limit of the field."""
    _check_integer(name, value, 1, "a positive integer")
    largest = _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST_SIZE
    if value > largest:
        raise UserError(f"{name} must be at most {largest:,}, found {value:,}")


def check_num_parameters(number: int) -> None:
    """Raises UserError if a model has more than 10^14 parameters."""
    if number > _MOST_PARAMETERS:
        raise UserError(
            f"the sizes in config.json make a model of {number:.2e} parameters; at most "
            f"{_MOST_PARAMETERS:.0e} are possible. Check vocab_size, hidden_size, "
            "intermediate_size and num_hidden_layers"
        )


def check_types(values: Mapping[str, Any]) -> None:
    """Raises UserError if a field has the wrong type or is not one of its choices.

    Args:
        values: every field of ModelConfig by name.
    """
    for name in _SIZES:
        check_size(name, values[name])
    for name in _OPTIONAL_SIZES:
        if values[name] is not None:
            check_size(name, values[name])
    for name in _COUNTS:
        _check_integer(name, values[name], 0, "an integer from 0 on")
    for name in _FLAGS:
        if not isinstance(values[name], bool):
            raise UserError(f"{name} must be true or false, found {values[name]!r}")
    for name in _POSITIVE_NUMBERS:
        _check_positive_number(name, values[name])
    if values["partial_rotary_factor"] > 1:
        raise UserError(
            f"partial_rotary_factor ({values['partial_rotary_factor']!r}) must be at most 1"
        )
    for name in _OPTIONAL_NUMBERS:
        if values[name] is not None:
            _check_positive_number(name, values[name])
    for name in _TOKEN_IDS:
        if values[name] is not None and not _is_token_id(values[name]):
            raise UserError(_NO_TOKEN_ID.format(name, "an integer from 0 on", values[name]))
    ends = values["eos_token_id"]
    if not all(map(_is_token_id, _listed(ends))):
        wanted = "an integer from 0 on or a list of them"
        raise UserError(_NO_TOKEN_ID.format("eos_token_id", wanted, ends))
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise UserError(f"{name} must be one of {', '.join(choices)}, found {values[name]!r}")
    types = values["layer_types"]
    if types is not None and (
        not isinstance(types, (list, tuple)) or any(each not in _LAYER_TYPES for each in types)
    ):
        raise UserError(
            f"layer_types must be a list of {' and '.join(_LAYER_TYPES)}, found {types!r}"
        )


def _is_token_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _listed(value: Any) -> list[Any]:
    """``value`` as a list: empty for None, with one element for a single value."""
    return [] if value is None else value if isinstance(value, list) else [value]


def check_consistency(values: Mapping[str, Any], rotary_dim: int) -> None:
    """Raises UserError if fields, each valid by itself, contradict each other.

    Args:
        values: every field of ModelConfig by name.
        rotary_dim: ``ModelConfig.rotary_dim``.
    """
    heads, key_value_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % key_value_heads:
        raise UserError(
            f"num_attention_heads ({heads}) is not divisible by num_key_value_heads "
            f"({key_value_heads}); use a divisor of {heads}"
        )
    _check_layer_types(values)
    if values["position_embedding"] == "rope":
        _check_rotary(values, rotary_dim)
    if values["gated_mlp"] and values["activation"] == "relu":
        raise UserError("activation relu with gated_mlp is not supported; use silu or gelu")
    if values["norm_head"] and values["tie_word_embeddings"]:
        raise UserError("norm_head needs a head of its own; set tie_word_embeddings to false")
    if values["mup_base_width"] is not None:
        _check_mup(values)
    if values["prefix_lm"] and None in (
        values["sop_token_id"],
        values["gmask_token_id"],
        values["mask_token_id"],
    ):
        raise UserError("prefix_lm needs sop_token_id, gmask_token_id and mask_token_id")


def _check_mup(values: Mapping[str, Any]) -> None:
    width = values["mup_base_width"]
    check_size("mup_base_width", width)
    if values["tie_word_embeddings"]:
        raise UserError(
            f"mup_base_width is {width}, but muP scales weights and learning rate of the head and "
            "not those of the embedding, and they are tied; set tie_word_embeddings to false, or "
            "leave mup_base_width out"
        )
    if values["initialization"] == "deepnorm":
        raise UserError(
            f"mup_base_width is {width}, but the family's initialization, deepnorm, already "
            "depends on the width; leave mup_base_width out"
        )


def _check_layer_types(values: Mapping[str, Any]) -> None:
    if len(values["layer_types"]) != values["num_hidden_layers"]:
        raise UserError(
            f"layer_types names {len(values['layer_types'])} layers, but num_hidden_layers is "
            f"{values['num_hidden_layers']}; give one type for each layer"
        )
    if SLIDING_ATTENTION in values["layer_types"] and values["sliding_window"] is None:
        raise UserError(
            f"layer_types has {SLIDING_ATTENTION}, but sliding_window is None; give the number of "
            f"tokens that such a layer sees, or use only {FULL_ATTENTION}"
        )


def _check_rotary(values: Mapping[str, Any], rotary_dim: int) -> None:
    head_dim, fraction = values["head_dim"], values["partial_rotary_factor"]
    if head_dim % 2:
        raise UserError(
            f"head_dim ({head_dim}) is odd, but rotary position embedding rotates pairs of "
            f"dimensions; with hidden_size {values['hidden_size']} and num_attention_heads "
            f"{values['num_attention_heads']}, choose sizes that make it even"
        )
    if rotary_dim % 2 or rotary_dim < 2:
        raise UserError(
            f"partial_rotary_factor ({fraction}) of head_dim "
            f"({head_dim}) must be an even number of dimensions, at least 2 and at most all"
        )
    if values["position_encoding_2d"] and (
        head_dim % 4 or fraction != 1 or not values["prefix_lm"]
    ):
        raise UserError(
            f"position_encoding_2d needs prefix_lm true, partial_rotary_factor 1 and a head_dim "
            f"that is a multiple of 4, found {values['prefix_lm']}, {fraction} and {head_dim}; it "
            "rotates one half of a head by position and the other by block position"
        )


def _check_integer(name: str, value: Any, minimum: int, expected: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise UserError(f"{name} must be {expected}, found {value!r}")


def _check_positive_number(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= sys.float_info.max:  # false for NaN too
        raise UserError(f"{name} must be a positive number, found {value!r}")


def normalised_rope_scaling(scaling: Any, max_positions: int) -> dict[str, Any] | None:
    """``scaling`` with its type under ``rope_type`` and without keys that no formula reads.

    Args:
        scaling: ``rope_scaling`` of a config.json, or None.
        max_positions: ``max_position_embeddings``, the default of the trained length.

    Raises:
        UserError: the type is unknown, or a key is missing, unknown or has a wrong value.
    """
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise UserError(f"rope_scaling must be an object or null, found {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_SCALING_KEYS:
        known = ", ".join(_ROPE_SCALING_KEYS)
        raise UserError(f"rope_scaling type {kind!r} is not supported; use one of {known}")
    required, optional = _ROPE_SCALING_KEYS[kind]
    values = {
        key: value
        for key, value in scaling.items()
        if key not in _ROPE_SCALING_IGNORED and value is not None
    }
    if kind in (
        "default",
        "linear",
        "dynamic",
    ):  # some files hold these keys; the types ignore them
        values.pop("original_max_position_embeddings", None)
    if missing := sorted(required - set(values)):
        raise UserError(f"rope_scaling of type {kind} lacks {', '.join(missing)}")
    if unknown := sorted(set(values) - required - optional):
        raise UserError(
            f"rope_scaling of type {kind} does not know {', '.join(unknown)}; it takes "
            f"{', '.join(sorted(required | optional))}"
        )
    if kind == "default":
        return None
    for key in sorted(set(values) - {"truncate"}):
        _check_positive_number(f"rope_scaling.{key}", values[key])
    if kind == "yarn":
        values.setdefault("original_max_position_embeddings", max_positions)
        values.setdefault("factor", max_positions / values["original_max_position_embeddings"])
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise UserError(
            f"rope_scaling.high_freq_factor ({values['high_freq_factor']}) must be above "
            f"low_freq_factor ({values['low_freq_factor']})"
        )
    return {"rope_type": kind, **values}
