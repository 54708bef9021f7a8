"""Makes generation.json with the original implementation (transformers 5.23.0, torch 2.13.0).

    python tests/golden/make_generation.py [FIXTURE ...]

Without a name it makes all. Not run by the tests, which need neither library. For each fixture of a
family that transformers has: three prompts of different lengths, and the tokens that its greedy
search makes of them as one batch, padded on the left, with its key-value cache; and the logits of
these tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
# Baichuan, ChatGLM, ChatGLM2, GLM-130B and the first Qwen are not in transformers.
FIXTURES = (
    "bloom",
    "family_variants/bloom_12_heads",
    "family_variants/gpt2_untied",
    "family_variants/mistral_window",
    "family_variants/opt_350m",
    "family_variants/opt_unbiased",
    "family_variants/qwen2_tied_window",
    "family_variants/qwen3_tied_biased",
    "glm4_glm",
    "glm4_glm4",
    "gpt3",
    "llama",
    "llama_variants/biased",
    "mistral",
    "opt",
    "qwen2",
    "qwen3",
    "stablelm",
)
_PROMPT_LENGTHS = (5, 9, 2)
_NEW_TOKENS = 16


def greedy(folder: Path, seed: int) -> dict[str, list[list[float]]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    random = torch.Generator().manual_seed(seed)
    vocab_size = model.config.vocab_size
    prompts = [
        torch.randint(vocab_size // 2, vocab_size, [length], generator=random).tolist()
        for length in _PROMPT_LENGTHS
    ]
    longest = max(_PROMPT_LENGTHS)
    padding = [longest - length for length in _PROMPT_LENGTHS]
    ids = torch.tensor([[0] * pad + row for pad, row in zip(padding, prompts, strict=True)])
    seen = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
    model.generation_config.eos_token_id = None  # no row ends before the others
    made = model.generate(
        ids,
        attention_mask=seen,
        do_sample=False,
        max_new_tokens=_NEW_TOKENS,
        pad_token_id=0,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack([each.max(dim=-1).values for each in made.logits], dim=1)
    return {
        "prompts": prompts,
        "tokens": made.sequences[:, longest:].tolist(),
        "logits": [[round(each, 5) for each in row] for row in logits.tolist()],
    }


def main() -> None:
    file = HERE / "generation.json"
    made = json.loads(file.read_text(encoding="utf-8"))
    chosen = sys.argv[1:] or FIXTURES
    made |= {name: greedy(HERE / name, FIXTURES.index(name)) for name in chosen}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(case)}" for name, case in made.items())
    file.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
