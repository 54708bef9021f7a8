"""The model format of PaddleNLP 3: config.json keys, tensor names and layouts.

PaddleNLP stores matrices as [in, out], Hugging Face as [out, in], including the matrix of an untied
head. Query, key and value may be fused (``fuse_attention_qkv``), and also gate and up projection
(``fuse_attention_ffn``). The fusion is visible in the tensor names, but not in config.json. Nothing
here imports Paddle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.paddlenlp_formats import FORMATS, Format, Keys, format_of
from pypkg.models.architecture.weight_map import Packing, Shape, Weight, WeightMap, linear

VERSION_KEY = "paddlenlp_version"
_VERSION = "3.0.0b4"  # the version that wrote the test fixtures
# Keys of Hugging Face folders that PaddleNLP does not read. A model that needs one is rejected.
_UNREAD = frozenset(
    {
        *("auto_map", "head_dim", "attention_bias", "mlp_bias", "rope_scaling", "rope_ratio"),
        *("use_sliding_window", "max_window_layers", "layer_types", "_remove_final_layer_norm"),
    }
)
_ROPE_TYPES = {"linear": "linear", "dynamic": "dynamic_ntk"}  # transformers -> PaddleNLP
_FUSED_QKV = "self_attn.qkv_proj.weight"
_FUSED_GATE_UP = "mlp.gate_up_fused_proj.weight"
_NO_PARAMETERS = (r"(.*\.)?rotary_(emb|pos_emb)\.inv_freq",)


def describes(keys: Keys) -> bool:
    """Whether the keys are those of a PaddleNLP config.json."""
    return VERSION_KEY in keys or any(_has_own_name(each, keys) for each in FORMATS)


def _has_own_name(each: Format, keys: Keys) -> bool:
    """Whether ``keys`` has a value of this format that no Hugging Face folder has."""
    own_type = each.model_type and keys.get("model_type") == each.model_type
    own_class = each.architecture in ("GPTForCausalLM", "ChatGLMv2ForCausalLM", "QWenForCausalLM")
    return bool(own_type or (own_class and each.architecture in (keys.get("architectures") or [])))


def huggingface_keys(keys: Keys) -> dict[str, Any]:
    """The Hugging Face keys that describe the same model as ``keys`` of a PaddleNLP config.json.

    Raises:
        UserError: the family or a value is not supported.
    """
    stored = _described(keys)
    for key, supported in stored.fixed.items():
        if keys.get(key) is not None and keys[key] != supported:
            raise UserError(
                f"{key} is {keys[key]!r}; a {stored.architecture} of PaddleNLP is read with "
                f"{supported!r}"
            )
    translated = {key: value for key, value in keys.items() if key not in stored.keys.values()}
    translated |= {ours: keys[theirs] for ours, theirs in stored.keys.items() if theirs in keys}
    translated |= {"model_type": stored.family, **stored.implied}
    translated.pop("architectures", None)
    return translated


def fields_of(keys: Keys) -> dict[str, Any]:
    """Fields of ModelConfig that PaddleNLP's config.json has and ``huggingface_keys`` lacks."""
    return _described(keys).fields(keys)


def _described(keys: Keys) -> Format:
    names = keys.get("architectures") or []
    for each in FORMATS:
        own_type = each.model_type or each.family
        if each.architecture in names or keys.get("model_type") == own_type:
            return each
    raise UserError(
        f"architectures {names} of PaddleNLP is not supported; supported are "
        f"{', '.join(each.architecture for each in FORMATS)}"
    )


def keys_of(family: str, huggingface: Keys, dtype: str) -> dict[str, Any]:
    """The inverse of ``huggingface_keys``, without keys that PaddleNLP does not read.

    Args:
        family: ``ModelConfig.model_type``.
        huggingface: the Hugging Face keys.
        dtype: of the weights.

    Raises:
        UserError: PaddleNLP does not have the family.
    """
    stored = _required(family)
    keys = {
        stored.keys.get(key, key): value
        for key, value in huggingface.items()
        if key not in {*_UNREAD, *stored.unread, *stored.implied}
    }
    scaling = huggingface.get("rope_scaling") or {}
    if scaling.get("rope_type") in _ROPE_TYPES:
        keys |= {
            "rope_scaling_type": _ROPE_TYPES[scaling["rope_type"]],
            "rope_scaling_factor": scaling["factor"],
        }
    return {
        **keys,
        **stored.fixed,
        "architectures": [stored.architecture],
        "model_type": stored.model_type or family,
        "dtype": dtype,
        VERSION_KEY: _VERSION,
    }


def weight_map(config: ModelConfig, huggingface: WeightMap, found: Iterable[str] = ()) -> WeightMap:
    """PaddleNLP's weight map.

    Args:
        huggingface: the weight map of the family's Hugging Face folders.
        found: tensor names of a checkpoint, which show whether matrices are fused, and whether it
            holds a model without its head (``LlamaModel``), whose names have no prefix. Empty:
            matrices are not fused, and the model has its head.

    Raises:
        UserError: PaddleNLP does not have the family.
    """
    stored = _required(config.model_type)
    names = list(found)
    has_qkv = any(name.endswith(_FUSED_QKV) for name in names)
    if stored.weights is not None:
        weights = stored.weights(config, has_qkv)
    else:
        weights = [_renamed(each, stored) for each in huggingface.weights]
        fused = _fused(
            config, stored.prefix, has_qkv, any(n.endswith(_FUSED_GATE_UP) for n in names)
        )
        weights = [fused.get(each.name, each) for each in weights]
    ignored = list(_NO_PARAMETERS)
    if config.tie_word_embeddings:
        ignored.append(r"lm_head\.(decoder_)?weight")
    turned = [_turned(each, config, stored) for each in weights]
    whole = WeightMap(turned, ignored, prefix=_model_prefix(stored))
    return whole.fitted_to(names) if names else whole


def _required(family: str) -> Format:
    stored = format_of(family)
    if stored is None:
        raise UserError(
            f"PaddleNLP has no {family} model; the families that it has are "
            f"{', '.join(each.family for each in FORMATS)}"
        )
    return stored


def is_stored_as(config: ModelConfig, huggingface: WeightMap, found: Mapping[str, Shape]) -> bool:
    """Whether the tensors ``found`` are in PaddleNLP's format.

    PaddleNLP's prefix of tensor names identifies it. A model without its head has no prefix, and
    its names may be those of a Hugging Face folder too. In that case the shape of a matrix that is
    not square decides.

    Args:
        config: of the model.
        huggingface: the weight map of the family's Hugging Face folders.
        found: shapes of the tensors by name.
    """
    stored = format_of(config.model_type)
    if stored is None:
        return False
    if any(name.startswith(_model_prefix(stored)) for name in found):
        return True
    shape = (config.intermediate_size, config.hidden_size)

    def fits(names: WeightMap) -> bool:
        sources = names.source_shapes("layers.0.mlp.down_proj.weight", shape)
        return sources.items() <= found.items()

    names = weight_map(config, huggingface, found)
    return fits(names) and not fits(huggingface.fitted_to(found))


def head_of(family: str) -> str:
    """Name of the tensor in which PaddleNLP also stores the head of a tied model; empty: none."""
    return _required(family).head


def _model_prefix(stored: Format) -> str:
    """The prefix of tensor names that a model without its head does not have."""
    return stored.prefix.partition(".")[0] + "."


def _renamed(weight: Weight, stored: Format) -> Weight:
    before = stored.huggingface_prefix
    sources = (
        stored.prefix + name.removeprefix(before) if name.startswith(before) else name
        for name in weight.sources
    )
    return replace(weight, sources=tuple(sources))


def _turned(weight: Weight, config: ModelConfig, stored: Format) -> Weight:
    has_own_head = not config.tie_word_embeddings and not stored.head
    own_head = weight.name == "lm_head.weight" and has_own_head
    return replace(weight, turned=weight.transpose or own_head)


def _fused(config: ModelConfig, prefix: str, qkv: bool, gate_up: bool) -> dict[str, Weight]:
    """The weight map entries of fused matrices, by parameter name."""
    ours, theirs = "layers.{}.", f"{prefix}layers.{{}}."
    queries = config.num_attention_heads // config.num_key_value_heads
    packing = Packing(config.num_key_value_heads, (0, 1, 2), (queries, 1, 1))
    weights = []
    if qkv:
        weights += linear(
            f"{ours}self_attn.qkv_proj", f"{theirs}self_attn.qkv_proj", packing=packing
        )
    if gate_up:
        weights += linear(f"{ours}mlp.gate_up_proj", f"{theirs}mlp.gate_up_fused_proj")
    return {weight.name: weight for weight in weights}
