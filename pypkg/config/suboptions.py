"""The options inside PaddleNLP's tensor_parallel_config, pipeline_parallel_config and so on.

Most of them choose how fleet overlaps or fuses communication, not what is computed. None is passed
over in silence: what changes nothing is said in the log, and what cannot be had is refused.
PaddleNLP has all of them but ``reduce_once_per_step``.
"""

from __future__ import annotations

from typing import NamedTuple


class SubOption(NamedTuple):
    """One word of a *_config setting.

    ``why`` says why it changes nothing, or why it is refused; ``does`` what it does. Both are empty
    for what happens anyway.
    """

    setting: str
    name: str
    why: str = ""
    refused: bool = False
    does: str = ""


_OVERLAP = "communication is not overlapped further; the results are the same"
_FUSED = "fleet's own choice of operators and buffers stays; the results are the same"
_SCALE = "the loss of each micro batch is divided as it arises; the sum is the same"
_AUTO = "it matters only to PaddleNLP's automatic parallelism"
_TENSOR, _PIPELINE = "tensor_parallel_config", "pipeline_parallel_config"
_SEQUENCE, _DATA = "sequence_parallel_config", "data_parallel_config"
_SHARDING = "sharding_parallel_config"

SUB_OPTIONS: tuple[SubOption, ...] = (
    SubOption(
        _TENSOR,
        "enable_mp_async_allreduce",
        does="the input gradient of qkv, gate and up projections is all-reduced beside the product "
        "of their weight gradient; on GPUs set CUDA_DEVICE_MAX_CONNECTIONS=1 with it",
    ),
    SubOption(
        _TENSOR,
        "enable_mp_skip_c_identity",
        does="column- and row-parallel layers do not copy their input and the gradient of their "
        "output",
    ),
    SubOption(
        _TENSOR,
        "enable_mp_fused_linear_param_grad_add",
        "Paddle's operator adds to the gradient of the parameter itself, past the hooks that "
        "reduce gradients here; the results are the same",
    ),
    SubOption(
        _TENSOR,
        "enable_sp_async_reduce_scatter",
        does="as enable_mp_async_allreduce, of the reduce-scatter of sequence_parallel",
    ),
    SubOption(_TENSOR, "enable_delay_scale_loss", _SCALE),
    SubOption(_TENSOR, "sync_param", "whole parameters stay equal by their equal gradients"),
    SubOption(_TENSOR, "sync_grad", "gradients of whole parameters are equal or summed already"),
    SubOption(_TENSOR, "sync_moment", "whole parameters stay equal by their equal gradients"),
    SubOption(_TENSOR, "replace_with_c_embedding"),
    SubOption(_TENSOR, "replace_with_parallel_cross_entropy"),
    SubOption(_SEQUENCE, "enable_allreduce_avg_in_gradinent_scale", _AUTO),
    SubOption(_PIPELINE, "disable_partial_send_recv"),
    SubOption(
        _PIPELINE,
        "disable_p2p_cache_shape",
        "all micro batches of a run have one shape, which is sent once",
    ),
    SubOption(_PIPELINE, "enable_delay_scale_loss", _SCALE),
    SubOption(
        _PIPELINE,
        "enable_dp_comm_overlap",
        "reducing gradients during the pipeline's backward passes gives inaccurate results, "
        "for which PaddleNLP refuses it as well",
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
        "interleaved stages run fleet's ordinary schedules, which take "
        "pipeline_parallel_degree micro batches, or twice as many and more",
        refused=True,
    ),
    SubOption(
        _PIPELINE, "use_dualpipev", "the schedules here are 1F1B and interleaved", refused=True
    ),
    SubOption(_SHARDING, "enable_tensor_fusion", _FUSED),
    SubOption(_SHARDING, "enable_overlap", _OVERLAP),
    SubOption(_SHARDING, "enable_stage1_tensor_fusion", does="as enable_stage1_overlap"),
    SubOption(
        _SHARDING,
        "enable_stage1_overlap",
        does="stage 1 reduces gradients in buckets beside the last backward pass of a step, and "
        "broadcasts one buffer for each owner; not with pipeline stages, whose schedule needs "
        "whole gradients at its end",
    ),
    SubOption(
        _SHARDING,
        "enable_stage2_overlap",
        does="as enable_stage1_broadcast_overlap, in stage 2; gradients are reduced beside the "
        "backward pass with or without it",
    ),
    SubOption(
        _SHARDING,
        "reduce_once_per_step",
        does="stage 2 adds up the gradients of all micro batches and reduces the sum in the "
        "backward pass of the last one; a rank holds all gradients until then",
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
        does="in stage 1 updated weights come from their owners beside the next forward pass, "
        "parameter by parameter in the order of its layers; a layer waits for its own",
    ),
    SubOption(_SHARDING, "enable_stage1_allgather_overlap", _OVERLAP),
    SubOption(_SHARDING, "enable_release_grads", "gradients are freed after every step anyway"),
    SubOption(_SHARDING, "enable_fuse_optimizer_states", _FUSED),
    SubOption(_DATA, "enable_allreduce_avg_in_gradinent_scale", _AUTO),
    SubOption(_DATA, "gradient_sync_after_accumulate", _AUTO),
)

# Words of tensor_parallel_config, and whether they are about sequence parallelism.
OF_SEQUENCE_PARALLEL = {
    "enable_mp_async_allreduce": False,
    "enable_mp_skip_c_identity": False,
    "enable_sp_async_reduce_scatter": True,
}
# The sharding stage that a word of sharding_parallel_config is about.
STAGE_OF_WORD = {
    "enable_stage1_tensor_fusion": 1,
    "enable_stage1_overlap": 1,
    "enable_stage2_overlap": 2,
    "reduce_once_per_step": 2,
    "enable_stage1_broadcast_overlap": 1,
}
# With these, gradients are reduced in the last backward pass of a step alone.
REDUCE_ONCE = ("enable_stage1_tensor_fusion", "enable_stage1_overlap", "reduce_once_per_step")
# With these, updated weights come beside the next forward pass.
OVERLAP_WEIGHTS = ("enable_stage1_broadcast_overlap", "enable_stage2_overlap")


def option_names(setting: str) -> tuple[str, ...]:
    """The words that ``setting`` may hold."""
    return tuple(option.name for option in SUB_OPTIONS if option.setting == setting)
