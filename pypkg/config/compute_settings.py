"""The settings of device, precision, parallelism and activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pypkg.config.options.suboptions import (
    FUSED_GRAD_ADD,
    OVERLAP_WEIGHTS,
    REDUCE_ONCE,
    STAGE_OF_WORD,
    option_names,
)
from pypkg.config.setting import SEE_BELOW, setting
from pypkg.config.training_settings import TrainingSettings

# PaddleNLP writes these as one string of words: "stage2 offload".
SPACED_LISTS = (
    "sharding",
    "tensor_parallel_config",
    "sequence_parallel_config",
    "pipeline_parallel_config",
    "sharding_parallel_config",
    "data_parallel_config",
)


@dataclass(frozen=True, kw_only=True)
class ComputeSettings(TrainingSettings):
    """The fields of ``Settings`` that follow those of training: how a step is computed."""

    # Device
    device: str | None = setting(
        None,
        "device to train on; by default gpu if Paddle finds one, else cpu",
        choices=("cpu", "gpu"),
    )
    bf16: bool | None = setting(
        None,
        "parameters and computation in bfloat16; by default true on a GPU that supports it unless "
        'fp16 is true; on a CPU it needs `device` "cpu"',
    )
    fp16: bool = setting(
        False,
        "parameters and computation in float16, with dynamic loss scaling; on a CPU it needs "
        '`device` "cpu"',
    )
    scale_loss: float = setting(2.0**15, "initial loss scale of fp16", above=0)
    offload_optim: bool = setting(
        False, "keep the optimizer state in host memory between updates, like sharding's offload"
    )
    amp_master_grad: bool = setting(
        False, "accumulate and reduce the gradients of 16-bit parameters in float32"
    )
    enable_linear_fused_grad_add: bool = setting(
        False,
        "a linear layer adds its weight gradient to the float32 sum of amp_master_grad in the "
        "matrix product; its block then runs as separate operators",
    )
    use_flash_attention: bool | None = setting(
        None,
        "true: require flash attention; false: compute attention with stored attention weights; "
        "by default flash attention if it is supported",
    )

    # Parallelism. The number of ranks must be a multiple of the product of these degrees.
    tensor_parallel_degree: int = setting(
        -1, "ranks that divide the matrices of each layer (TP); -1 means 1", at_least=-1
    )
    pipeline_parallel_degree: int = setting(
        -1, "number of pipeline stages, each with consecutive layers; -1 means 1", at_least=-1
    )
    virtual_pp_degree: int = setting(
        1, "model chunks per pipeline stage; above 1 the schedule is interleaved", at_least=-1
    )
    sharding: tuple[str, ...] = setting(
        (),
        "ZeRO stage: stage1 shards the optimizer state, stage2 also the gradients, stage3 also the "
        "parameters; offload keeps the optimizer state in host memory",
        choices=("stage1", "stage2", "stage3", "offload"),
    )
    sharding_parallel_degree: int = setting(
        -1,
        "ranks over which sharding divides; -1: all that the other degrees leave",
        at_least=-1,
    )
    sharding_degree: int = setting(-1, "deprecated name of sharding_parallel_degree", at_least=-1)
    data_parallel_degree: int = setting(
        -1, "replicas that train on different samples; -1: from the other degrees", at_least=-1
    )
    sequence_parallel: bool = setting(
        False, "divide the tokens over the tensor-parallel ranks outside attention and MLP"
    )
    sep_parallel_degree: int = setting(
        -1,
        "ranks that divide the tokens of each sample and exchange heads for tokens around "
        "attention (Ulysses); -1 means 1",
        at_least=-1,
    )
    context_parallel_degree: int = setting(
        -1,
        "ranks that divide the tokens of each sample and exchange keys and values by ring "
        "attention; -1 means 1",
        at_least=-1,
    )
    hybrid_parallel_topo_order: str | None = setting(
        None,
        "order of the axes of the rank grid: pp_first has the pipeline axis outside the sharding "
        "axis, sharding_first inside; by default pp_first",
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
        "activation recomputation: keep only the input of each layer, and recompute its "
        "activations in the backward pass",
    )
    recompute_granularity: str = setting(
        "full",
        "what is recomputed: whole layers (full), attention blocks (full_attn), or attention "
        "without its projections (core_attn)",
        choices=("full", "full_attn", "core_attn"),
    )
    no_recompute_layers: tuple[int, ...] = setting(
        (), "indices, from 0, of layers that are not recomputed", at_least=0
    )
    pp_recompute_interval: int = setting(
        1, "recompute every n-th layer of each model chunk; 0: none", at_least=0
    )
    recompute_use_reentrant: bool = setting(
        False,
        "recompute in an autograd function (true) or in hooks (false); the results are the same",
    )
    hidden_dropout_prob: float = setting(
        0.0,
        "dropout probability after attention, after the MLP, and after an embedding with learned "
        "positions; the dropout in the model's config.json is not used",
        at_least=0,
        below=1,
    )

    @property
    def sharding_stage(self) -> int:
        """The ZeRO stage, 1 to 3; 0 without sharding or if sharding_parallel_degree is 1."""
        if self.wanted_sharding_degree == 1:
            return 0
        return max((int(part[-1]) for part in self.sharding if part.startswith("stage")), default=0)

    @property
    def wanted_sharding_degree(self) -> int:
        """sharding_parallel_degree, under either name; -1: all ranks that other degrees leave."""
        new = self.sharding_parallel_degree
        return new if new > 0 else self.sharding_degree

    @property
    def sharding_offload(self) -> bool:
        """Whether ``sharding`` asks to keep the optimizer state in host memory."""
        return "offload" in self.sharding and self.wanted_sharding_degree != 1

    @property
    def overlaps_input_gradients(self) -> bool:
        """Whether tensor parallelism sums input gradients while it computes weight gradients."""
        kind = "sp_async_reduce_scatter" if self.sequence_parallel else "mp_async_allreduce"
        return f"enable_{kind}" in self.tensor_parallel_config

    @property
    def linear_options(self) -> dict[str, Any]:
        """How linear layers compute, as keyword arguments of ``parallel.mesh.Degrees``."""
        return {
            "overlap_input_gradients": self.overlaps_input_gradients,
            "skip_identity": "enable_mp_skip_c_identity" in self.tensor_parallel_config,
            "adds_weight_gradients": self.adds_weight_gradients,
        }

    @property
    def adds_weight_gradients(self) -> bool:
        """Whether products of 16 bits add weight gradients to the sums of amp_master_grad."""
        divided = FUSED_GRAD_ADD in self.tensor_parallel_config and self.tensor_parallel_degree > 1
        return self.amp_master_grad and (self.enable_linear_fused_grad_add or divided)

    @property
    def reduces_once(self) -> bool:
        """Whether stage 1 or 2 reduces gradients during the last backward pass of a step."""
        return self.pipeline_parallel_degree <= 1 and any(
            word in REDUCE_ONCE and STAGE_OF_WORD[word] == self.sharding_stage
            for word in self.sharding_parallel_config
        )

    @property
    def overlaps_weights(self) -> bool:
        """Whether stage 1 or 2 broadcasts updated weights during the next forward pass."""
        return any(
            word in OVERLAP_WEIGHTS and STAGE_OF_WORD[word] == self.sharding_stage
            for word in self.sharding_parallel_config
        )

    @property
    def context_degree(self) -> int:
        """Number of ranks that divide the tokens of a sample, by Ulysses or ring attention."""
        return max(self.sep_parallel_degree, self.context_parallel_degree, 1)

    @property
    def ring(self) -> bool:
        """Whether these ranks run ring attention."""
        return self.context_parallel_degree > 1
