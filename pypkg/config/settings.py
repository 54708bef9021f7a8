"""The settings that a run honours, one field each. Names and defaults are PaddleNLP's.

A default of None means that the value follows from other settings (see ``__post_init__``) or from
the device (see ``pypkg.capabilities``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# PaddleNLP's run_pretrain evaluates this many batches, whatever the settings say.
_PADDLENLP_EVAL_ITERS = 10


def _setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    required: bool = False,
) -> Any:
    """A dataclass field with what the parser, the checks and the documentation need to know."""
    metadata = {
        "help": help,
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "below": below,
        "required": required,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a run. Made by ``load_settings``; direct construction checks nothing.

    ``other_keys`` holds the known keys that no part of this version reads, as they were given:
    ``check_supported`` refuses them or ``notices`` says why they change nothing.
    """

    # Model and data
    model_name_or_path: str = _setting(
        "",
        "folder in Hugging Face format, or the name of a shipped model configuration",
        required=True,
    )
    tokenizer_name_or_path: str | None = _setting(
        None, "folder of the tokenizer; by default model_name_or_path"
    )
    input_dir: str = _setting(
        "", "folder of .bin/.idx files, or 'weight1 prefix1 weight2 prefix2 ...'", required=True
    )
    output_dir: str = _setting("", "folder for checkpoints, metrics and logs", required=True)
    split: str = _setting("949,50,1", "shares of the documents for training, validation and test")
    max_seq_length: int = _setting(1024, "tokens in a sample", at_least=1)
    continue_training: bool = _setting(
        False, "start from the weights in model_name_or_path instead of random ones"
    )
    num_hidden_layers: int | None = _setting(
        None, "overrides the depth in the model's configuration", at_least=1
    )
    initializer_range: float | None = _setting(
        None, "overrides the standard deviation of random weights", above=0
    )

    # What to do
    do_train: bool = _setting(False, "train")
    do_eval: bool = _setting(False, "evaluate on the validation split")
    do_predict: bool = _setting(False, "after training, evaluate on the test split")
    seed: int = _setting(42, "decides random weights and the order of samples", at_least=0)
    max_steps: int = _setting(
        -1, "number of optimizer steps of the whole run", at_least=1, required=True
    )
    per_device_train_batch_size: int = _setting(8, "samples in a micro batch", at_least=1)
    per_device_eval_batch_size: int = _setting(8, "samples in an evaluation batch", at_least=1)
    gradient_accumulation_steps: int = _setting(1, "micro batches in an optimizer step", at_least=1)
    dataloader_num_workers: int = _setting(
        0, "0 reads batches in the training thread; more read ahead in a thread", at_least=0
    )

    # Optimizer and learning rate
    learning_rate: float = _setting(5e-5, "the peak", above=0)
    min_learning_rate: float = _setting(1e-5, "where cosine and linear decay end", at_least=0)
    lr_scheduler_type: str = _setting(
        "linear",
        "shape of the learning rate after warm-up; constant has no warm-up",
        choices=("linear", "cosine", "constant", "constant_with_warmup"),
    )
    warmup_steps: int = _setting(
        0, "steps of linear warm-up; above 0 it wins over warmup_ratio", at_least=0
    )
    warmup_ratio: float = _setting(0.0, "warm-up as a share of max_steps", at_least=0, at_most=1)
    decay_steps: float | None = _setting(
        None, "step at which min_learning_rate is reached; by default max_steps", above=0
    )
    weight_decay: float = _setting(0.0, "of matrices; norms and biases have none", at_least=0)
    adam_beta1: float = _setting(0.9, "AdamW", at_least=0, below=1)
    adam_beta2: float = _setting(0.999, "AdamW", at_least=0, below=1)
    adam_epsilon: float = _setting(1e-8, "AdamW", above=0)
    max_grad_norm: float = _setting(
        1.0, "global gradient norm above which gradients are scaled down; 0 never", at_least=0
    )

    # Logging, evaluation, checkpoints
    logging_steps: int = _setting(500, "steps between log lines", at_least=1)
    logging_first_step: bool = _setting(False, "log the first step as well")
    logging_dir: str | None = _setting(
        None, "folder of VisualDL or TensorBoard records; by default output_dir/runs"
    )
    report_to: tuple[str, ...] = _setting(
        (),
        "visualdl, tensorboard, both or none; metrics.jsonl is always written",
        choices=("none", "visualdl", "tensorboard"),
    )
    disable_tqdm: bool | None = _setting(
        None, "true: no progress bar; by default one is shown on a terminal"
    )
    evaluation_strategy: str | None = _setting(
        None, "by default steps when do_eval is true, else no", choices=("no", "steps", "epoch")
    )
    eval_steps: int | None = _setting(
        None, "steps between evaluations; by default logging_steps", at_least=1
    )
    max_evaluate_steps: int = _setting(
        -1, "cap on the batches of an evaluation; -1 for none", at_least=-1
    )
    save_strategy: str = _setting(
        "steps", "when checkpoints are written", choices=("no", "steps", "epoch")
    )
    save_steps: int = _setting(500, "steps between checkpoints", at_least=1)
    save_total_limit: int | None = _setting(
        None, "checkpoints kept, oldest deleted first; by default all", at_least=1
    )
    overwrite_output_dir: bool = _setting(False, "start anew although output_dir holds checkpoints")
    resume_from_checkpoint: str | None = _setting(
        None, "checkpoint folder to go on from; by default the last one in output_dir"
    )

    # Device
    device: str | None = _setting(
        None, "by default gpu when Paddle sees one, else cpu", choices=("cpu", "gpu")
    )
    bf16: bool | None = _setting(
        None, "compute in bfloat16; by default where the device can, false: float32"
    )
    use_flash_attention: bool | None = _setting(
        None, "true: insist on it; false: attention that stores its weights; by default if possible"
    )

    # Ours, unknown to PaddleNLP
    ops_backend: str | None = _setting(
        None,
        "implementation of the operators; by default PYPKG_OPS_BACKEND, else auto",
        choices=("auto", "compiled", "reference"),
    )
    num_threads: int = _setting(
        0, "CPU threads; 0 takes every core this process may use", at_least=0
    )
    eval_iters: int | None = _setting(
        None, "batches of an evaluation; by default max_evaluate_steps if set, else 10", at_least=1
    )
    sample_prompt: str = _setting("", "what the text written at the end of a run starts with")
    sample_tokens: int = _setting(
        0, "tokens of text that the model writes at the end of a run; 0 for none", at_least=0
    )

    other_keys: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        derived = {
            "tokenizer_name_or_path": self.model_name_or_path,
            "decay_steps": float(self.max_steps),
            "evaluation_strategy": "steps" if self.do_eval else "no",
            "eval_steps": self.logging_steps,
            "eval_iters": (
                self.max_evaluate_steps if self.max_evaluate_steps > 0 else _PADDLENLP_EVAL_ITERS
            ),
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(
            self, "report_to", tuple(name for name in self.report_to if name != "none")
        )

    @property
    def evaluates(self) -> bool:
        """Whether the validation split is evaluated during training."""
        return self.evaluation_strategy != "no"

    @property
    def saves(self) -> bool:
        """Whether checkpoints are written."""
        return self.save_strategy != "no"

    @property
    def warmup(self) -> float:
        """Warm-up in steps; with warmup_ratio not always a whole number."""
        return self.warmup_steps if self.warmup_steps > 0 else self.warmup_ratio * self.max_steps

    @property
    def model_overrides(self) -> dict[str, Any]:
        """Fields of ModelConfig that these settings replace."""
        names = ("num_hidden_layers", "initializer_range")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def to_json(self) -> str:
        """All settings with derived defaults filled in; a file that ``load_settings`` reads."""
        values = {spec.name: getattr(self, spec.name) for spec in setting_fields()}
        return json.dumps(values, indent=2) + "\n"

    def digest(self) -> str:
        """16 hexadecimal digits that differ when any setting does."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def setting_fields() -> tuple[dataclasses.Field, ...]:
    """The fields of Settings that users can set."""
    return tuple(f for f in dataclasses.fields(Settings) if "help" in f.metadata)


def setting_types() -> dict[str, Any]:
    """Setting name to its type, where ``X | None`` counts as X."""
    hints = typing.get_type_hints(Settings)
    found = {spec.name: hints[spec.name] for spec in setting_fields()}
    return {
        name: typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
        for name, hint in found.items()
    }
