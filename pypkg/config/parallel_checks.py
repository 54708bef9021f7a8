"""Finds contradictions between settings of parallelism and precision, independent of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pypkg.config.settings import Settings

_Check = Callable[[Settings], Iterator[str]]


def parallel_problems(settings: Settings) -> list[str]:
    """Combinations that are invalid for every model and number of processes, one sentence each."""
    return [problem for _, check in PARALLEL_CHECKS for problem in check(settings)]


def _check_degrees(s: Settings) -> Iterator[str]:
    for name in _DEGREES:
        if getattr(s, name) == 0:
            yield f"{name} is 0; expected at least 1, or -1 to leave it open"


def _check_sharding(s: Settings) -> Iterator[str]:
    stages = [part for part in s.sharding if part != "offload"]
    if len(stages) > 1:
        yield f"sharding is {' '.join(s.sharding)!r}; expected one of stage1, stage2, stage3"
    if "offload" in s.sharding and not stages:
        yield (
            "sharding is 'offload' without a stage; add stage1, stage2 or stage3, or set "
            "offload_optim instead"
        )


def _check_sharding_degree(s: Settings) -> Iterator[str]:
    new, old = s.sharding_parallel_degree, s.sharding_degree
    if old > 0 and new > 0 and old != new:
        yield (
            f"sharding_degree ({old}) is the old name of sharding_parallel_degree ({new}); keep "
            "only the second"
        )
    if s.wanted_sharding_degree > 1 and not s.sharding:
        yield (
            f"sharding_parallel_degree is {s.wanted_sharding_degree}, but sharding names no stage; "
            "set sharding to stage1, stage2 or stage3, or leave the degree out: all ranks are then "
            "data-parallel replicas"
        )


def _check_sharded_pipeline(s: Settings) -> Iterator[str]:
    if s.sharding_stage > 1 and s.pipeline_parallel_degree > 1:
        yield (
            f"sharding is stage{s.sharding_stage} and pipeline_parallel_degree "
            f"{s.pipeline_parallel_degree}, but a pipeline needs the gradients and parameters "
            "of all its micro batches in place; use stage1, or a pipeline_parallel_degree of 1"
        )


def _check_interleaving(s: Settings) -> Iterator[str]:
    stages, parts = s.pipeline_parallel_degree, s.virtual_pp_degree
    if parts <= 1:
        return
    if stages <= 2:
        yield (
            f"virtual_pp_degree is {parts}, but interleaved stages need a pipeline_parallel_degree "
            f"of 3 or more, found {max(stages, 1)}; set virtual_pp_degree to 1, or raise "
            "pipeline_parallel_degree"
        )
    elif s.do_train and s.rampup_batch_size:
        yield (
            f"rampup_batch_size is {list(s.rampup_batch_size)}, but interleaved stages "
            f"(virtual_pp_degree {parts}) do not take every number of micro batches; leave "
            "rampup_batch_size out, or set virtual_pp_degree to 1"
        )
    elif s.do_train and not (
        s.gradient_accumulation_steps == stages or s.gradient_accumulation_steps >= 2 * stages
    ):
        yield (
            f"gradient_accumulation_steps ({s.gradient_accumulation_steps}) is too small for "
            f"interleaved stages (pipeline_parallel_degree {stages}, virtual_pp_degree {parts}); "
            f"make it {stages}, or at least {2 * stages}, or set virtual_pp_degree to 1"
        )


def _check_context(s: Settings) -> Iterator[str]:
    sep, ring = s.sep_parallel_degree, s.context_parallel_degree
    if sep > 1 and ring > 1:
        yield (
            f"sep_parallel_degree is {sep} and context_parallel_degree {ring}, but both divide the "
            "tokens of a sample over the same axis; set one of them to 1"
        )
        return
    yield from _ring_attention_problems(s)
    name, blocks = ("context_parallel_degree", 2 * ring) if s.ring else ("sep_parallel_degree", sep)
    if blocks > 1 and s.max_seq_length % blocks:
        what = f"{blocks} blocks, two for each rank" if s.ring else f"{blocks} equal parts"
        yield (
            f"max_seq_length ({s.max_seq_length}) cannot be cut into {what}, as {name} "
            f"({s.context_degree}) needs; make it a multiple of {blocks}, or change {name}"
        )


def _ring_attention_problems(s: Settings) -> Iterator[str]:
    """Implementations of attention that ring attention cannot use."""
    asked = {
        f"attention_backend is {s.attention_backend!r}": s.attention_backend
        in ("paddle", "reference"),
        "use_flash_attention is false": s.use_flash_attention is False,
    }
    for what in (what for what, is_asked in asked.items() if s.ring and is_asked):
        yield (
            f"context_parallel_degree is {s.context_parallel_degree} and {what}, but ring "
            "attention needs pypkg's flash attention; leave that out, or use sep_parallel_degree "
            "instead of context_parallel_degree"
        )


def _check_sequence_parallel(s: Settings) -> Iterator[str]:
    if not s.sequence_parallel:
        return
    degree = s.tensor_parallel_degree
    if degree <= 1:
        yield (
            "sequence_parallel is true, but it divides tokens over tensor-parallel processes, and "
            f"tensor_parallel_degree is {degree}; raise that, or set sequence_parallel to false"
        )
        return
    used = {
        "per_device_train_batch_size": s.do_train,
        "per_device_eval_batch_size": s.do_eval or s.evaluates or s.do_predict,
    }
    for name in (name for name, is_used in used.items() if is_used):
        rows = getattr(s, name)
        if rows * s.max_seq_length // s.context_degree % degree:
            divided = f" / {s.context_degree} (context ranks)" if s.context_degree > 1 else ""
            yield (
                f"{name} ({rows}) x max_seq_length ({s.max_seq_length}){divided} tokens are not "
                f"divisible by tensor_parallel_degree ({degree}), as sequence_parallel needs; "
                "change one of them, or set sequence_parallel to false"
            )


def _check_sample(s: Settings) -> Iterator[str]:
    if s.sample_tokens and s.sequence_parallel:
        yield (
            f"sample_tokens is {s.sample_tokens} and sequence_parallel is true, but text is "
            "generated one token at a time, which cannot be divided over ranks; set sample_tokens "
            "to 0, or sequence_parallel to false"
        )
    for name in ("sep_parallel_degree", "context_parallel_degree"):
        if s.sample_tokens and getattr(s, name) > 1:
            yield (
                f"sample_tokens is {s.sample_tokens} and {name} {getattr(s, name)}, but text is "
                "generated one token at a time, which cannot be divided over ranks; set "
                f"sample_tokens to 0, or {name} to 1"
            )


def _check_precision(s: Settings) -> Iterator[str]:
    if s.fp16 and s.bf16:
        yield "fp16 and bf16 are both true; set one of them to false"
    elif s.stochastic_rounding and (s.fp16 or s.bf16 is False):
        yield (
            "stochastic_rounding is true, which is for bfloat16 parameters, but "
            f"{'fp16 is true' if s.fp16 else 'bf16 is false'}; set bf16 to true and fp16 to false"
        )


_DEGREES = (
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
    "virtual_pp_degree",
    "sharding_parallel_degree",
    "sharding_degree",
    "data_parallel_degree",
    "sep_parallel_degree",
    "context_parallel_degree",
)

# Each check with the settings that it reads.
PARALLEL_CHECKS: tuple[tuple[tuple[str, ...], _Check], ...] = (
    (_DEGREES, _check_degrees),
    (("sharding",), _check_sharding),
    (("sharding", "sharding_parallel_degree", "sharding_degree"), _check_sharding_degree),
    (
        ("sharding", "sharding_parallel_degree", "sharding_degree", "pipeline_parallel_degree"),
        _check_sharded_pipeline,
    ),
    (
        (
            "pipeline_parallel_degree",
            "virtual_pp_degree",
            "gradient_accumulation_steps",
            "rampup_batch_size",
            "do_train",
        ),
        _check_interleaving,
    ),
    (
        (
            "sequence_parallel",
            "tensor_parallel_degree",
            "sep_parallel_degree",
            "context_parallel_degree",
            "max_seq_length",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
        ),
        _check_sequence_parallel,
    ),
    (
        (
            "sep_parallel_degree",
            "context_parallel_degree",
            "max_seq_length",
            "attention_backend",
            "use_flash_attention",
        ),
        _check_context,
    ),
    (
        ("sample_tokens", "sequence_parallel", "sep_parallel_degree", "context_parallel_degree"),
        _check_sample,
    ),
    (("fp16", "bf16", "stochastic_rounding"), _check_precision),
)
