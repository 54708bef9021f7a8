"""The page docs/models.md, written from the registry."""

from __future__ import annotations

from collections.abc import Sequence

from pypkg.console import markdown
from pypkg.models.architecture import registry
from pypkg.models.architecture.config import ModelConfig

_INTRODUCTION = """\
<!-- Written by `make docs` from pypkg/models and configs/models. Change those, not this page. -->
# Models

`model_name_or_path` is a folder in Hugging Face format, or one of the names below. A name selects
a configuration in `configs/models`, which is part of this package. Names are not case-sensitive.
Training from random weights needs nothing else. `continue_training` loads the weights from the
folder, or those of the name from the Hugging Face cache. With `download`, weights that the cache
lacks are downloaded from the Hugging Face Hub.

To add a size, add a JSON file with the keys of the family's `config.json` to `configs/models`; the
file of `org/name` is `org--name.json`. `aliases.json` maps models that differ only in their weights
to one file.

Parameters are counted from the configuration. An embedding table that is tied to the head counts
once.

## Keys of config.json

Each key is read, is known to have no effect, or is rejected with an error that names it. A key that
was ignored silently could change the model.

- A family reads the keys of its original implementation. Those of token ids, generation, other
  tasks and the program that wrote the file are known in every family, and dropout is logged.
- Some keys are accepted with one value only, such as `hidden_act` `silu` in LLaMA, or null, such as
  `quantization_config`.
- The LLaMA-like families also read `sliding_window`, `layer_types`, `attn_logit_softcapping` and
  `mlp_bias`, Mistral also `attention_bias`, and Baichuan also `num_key_value_heads`. Their original
  implementations do not read these keys, so other programs compute another model from such a
  folder; a warning is logged. LLaMA also reads PaddleNLP's `alibi`, `rope_scaling_type` and
  `rope_scaling_factor`.
- If `rope_scaling` and `rope_parameters` are both present, `rope_scaling` is used, as in
  transformers.
- A key that the family does not know is an error. `--allow_unknown_config KEY ...`, a setting of
  `pypkg pretrain` and an option of `pypkg convert`, ignores the key.
"""


def models_page() -> str:
    """The text of docs/models.md."""
    models = {name: registry.load_config(name) for name in registry.known_models()}
    parts = [_INTRODUCTION, "\n## Families\n", _families(), "\n## Names\n"]
    for family in registry.families():
        of_family = {
            name: config for name, config in models.items() if config.model_type == family.name
        }
        parts += [f"\n### {family.name}\n", _names(of_family)]
    return "".join(parts)


def _families() -> str:
    rows = [
        (
            family.name,
            f"`{family.model_type or family.name}`",
            ", ".join(f"`{each}`" for each in family.architectures),
        )
        for family in registry.families()
    ]
    return _table(("family", "`model_type` in config.json", "`architectures`"), rows)


def _names(models: dict[str, ModelConfig]) -> str:
    """The table of known models, the smallest first."""
    counts = {name: config.num_parameters() for name, config in models.items()}
    rows = [(f"`{name}`", f"{counts[name]:,}") for name in sorted(models, key=counts.__getitem__)]
    return _table(("name", "parameters"), rows)


def _table(header: tuple[str, ...], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(["", *markdown.table(header, rows, padded=False), ""])
