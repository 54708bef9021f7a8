"""The settings of the optimizer, and of logging, evaluation and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from pypkg.config.model_data import ModelDataSettings
from pypkg.config.setting import setting


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(ModelDataSettings):
    """The fields of ``Settings`` that follow those of model and data."""

    # Optimizer and learning rate
    rampup_batch_size: tuple[int, ...] = setting(
        (),
        "start, increment, samples: the global batch size is start at first and grows by increment "
        "at equal intervals, until it reaches that of the other settings after the given number of "
        "samples (Megatron-LM's name)",
        at_least=1,
    )
    optim: str = setting(
        "adamw",
        "optimizer. adamw_16bit_moment and adamw_8bit store AdamW's moments in bfloat16 or 8 bits; "
        "with muon, Muon updates the matrices of the decoder layers and AdamW all other parameters",
        choices=("adamw", "adamw_16bit_moment", "adamw_8bit", "lion", "adafactor", "muon"),
    )
    stochastic_rounding: bool = setting(
        False,
        "bfloat16 parameters have no float32 master weights, and updates are rounded "
        "stochastically",
    )
    muon_momentum: float = setting(0.95, "decay rate of Muon's momentum", at_least=0, below=1)
    learning_rate: float = setting(5e-5, "learning rate after warm-up", above=0)
    embedding_lr_scale: float = setting(
        1.0, "factor of the learning rate of token and position embeddings", above=0
    )
    head_lr_scale: float = setting(
        1.0, "factor of the learning rate of a head that is not tied to the embedding", above=0
    )
    min_learning_rate: float = setting(
        1e-5, "final learning rate of a decay; polynomial has lr_end instead", at_least=0
    )
    lr_scheduler_type: str = setting(
        "linear",
        "schedule of the learning rate after warm-up; constant has no warm-up",
        choices=(
            *("linear", "cosine", "constant", "constant_with_warmup", "polynomial"),
            *("cosine_with_restarts", "inverse_sqrt", "warmup_stable_decay"),
        ),
    )
    warmup_steps: int = setting(
        0, "steps of linear warm-up; a value above 0 overrides warmup_ratio", at_least=0
    )
    warmup_ratio: float = setting(
        0.0, "warm-up steps as a fraction of max_steps", at_least=0, at_most=1
    )
    decay_steps: float | None = setting(
        None, "step at which min_learning_rate is reached; by default max_steps", above=0
    )
    lr_end: float = setting(1e-7, "final learning rate of polynomial", at_least=0)
    power: float = setting(1.0, "exponent of polynomial; 1 is linear", above=0)
    num_cycles: float = setting(
        0.5, "cycles of cosine_with_restarts, a whole number; each decays from the peak", above=0
    )
    lr_wsd_decay_steps: float | None = setting(
        None,
        "length in steps of the decay of warmup_stable_decay, which ends at decay_steps",
        above=0,
    )
    lr_wsd_decay_style: str = setting(
        "minus_sqrt",
        "decay of warmup_stable_decay: 1 - progress (linear), half a cosine (cosine), or "
        "1 - sqrt(progress) (minus_sqrt)",
        choices=("linear", "cosine", "minus_sqrt"),
    )
    weight_decay: float = setting(
        0.0, "decoupled weight decay of matrices; norms and biases have none", at_least=0
    )
    adam_beta1: float = setting(
        0.9, "decay rate of AdamW's first moment; beta1 of lion", at_least=0, below=1
    )
    adam_beta2: float = setting(
        0.999, "decay rate of AdamW's second moment; beta2 of lion", at_least=0, below=1
    )
    adam_epsilon: float = setting(1e-8, "added to AdamW's denominator", above=0)
    max_grad_norm: float = setting(
        1.0,
        "global norm to which gradients are clipped; 0 disables clipping",
        at_least=0,
    )

    z_loss: float = setting(
        0.0,
        "factor of the squared log-sum-exp of the logits, which is added to the training loss of "
        "each label; PaLM used 1e-4; 0: not added",
        at_least=0,
    )

    # Logging, evaluation, checkpoints
    logging_steps: int = setting(500, "steps between log lines", at_least=1)
    logging_first_step: bool = setting(False, "log the first step as well")
    log_layer_grad_norms: bool = setting(
        False,
        "record the gradient norm of each layer, before clipping, in metrics.jsonl and report_to",
    )
    logging_dir: str | None = setting(
        None, "folder for the files of report_to; by default output_dir/runs"
    )
    report_to: tuple[str, ...] = setting(
        (),
        "programs that track the run; metrics.jsonl is always written",
        choices=("none", "visualdl", "tensorboard", "wandb", "swanlab"),
    )
    run_name: str | None = setting(
        None, "name of the run in wandb and swanlab; by default the name of output_dir"
    )
    disable_tqdm: bool | None = setting(
        None, "true: no progress bar; by default there is one on a terminal"
    )
    skip_profile_timer: bool = setting(
        True,
        "false: every rank times the phases of its steps and counts its communication, and the run "
        "ends with a table of both",
    )
    profiler_options: str | None = setting(
        None,
        'steps to record with Paddle\'s profiler, such as "batch_range=[10,20]; profile_path=DIR": '
        "each rank writes a Chrome trace, tables of operators, and memory use; by default none",
    )
    evaluation_strategy: str | None = setting(
        None,
        "when to evaluate on the validation split. epoch: after the last step, because PaddleNLP's "
        "epoch is the whole run. By default steps if do_eval is true, else no",
        choices=("no", "steps", "epoch"),
    )
    eval_steps: int | None = setting(
        None, "steps between evaluations; by default logging_steps", at_least=1
    )
    eval_on_start: bool = setting(
        False,
        "also evaluate before the first step, for example to know the loss of a model before "
        "continue_training (transformers' name)",
    )
    max_evaluate_steps: int = setting(
        -1, "limit of the batches of an evaluation; -1: no limit", at_least=-1
    )
    save_strategy: str = setting(
        "steps",
        "when to write checkpoints. epoch: after the last step, as in evaluation_strategy",
        choices=("no", "steps", "epoch"),
    )
    save_steps: int = setting(500, "steps between checkpoints", at_least=1)
    save_total_limit: int | None = setting(
        None,
        "number of checkpoints to keep; the oldest are deleted first; by default all are kept",
        at_least=1,
    )
    use_async_save: bool = setting(
        False,
        "write checkpoints asynchronously: training continues while a process of each rank writes "
        "its part. There is one checkpoint at a time, and the run waits for the last one",
    )
    async_save_memory: float = setting(
        8.0,
        "with use_async_save, the limit in GiB of host memory for data of a rank that is not "
        "written yet; if a rank's part of a checkpoint is larger, training waits for the disk",
        above=0,
    )
    load_best_model_at_end: bool = setting(
        False,
        "keep the checkpoint with the lowest validation loss, and load its model at the end of the "
        "run for the test loss, the sample text and the summary",
    )
    metric_for_best_model: str | None = setting(
        None,
        "metric of load_best_model_at_end: loss, ppl or perplexity, with or without the prefix "
        "eval_; all of them choose the same model",
    )
    greater_is_better: bool | None = setting(
        None, "must be false, because the metric is a loss; by default false"
    )
    allow_local_output: bool = setting(
        False,
        "allow an output_dir that the machines do not share: each machine keeps its own part of "
        "the checkpoints, and a run on the same machines can resume from them",
    )
    overwrite_output_dir: bool = setting(
        False, "start a new run although output_dir holds checkpoints"
    )
    resume_from_checkpoint: str | None = setting(
        None, "checkpoint folder to resume from; by default the newest one in output_dir"
    )
    ignore_load_lr_and_optim: bool = setting(
        False,
        "load only the weights from resume_from_checkpoint; optimizer state, step, learning rate "
        "and data start anew",
    )
    ignore_save_lr_and_optim: bool = setting(
        False,
        "write checkpoints without optimizer state; a run can only resume from them with "
        "ignore_load_lr_and_optim",
    )
