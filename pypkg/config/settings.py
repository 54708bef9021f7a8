"""All settings of a run. Names and defaults are PaddleNLP's.

A default of None means that the value depends on other settings (see ``__post_init__``) or on the
device (see ``pypkg.device.capabilities``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pypkg.config.compute_settings import SPACED_LISTS, ComputeSettings
from pypkg.config.setting import interval, setting, split_words

# PaddleNLP's run_pretrain evaluates this many batches, whatever the settings say.
_PADDLENLP_EVAL_ITERS = 10
_WHOLE_WARMUP = ("constant_with_warmup", "polynomial")


@dataclass(frozen=True, kw_only=True)
class Settings(ComputeSettings):
    """All settings of a run. ``load_settings`` creates it; direct construction checks nothing.

    Attributes:
        other_keys: given keys of PaddleNLP that this version does not read (``known_keys.py``).
            ``check_supported`` rejects them, or ``notices`` says why they have no effect.
    """

    # Settings that PaddleNLP does not have
    allow_unknown_config: tuple[str, ...] = setting(
        (), "keys of config.json to ignore although the model's family does not know them"
    )
    download: bool = setting(
        False,
        "with continue_training, download weights that the Hugging Face cache lacks from the Hub; "
        "if false, the network is not used",
    )
    verify_checkpoint: str = setting(
        "checksums",
        "how a checkpoint is checked before the run resumes from it: checksums reads every file, "
        "sizes only compares file sizes, no skips the check",
        choices=("checksums", "sizes", "no"),
    )
    verify_data: bool = setting(
        False,
        "at start, rank 0 reads the corpora and compares them with the checksums that pypkg "
        "preprocess wrote",
    )
    reset_attention_mask: bool = setting(
        False, "a token attends only to tokens of its own document (Megatron-LM's name)"
    )
    reset_position_ids: bool = setting(
        False, "position ids start at 0 in each document (Megatron-LM's name)"
    )
    eod_mask_loss: bool = setting(
        False, "mask the loss at the last token of each document (Megatron-LM's name)"
    )
    loss_normalization: str = setting(
        "global",
        "global: the loss of a step is the mean over all labels of its global batch; micro_batch: "
        "the mean of the means of its micro batches, as in PaddleNLP. They differ if labels are "
        "masked",
        choices=("global", "micro_batch"),
    )
    blend_by: str = setting(
        "weights",
        "how often the corpora of input_dir are sampled: weights: by the weights in input_dir; "
        "size: by their tokens; temperature: by their tokens to the power of "
        "1 / blend_temperature. With the last two, input_dir has no weights",
        choices=("weights", "size", "temperature"),
    )
    blend_temperature: float = setting(
        1.0,
        "temperature of blend_by: 1 is the same as size; higher values favour small corpora",
        at_least=1,
    )
    sample_order: str = setting(
        "run",
        "order of the samples. run: PaddleNLP's, which depends on the number of samples of the "
        "run; epoch: each epoch is shuffled separately, so that a longer run starts with the "
        "samples of a shorter one",
        choices=("run", "epoch"),
    )
    attention_backend: str = setting(
        "auto",
        "implementation of attention. pypkg: this package's flash attention; paddle: Paddle's; "
        "reference: stores the attention weights; auto: pypkg on a CPU, and on a GPU the faster "
        "one of those whose results were checked",
        choices=("auto", "pypkg", "paddle", "reference"),
    )
    ops_backend: str | None = setting(
        None,
        "implementation of the operators; by default the environment variable "
        "PYPKG_OPS_BACKEND, else auto",
        choices=("auto", "compiled", "triton", "reference"),
    )
    matmul_precision: str = setting(
        "float32",
        "on a CPU: bfloat16 rounds the operands of matrix products to bfloat16 and sums in "
        "float32; all other computation stays in float32",
        choices=("float32", "bfloat16"),
    )
    num_threads: int = setting(
        0, "CPU threads of a process; 0: all cores that it may use", at_least=0
    )
    eval_iters: int | None = setting(
        None,
        "batches of an evaluation; -1: the whole split, each sample once; by default "
        "max_evaluate_steps if set, else 10",
        at_least=-1,
    )
    max_rollbacks: int = setting(
        3,
        "rollbacks allowed within rollback_window steps. In a rollback the run goes back to its "
        "newest checkpoint and leaves out the samples of the failed step. If more are needed, the "
        "run stops. 0: it stops at the first failed step",
        at_least=0,
    )
    rollback_window: int = setting(
        1000, "number of steps within which max_rollbacks counts", at_least=1
    )
    rollback_skip_steps: int = setting(
        1,
        "number of steps whose samples a rollback leaves out: the failed step and those before it",
        at_least=1,
    )
    loss_spike_threshold: float = setting(
        0.0,
        "a loss that is more than this number of standard deviations above the median of the "
        "previous steps is a spike, and the step has failed; 0: only a loss that is not finite "
        "fails. 10 is a value to start with",
        at_least=0,
    )
    grad_norm_spike_threshold: float = setting(
        0.0,
        "the same as loss_spike_threshold, for the gradient norm before clipping",
        at_least=0,
    )
    spike_window: int = setting(
        128,
        "number of previous steps from which the median and standard deviation are computed",
        at_least=8,
    )
    sample_prompt: str = setting(
        "", "prompt for the text that the model generates at the end of a run"
    )
    sample_tokens: int = setting(
        0, "number of tokens of a generated text; 0: no text is generated", at_least=0
    )
    sample_prompts: tuple[str, ...] = setting(
        (),
        "prompts for texts of sample_tokens tokens that the model generates during training, or "
        "the name of a file of prompts (.txt, .json, .jsonl)",
    )
    sample_steps: int = setting(
        0, "steps between texts for sample_prompts, which need at least 1", at_least=0
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
        for name in SPACED_LISTS:
            object.__setattr__(self, name, split_words(getattr(self, name)))
        object.__setattr__(
            self, "report_to", tuple(name for name in self.report_to if name != "none")
        )

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer state stays in host memory between updates."""
        return self.offload_optim or self.sharding_offload

    @property
    def evaluates(self) -> bool:
        """Whether the validation split is evaluated during training."""
        return self.evaluation_interval > 0

    @property
    def whole_splits(self) -> bool:
        """Whether evaluations use all samples of their split, each once."""
        return self.eval_iters == -1

    @property
    def evaluation_interval(self) -> int:
        """Number of steps between evaluations; 0: never."""
        steps = self.eval_steps or self.logging_steps
        return interval(self.evaluation_strategy or "no", steps, self.max_steps)

    @property
    def saves(self) -> bool:
        """Whether checkpoints are written."""
        return self.save_interval > 0

    @property
    def async_save_bytes(self) -> int | None:
        """Bytes of host memory of a rank for asynchronous saves; None: saves are synchronous."""
        return int(self.async_save_memory * 2**30) if self.use_async_save else None

    @property
    def save_interval(self) -> int:
        """Number of steps between checkpoints; 0: never."""
        return interval(self.save_strategy, self.save_steps, self.max_steps)

    def skips(self, step: int) -> bool:
        """Whether optimizer step ``step``, counted from 1, is in ``skip_data_intervals``."""
        return any(first <= step <= last for first, last in self.skip_data_intervals)

    @property
    def warmup(self) -> float:
        """Length of the warm-up in steps; with warmup_ratio it may be a fraction.

        Only constant_with_warmup and polynomial truncate it to whole steps, like PaddleNLP's
        trainer. PaddleNLP's run_pretrain, which has the other schedules, keeps the fraction.
        """
        if self.warmup_steps > 0:
            return self.warmup_steps
        steps = self.warmup_ratio * self.max_steps
        return int(steps) if self.lr_scheduler_type in _WHOLE_WARMUP else steps

    @property
    def model_overrides(self) -> dict[str, Any]:
        """Fields of ModelConfig that these settings replace."""
        names = ("num_hidden_layers", "initializer_range", "mup_base_width")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def to_json(self) -> str:
        """All settings with derived defaults, as JSON that ``load_settings`` can read."""
        values = {spec.name: getattr(self, spec.name) for spec in setting_fields()}
        return json.dumps(values, indent=2) + "\n"

    def digest(self) -> str:
        """A hash of all settings, as 16 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def setting_fields() -> tuple[dataclasses.Field, ...]:
    """The fields of Settings that users can set."""
    return tuple(f for f in dataclasses.fields(Settings) if "help" in f.metadata)
