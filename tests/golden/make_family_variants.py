"""Makes family_variants/ with the original implementations (transformers 5.23.0, torch 2.13.0).

    python tests/golden/make_family_variants.py

Not run by the tests, which need neither library. Each folder is a tiny model that takes a path of
its family that the other fixtures do not: weights, logits, loss and all gradients.
"""

from __future__ import annotations

from pathlib import Path

import torch
from make_family import freeze
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

OUT = Path(__file__).parent / "family_variants"
_VOCAB = 96
_LLAMA_LIKE = {
    "vocab_size": _VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_OPT = {
    "vocab_size": _VOCAB,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "dropout": 0.0,
}


def models() -> dict[str, PreTrainedModel]:
    window = {**_LLAMA_LIKE, "sliding_window": 7}
    later_layers = {"use_sliding_window": True, "max_window_layers": 1}
    return {
        "mistral_window": MistralForCausalLM(MistralConfig(**window)),
        "qwen2_tied_window": Qwen2ForCausalLM(
            Qwen2Config(**window, **later_layers, tie_word_embeddings=True)
        ),
        "qwen3_tied_biased": Qwen3ForCausalLM(
            Qwen3Config(**_LLAMA_LIKE, head_dim=24, attention_bias=True, tie_word_embeddings=True)
        ),
        # As opt-350m: norms after the branches, no last norm, a narrow embedding.
        "opt_350m": OPTForCausalLM(
            OPTConfig(**_OPT, do_layer_norm_before=False, word_embed_proj_dim=16)
        ),
        "opt_unbiased": OPTForCausalLM(
            OPTConfig(**_OPT, enable_bias=False, activation_function="gelu")
        ),
        # ALiBi for a number of heads that is no power of two, the residual from the norm.
        "bloom_12_heads": BloomForCausalLM(
            BloomConfig(
                vocab_size=_VOCAB,
                hidden_size=48,
                n_layer=2,
                n_head=12,
                apply_residual_connection_post_layernorm=True,
            )
        ),
        "gpt2_untied": GPT2LMHeadModel(
            GPT2Config(
                vocab_size=_VOCAB,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=32,
                n_inner=40,
                activation_function="gelu",
                tie_word_embeddings=False,
            )
        ),
    }


def main() -> None:
    torch.manual_seed(3)
    for name, model in models().items():
        freeze(model, OUT / name, first_id=4)  # beyond those of padding


if __name__ == "__main__":
    main()
