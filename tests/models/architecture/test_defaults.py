"""What a config.json means that leaves out all that the original classes have defaults for."""

from __future__ import annotations

from typing import Any

import pytest

from pypkg.models.architecture.registry import config_from_huggingface

_SIZES = {"vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
_LLAMA_SIZES = {**_SIZES, "intermediate_size": 96, "max_position_embeddings": 512}
_UNBIASED = {"qkv_bias": False, "attention_output_bias": False, "mlp_bias": False}
_BIASED = {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True}
_LLAMA_FIELDS = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "norm": "rms_norm",
    "norm_eps": 1e-6,
    "activation": "silu",
    "gated_mlp": True,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "layer_types": ("full_attention",) * 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    **_UNBIASED,
}
_GLM_FIELDS = {
    **_LLAMA_FIELDS,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "norm_eps": 1.5625e-07,
    "partial_rotary_factor": 0.5,
    "qkv_bias": True,
}
_CHATGLM_SIZES = {
    **{key: value for key, value in _SIZES.items() if key != "num_hidden_layers"},
    "num_layers": 2,
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (_LLAMA_SIZES, _LLAMA_FIELDS),
    "mistral": (
        {**_LLAMA_SIZES, "num_attention_heads": 16},
        {
            **_LLAMA_FIELDS,
            "num_key_value_heads": 8,
            "head_dim": 4,
            "sliding_window": 4096,
            "layer_types": ("sliding_attention",) * 2,
        },
    ),
    "qwen2": (_LLAMA_SIZES, {**_LLAMA_FIELDS, "qkv_bias": True}),
    "qwen3": (_LLAMA_SIZES, {**_LLAMA_FIELDS, "head_dim": 128, "qk_norm": True}),
    "glm": (_LLAMA_SIZES, {**_GLM_FIELDS, "branch_norm": False}),
    "glm4": (_LLAMA_SIZES, {**_GLM_FIELDS, "branch_norm": True}),
    "stablelm": (
        _LLAMA_SIZES,
        {**_LLAMA_FIELDS, "norm": "layer_norm", "norm_eps": 1e-5, "partial_rotary_factor": 0.25},
    ),
    "qwen": (
        {**_SIZES, "intermediate_size": 192},
        {
            "intermediate_size": 96,
            "max_position_embeddings": 2048,
            "dynamic_ntk_length": 2048,
            "logn_attention_length": 2048,
            "norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "initializer_range": 0.02,
            **_UNBIASED,
            "qkv_bias": True,
        },
    ),
    "gpt2": (
        {"vocab_size": 320, "n_layer": 2, "n_head": 4, "n_embd": 64},
        {
            "intermediate_size": 256,
            "max_position_embeddings": 1024,
            "activation": "gelu_tanh",
            "norm": "layer_norm",
            "norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            **_BIASED,
        },
    ),
    "opt": (
        {**_SIZES, "ffn_dim": 256},
        {
            "embedding_size": 64,
            "max_position_embeddings": 2048,
            "activation": "relu",
            "residual": "pre",
            "final_norm": True,
            "norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            **_BIASED,
        },
    ),
    "bloom": (
        {"vocab_size": 320, "n_layer": 2, "n_head": 4, "hidden_size": 64},
        {
            "intermediate_size": 256,
            "residual": "pre",
            "norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            **_BIASED,
        },
    ),
    "chatglm": (
        {
            **_CHATGLM_SIZES,
            "inner_hidden_size": 256,
            "bos_token_id": 310,
            "gmask_token_id": 311,
            "mask_token_id": 312,
        },
        {
            "max_position_embeddings": 2048,
            "norm_eps": 1e-5,
            "position_encoding_2d": True,
            **_BIASED,
        },
    ),
    "chatglm2": (
        {
            **{key: value for key, value in _CHATGLM_SIZES.items() if key != "vocab_size"},
            "padded_vocab_size": 320,
            "ffn_hidden_size": 96,
        },
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "norm": "rms_norm",
            "norm_eps": 1e-5,
            "residual": "pre",
            "final_norm": True,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            **_UNBIASED,
        },
    ),
}


@pytest.mark.parametrize("family", CASES)
def test_keys_left_out(family: str) -> None:
    keys, expected = CASES[family]
    model_type = "chatglm" if family == "chatglm2" else family
    config = config_from_huggingface({"model_type": model_type, **keys})
    assert config.model_type == family
    assert {name: getattr(config, name) for name in expected} == expected
