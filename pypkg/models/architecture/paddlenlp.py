"""The model format of PaddleNLP 3: config.json keys, tensor names and layouts.

PaddleNLP stores matrices as [in, out], Hugging Face folders as [out, in]; this includes the matrix
of an untied head. Query, key and value may be fused (``fuse_attention_qkv``), and so may gate and
up projection (``fuse_attention_ffn``). The tensor names show the fusion; config.json does not.
Nothing here imports Paddle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.weight_map import Packing, Weight, WeightMap, linear, same_layout

Keys = Mapping[str, Any]

VERSION_KEY = "paddlenlp_version"
_VERSION = "3.0.0b4"  # the one that the fixtures come from
# Keys of Hugging Face folders that PaddleNLP does not read. A model that needs one is refused.
_UNREAD = frozenset(
    {
        *("auto_map", "head_dim", "attention_bias", "mlp_bias", "rope_scaling", "rope_ratio"),
        *("use_sliding_window", "max_window_layers", "layer_types", "_remove_final_layer_norm"),
    }
)
_ROPE_TYPES = {"linear": "linear", "dynamic": "dynamic_ntk"}  # of transformers, of PaddleNLP
_FUSED_QKV = "self_attn.qkv_proj.weight"
_FUSED_GATE_UP = "mlp.gate_up_fused_proj.weight"
_NO_PARAMETERS = (r".*\.rotary_(emb|pos_emb)\.inv_freq",)


@dataclass(frozen=True, kw_only=True)
class Format:
    """Names and keys of a family in PaddleNLP.

    Args:
        family: value of ``ModelConfig.model_type``.
        architecture: class name in config.json.
        model_type: value in config.json; empty: ``family``.
        prefix: prefix of PaddleNLP's tensor names, in place of ``huggingface_prefix``.
        keys: key in a Hugging Face config.json -> key in PaddleNLP's.
        implied: Hugging Face keys with the value that PaddleNLP's code always uses.
        fixed: PaddleNLP keys that affect the model, with the only supported value.
        unread: Hugging Face keys that PaddleNLP does not read, in addition to ``_UNREAD``.
        weights: returns the entries of the weight map; None: the names differ only in the prefix.
    """

    family: str
    architecture: str
    prefix: str
    huggingface_prefix: str = "model."
    model_type: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    weights: Callable[[ModelConfig, bool], list[Weight]] | None = None


def _gpt_weights(config: ModelConfig, is_fused: bool) -> list[Weight]:
    ours, theirs = "layers.{}.", "gpt.decoder.layers.{}."
    weights = same_layout(
        {
            "embed_tokens": "gpt.embeddings.word_embeddings",
            "embed_positions": "gpt.embeddings.position_embeddings",
            f"{ours}input_layernorm": f"{theirs}norm1",
            f"{ours}post_attention_layernorm": f"{theirs}norm2",
            "norm": "gpt.decoder.norm",
            "lm_head": "lm_head",
        }
    )
    return weights + _plain_layers(config, ours, theirs, is_fused)


def _opt_weights(config: ModelConfig, is_fused: bool) -> list[Weight]:
    ours, theirs = "layers.{}.", "opt.decoder.layers.{}."
    weights = same_layout(
        {
            "embed_tokens": "opt.embeddings.word_embeddings",
            "embed_positions": "opt.embeddings.position_embeddings",
            f"{ours}input_layernorm": f"{theirs}norm1",
            f"{ours}post_attention_layernorm": f"{theirs}norm2",
            "norm": "opt.decoder.final_layer_norm",
            "lm_head": "lm_head",
        }
    )
    weights += linear("project_in", "opt.embeddings.project_in")
    weights += linear("project_out", "opt.decoder.project_out")
    return weights + _plain_layers(config, ours, theirs, is_fused)


def _plain_layers(config: ModelConfig, ours: str, theirs: str, is_fused: bool) -> list[Weight]:
    attention = f"{theirs}self_attn."
    if is_fused:
        packing = Packing(config.num_attention_heads, (0, 1, 2))
        weights = linear(f"{ours}self_attn.qkv_proj", f"{attention}qkv_proj", packing=packing)
    else:
        qkv = [f"{attention}{name}_proj" for name in "qkv"]
        weights = linear(f"{ours}self_attn.qkv_proj", qkv, [config.query_size] * 3)
    weights += linear(f"{ours}self_attn.o_proj", f"{attention}out_proj")
    weights += linear(f"{ours}mlp.up_proj", f"{theirs}linear1")
    weights += linear(f"{ours}mlp.down_proj", f"{theirs}linear2")
    return weights


FORMATS = (
    Format(family="llama", architecture="LlamaForCausalLM", prefix="llama."),
    Format(family="mistral", architecture="MistralForCausalLM", prefix="mistral."),
    Format(
        family="qwen2",
        architecture="Qwen2ForCausalLM",
        prefix="qwen2.",
        unread=("sliding_window",),
    ),
    Format(
        family="qwen",
        architecture="QWenForCausalLM",
        prefix="qwen.",
        huggingface_prefix="transformer.",
    ),
    Format(
        family="bloom",
        architecture="BloomForCausalLM",
        prefix="bloom.",
        huggingface_prefix="transformer.",
        implied={"tie_word_embeddings": True},
    ),
    Format(
        family="chatglm",
        architecture="ChatGLMForCausalLM",
        prefix="chatglm.transformer.",
        huggingface_prefix="transformer.",
        keys={"num_layers": "num_hidden_layers"},
        implied={"tie_word_embeddings": True},
        # PaddleNLP computes the weight of the residual stream from the depth; the original does
        # not.
        fixed={"num_hidden_layers": 28},
    ),
    Format(
        family="chatglm2",
        architecture="ChatGLMv2ForCausalLM",
        model_type="chatglm_v2",
        prefix="chatglm_v2.",
        huggingface_prefix="transformer.",
        keys={
            "padded_vocab_size": "vocab_size",
            "num_layers": "num_hidden_layers",
            "seq_length": "max_sequence_length",
        },
        implied={"multi_query_attention": True, "model_type": "chatglm"},
    ),
    Format(
        family="gpt2",
        architecture="GPTForCausalLM",
        model_type="gpt",
        prefix="gpt.",
        keys={
            "n_embd": "hidden_size",
            "n_inner": "intermediate_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "n_positions": "max_position_embeddings",
            "attn_pdrop": "attention_probs_dropout_prob",
            "resid_pdrop": "hidden_dropout_prob",
        },
        # PaddleNLP passes approximate=True to GELU and epsilon=1e-5 to norms, for any key values.
        implied={
            "tie_word_embeddings": True,
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
        },
        fixed={"normalize_before": True, "scale_qk_coeff": 1.0, "hidden_activation": "gelu"},
        weights=_gpt_weights,
    ),
    Format(
        family="opt",
        architecture="OPTForCausalLM",
        prefix="opt.",
        keys={
            "ffn_dim": "intermediate_size",
            "activation_function": "hidden_act",
            "do_layer_norm_before": "normalize_before",
            "init_std": "initializer_range",
            "dropout": "hidden_dropout_prob",
            "attention_dropout": "attention_probs_dropout_prob",
        },
        implied={"tie_word_embeddings": True},
        weights=_opt_weights,
    ),
)


def format_of(family: str) -> Format | None:
    """The format of a family (``ModelConfig.model_type``); None if PaddleNLP lacks the family."""
    return next((each for each in FORMATS if each.family == family), None)


def describes(keys: Keys) -> bool:
    """Whether the keys are those of a PaddleNLP config.json."""
    return VERSION_KEY in keys or any(_has_own_name(each, keys) for each in FORMATS)


def _has_own_name(each: Format, keys: Keys) -> bool:
    """Whether ``keys`` identify the format with a value that no Hugging Face folder has."""
    own_type = each.model_type and keys.get("model_type") == each.model_type
    own_class = each.architecture in ("GPTForCausalLM", "ChatGLMv2ForCausalLM", "QWenForCausalLM")
    return bool(own_type or (own_class and each.architecture in (keys.get("architectures") or [])))


def huggingface_keys(keys: Keys) -> dict[str, Any]:
    """The Hugging Face keys that describe the same model as ``keys`` of a PaddleNLP config.json.

    Raises:
        UserError: Hugging Face or PaddleNLP lacks the family, or a value is not supported.
    """
    names = keys.get("architectures") or []
    found = [
        each
        for each in FORMATS
        if each.architecture in names or keys.get("model_type") == (each.model_type or each.family)
    ]
    if not found:
        raise UserError(
            f"architectures {names} of PaddleNLP is not supported; supported are "
            f"{', '.join(each.architecture for each in FORMATS)}"
        )
    stored = found[0]
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


def keys_of(family: str, huggingface: Keys, dtype: str) -> dict[str, Any]:
    """The inverse of ``huggingface_keys``, without keys that PaddleNLP does not read.

    Raises:
        UserError: PaddleNLP lacks the family.
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
        huggingface: the map of the family's Hugging Face folder.
        found: tensor names of a checkpoint, which show whether matrices are fused; empty: they are
            not.

    Raises:
        UserError: PaddleNLP lacks the family.
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
    return WeightMap([_turned(each, config) for each in weights], ignored)


def _required(family: str) -> Format:
    stored = format_of(family)
    if stored is None:
        raise UserError(
            f"PaddleNLP has no {family} model; the families of both are "
            f"{', '.join(each.family for each in FORMATS)}"
        )
    return stored


def is_stored_as(config: ModelConfig, found: Iterable[str]) -> bool:
    """Whether ``found``, tensor names, are PaddleNLP's names for the family of ``config``."""
    stored = format_of(config.model_type)
    return stored is not None and any(name.startswith(stored.prefix) for name in found)


def _renamed(weight: Weight, stored: Format) -> Weight:
    before = stored.huggingface_prefix
    sources = (
        stored.prefix + name.removeprefix(before) if name.startswith(before) else name
        for name in weight.sources
    )
    return replace(weight, sources=tuple(sources))


def _turned(weight: Weight, config: ModelConfig) -> Weight:
    own_head = weight.name == "lm_head.weight" and not config.tie_word_embeddings
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
