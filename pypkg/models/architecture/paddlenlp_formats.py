"""PaddleNLP 3's format of each family: class names, prefixes, keys and tensor names.

Nothing here imports Paddle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.weight_map import Packing, Weight, linear, same_layout

Keys = Mapping[str, Any]

_OPT_HEAD = "lm_head.decoder_weight"


@dataclass(frozen=True, kw_only=True)
class Format:
    """PaddleNLP's format of a family.

    Args:
        family: ``ModelConfig.model_type``.
        architecture: the class name in config.json.
        model_type: in config.json; empty: ``family``.
        prefix: prefix of tensor names; it replaces ``huggingface_prefix``.
        keys: Hugging Face's key in config.json -> PaddleNLP's key.
        implied: keys of Hugging Face that PaddleNLP does not have, with the value that it implies.
        fields: computes fields of ModelConfig that Hugging Face's keys do not express.
        fixed: keys that only PaddleNLP has and that affect the model, with the supported value.
        unread: keys of Hugging Face that PaddleNLP does not read, besides ``_UNREAD``.
        head: name of a [vocabulary, hidden] matrix in which the head is stored even if it is tied
            to the embedding; config.json does not say whether it is.
        weights: returns the entries of the weight map from the configuration and whether query, key
            and value are fused; None: the names differ from Hugging Face's only in the prefix.
    """

    family: str
    architecture: str
    prefix: str
    huggingface_prefix: str = "model."
    model_type: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    fields: Callable[[Keys], dict[str, Any]] = lambda _: {}
    fixed: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    head: str = ""
    weights: Callable[[ModelConfig, bool], list[Weight]] | None = None


def _residual_alpha(keys: Keys) -> dict[str, Any]:
    """residual_alpha of ChatGLM-6B, which PaddleNLP computes from the depth of the model.

    The original code uses 28 layers for models of any depth.
    """
    layers = keys.get("num_hidden_layers")
    return {"residual_alpha": (2 * layers) ** 0.5} if isinstance(layers, int) else {}


def _gpt_weights(config: ModelConfig, is_fused: bool) -> list[Weight]:
    outer = same_layout({"norm": "gpt.decoder.norm", "lm_head": "lm_head"})
    return outer + _plain_decoder(config, "gpt.", is_fused)


def _opt_weights(config: ModelConfig, is_fused: bool) -> list[Weight]:
    outer = same_layout({"norm": "opt.decoder.final_layer_norm"})
    outer.append(Weight("lm_head.weight", (_OPT_HEAD,)))
    outer += linear("project_in", "opt.embeddings.project_in")
    outer += linear("project_out", "opt.decoder.project_out")
    return outer + _plain_decoder(config, "opt.", is_fused)


def _plain_decoder(config: ModelConfig, prefix: str, is_fused: bool) -> list[Weight]:
    """The embeddings and layers of GPT and OPT, which have the same names after ``prefix``."""
    ours, theirs = "layers.{}.", prefix + "decoder.layers.{}."
    weights = same_layout(
        {
            "embed_tokens": f"{prefix}embeddings.word_embeddings",
            "embed_positions": f"{prefix}embeddings.position_embeddings",
            f"{ours}input_layernorm": f"{theirs}norm1",
            f"{ours}post_attention_layernorm": f"{theirs}norm2",
        }
    )
    attention = f"{theirs}self_attn."
    if is_fused:
        packing = Packing(config.num_attention_heads, (0, 1, 2))
        weights += linear(f"{ours}self_attn.qkv_proj", f"{attention}qkv_proj", packing=packing)
    else:
        qkv = [f"{attention}{name}_proj" for name in "qkv"]
        weights += linear(f"{ours}self_attn.qkv_proj", qkv, [config.query_size] * 3)
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
        fields=_residual_alpha,
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
        # PaddleNLP's code always passes approximate=True to GELU and epsilon=1e-5 to norms.
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
        head=_OPT_HEAD,
        weights=_opt_weights,
    ),
)


def format_of(family: str) -> Format | None:
    """The format of a family, ``ModelConfig.model_type``; None: PaddleNLP does not have it."""
    return next((each for each in FORMATS if each.family == family), None)
