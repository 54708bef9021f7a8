"""Checks that PaddleNLP loads what ``pypkg convert export --format paddlenlp`` writes.

It needs two environments: this package's own, in which the script runs, and one with
paddlenlp 3.0.0b4, whose Python is the only argument:

    python tools/check_paddlenlp_export.py OTHER_ENVIRONMENT/bin/python

Each model of tests/golden/paddlenlp is imported and exported here. PaddleNLP loads the result with
``from_pretrained``, and its logits are compared with those that it gave for the original.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

MODELS = Path(__file__).resolve().parents[1] / "tests/golden/paddlenlp/models"
CODE = """
import sys
import numpy as np, paddle
from paddlenlp.transformers import AutoModelForCausalLM
worst = 0.0
for name in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[2]}/{name}", dtype="float32")
    model.eval()
    logits = model(paddle.to_tensor(np.load(f"{sys.argv[1]}/ids.npy")))
    logits = logits[0] if isinstance(logits, (tuple, list)) else logits
    error = abs(logits.numpy() - np.load(f"{sys.argv[1]}/{name}.npy")).max()
    print(f"{name}: largest difference of a logit {error:.1e}", flush=True)
    worst = max(worst, error)
sys.exit(int(worst > 1e-5))
"""


def main(python: str) -> int:
    """Returns 0 if all logits agree within 1e-5."""
    from pypkg.conversion.converter import convert_model

    names = sorted(folder.name.removesuffix("_pdparams") for folder in MODELS.glob("*_pdparams"))
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            imported = Path(work, "imported", name)
            convert_model(MODELS / f"{name}_pdparams", imported)
            convert_model(imported, Path(work, name), layout="paddlenlp")
        command = [python, "-c", CODE, str(MODELS), work, *names]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
