"""Makes llama_variants/ with the original implementation (transformers 5.23.0, torch 2.13.0).

    python tests/golden/make_llama_variants.py

Not run by the tests, which need neither library. What it froze:

- ``rope_<case>.json``: the angles of one rope scaling (config.json keys, inverse frequencies,
  factor on cosines and sines), for a sequence of ``seq_length``.
- ``rope.safetensors``: logits of the golden llama model on 96 tokens, 32 more than it was made
  for, under each scaling; the first and the last position only.
- ``biased/``: a small model with grouped-query attention, biases everywhere, a tied head and
  heads wider than hidden_size / num_attention_heads: weights, logits, loss and all gradients.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from make_family import freeze
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HERE = Path(__file__).parent
OUT = HERE / "llama_variants"
# name -> (rope_theta, head_dim, max_position_embeddings, seq_length, rope_scaling)
ANGLES = {
    "default": (10000.0, 16, 64, 64, None),
    "theta_5e5": (500000.0, 128, 8192, 64, None),
    "linear": (10000.0, 64, 2048, 64, {"rope_type": "linear", "factor": 4.0}),
    "dynamic_short": (10000.0, 64, 64, 64, {"rope_type": "dynamic", "factor": 2.0}),
    "dynamic_long": (10000.0, 64, 64, 200, {"rope_type": "dynamic", "factor": 2.0}),
    "llama3": (
        500000.0,
        128,
        131072,
        64,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        10000.0,
        128,
        16384,
        64,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    ),
    "yarn_options": (
        10000.0,
        64,
        8192,
        64,
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
            "truncate": False,
        },
    ),
    "yarn_defaults": (10000.0, 64, 4096, 64, {"rope_type": "yarn", "factor": 2.0}),
    "yarn_wide_ramp": (  # its upper end lies beyond the last dimension
        10000.0,
        64,
        10**8,
        64,
        {"rope_type": "yarn", "factor": 2.0, "beta_slow": 0.001},
    ),
    "yarn_attention_factor": (
        10000.0,
        64,
        16384,
        64,
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 1.5,
        },
    ),
}
LOGITS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
}


def angles(case: tuple) -> dict:
    theta, head_dim, max_positions, seq_length, scaling = case
    keys = {
        "hidden_size": 4 * head_dim,
        "num_attention_heads": 4,
        "max_position_embeddings": max_positions,
        "rope_theta": theta,
        "rope_scaling": scaling,
    }
    rotary = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(keys))))
    rotary(torch.zeros(1), torch.arange(seq_length)[None])  # the dynamic scaling updates itself
    return {
        "config": keys,
        "seq_length": seq_length,
        "inverse_frequencies": [float(value) for value in rotary.inv_freq],
        "factor": float(rotary.attention_scaling),
    }


def rope_logits() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(0, 320, (1, 96), generator=torch.Generator().manual_seed(7))
    tensors = {"input_ids": input_ids}
    for name, scaling in LOGITS.items():
        keys = json.loads((HERE / "llama" / "config.json").read_text())
        config = LlamaConfig(**{**keys, "rope_scaling": dict(scaling)})
        model = LlamaForCausalLM.from_pretrained(
            HERE / "llama", config=config, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            tensors[name] = model(input_ids).logits[0, [0, -1]].contiguous()
    return tensors


def biased(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    torch.manual_seed(3)
    freeze(LlamaForCausalLM(config), folder, first_id=0)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for name, case in ANGLES.items():
        (OUT / f"rope_{name}.json").write_text(json.dumps(angles(case)) + "\n")
    save_file(rope_logits(), OUT / "rope.safetensors")
    biased(OUT / "biased")


if __name__ == "__main__":
    main()
