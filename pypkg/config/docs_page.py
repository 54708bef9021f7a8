"""Writes docs/configuration.md and the help texts from the tables that the parser uses."""

from __future__ import annotations

import dataclasses
import json
import textwrap
import typing
from collections.abc import Sequence
from typing import Any

from pypkg.config.known_keys import NO_EFFECT, REFUSED, KnownKey
from pypkg.config.options.suboptions import SUB_OPTIONS
from pypkg.config.reading.values import setting_types
from pypkg.config.setting import SEE_BELOW
from pypkg.config.settings import setting_fields
from pypkg.console import markdown
from pypkg.errors import UserError

_INTRODUCTION = """\
<!-- Written by `make docs` from pypkg/config. Change the tables there, not this page. -->
# Configuration

```
python -m pypkg.pretrain CONFIG.json [--key value ...] [--nproc N]
```

`CONFIG.json` is one JSON object; `--key value` on the command line overrides it. The file may also
be YAML (`.yaml`, `.yml`), or be left out. Names and defaults are those of PaddleNLP's
`run_pretrain.py`. Its files can therefore be used unchanged, except for the keys that the tables
below exclude. `--nproc` is not a setting: it starts one run of N CPU processes. On GPUs,
`python -m paddle.distributed.launch` starts the processes.

- Boolean values may be written true/false, 1/0, yes/no, y/n, t/f. `--do_train` alone means true,
  and `--no_do_train` means false.
- Numbers may be written as strings ("3e-05"). `null` means the default.
- Lists are JSON lists, or several values: `--report_to visualdl tensorboard`.
- On the command line a key may be abbreviated if only one key starts with the given letters.
- Unknown keys, keys that occur twice, wrong types, invalid values, unknown models, invalid layouts
  and features that the device does not support are errors. All errors are reported at once, before
  anything is started or written.

## How some settings work together
- The learning rate of optimizer step n = 1, 2, ... is the value of the schedule at n. It rises
  linearly from 0 at n = 0 to `learning_rate`, then decays to `min_learning_rate` at `decay_steps`,
  and keeps this value. The first step therefore has learning_rate / warm-up steps. The last step of
  a run with the default `decay_steps` has exactly `min_learning_rate`.
- `constant_with_warmup` is one step behind: step n has learning_rate * (n - 1) / warm-up steps, so
  the first step changes no weights. Its warm-up by `warmup_ratio` is truncated to whole steps.
- The log and metrics.jsonl give the learning rate that a step used. PaddleNLP logs that of the next
  step.
- A `warmup_steps` above 0 overrides `warmup_ratio`.
- If `bf16` or `use_flash_attention` is left out, the value depends on the device, and the log gives
  the value and the reason. If it is true and the device does not support it, the run is rejected.
  [operators.md](operators.md#which-implementation-runs) explains `attention_backend`.
- The number of launched processes, divided by `tensor_parallel_degree` times
  `pipeline_parallel_degree` times `sep_parallel_degree` or `context_parallel_degree`, is the number
  of ranks with different samples. With `sharding` these ranks divide the optimizer state, in groups
  of `sharding_parallel_degree` or all together; the groups are data-parallel replicas. A step takes
  `per_device_train_batch_size` times `gradient_accumulation_steps` samples from each of these
  ranks.
- Layouts that do not fit the model or the number of processes are rejected before any process group
  is created. All problems are listed at once.
- There is no dropout unless `hidden_dropout_prob` is set.
- `do_eval: true` evaluates every `eval_steps` steps and after the last one. The strategy `epoch`
  evaluates only after the last step: in PaddleNLP an epoch is the number of samples that the run
  needs.
- An evaluation uses the first `eval_iters` batches of the validation split, the same ones each
  time. PaddleNLP always uses 10 batches, and each evaluation continues in the data where the
  previous one ended. With `eval_iters` -1 an evaluation uses each sample of the split once.
  `do_predict` then does the same with the test split; otherwise it uses 100 batches. The log gives
  the numbers of samples.
- `load_best_model_at_end` compares checkpoints by the validation loss at their step, so
  `save_steps` must be a multiple of `eval_steps`. `save_total_limit` keeps the best checkpoint and
  the newest one. A longer run still resumes from the newest.
- The learning rate does not advance during `skip_data_intervals`, as in PaddleNLP.

## Settings
If the default is *none*, the description says what happens without the setting.
"""

_SUB_OPTIONS = """
## Inside the *_config settings
These settings hold words separated by spaces. The log names words that have no effect.
"""

_NO_EFFECT = """
## Accepted, without effect
These PaddleNLP keys may stay in a file. If a value differs from those in the third column, the log
says that it has no effect, and why.
"""

_REFUSED = """
## Not possible in this version
These PaddleNLP keys are known. Any value other than those in the third column is rejected at start.
"""


_USAGE = """\
usage: pypkg pretrain [CONFIG.json] [--KEY VALUE ...] [--nproc N] [--dry_run]

Pre-trains a model, and resumes from the newest checkpoint in output_dir.
--KEY VALUE overrides CONFIG.json. --nproc N starts N CPU processes as one run.
--dry_run plans the run and checks its inputs and output_dir, without starting.
Required: {required}.
"""

_MORE = """
pypkg config WORD ...   type, default and meaning of the settings about WORD
pypkg config            docs/configuration.md: all settings, how they interact
"""

# The first setting of each topic, in the order of Settings, and the topic's title.
_TOPICS = {
    "model_name_or_path": "Model and data",
    "do_train": "What to do",
    "rampup_batch_size": "Optimizer and learning rate",
    "logging_steps": "Logging, evaluation, checkpoints",
    "device": "Device and precision",
    "tensor_parallel_degree": "Parallelism",
    "recompute": "Activations",
    "allow_unknown_config": "Unknown to PaddleNLP",
}


def help_text() -> str:
    """The text of ``pypkg pretrain --help``: the names of all settings by topic."""
    required = ", ".join(spec.name for spec in setting_fields() if spec.metadata["required"])
    topics: dict[str, list[str]] = {}
    title = ""
    for spec in setting_fields():
        title = _TOPICS.get(spec.name, title)
        topics.setdefault(title, []).append(f"--{spec.name}")
    lines = [_USAGE.format(required=required)]
    for title, names in topics.items():
        words = textwrap.fill(
            " ".join(names), 80, initial_indent="  ", subsequent_indent="  ",
            break_on_hyphens=False,
        )  # fmt: skip
        lines.append(f"{title}:\n{words}")
    return "\n".join(lines) + "\n" + _MORE


def explain_settings(words: Sequence[str]) -> str:
    """Type, default and meaning of all settings whose names contain one of ``words``, as text.

    A word that is in no name is looked for in the meanings.

    Raises:
        UserError: neither names nor meanings contain any of them.
    """
    types = setting_types()
    asked = [word.removeprefix("--") for word in words]
    named = [word for word in asked if any(word in spec.name for spec in setting_fields())]
    meant = [word.lower() for word in asked if word not in named]
    lines = []
    for spec in setting_fields():
        meaning = _description(spec).replace("`", "")
        if any(word in spec.name for word in named) or any(w in meaning.lower() for w in meant):
            default = _default(spec).strip("`*")
            lines.append(f"--{spec.name}  [{_type_name(types[spec.name])}, {default}]")
            lines.append(
                textwrap.fill(meaning, 80, initial_indent="    ", subsequent_indent="    ")
            )
    if not lines:
        raise UserError(
            f"no setting has {' or '.join(map(repr, words))} in its name or meaning; "
            "'pypkg pretrain --help' lists the names"
        )
    return "\n".join(lines) + "\n"


def configuration_page() -> str:
    """The content of docs/configuration.md."""
    types = setting_types()
    own = [
        (f"`{spec.name}`", _type_name(types[spec.name]), _default(spec), _description(spec))
        for spec in setting_fields()
    ]
    return "".join(
        [
            _INTRODUCTION,
            _table(("setting", "type", "default", "meaning"), own),
            _SUB_OPTIONS,
            _table(("setting", "word", "effect"), _sub_options()),
            _NO_EFFECT,
            _table(
                ("key", "type", "values without a notice", "why it has no effect"),
                _rows(NO_EFFECT),
            ),
            _REFUSED,
            _table(("key", "type", "accepted values", "reason"), _rows(REFUSED)),
        ]
    )


def _sub_options() -> list[tuple[str, ...]]:
    here = {True: "rejected: ", False: "no effect: "}
    return [
        (
            f"`{option.setting}`",
            f"`{option.name}`",
            here[option.refused] + option.why if option.why else option.does or "always on",
        )
        for option in SUB_OPTIONS
    ]


def _description(spec: dataclasses.Field) -> str:
    rules = spec.metadata
    limits = [
        f"{words} {rules[rule]}"
        for rule, words in (
            ("at_least", "at least"),
            ("above", "more than"),
            ("at_most", "at most"),
            ("below", "less than"),
        )
        if rules[rule] is not None
    ]
    if rules["choices"] and rules["help"] != SEE_BELOW:
        limits.append(", ".join(f"`{choice}`" for choice in rules["choices"]))
    return rules["help"] + (f" ({'; '.join(limits)})" if limits else "")


def _default(spec: dataclasses.Field) -> str:
    if spec.metadata["required"]:
        return "required"
    if spec.default == ():
        return _value("none") if "none" in (spec.metadata["choices"] or ()) else "*empty*"
    return _value(spec.default)


def _rows(keys: tuple[KnownKey, ...]) -> list[tuple[str, ...]]:
    return [
        (
            f"`{row.name}`",
            _type_name(row.type),
            ", ".join(_value(value) for value in row.neutral if value is not None) or "*none*",
            "; ".join(part for part in (row.why, row.way_out) if part),
        )
        for row in keys
    ]


def _value(value: Any) -> str:
    return "*none*" if value is None else f"`{json.dumps(value)}`"


def _type_name(kind: Any) -> str:
    names = {bool: "true/false", int: "integer", float: "number", str: "text"}
    if kind in names:
        return names[kind]
    return f"list of {_type_name(typing.get_args(kind)[0])}"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(["", *markdown.table(header, rows, padded=False), ""])
