"""Makes llama_variants/paddlenlp.npz with PaddleNLP 3.0.0b4 (paddlepaddle 3.3.1, CPU).

    python tests/golden/make_paddlenlp_llama.py

Not run by the tests, which do not need PaddleNLP. It holds the logits of the golden llama model,
its weights in PaddleNLP's implementation, under keys of config.json that transformers has not:
``alibi``, and each ``rope_scaling_type`` on 96 tokens, 32 more than the model was made for.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle
from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM
from safetensors.numpy import load_file

HERE = Path(__file__).parent
CASES = {
    "alibi": {"alibi": True},
    "linear": {"rope_scaling_type": "linear", "rope_scaling_factor": 2.0},
    "ntk": {"rope_scaling_type": "ntk", "rope_scaling_factor": 2.0},
    "dynamic_ntk": {"rope_scaling_type": "dynamic_ntk", "rope_scaling_factor": 2.0},
}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("rms_norm_eps", "rope_theta", "tie_word_embeddings"),
)


def logits(keys: dict, weights: dict, ids: np.ndarray) -> np.ndarray:
    model = LlamaForCausalLM(LlamaConfig(**keys))
    model.eval()
    for name, parameter in model.named_parameters():
        value = weights[name.replace("llama.", "model.", 1)]
        parameter.set_value(value.T if "proj" in name or "head" in name else value)
    return model(paddle.to_tensor(ids))[0].numpy()


def main() -> None:
    stored = json.loads((HERE / "llama/config.json").read_text())
    keys = {key: stored[key] for key in SIZES}
    weights = load_file(HERE / "llama/model.safetensors")
    ids = np.random.default_rng(0).integers(0, keys["vocab_size"], [1, 96])
    out = {"input_ids": ids}
    for name, case in CASES.items():
        out[name] = logits({**keys, **case}, weights, ids)[:, [0, 63, 95]]
    np.savez(HERE / "llama_variants/paddlenlp.npz", **out)


if __name__ == "__main__":
    main()
