"""PaddleNLP's keys that are not settings: those without effect, and those that are rejected.

Together with the fields of ``Settings`` these are all keys of PaddleNLP 3.0.0b4's run_pretrain and
run_pretrain_auto, and of its configuration files. When a key becomes a setting, its row here is
removed.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class KnownKey(NamedTuple):
    """A key that this version does not read.

    Attributes:
        type: of its values.
        neutral: values that agree with what this version does; other values cause a notice or an
            error.
        why: completes "KEY is VALUE, but ..." for a rejected key, and "KEY has no effect: ..." for
            the others.
        way_out: what to do instead; empty: set the key to the first neutral value.
    """

    name: str
    type: Any
    neutral: tuple[Any, ...]
    why: str
    way_out: str = ""


_OFF = (False, None)
_ONE = (1, -1, None)
_UNSET = (None,)
_EMPTY = ("", None)

_NO_EXPERT_MODELS = "no supported model is a mixture of experts"
_NO_AUTO = "the layout is given by degrees; Paddle's automatic parallelism is not used"
_NO_AMP_LISTS = "bf16 and fp16 convert the whole model, not single operators"
_NO_EXPERTS = "it matters only for mixtures of experts"
_PARTS = "it matters only for fine-tuning with PaddleNLP's trainer"
_AUTO_ONLY = "it matters only with enable_auto_parallel"
_NO_FUSED_ADD = "the bias is added outside the matrix product; the results are the same"
_LAUNCHER = "the launcher tells each process its rank"

NO_EFFECT: tuple[KnownKey, ...] = (
    # The same result either way.
    KnownKey(
        "use_fused_rms_norm",
        bool,
        (True, None),
        "the fused operator always runs; ops_backend chooses its implementation",
    ),
    KnownKey(
        "use_fused_rope",
        bool,
        (True, None),
        "the fused operator always runs; ops_backend chooses its implementation",
    ),
    KnownKey(
        "use_fused_linear_cross_entropy",
        bool,
        (True, None),
        "the loss is always computed without storing all logits",
    ),
    KnownKey(
        "fuse_attention_qkv",
        bool,
        (True, None),
        "query, key and value are always one matrix product",
    ),
    KnownKey(
        "fuse_attention_ffn",
        bool,
        (True, None),
        "gate and up projection are always one matrix product",
    ),
    KnownKey(
        "unified_checkpoint",
        bool,
        (True, None),
        "checkpoints are always safetensors that any layout can read",
    ),
    KnownKey("skip_memory_metrics", bool, (True, None), "peak memory is always logged"),
    KnownKey("count_trained_tokens", bool, _OFF, "trained tokens are always counted"),
    KnownKey("prediction_loss_only", bool, (True, None), "evaluation computes only the loss"),
    KnownKey(
        "eval_accumulation_steps",
        int,
        _UNSET,
        "evaluation keeps one number per batch, so outputs do not accumulate on the device",
    ),
    KnownKey(
        "data_impl",
        str,
        ("mmap", "lazy", None),
        "the files determine the format of the data, and are always memory-mapped",
    ),
    KnownKey("skip_warmup", bool, (True, None), "memory-mapped files need no warm-up"),
    KnownKey("dataloader_drop_last", bool, (True, None), "every training batch is full"),
    KnownKey("num_train_epochs", float, (1.0, None), "max_steps sets the length of the run"),
    KnownKey("model_type", str, _UNSET, "the model's config.json has the type"),
    KnownKey(
        "wandb_api_key",
        str,
        _UNSET,
        "wandb reads the environment variable WANDB_API_KEY, or the key that `wandb login` stored",
    ),
    KnownKey(
        "wandb_http_proxy",
        str,
        _UNSET,
        "wandb reads the environment variables HTTP_PROXY and HTTPS_PROXY",
    ),
    KnownKey(
        "use_fused_dropout_add", bool, _OFF, "the add is part of the next norm, after any dropout"
    ),
    KnownKey("use_fused_linear", bool, _OFF, _NO_FUSED_ADD),
    KnownKey("fused_linear", bool, _OFF, _NO_FUSED_ADD),
    KnownKey("fused_linear_param_grad_add", bool, _OFF, _AUTO_ONLY),
    KnownKey("transformer_engine_backend", str, _UNSET, "it matters only with use_fp8"),
    KnownKey("use_fast_layer_norm", bool, _OFF, "Paddle's LayerNorm always runs"),
    KnownKey("pad_token_id", int, (0, None), "samples are cut to length, never padded"),
    KnownKey("label_names", tuple[str, ...], _UNSET, _PARTS),
    KnownKey("past_index", int, (-1, None), _PARTS),
    KnownKey("remove_unused_columns", bool, (True, None), _PARTS),
    KnownKey("lazy_data_processing", bool, (True, None), _PARTS),
    KnownKey("release_grads", bool, _OFF, "gradients are freed after every step anyway"),
    # Parallelism and checkpoints, where this version has only one implementation.
    KnownKey(
        "fuse_sequence_parallel_allreduce",
        bool,
        _OFF,
        "gradients of norms and biases are summed during the backward pass; the results are the "
        "same",
    ),
    KnownKey(
        "tensor_parallel_output",
        bool,
        (True, None),
        "the loss is always computed from logits divided by vocabulary",
    ),
    KnownKey("tensor_parallel_rank", int, (0, None), _LAUNCHER),
    KnownKey("local_rank", int, (-1, 0, None), _LAUNCHER),
    KnownKey("force_reshard_pp", bool, _OFF, "checkpoints can be loaded under every layout"),
    KnownKey(
        "sharding_comm_buffer_size_MB", int, (-1, None), "fleet chooses the size of its buffers"
    ),
    KnownKey("sharding_parallel_mesh_dimension", str, ("dp", None), _AUTO_ONLY),
    KnownKey("use_intermediate_api", bool, _OFF, _AUTO_ONLY),
    KnownKey("fuse_allreduce_split_to_reducescatter", bool, _OFF, _AUTO_ONLY),
    KnownKey("eliminate_transpose", bool, _OFF, _AUTO_ONLY),
    KnownKey("load_model_with_sharding_tensor_fusion", bool, _OFF, _AUTO_ONLY),
    KnownKey("save_model_with_sharding_tensor_fusion", bool, _OFF, _AUTO_ONLY),
    KnownKey("job_schedule_profiler_start", int, (-1, None), _AUTO_ONLY),
    KnownKey("job_schedule_profiler_end", int, (-1, None), _AUTO_ONLY),
    KnownKey(
        "virtual_pipeline_seg_method",
        str,
        ("LlamaDecoderLayerAuto", None),
        "layers are divided evenly over pipeline stages and their model chunks",
    ),
    KnownKey(
        "save_sharding_stage1_model_include_freeze_params",
        bool,
        _OFF,
        "checkpoints always hold all parameters",
    ),
    KnownKey("expert_max_capacity", int, (2**32, None), _NO_EXPERTS),
    KnownKey("expert_min_capacity", int, (1, None), _NO_EXPERTS),
    KnownKey(
        "ddp_find_unused_parameters",
        bool,
        _OFF,
        "every parameter of a model is used in every step",
    ),
    KnownKey("log_on_each_node", bool, (True, None), "only rank 0 writes log lines"),
    KnownKey("save_on_each_node", bool, _OFF, "allow_local_output keeps a part on each machine"),
    KnownKey("ordered_save_group_size", int, (0, None), "all ranks write at the same time"),
    KnownKey("pdc_download_timeout", int, (300, None), "it matters only with pdc_download_ckpt"),
    KnownKey(
        "auto_parallel_resume_form_hybrid_parallel",
        bool,
        _OFF,
        _AUTO_ONLY,
    ),
    KnownKey(
        "unified_checkpoint_config",
        str,
        _EMPTY,
        "every checkpoint holds weights in training precision and the whole optimizer state",
    ),
)

REFUSED: tuple[KnownKey, ...] = (
    KnownKey(
        "split_inputs_sequence_dim",
        bool,
        (True, None),
        "each rank takes its part of the tokens from the whole batch",
    ),
    KnownKey("expert_parallel_degree", int, _ONE, _NO_EXPERT_MODELS),
    KnownKey("expert_tensor_parallel_degree", int, _ONE, _NO_EXPERT_MODELS),
    KnownKey("use_expert_parallel", bool, _OFF, _NO_EXPERT_MODELS),
    KnownKey("enable_auto_parallel", bool, _OFF, _NO_AUTO),
    KnownKey("parallel_mode", str, _UNSET, _NO_AUTO),
    KnownKey("to_static", bool, _OFF, "models run in dynamic mode only"),
    KnownKey(
        "fp16_opt_level",
        str,
        ("O2", None),
        "bf16 and fp16 always mean 16-bit parameters with float32 master weights, which is O2",
    ),
    KnownKey(
        "attention_probs_dropout_prob",
        float,
        (0.0, None),
        "flash attention has no dropout; hidden_dropout_prob is supported",
    ),
    KnownKey(
        "offload_recompute_inputs",
        bool,
        _OFF,
        "the inputs of recomputed layers stay on the device",
    ),
    KnownKey(
        "refined_recompute",
        str,
        _EMPTY,
        "recomputation cannot be chosen for single operators",
        "leave it out and use recompute_granularity or no_recompute_layers",
    ),
    KnownKey("amp_custom_black_list", tuple[str, ...], _UNSET, _NO_AMP_LISTS),
    KnownKey("amp_custom_white_list", tuple[str, ...], _UNSET, _NO_AMP_LISTS),
    KnownKey("bf16_full_eval", bool, _OFF, "evaluation runs in the precision of training"),
    KnownKey("fp16_full_eval", bool, _OFF, "evaluation runs in the precision of training"),
    KnownKey("use_fp8", bool, _OFF, "there are no FP8 operators"),
    KnownKey(
        "pipeline_schedule_mode",
        str,
        ("1F1B", "VPP", None),
        "the schedules here are 1F1B and, with virtual_pp_degree above 1, its interleaved form",
    ),
    KnownKey("flatten_param_grads", bool, _OFF, "gradients are not flattened into one buffer"),
    KnownKey("ignore_data_skip", bool, _OFF, "a resumed run continues with the next sample"),
    KnownKey("save_sharded_model", bool, _OFF, "checkpoints are independent of the layout"),
    KnownKey("load_sharded_model", bool, _OFF, "checkpoints are independent of the layout"),
    KnownKey("ckpt_quant_stage", str, ("O0", None), "checkpoints are not quantized"),
    KnownKey("minimum_eval_times", int, _UNSET, "only eval_steps sets when to evaluate"),
    KnownKey("logging_strategy", str, ("steps", None), "logging is only by steps"),
    KnownKey("metrics_output_path", str, _UNSET, "metrics go to metrics.jsonl in output_dir"),
    KnownKey("output_signal_dir", str, _UNSET, "no signal files are written"),
    KnownKey("pdc_download_ckpt", bool, _OFF, "checkpoints are not downloaded"),
    KnownKey(
        "do_export",
        bool,
        _OFF,
        "models are not exported for inference",
        "set it to false; a checkpoint is a folder in Hugging Face format",
    ),
    KnownKey(
        "autotuner_benchmark",
        bool,
        _OFF,
        "this mode does not exist",
        'set it to false and use "python -m pypkg.bench train-step"',
    ),
    KnownKey(
        "no_cuda",
        bool,
        _OFF,
        "the setting device chooses the device",
        'set device to "cpu" instead',
    ),
)
