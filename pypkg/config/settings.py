"""The settings that a run honours, one field each. Names and defaults are PaddleNLP's.

A default of None means that the value follows from other settings (see ``__post_init__``) or from
the device (see ``pypkg.device.capabilities``).
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
    """Everything that decides a run. Made by ``load_settings``; direct construction checks nothing.

    ``other_keys`` holds the known keys that no part of this version reads, as they were given:
    ``check_supported`` refuses them or ``notices`` says why they change nothing.
    """

    # Ours, unknown to PaddleNLP
    allow_unknown_config: tuple[str, ...] = setting(
        (), "keys of config.json to ignore that the model's family does not know"
    )
    download: bool = setting(
        False,
        "with continue_training, fetch weights that the Hugging Face cache lacks from the Hub; "
        "otherwise the network is never used",
    )
    verify_checkpoint: str = setting(
        "checksums",
        "how a checkpoint is checked before the run goes on from it: checksums reads every file, "
        "sizes compares only their lengths, no skips the check",
        choices=("checksums", "sizes", "no"),
    )
    verify_data: bool = setting(
        False,
        "read the corpora at start, on rank 0, and compare them with the checksums that pypkg "
        "preprocess wrote",
    )
    reset_attention_mask: bool = setting(
        False, "a token attends only to tokens of its own document (Megatron-LM's name)"
    )
    reset_position_ids: bool = setting(
        False, "positions count from 0 in each document (Megatron-LM's name)"
    )
    eod_mask_loss: bool = setting(
        False, "mask the loss at the last token of each document (Megatron-LM's name)"
    )
    loss_normalization: str = setting(
        "global",
        "global: the loss of a step is the mean over the labels of its global batch; micro_batch: "
        "the mean of the means of its micro batches, as in PaddleNLP. They differ under masks",
        choices=("global", "micro_batch"),
    )
    blend_by: str = setting(
        "weights",
        "shares of the corpora: the weights in input_dir; their sizes in tokens; or these sizes to "
        "the power of 1 / blend_temperature. With the last two, input_dir holds no weights",
        choices=("weights", "size", "temperature"),
    )
    blend_temperature: float = setting(
        1.0,
        "temperature of blend_by; 1 is by size, and higher values favour small corpora",
        at_least=1,
    )
    sample_order: str = setting(
        "run",
        "run: PaddleNLP's, which depends on how many samples the run needs; epoch: each epoch is "
        "shuffled by itself, so that a longer run begins like a shorter one",
        choices=("run", "epoch"),
    )
    attention_backend: str = setting(
        "auto",
        "attention: pypkg, our kernels; paddle, Paddle's flash attention; reference, which stores "
        "the attention weights; auto, ours on a CPU, and on a GPU the faster one that is checked",
        choices=("auto", "pypkg", "paddle", "reference"),
    )
    ops_backend: str | None = setting(
        None,
        "implementation of the operators; by default PYPKG_OPS_BACKEND, else auto",
        choices=("auto", "compiled", "triton", "reference"),
    )
    matmul_precision: str = setting(
        "float32",
        "on a CPU: bfloat16 rounds the operands of matrix products and sums in float32; "
        "everything else stays float32",
        choices=("float32", "bfloat16"),
    )
    num_threads: int = setting(
        0, "CPU threads; 0 takes every core this process may use", at_least=0
    )
    eval_iters: int | None = setting(
        None,
        "batches of an evaluation, and -1 for the whole split, each sample once; by default "
        "max_evaluate_steps if set, else 10",
        at_least=-1,
    )
    max_rollbacks: int = setting(
        3,
        "rollbacks allowed within rollback_window steps: the run goes back to its newest "
        "checkpoint and leaves out the samples of the failed step. After them it stops. 0: it "
        "stops at the first failed step",
        at_least=0,
    )
    rollback_window: int = setting(
        1000, "number of steps over which max_rollbacks counts", at_least=1
    )
    rollback_skip_steps: int = setting(
        1,
        "steps whose samples a rollback leaves out: the failed one and those before it",
        at_least=1,
    )
    loss_spike_threshold: float = setting(
        0.0,
        "standard deviations above the median of the previous steps from which a loss is a spike; "
        "0: no finite loss is one. 10 is a value to start with",
        at_least=0,
    )
    grad_norm_spike_threshold: float = setting(
        0.0, "loss_spike_threshold for the gradient norm before clipping", at_least=0
    )
    spike_window: int = setting(
        128, "number of previous steps that give the median and standard deviation", at_least=8
    )
    sample_prompt: str = setting("", "start of the text that the model writes at the end of a run")
    sample_tokens: int = setting(
        0, "tokens of text that the model writes at the end of a run; 0 for none", at_least=0
    )
    sample_prompts: tuple[str, ...] = setting(
        (),
        "prompts that the model continues by sample_tokens tokens during training, or the name of "
        "a file of them (.txt, .json, .jsonl)",
    )
    sample_steps: int = setting(
        0, "steps between texts after sample_prompts; they need it to be 1 or more", at_least=0
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
        """Whether evaluations go through all samples of their split, each once."""
        return self.eval_iters == -1

    @property
    def evaluation_interval(self) -> int:
        """Steps between evaluations; 0: there are none."""
        steps = self.eval_steps or self.logging_steps
        return interval(self.evaluation_strategy or "no", steps, self.max_steps)

    @property
    def saves(self) -> bool:
        """Whether checkpoints are written."""
        return self.save_interval > 0

    @property
    def async_save_bytes(self) -> int | None:
        """Host memory of a rank for what is yet to be written; None: checkpoints are awaited."""
        return int(self.async_save_memory * 2**30) if self.use_async_save else None

    @property
    def save_interval(self) -> int:
        """Steps between checkpoints; 0: there are none."""
        return interval(self.save_strategy, self.save_steps, self.max_steps)

    def skips(self, step: int) -> bool:
        """Whether the samples of optimizer step ``step``, from 1, are passed over."""
        return any(first <= step <= last for first, last in self.skip_data_intervals)

    @property
    def warmup(self) -> float:
        """Warm-up in steps; of a decay with warmup_ratio not always a whole number.

        PaddleNLP's run_pretrain keeps the fraction; its trainer, which makes constant_with_warmup
        and polynomial, cuts it off.
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
        """All settings with derived defaults filled in; a file that ``load_settings`` reads."""
        values = {spec.name: getattr(self, spec.name) for spec in setting_fields()}
        return json.dumps(values, indent=2) + "\n"

    def digest(self) -> str:
        """16 hexadecimal digits that differ when any setting does."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def setting_fields() -> tuple[dataclasses.Field, ...]:
    """The fields of Settings that users can set."""
    return tuple(f for f in dataclasses.fields(Settings) if "help" in f.metadata)
