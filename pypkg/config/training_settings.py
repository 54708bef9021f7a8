"""The settings of the optimizer, and of what a run logs, evaluates and saves."""

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
        "start, increment, samples: a step has start samples of all ranks at first, and increment "
        "more after each equal part of samples, up to the batch of the other settings "
        "(Megatron-LM's name)",
        at_least=1,
    )
    optim: str = setting(
        "adamw",
        "optimizer. adamw_16bit_moment and adamw_8bit keep AdamW's moments in bfloat16 or 8 bits; "
        "muon updates the matrices between embedding and head, and AdamW the rest",
        choices=("adamw", "adamw_16bit_moment", "adamw_8bit", "lion", "adafactor", "muon"),
    )
    stochastic_rounding: bool = setting(
        False,
        "bfloat16 parameters have no float32 master weights; updates are rounded stochastically",
    )
    muon_momentum: float = setting(0.95, "decay rate of Muon's momentum", at_least=0, below=1)
    learning_rate: float = setting(5e-5, "learning rate after warm-up", above=0)
    embedding_lr_scale: float = setting(
        1.0, "factor of the learning rate of embeddings of tokens and positions", above=0
    )
    head_lr_scale: float = setting(
        1.0, "factor of the learning rate of a head that is not the embedding", above=0
    )
    min_learning_rate: float = setting(
        1e-5, "final learning rate of a decay, but not of polynomial", at_least=0
    )
    lr_scheduler_type: str = setting(
        "linear",
        "shape of the learning rate after warm-up; constant has no warm-up",
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
        0.5, "cycles of cosine_with_restarts, a whole number, each from the peak down", above=0
    )
    lr_wsd_decay_steps: float | None = setting(
        None, "last steps before decay_steps in which warmup_stable_decay falls", above=0
    )
    lr_wsd_decay_style: str = setting(
        "minus_sqrt",
        "fall of warmup_stable_decay: 1 - progress, half a cosine, or 1 - sqrt(progress)",
        choices=("linear", "cosine", "minus_sqrt"),
    )
    weight_decay: float = setting(
        0.0, "decoupled decay, of matrices; 0 for norms and biases", at_least=0
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
        "gradients are scaled down to this global norm if theirs is larger; 0 disables clipping",
        at_least=0,
    )

    z_loss: float = setting(
        0.0,
        "factor of the squared log-sum-exp of the logits, which is added to the loss of each label "
        "in training, as in PaLM, which took 1e-4; 0: none",
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
        None, "folder of the records of report_to; by default output_dir/runs"
    )
    report_to: tuple[str, ...] = setting(
        (),
        "programs that track the run; metrics.jsonl is always written",
        choices=("none", "visualdl", "tensorboard", "wandb", "swanlab"),
    )
    run_name: str | None = setting(
        None, "name of the run in wandb and swanlab; by default that of output_dir"
    )
    disable_tqdm: bool | None = setting(
        None, "true: no progress bar; by default one is shown on a terminal"
    )
    skip_profile_timer: bool = setting(
        True,
        "false: every rank measures its steps, and a table at the end of the run says where the "
        "time went and what was sent",
    )
    profiler_options: str | None = setting(
        None,
        'steps to record with Paddle\'s profiler, such as "batch_range=[10,20]; profile_path=DIR": '
        "a Chrome trace, tables of operators, and memory, of each rank; by default none",
    )
    evaluation_strategy: str | None = setting(
        None,
        "when the validation split is evaluated; epoch: after the last step, since PaddleNLP's "
        "epoch is the whole run; by default steps if do_eval is true, else no",
        choices=("no", "steps", "epoch"),
    )
    eval_steps: int | None = setting(
        None, "steps between evaluations; by default logging_steps", at_least=1
    )
    eval_on_start: bool = setting(
        False,
        "evaluate before the first step as well, so that the loss of a model that is continued is "
        "known (transformers' name)",
    )
    max_evaluate_steps: int = setting(
        -1, "cap on the batches of an evaluation; -1 for none", at_least=-1
    )
    save_strategy: str = setting(
        "steps",
        "when checkpoints are written; epoch: after the last step, as in evaluation_strategy",
        choices=("no", "steps", "epoch"),
    )
    save_steps: int = setting(500, "steps between checkpoints", at_least=1)
    save_total_limit: int | None = setting(
        None, "checkpoints kept, oldest deleted first; by default all", at_least=1
    )
    use_async_save: bool = setting(
        False,
        "training goes on while a process of each rank writes its part of a checkpoint; one "
        "checkpoint at a time, and the run ends when the last is complete",
    )
    async_save_memory: float = setting(
        8.0,
        "limit in GiB of the host memory from which a rank writes with use_async_save; if its part "
        "of a checkpoint is larger, training waits for the disk",
        above=0,
    )
    load_best_model_at_end: bool = setting(
        False,
        "keep the checkpoint of the lowest validation loss, and end the run with its model: test "
        "loss, sample and summary",
    )
    metric_for_best_model: str | None = setting(
        None,
        "what load_best_model_at_end compares: loss, ppl or perplexity, with or without eval_ "
        "before it, which all choose the same model",
    )
    greater_is_better: bool | None = setting(
        None, "must be false, since a loss is compared; by default false"
    )
    allow_local_output: bool = setting(
        False,
        "let each machine keep its own part of the checkpoints where output_dir is no folder that "
        "all machines share; a run of the same machines goes on from them",
    )
    overwrite_output_dir: bool = setting(False, "start anew although output_dir holds checkpoints")
    resume_from_checkpoint: str | None = setting(
        None, "checkpoint folder to go on from; by default the last one in output_dir"
    )
    ignore_load_lr_and_optim: bool = setting(
        False,
        "take only the weights from resume_from_checkpoint: optimizer state, steps, learning rate "
        "and data start anew",
    )
    ignore_save_lr_and_optim: bool = setting(
        False,
        "write checkpoints without the optimizer state, which only ignore_load_lr_and_optim reads",
    )
