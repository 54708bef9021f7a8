"""A tiny configuration of every family, in the keys of its own config.json.

Two layers of width 64 with the 4,096 tokens of the quickstart corpus; the families whose rows hold
[gMASK], [MASK] and a start token have rows of the embedding for them beyond those of the text.
"""

from __future__ import annotations

from typing import Any

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.registry import config_from_huggingface

TEXT_TOKENS = 4096

_TEXT = {"vocab_size": TEXT_TOKENS, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    **_TEXT,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_BAICHUAN = {
    **_DECODER,
    "architectures": ["BaichuanForCausalLM"],
    "model_type": "baichuan",
    "rms_norm_eps": 1e-6,
}
_BAICHUAN_13B = {
    **{key: value for key, value in _BAICHUAN.items() if key != "max_position_embeddings"},
    "model_max_length": 256,
}
_OPT = {
    **_TEXT,
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "ffn_dim": 256,
    "hidden_size": 64,
    "init_std": 0.02,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "word_embed_proj_dim": 64,
}
_CHATGLM2 = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "eos_token_id": 2,
    "ffn_hidden_size": 160,
    "hidden_size": 64,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "original_rope": True,
    "padded_vocab_size": TEXT_TOKENS,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 256,
    "tie_word_embeddings": False,
}

KEYS: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "baichuan_7b": _BAICHUAN,
    "baichuan_13b": _BAICHUAN_13B,
    "baichuan2_7b": _BAICHUAN,
    "baichuan2_13b": _BAICHUAN_13B,
    "gpt3": {
        **_TEXT,
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 256,
    },
    "qwen": {
        **_TEXT,
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 320,
        "kv_channels": 16,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 256,
        "no_bias": True,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 256,
        "tie_word_embeddings": False,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    },
    "opt": _OPT,
    "opt_350m": {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "bloom": {
        **_TEXT,
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "apply_residual_connection_post_layernorm": False,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "n_embed": 64,
        "n_layer": 2,
        "num_attention_heads": 4,
    },
    "chatglm": {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "bos_token_id": TEXT_TOKENS + 4,
        "eos_token_id": TEXT_TOKENS + 5,
        "mask_token_id": TEXT_TOKENS,
        "gmask_token_id": TEXT_TOKENS + 1,
        "pad_token_id": 3,
        "hidden_size": 64,
        "inner_hidden_size": 256,
        "layernorm_epsilon": 1e-5,
        "max_sequence_length": 256,
        "num_attention_heads": 4,
        "num_layers": 2,
        "position_encoding_2d": True,
        "vocab_size": TEXT_TOKENS + 128,
    },
    "chatglm2": _CHATGLM2,
    "glm130b": {
        "model_type": "glm-130b",
        "vocab_size": TEXT_TOKENS + 128,
        "layernorm_order": "post",
        "layernorm_epsilon": 1e-5,
        "gmask_token_id": TEXT_TOKENS + 1,
        "mask_token_id": TEXT_TOKENS,
        "sop_token_id": TEXT_TOKENS + 4,
        "eop_token_id": TEXT_TOKENS + 5,
        "num_layers": 2,
        "hidden_size": 64,
        "inner_hidden_size": 160,
        "num_attention_heads": 4,
        "max_sequence_length": 256,
    },
    "mistral": {
        **_GROUPED,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 48,
    },
    "qwen2": {
        **_GROUPED,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
    },
    "qwen3": {
        **_GROUPED,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 32,
        "attention_bias": False,
        "use_sliding_window": False,
    },
    "glm": {
        **_GROUPED,
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "head_dim": 16,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    "glm4": {
        **_GROUPED,
        "architectures": ["Glm4ForCausalLM"],
        "model_type": "glm4",
        "head_dim": 16,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    "stablelm": {
        **_DECODER,
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
        "num_key_value_heads": 2,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": True,
    },
}
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
# What a Baichuan config.json tells only by its sizes.
OVERRIDES: dict[str, dict[str, Any]] = {
    "baichuan_7b": {"position_embedding": "rope", "norm_head": False},
    "baichuan_13b": {"position_embedding": "alibi", "norm_head": False},
    "baichuan2_7b": {"position_embedding": "rope", "norm_head": True},
    "baichuan2_13b": {"position_embedding": "alibi", "norm_head": True},
}


def tiny(family: str, num_layers: int = 2) -> ModelConfig:
    """The tiny configuration of ``family``, a key of ``KEYS``."""
    keys = {key: num_layers if key in _LAYERS else value for key, value in KEYS[family].items()}
    return config_from_huggingface(keys).replace(**OVERRIDES.get(family, {}))
