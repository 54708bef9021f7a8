"""Memory of each rank at the peak of a training step, by term."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pypkg.config import Settings
from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.layer_split import ModelChunk, cut
from pypkg.parallel.mesh import Degrees
from pypkg.planner.extension import extended_passes
from pypkg.planner.micro_batch import Batch
from pypkg.planner.pipeline.interleaving import Interleaving
from pypkg.planner.step import StepPlan, run_update, sharding_rank
from pypkg.planner.zero import UpdateLayout

# The terms of a peak, in the order of a table. A plan leaves out terms that are zero.
TERMS = (
    "weights",
    "gradients",
    "master weights",
    "moments",
    "tables",
    "inputs",
    "activations",
    "logits",
    "gathered weights",
    "buckets",
    "communication",
    "workspace",
)
# Assumed relative standard error of each term. Persistent memory follows from shapes, so its error
# is small. The memory of running operators depends on their implementation.
TERM_ERRORS = {
    "weights": 0.001,
    "gradients": 0.02,
    "master weights": 0.001,
    "moments": 0.001,
    "tables": 0.01,
    "inputs": 0.05,
    "activations": 0.1,
    "logits": 0.1,
    "gathered weights": 0.1,
    "buckets": 0.1,
    "communication": 0.2,
    "workspace": 0.5,
}
PHASES = ("forward", "backward", "update")


@dataclass(frozen=True)
class RankMemory:
    """Memory of a rank at its peak. Ranks with the same coordinates need at most as much.

    Attributes:
        pipeline_rank, tensor_rank: coordinates of the rank.
        terms: bytes by term, in the order of ``TERMS``.
        phases: peak bytes in each of ``PHASES``.
    """

    pipeline_rank: int
    tensor_rank: int
    terms: Mapping[str, int]
    phases: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Bytes at the peak: the sum of the terms."""
        return sum(self.terms.values())

    @property
    def peak_phase(self) -> str:
        """The phase of the peak."""
        return max(PHASES, key=lambda name: self.phases[name])


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run.

    Attributes:
        degrees: degrees of the layout.
        ranks: by pipeline stage, then by rank in the tensor group.
    """

    degrees: Degrees
    ranks: tuple[RankMemory, ...]

    @property
    def largest(self) -> RankMemory:
        """The rank with the highest peak."""
        return max(self.ranks, key=lambda rank: rank.peak)


def plan_memory(
    settings: Settings,
    config: ModelConfig,
    degrees: Degrees,
    device: str = "gpu",
    stages: Iterable[int] | None = None,
) -> MemoryPlan:
    """The memory of each rank in a training step after the first, which has optimizer state.

    Args:
        settings: ZeRO stage, recompute, batch and dtype are read; degrees are not.
        config: configuration of the model as it is trained.
        degrees: degrees of a layout without problems (training/start/layout.py).
        device: "gpu", or "cpu", where the kernels and collectives need other workspaces.
        stages: pipeline stages to plan; None: all.

    Raises:
        UserError: the layout or a setting is not planned yet.
    """
    _check(settings, degrees, device)
    ranks = []
    for stage in range(degrees.pipeline) if stages is None else stages:
        for tensor_rank in _different_shards(config, degrees.tensor):
            step = step_plan(settings, config, degrees, device, stage, tensor_rank)
            inputs = settings.gradient_accumulation_steps * _input_bytes(settings, config, degrees)
            ranks.append(_rank_memory(stage, step, inputs))
    return MemoryPlan(degrees, tuple(ranks))


def step_plan(
    settings: Settings,
    config: ModelConfig,
    degrees: Degrees,
    device: str,
    stage: int,
    tensor_rank: int,
) -> StepPlan:
    """What the ranks of a pipeline stage with one rank in the tensor group do in a step."""
    dtype_bytes = 4 if _is_wide(settings, device) else 2
    chunks = cut(config.num_hidden_layers, degrees.pipeline, degrees.virtual_stages)
    own = chunks[stage :: degrees.pipeline]
    startup, steady = _different_passes(settings, degrees.pipeline, stage)
    place = Interleaving(degrees.pipeline, stage, settings.gradient_accumulation_steps)
    return StepPlan(
        config=config,
        chunks=_counted_from_0(own),
        degrees=degrees,
        tensor_rank=tensor_rank,
        dtype_bytes=dtype_bytes,
        is_gpu=device == "gpu",
        batch=Batch(
            settings.per_device_train_batch_size,
            settings.max_seq_length,
            degrees.context,
            has_dropout=settings.hidden_dropout_prob > 0,
        ),
        startup=startup,
        steady=steady,
        sent_bytes=_input_bytes(settings, config, degrees) - _label_bytes(settings, degrees),
        stage=_zero_stage(settings, degrees),
        update=UpdateLayout(
            sharding=degrees.sharding,
            data=degrees.data * degrees.context,
            has_main_grad=settings.amp_master_grad and dtype_bytes == 2,
            reduces_once=settings.reduces_once,
            offloads=settings.offloads_optimizer,
            optim=settings.optim,
            has_masters=not settings.stochastic_rounding,
        ),
        recompute=tuple(recomputed_layers(settings, chunk, degrees.pipeline) for chunk in own),
        interleaving=place.shortened() if len(own) > 1 else None,
    )


def _rank_memory(stage: int, step: StepPlan, inputs: int) -> RankMemory:
    """A rank's memory: the peaks, plus ``inputs`` bytes in all passes and the optimizer state."""
    owner = sharding_rank(step)
    step = replace(step, update=replace(step.update, rank=owner))
    update, state = run_update(step)
    found = [
        (phase, {**peak.terms, "inputs": peak.terms.get("inputs", 0) + inputs})
        for (phase, _), peak in extended_passes(step).items()
    ]
    found.append((PHASES[-1], update.terms))
    phases, highest = dict.fromkeys(PHASES, 0), {}
    for phase, terms in found:
        with_state = {**terms, **state, "moments": state["moments"] + terms.get("moments", 0)}
        total = sum(with_state.values())
        if total > max(phases.values()):
            highest = with_state
        phases[phase] = max(phases[phase], total)
    ordered = {name: highest[name] for name in TERMS if highest.get(name)}
    return RankMemory(stage, step.tensor_rank, ordered, phases)


def _counted_from_0(chunks: Sequence[ModelChunk]) -> tuple[ModelChunk, ...]:
    """The chunks with layers counted from 0, so that stages of the same shape compare equal."""
    found, start = [], 0
    for chunk in chunks:
        stop = start + len(chunk.layers)
        found.append(replace(chunk, layers=range(start, stop)))
        start = stop
    return tuple(found)


def _different_passes(settings: Settings, stages: int, stage: int) -> tuple[int, int]:
    """``startup`` and ``steady`` of a stage, with two steady micro batches at most.

    The second one runs with the gradients of the first, and all later ones are like it.
    """
    micro_batches = settings.gradient_accumulation_steps
    startup = min(stages - stage - 1, micro_batches)
    return startup, min(micro_batches - startup, 2)


def _different_shards(config: ModelConfig, degree: int) -> Iterable[int]:
    """The ranks of a tensor group to plan.

    The first stands for all, unless the last ranks hold fewer rows of the vocabulary.
    """
    return range(degree) if config.vocab_size % degree else (0,)


def _zero_stage(settings: Settings, degrees: Degrees) -> int:
    """As ``Updater`` chooses it."""
    stage = settings.sharding_stage if degrees.sharding > 1 else 0
    return 2 if stage == 1 and settings.reduces_once else stage


def _is_wide(settings: Settings, device: str) -> bool:
    """Whether the run is in float32; on a GPU bfloat16 is the default (device/capabilities.py)."""
    return not (settings.fp16 or (settings.bf16 if settings.bf16 is not None else device == "gpu"))


def _label_bytes(settings: Settings, degrees: Degrees) -> int:
    tokens = settings.per_device_train_batch_size * settings.max_seq_length
    return tokens // degrees.context * 8


def _input_bytes(settings: Settings, config: ModelConfig, degrees: Degrees) -> int:
    """A micro batch on the device (data/loading/loader.py); all positions (context/tokens.py)."""
    rows, length = settings.per_device_train_batch_size, settings.max_seq_length
    tokens, int64, int32 = rows * length, 8, 4
    total = 2 * tokens // degrees.context * int64  # input_ids and labels
    if config.prefix_lm:  # positions, and the lengths of prefixes
        return total + (1 + config.position_encoding_2d) * tokens * int64 + rows * int32
    if settings.reset_attention_mask:
        total += tokens * int32
    return total + settings.reset_position_ids * tokens * int64


def recomputed_layers(settings: Settings, chunk: ModelChunk, pipeline: int) -> tuple[str, ...]:
    """The granularity of each layer, or "" (training/step/activations.py)."""
    interval = settings.pp_recompute_interval if pipeline > 1 else 1

    def is_due(place: int, number: int) -> bool:
        return interval > 0 and place % interval == 0 and number not in settings.no_recompute_layers

    return tuple(
        settings.recompute_granularity if settings.recompute and is_due(place, number) else ""
        for place, number in enumerate(chunk.layers)
    )


def _check(settings: Settings, degrees: Degrees, device: str) -> None:
    """
    Raises:
        UserError: names what is not planned.
    """
    unplanned = {
        "use_flash_attention": settings.use_flash_attention is False,
        "attention_backend": settings.attention_backend not in ("auto", "pypkg"),
        "ops_backend": settings.ops_backend not in (None, "auto", "compiled"),
        "matmul_precision": settings.matmul_precision != "float32",
        "recompute_use_reentrant": settings.recompute and settings.recompute_use_reentrant,
        "bf16 or fp16 (on a CPU)": device == "cpu" and not _is_wide(settings, device),
    }
    if found := [name for name, is_used in unplanned.items() if is_used]:
        raise UserError(
            f"memory is not planned yet for the value of {', '.join(found)}; plan with the "
            "default, or read peak_memory_gib in the log of a run"
        )
