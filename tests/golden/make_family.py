"""Makes the fixture of a family from its config.json alone, with the original in transformers.

    python tests/golden/make_family.py tests/golden/stablelm

FOLDER holds a tiny config.json in the form of transformers 4, as the published models of the
family have it. Beside it are written config_v5.json, the form of transformers 5; the weights; the
ids, labels, logits, loss and all gradients in io.safetensors; and the source in meta.json. A
family that transformers lacks needs a script that calls ``freeze`` with the authors' class.

Not run by the tests, which need neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

_SEQUENCE = 24


def freeze(model: transformers.PreTrainedModel, folder: Path, first_id: int) -> None:
    """Writes the model, with every parameter moved away from its first value, and its outputs.

    Args:
        first_id: the lowest of the input ids; those below get no gradient.
    """
    model.eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, so that a lost one is noticed
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    vocab_size = model.config.vocab_size
    input_ids = torch.randint(first_id, vocab_size, (2, _SEQUENCE))
    labels = torch.randint(0, vocab_size, (2, _SEQUENCE))
    labels[0, :5] = -100
    logits = model(input_ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    tensors = {"input_ids": input_ids, "labels": labels, "logits": logits.detach()}
    tensors["loss"] = loss.detach()
    for name, parameter in model.named_parameters():
        tensors[f"grad.{name}"] = parameter.grad
    save_file(tensors, folder / "io.safetensors")
    (folder / "generation_config.json").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with a config.json")
    folder = parser.parse_args().folder
    config = folder / "config.json"
    written = config.read_text(encoding="utf-8")
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    freeze(model, folder, first_id=4)  # beyond those of padding
    config.rename(folder / "config_v5.json")
    config.write_text(written, encoding="utf-8")
    source = (
        f"transformers {transformers.__version__} {type(model).__name__} "
        f"(torch {torch.__version__}, CPU, float32, eager attention)"
    )
    meta = {"family": folder.name, "source": source}
    (folder / "meta.json").write_text(f"{json.dumps(meta, indent=1)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
