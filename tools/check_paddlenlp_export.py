"""Checks that PaddleNLP loads what ``pypkg convert export --format paddlenlp`` writes.

It needs two environments: this package's own, in which the script runs, and one with
paddlenlp 3.0.0b4, whose Python is the only argument:

    python tools/check_paddlenlp_export.py OTHER_ENVIRONMENT/bin/python

Models that PaddleNLP saved, in tests/golden/paddlenlp, are imported and exported here. PaddleNLP
loads the original and the result with ``from_pretrained``. All tensors of the two have to be the
same, bit for bit, and the logits of models in float32 equal.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).resolve().parents[1] / "tests/golden/paddlenlp"
CODE = """
import sys
import numpy as np, paddle
from paddlenlp.transformers import AutoModelForCausalLM

def load(folder, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.eval()
    return model

def bits(tensor):
    if tensor.dtype == paddle.bfloat16:
        tensor = tensor.astype("float32")  # exact
    return tensor.numpy().tobytes()

def logits(model):
    ids = paddle.to_tensor(np.arange(10, 34).reshape(1, 24))
    more = {}
    if model.config.model_type == "chatglm":
        config = model.config
        ids[0, 10], ids[0, 11] = config.gmask_token_id, config.bos_token_id
        mask = np.tril(np.ones([1, 1, 24, 24], "int64"))
        mask[..., :11] = 1
        more = {"attention_mask": paddle.to_tensor(mask)}
    found = model(ids, **more)
    return (found[0] if isinstance(found, (tuple, list)) else found).numpy()

wrong = 0
for case in sys.argv[1:]:
    name, dtype, original, export = case.split("=")
    first, second = load(original, dtype), load(export, dtype)
    one, other = first.state_dict(), second.state_dict()
    differing = [k for k in one.keys() ^ other.keys()]
    differing += [k for k in one.keys() & other.keys() if bits(one[k]) != bits(other[k])]
    error = abs(logits(first) - logits(second)).max() if dtype == "float32" else 0.0
    print(f"{name} ({dtype}): {len(one)} tensors, {len(differing)} differ {differing[:3]}; "
          f"largest difference of a logit {error:.1e}", flush=True)
    wrong += bool(differing) or not error == 0.0
print(f"{wrong} of {len(sys.argv) - 1} models are wrong")
sys.exit(int(wrong > 0))
"""


def main(python: str) -> int:
    """Returns 0 if PaddleNLP makes the same model of each export as of its original."""
    from pypkg.conversion.converter import convert_model

    originals = {
        folder.name.removesuffix("_pdparams"): folder
        for folder in sorted((GOLDEN / "models").glob("*_pdparams"))
    }
    originals |= {
        "opt": GOLDEN / "opt",
        "chatglm": GOLDEN / "chatglm/model",
        "chatglm_3_layers": GOLDEN / "chatglm_3_layers",
        "llama_bfloat16": GOLDEN / "bfloat16/llama",
    }
    with tempfile.TemporaryDirectory() as work:
        cases = []
        for name, original in originals.items():
            imported, export = Path(work, "imported", name), Path(work, name)
            convert_model(original, imported)
            convert_model(imported, export, layout="paddlenlp")
            dtype = "bfloat16" if name.endswith("bfloat16") else "float32"
            cases.append(f"{name}={dtype}={original}={export}")
        return subprocess.run([python, "-c", CODE, *cases], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
