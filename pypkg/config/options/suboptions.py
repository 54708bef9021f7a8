"""The options inside PaddleNLP's tensor_parallel_config, pipeline_parallel_config and so on.

Most of them choose how fleet overlaps or fuses communication, and do not change results. None is
ignored silently: the log names options without effect, and unsupported options are rejected. All
except ``reduce_once_per_step`` are PaddleNLP's.
"""

from __future__ import annotations

from typing import NamedTuple


class SubOption(NamedTuple):
    """One word of a *_config setting.

    Attributes:
        why: the reason why it has no effect or is rejected; empty if it has an effect.
        refused: whether it is rejected.
        does: its effect. If ``why`` and ``does`` are empty, the option is always on.
    """

    setting: str
    name: str
    why: str = ""
    refused: bool = False
    does: str = ""


FUSED_GRAD_ADD = "enable_mp_fused_linear_param_grad_add"

_OVERLAP = "communication is not overlapped further; the results are the same"
_FUSED = "fleet chooses operators and buffers by itself; the results are the same"
_SCALE = "the loss of each micro batch is divided before its backward pass; the sum is the same"
_AUTO = "it matters only with PaddleNLP's automatic parallelism"
_TENSOR, _PIPELINE = "tensor_parallel_config", "pipeline_parallel_config"
_SEQUENCE, _DATA = "sequence_parallel_config", "data_parallel_config"
_SHARDING = "sharding_parallel_config"

SUB_OPTIONS: tuple[SubOption, ...] = (
    SubOption(
        _TENSOR,
        "enable_mp_async_allreduce",
        does="the input gradient of qkv, gate and up projections is all-reduced while their weight "
        "gradient is computed; on GPUs also set CUDA_DEVICE_MAX_CONNECTIONS=1",
    ),
    SubOption(
        _TENSOR,
        "enable_mp_skip_c_identity",
        does="column- and row-parallel layers do not copy their inputs and the gradients of their "
        "outputs",
    ),
    SubOption(_TENSOR, FUSED_GRAD_ADD, does="same as enable_linear_fused_grad_add"),
    SubOption(
        _TENSOR,
        "enable_sp_async_reduce_scatter",
        does="like enable_mp_async_allreduce, for the reduce-scatter of sequence_parallel",
    ),
    SubOption(_TENSOR, "enable_delay_scale_loss", _SCALE),
    SubOption(_TENSOR, "sync_param", "replicated parameters stay equal, as their gradients are"),
    SubOption(_TENSOR, "sync_grad", "gradients of replicated parameters are equal already"),
    SubOption(_TENSOR, "sync_moment", "moments of replicated parameters stay equal"),
    SubOption(_TENSOR, "replace_with_c_embedding"),
    SubOption(_TENSOR, "replace_with_parallel_cross_entropy"),
    SubOption(_SEQUENCE, "enable_allreduce_avg_in_gradinent_scale", _AUTO),
    SubOption(_PIPELINE, "disable_partial_send_recv"),
    SubOption(
        _PIPELINE,
        "disable_p2p_cache_shape",
        "all micro batches of a run have the same shape, which is sent once",
    ),
    SubOption(_PIPELINE, "enable_delay_scale_loss", _SCALE),
    SubOption(
        _PIPELINE,
        "enable_dp_comm_overlap",
        "reducing gradients during the pipeline's backward passes gives inaccurate results; "
        "PaddleNLP rejects it too",
        refused=True,
    ),
    SubOption(_PIPELINE, "enable_sharding_comm_overlap", _OVERLAP),
    SubOption(_PIPELINE, "enable_timer", "fleet's timers of the schedule are not printed"),
    SubOption(_PIPELINE, "enable_release_grads", "gradients are freed after every step anyway"),
    SubOption(_PIPELINE, "enable_clear_every_step_cache", "shapes stay the same between steps"),
    SubOption(_PIPELINE, "enable_overlap_p2p_comm", _OVERLAP),
    SubOption(_PIPELINE, "enable_send_recv_overlap", _OVERLAP),
    SubOption(
        _PIPELINE,
        "enable_split_backward",
        "gradients of inputs and of weights are computed together; the results are the same",
    ),
    SubOption(_PIPELINE, "disable_batch_p2p_comm", _FUSED),
    SubOption(
        _PIPELINE,
        "best_unbalanced_scheduler",
        "interleaved stages use fleet's standard schedules, which need "
        "pipeline_parallel_degree micro batches, or at least twice as many",
        refused=True,
    ),
    SubOption(
        _PIPELINE, "use_dualpipev", "the schedules here are 1F1B and interleaved", refused=True
    ),
    SubOption(_SHARDING, "enable_tensor_fusion", _FUSED),
    SubOption(_SHARDING, "enable_overlap", _OVERLAP),
    SubOption(_SHARDING, "enable_stage1_tensor_fusion", does="same as enable_stage1_overlap"),
    SubOption(
        _SHARDING,
        "enable_stage1_overlap",
        does="stage 1 reduces gradients in buckets during the last backward pass of a step, and "
        "broadcasts one buffer for each owner; no effect with pipeline stages, whose schedule "
        "needs whole gradients at its end",
    ),
    SubOption(
        _SHARDING,
        "enable_stage2_overlap",
        does="like enable_stage1_broadcast_overlap, for stage 2; gradients are always reduced "
        "during the backward pass",
    ),
    SubOption(
        _SHARDING,
        "reduce_once_per_step",
        does="stage 2 accumulates the gradients of all micro batches and reduces the sums during "
        "the last backward pass; a rank holds all gradients until then",
    ),
    SubOption(
        _SHARDING,
        "split_param",
        "the optimizer state is divided by whole parameters; the results are the same",
    ),
    SubOption(_SHARDING, "disable_stage1_reduce_avg", _FUSED),
    SubOption(
        _SHARDING,
        "enable_stage1_broadcast_overlap",
        does="in stage 1 owners broadcast updated weights during the next forward pass, one "
        "parameter after the other in the order of the layers; a layer waits for its own weights",
    ),
    SubOption(_SHARDING, "enable_stage1_allgather_overlap", _OVERLAP),
    SubOption(_SHARDING, "enable_release_grads", "gradients are freed after every step anyway"),
    SubOption(_SHARDING, "enable_fuse_optimizer_states", _FUSED),
    SubOption(_DATA, "enable_allreduce_avg_in_gradinent_scale", _AUTO),
    SubOption(_DATA, "gradient_sync_after_accumulate", _AUTO),
)

# Words of tensor_parallel_config that need sequence_parallel (True) or need it off (False).
OF_SEQUENCE_PARALLEL = {
    "enable_mp_async_allreduce": False,
    "enable_mp_skip_c_identity": False,
    "enable_sp_async_reduce_scatter": True,
}
# The sharding stage in which a word of sharding_parallel_config has an effect.
STAGE_OF_WORD = {
    "enable_stage1_tensor_fusion": 1,
    "enable_stage1_overlap": 1,
    "enable_stage2_overlap": 2,
    "reduce_once_per_step": 2,
    "enable_stage1_broadcast_overlap": 1,
}
# With these words, gradients are only reduced during the last backward pass of a step.
REDUCE_ONCE = ("enable_stage1_tensor_fusion", "enable_stage1_overlap", "reduce_once_per_step")
# With these words, updated weights are broadcast during the next forward pass.
OVERLAP_WEIGHTS = ("enable_stage1_broadcast_overlap", "enable_stage2_overlap")


def option_names(setting: str) -> tuple[str, ...]:
    """The valid words of ``setting``."""
    return tuple(option.name for option in SUB_OPTIONS if option.setting == setting)
