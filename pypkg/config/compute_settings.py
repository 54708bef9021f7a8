"""The settings of device, precision, parallelism and activations."""

from __future__ import annotations

from dataclasses import dataclass

from pypkg.config.options.suboptions import option_names
from pypkg.config.setting import SEE_BELOW, setting
from pypkg.config.training_settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class ComputeSettings(TrainingSettings):
    """The fields of ``Settings`` that follow those of training: how a step is computed."""

    # Device
    device: str | None = setting(
        None,
        "device to run on; by default gpu if Paddle finds one, else cpu",
        choices=("cpu", "gpu"),
    )
    bf16: bool | None = setting(
        None,
        "compute in bfloat16; by default if the device is a GPU that supports it and fp16 is "
        'false; on a CPU only with `device` "cpu"',
    )
    fp16: bool = setting(
        False, 'compute in float16 with a dynamic loss scale; on a CPU only with `device` "cpu"'
    )
    scale_loss: float = setting(2.0**15, "initial loss scale of float16", above=0)
    offload_optim: bool = setting(
        False, "keep the optimizer state in host memory between updates, as sharding's offload does"
    )
    amp_master_grad: bool = setting(
        False, "accumulate and reduce the gradients of half-precision parameters in float32"
    )
    use_flash_attention: bool | None = setting(
        None,
        "require flash attention, or store the attention weights; by default flash where supported",
    )

    # Parallelism. The number of ranks must be a multiple of the product of these degrees.
    tensor_parallel_degree: int = setting(
        -1, "ranks that divide the matrices of every layer; -1 is 1", at_least=-1
    )
    pipeline_parallel_degree: int = setting(
        -1, "pipeline stages of consecutive layers, each on ranks of its own; -1 is 1", at_least=-1
    )
    virtual_pp_degree: int = setting(
        1, "model chunks of each pipeline stage; above 1, the interleaved schedule", at_least=-1
    )
    sharding: tuple[str, ...] = setting(
        (),
        "ZeRO stage: stage1 shards the optimizer state, stage2 the gradients as well, stage3 the "
        "parameters as well; offload keeps the optimizer state in host memory",
        choices=("stage1", "stage2", "stage3", "offload"),
    )
    sharding_parallel_degree: int = setting(
        -1, "ranks that sharding divides over; -1 for all that the other degrees leave", at_least=-1
    )
    sharding_degree: int = setting(-1, "deprecated name of sharding_parallel_degree", at_least=-1)
    data_parallel_degree: int = setting(
        -1, "replicas that train on different samples; -1: from the other degrees", at_least=-1
    )
    sequence_parallel: bool = setting(
        False, "divide the tokens over the tensor-parallel ranks outside attention and MLP"
    )
    hybrid_parallel_topo_order: str | None = setting(
        None,
        "outer axis of the rank grid: pp_first puts pipeline stages outside the sharding groups, "
        "sharding_first inside; by default pp_first",
        choices=("pp_first", "sharding_first"),
    )
    tensor_parallel_config: tuple[str, ...] = setting(
        (), SEE_BELOW, choices=option_names("tensor_parallel_config")
    )
    sequence_parallel_config: tuple[str, ...] = setting(
        (), SEE_BELOW, choices=option_names("sequence_parallel_config")
    )
    pipeline_parallel_config: tuple[str, ...] = setting(
        (), SEE_BELOW, choices=option_names("pipeline_parallel_config")
    )
    sharding_parallel_config: tuple[str, ...] = setting(
        (), SEE_BELOW, choices=option_names("sharding_parallel_config")
    )
    data_parallel_config: tuple[str, ...] = setting(
        (), SEE_BELOW, choices=option_names("data_parallel_config")
    )

    # Activations
    recompute: bool = setting(
        False,
        "keep only the input of each layer and recompute its activations in the backward pass",
    )
    recompute_granularity: str = setting(
        "full",
        "what is recomputed: whole layers, attention blocks, or attention without its projections",
        choices=("full", "full_attn", "core_attn"),
    )
    no_recompute_layers: tuple[int, ...] = setting(
        (), "numbers of layers, from 0, that are not recomputed", at_least=0
    )
    pp_recompute_interval: int = setting(
        1, "recompute one in this many layers of each model chunk; 0: none", at_least=0
    )
    recompute_use_reentrant: bool = setting(
        False, "recompute in an autograd function, not in hooks; the results are the same"
    )
    hidden_dropout_prob: float = setting(
        0.0,
        "dropout after attention, feed-forward and an embedding with learned positions, whatever "
        "the model's own configuration says",
        at_least=0,
        below=1,
    )
