"""Checks that PaddleNLP loads what ``pypkg convert export --format paddlenlp`` writes.

It needs two environments: this package's own, in which the script runs, and one with
paddlenlp 3.0.0b4, whose Python is the argument:

    python tools/check_paddlenlp_export.py OTHER_ENVIRONMENT/bin/python [--update]

Models that PaddleNLP saved, in tests/golden/paddlenlp, are imported and exported here. PaddleNLP
loads the original and the result with ``from_pretrained``. All tensors of the two have to be the
same, bit for bit, and the logits of models in float32 equal. ``--update`` records the exports that
PaddleNLP loaded this way, by their digests, in tests/golden/paddlenlp/exports.json. A test
compares the exports of the present code with that record, without PaddleNLP.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

GOLDEN = Path(__file__).resolve().parents[1] / "tests/golden/paddlenlp"
RECORD = GOLDEN / "exports.json"
CODE = """
import json, sys
import numpy as np, paddle, paddlenlp
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

for case in sys.argv[2:]:
    name, dtype, original, export = case.split("=")
    first, second = load(original, dtype), load(export, dtype)
    one, other = first.state_dict(), second.state_dict()
    differing = [k for k in one.keys() ^ other.keys()]
    differing += [k for k in one.keys() & other.keys() if bits(one[k]) != bits(other[k])]
    error = abs(logits(first) - logits(second)).max() if dtype == "float32" else 0.0
    print(f"{name} ({dtype}): {len(one)} tensors, {len(differing)} differ {differing[:3]}; "
          f"largest difference of a logit {error:.1e}", flush=True)
    with open(sys.argv[1], "a") as file:
        result = {"name": name, "tensors": len(one), "paddlenlp": paddlenlp.__version__,
                  "same": not differing and float(error) == 0.0}
        file.write(json.dumps(result) + "\\n")
"""


@dataclass(frozen=True)
class Case:
    """A model of PaddleNLP and what this package exports of it."""

    name: str
    dtype: str
    original: Path
    export: Path

    def __str__(self) -> str:
        return f"{self.name}={self.dtype}={self.original}={self.export}"


def make_exports(work: Path) -> list[Case]:
    """Imports each model of the golden folder and exports it again, below ``work``."""
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
    cases = []
    for name, original in originals.items():
        imported, export = work / "imported" / name, work / name
        convert_model(original, imported)
        convert_model(imported, export, layout="paddlenlp")
        dtype = "bfloat16" if name.endswith("bfloat16") else "float32"
        cases.append(Case(name, dtype, original, export))
    return cases


def digest(folder: Path) -> str:
    """SHA-256 of the names and contents of all files; of JSON files of the values in them."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.dumps(json.loads(content), sort_keys=True).encode()
        for part in (path.name.encode(), content):
            found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def check(python: str, work: Path) -> dict[str, dict]:
    """Loads each export with the PaddleNLP of the environment ``python``; results by name.

    Raises:
        subprocess.CalledProcessError: PaddleNLP cannot load one of the models.
    """
    cases, results = make_exports(work), work / "results.jsonl"
    subprocess.run([python, "-c", CODE, str(results), *map(str, cases)], check=True)
    rows = {row.pop("name"): row for row in map(json.loads, results.read_text().splitlines())}
    return {case.name: {**rows[case.name], "sha256": digest(case.export)} for case in cases}


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 if PaddleNLP loads the same model from each export as from its original."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", help="the Python of an environment with PaddleNLP")
    parser.add_argument("--update", action="store_true", help=f"write {RECORD.name}")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        found = check(options.python, Path(work))
    wrong = [name for name, result in found.items() if not result["same"]]
    print(f"{len(wrong)} of {len(found)} models are wrong: {', '.join(wrong) or 'none'}")
    if options.update and not wrong:
        RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
