"""Memory and time of PaddleNLP's published runs: the profile ``paddlenlp`` of a model.

PaddleNLP saves other tensors than this package. Its profile is checked against the eleven runs that
it published, which confirms the terms of the model. It plans no run of this package.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pypkg.config import Settings
from pypkg.models.architecture.config import ModelConfig
from pypkg.parallel.mesh import Degrees
from pypkg.planner.time.gpus import GPUS
from pypkg.planner.time.layer_time import Implementation
from pypkg.planner.time.step_time import Cluster, StepTime, plan_time

# The two constants that were fitted, each on one run.
# Llama-2-7b: beside the gradients in 16 bits, a float32 buffer of the size of their shard.
BUFFER_BYTES = 4
# Baichuan2-7B: bytes per element of a head whose rows are normalised in each forward pass. It is
# there several times: normalised, its gradient, and what the gradient of the division makes.
NORM_HEAD_BYTES = 12

_STATE_BYTES = 12  # AdamW: float32 master weight and two moments


@dataclass(frozen=True)
class PublishedRun:
    """A run on 8 x A100-80G in bfloat16, with ZeRO stage 2 and sequences of 4096 tokens.

    Attributes:
        model: name of the model.
        tensor, sharding: degrees.
        rows, accumulation: of a micro batch, and micro batches of a step.
        recompute: whether whole layers are recomputed.
        tokens_per_second: tokens per second of a GPU.
        mib: memory of a GPU, as PaddleNLP measured it.
    """

    model: str
    tensor: int
    sharding: int
    rows: int
    accumulation: int
    tokens_per_second: float
    mib: int
    recompute: bool = False
    sequence: int = 4096

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.mib * 2**20


# PaddleNLP, llm/docs/pretrain.rst of November 2023: CUDA 11.8, NCCL 2.15, flash attention.
PUBLISHED = (
    PublishedRun("FlagAlpha/Llama2-Chinese-13b-Chat", 2, 4, 1, 16, 1980.22, 64323),
    PublishedRun("FlagAlpha/Llama2-Chinese-7b-Chat", 2, 4, 2, 8, 3744.62, 52092),
    PublishedRun("baichuan-inc/Baichuan2-13B-Base", 1, 8, 1, 8, 1354.99, 74767, recompute=True),
    PublishedRun("baichuan-inc/Baichuan2-7B-Base", 2, 4, 2, 8, 3542.45, 58363),
    PublishedRun("facebook/llama-13b", 2, 4, 1, 16, 1969.64, 64278),
    PublishedRun("facebook/llama-7b", 2, 4, 2, 8, 3754.73, 52092),
    PublishedRun("idea-ccnl/ziya-llama-13b-v1", 2, 4, 1, 16, 1968.34, 63983),
    PublishedRun("linly-ai/chinese-llama-2-7b", 2, 4, 2, 8, 3732.9, 51751),
    PublishedRun("meta-llama/Llama-2-13b", 2, 4, 1, 16, 1975.63, 64294),
    PublishedRun("meta-llama/Llama-2-7b", 2, 4, 2, 8, 3755.21, 52092),
    PublishedRun("qwen/qwen-7b", 2, 4, 2, 8, 3607.28, 65448),
)  # fmt: skip


# How PaddleNLP of November 2023 computes a family: residuals are added by an operator of their own,
# gate and up are two layers and are multiplied after the activation, logits are cast to float32 for
# the loss, and a gradient is sent when it is made. Norms and, unless it is in float32, the rotation
# of query and key are fused. ALiBi takes stored scores.
_PADDLENLP = Implementation(
    stream_passes=(10, 12), gate_passes=(5, 8), logit_passes=21, up_projections=2,
    gradients_overlap=False,
)  # fmt: skip
_FAMILIES = {
    "llama": replace(_PADDLENLP, projections=3),
    "baichuan": _PADDLENLP,
    "qwen": replace(_PADDLENLP, rope_in_float32=True),
}


def implementation_of(config: ModelConfig) -> Implementation:
    """How PaddleNLP computes a family that is among the published runs."""
    made = _FAMILIES[config.model_type]
    return replace(made, stored_scores=config.position_embedding == "alibi")


def settings_of(run: PublishedRun) -> Settings:
    """The settings of the run that decide memory and time."""
    return Settings(
        bf16=True,
        tensor_parallel_degree=run.tensor,
        sharding=("stage2",),
        per_device_train_batch_size=run.rows,
        gradient_accumulation_steps=run.accumulation,
        max_seq_length=run.sequence,
        recompute=run.recompute,
        save_strategy="no",
        evaluation_strategy="no",
    )


def degrees_of(run: PublishedRun) -> Degrees:
    """The layout of the run."""
    return Degrees(tensor=run.tensor, sharding=run.sharding)


def paddlenlp_time(run: PublishedRun, config: ModelConfig) -> StepTime:
    """The time of a step; ``Gpu.matmul_efficiency`` was fitted to the run of Llama-2-7b."""
    gpu = GPUS["a100-80g"]
    cluster = Cluster(gpu, gpus_per_node=8, network=gpu.link)  # one machine
    made = implementation_of(config)
    return plan_time(settings_of(run), config, degrees_of(run), cluster, implementation=made)


def paddlenlp_memory(run: PublishedRun, config: ModelConfig) -> dict[str, int]:
    """Bytes of a rank by term at the peak: at the loss, when all layers have saved tensors."""
    t, tokens = run.tensor, run.rows * run.sequence
    n = config.num_parameters() / t
    shard = n / run.sharding
    terms = {
        "weights": 2 * n,
        "master weights and moments": _STATE_BYTES * shard,
        "gradients": 2 * shard,
        "buffer": BUFFER_BYTES * shard,
        "activations": config.num_hidden_layers * _layer(run, config),
        # In 16 bits, cast to float32, probabilities, gradient.
        "logits": (2 + 4 + 4 + 4) * tokens * config.vocab_size / t,
        "normalised head": (
            NORM_HEAD_BYTES * config.vocab_size * config.hidden_size / t if config.norm_head else 0
        ),
        "ALiBi mask": _mask(run, config),
    }
    return {name: round(size) for name, size in terms.items() if size}


def _layer(run: PublishedRun, config: ModelConfig) -> float:
    """What a layer keeps for its backward pass."""
    tokens, t = run.rows * run.sequence, run.tensor
    stream = 2.0 * tokens * config.hidden_size
    if run.recompute:
        return stream
    made = implementation_of(config)
    copies = made.projections + made.up_projections if t > 1 else 2  # of inputs of matrices
    heads = 2 * tokens * config.query_size / t
    kept = 2 * stream + copies * stream  # inputs of two norms and of the projections
    kept += 4 * heads  # query, key, value and output of attention
    kept += 4 * 2 * tokens * config.intermediate_size / t  # gate, up, activation, product
    if made.rope_in_float32:
        kept += 2 * 2 * 2 * heads  # of query and key: plain and turned, in float32
    return kept


def _mask(run: PublishedRun, config: ModelConfig) -> int:
    """ALiBi and the causal mask, added up: [rows, heads, sequence, sequence] in float32."""
    if config.position_embedding != "alibi":
        return 0
    return 4 * run.rows * config.num_attention_heads // run.tensor * run.sequence**2
