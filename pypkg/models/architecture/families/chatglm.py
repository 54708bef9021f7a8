"""ChatGLM-6B (Du et al., 2022; Zeng et al., 2022): a prefix language model with 2-D positions."""

from __future__ import annotations

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.family import TOKEN_IDS, Family
from pypkg.models.architecture.megatron_format import by_head, megatron_layers
from pypkg.models.architecture.weight_map import WeightMap, same_layout

# The original code uses the depth of the released model, 28, for models of any depth.
_RESIDUAL_ALPHA = (2 * 28) ** 0.5


def _weight_map(config: ModelConfig) -> WeightMap:
    weights = same_layout(
        {
            "embed_tokens": "transformer.word_embeddings",
            "norm": "transformer.final_layernorm",
            "lm_head": "lm_head",
        }
    )
    weights += megatron_layers(config, "transformer.layers.{}.", qkv_packing=by_head(config))
    ignored = [r"transformer\.layers\.\d+\.attention\.rotary_emb\.inv_freq"]
    if config.tie_word_embeddings:
        ignored.append(r"lm_head\.weight")
    return WeightMap(weights, ignored)


FAMILIES = (
    Family(
        name="chatglm",
        architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
        auto_map={
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        },
        distinctive_key="inner_hidden_size",
        keys={
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "intermediate_size": "inner_hidden_size",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_attention_heads",
            "max_position_embeddings": "max_sequence_length",
            "norm_eps": "layernorm_epsilon",
            "position_encoding_2d": "position_encoding_2d",
            "tie_word_embeddings": "tie_word_embeddings",
            "gmask_token_id": "gmask_token_id",
            "mask_token_id": "mask_token_id",
            **TOKEN_IDS,
        },
        fields={
            "norm": "layer_norm",
            "norm_eps": 1e-5,
            "residual": "normed",
            "residual_alpha": _RESIDUAL_ALPHA,
            "position_encoding_2d": True,
            "prefix_lm": True,
            "qkv_bias": True,
            "attention_output_bias": True,
            "mlp_bias": True,
            "activation": "gelu_tanh",
            "gated_mlp": False,
            "tie_word_embeddings": True,
            "initialization": "deepnorm",
        },
        neutral={
            "activation": ("gelu",),
            "attention_scale": (True,),
            "num_image_tokens": (0,),
            "pre_seq_len": (),
            "quantization_bit": (0,),
        },
        unused=("output_predict", "prefix_projection", "quantization_embeddings"),
        # For models of PaddleNLP, which uses the depth of the model.
        extensions={"residual_alpha": "residual_alpha"},
        weight_map=_weight_map,
        # This family names the token bos that GLM-130B names sop.
        read_more=lambda keys: {"sop_token_id": keys.get("bos_token_id")},
    ),
)
