"""GPT-2 and GPT-3 (Radford et al., 2019; Brown et al., 2020) in the format of GPT-2."""

from __future__ import annotations

from typing import Any

from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.family import TOKEN_IDS, Family, Keys
from pypkg.models.architecture.weight_map import WeightMap, linear, same_layout

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


def _weight_map(config: ModelConfig) -> WeightMap:
    ours, theirs = "layers.{}.", "transformer.h.{}."
    weights = same_layout(
        {
            "embed_tokens": "transformer.wte",
            "embed_positions": "transformer.wpe",
            f"{ours}input_layernorm": f"{theirs}ln_1",
            f"{ours}post_attention_layernorm": f"{theirs}ln_2",
            "norm": "transformer.ln_f",
            "lm_head": "lm_head",
        }
    )
    for layer, name in (
        ("self_attn.qkv_proj", "attn.c_attn"),
        ("self_attn.o_proj", "attn.c_proj"),
        ("mlp.up_proj", "mlp.c_fc"),
        ("mlp.down_proj", "mlp.c_proj"),
    ):
        weights += linear(f"{ours}{layer}", f"{theirs}{name}", transpose=False)  # [in, out]
    ignored = [r"transformer\.h\.\d+\.attn\.(masked_)?bias"]
    if config.tie_word_embeddings:
        ignored.append(r"lm_head\.weight")
    return WeightMap(weights, ignored, prefix="transformer.")


def _read(keys: Keys) -> dict[str, Any]:
    name = keys.get("activation_function", "gelu_new")
    if name not in _ACTIVATIONS:
        raise UserError(f"activation_function is {name!r}; supported are {', '.join(_ACTIVATIONS)}")
    hidden = keys.get("n_embd") or 0
    return {
        "activation": _ACTIVATIONS[name],
        "intermediate_size": keys.get("n_inner") or 4 * hidden or None,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {"activation_function": names.get(config.activation)}


FAMILIES = (
    Family(
        name="gpt2",
        architectures=("GPT2LMHeadModel",),
        keys={
            "vocab_size": "vocab_size",
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": ("n_positions", "n_ctx"),
            "norm_eps": "layer_norm_epsilon",
            "tie_word_embeddings": "tie_word_embeddings",
            "initializer_range": "initializer_range",
            **TOKEN_IDS,
        },
        fields={
            "max_position_embeddings": 1024,
            "norm": "layer_norm",
            "norm_eps": 1e-5,
            "position_embedding": "learned",
            "qkv_bias": True,
            "attention_output_bias": True,
            "mlp_bias": True,
            "gated_mlp": False,
            "tie_word_embeddings": True,
            "initialization": "scaled_residual",
        },
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        neutral={
            "hidden_activation": ("gelu",),  # PaddleNLP's, like the next three keys
            "layer_norm_eps": (1e-5,),
            "normalize_before": (True,),
            "scale_qk_coeff": (1.0,),
        },
        unused=(
            "fused_softmax_with_triangular",
            "n_special",
            "output_past",
            "predict_special_tokens",
            "reorder_and_upcast_attn",
            "seq_length",
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
            "type_vocab_size",
        ),
        dropouts=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
        weight_map=_weight_map,
        reads=("activation_function",),
        read_more=_read,
        write_more=_write,
    ),
)
