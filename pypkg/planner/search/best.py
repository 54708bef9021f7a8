"""All layouts of a run that fit its GPUs, fastest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, isqrt, prod

from pypkg.config import Settings
from pypkg.config.parallel_checks import parallel_problems
from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.weights.tp_shards import exchange_problems, tensor_parallel_problems
from pypkg.parallel.mesh import Degrees
from pypkg.parallel.update_rules import moment_bytes
from pypkg.planner.search.plan import Plan, largest_term, make_plan, time_of, what_would_do
from pypkg.planner.time.step_time import Cluster

_ROWS = (1, 2, 4, 8)
_LEAST_TOKENS = 8192  # tokens per rank; the context axis is not tried below
_CHUNKS = 8  # maximum number of model chunks of a stage
_SHOWN = 5
_RECOMPUTE = ("", "full_attn", "full")  # from the fastest to the one that saves most memory
# State that every layout needs, in bytes per parameter in 16 bits: weights and gradients, which
# sharding divides as its stage says, and master weights. Moments are added.
_WEIGHT, _GRADIENT, _MASTER = 2, 2, 4
Problems = Callable[[Settings], Sequence[str]]


@dataclass(frozen=True)
class Layout:
    """A layout and micro batch; the amount of recompute is not chosen yet."""

    degrees: Degrees
    stage: int
    rows: int

    def settings(self, base: Settings, accumulation: int, recompute: str) -> Settings:
        """``base`` with this layout."""
        d = self.degrees
        return replace(
            base,
            tensor_parallel_degree=d.tensor,
            sequence_parallel=d.sequence_parallel,
            pipeline_parallel_degree=d.pipeline,
            virtual_pp_degree=d.virtual_stages,
            sep_parallel_degree=d.context if d.context > 1 and not d.ring else -1,
            context_parallel_degree=d.context if d.ring else -1,
            sharding=(f"stage{self.stage}",) if self.stage else (),
            sharding_parallel_degree=d.sharding if self.stage else -1,
            sharding_degree=-1,
            data_parallel_degree=-1,
            per_device_train_batch_size=self.rows,
            gradient_accumulation_steps=accumulation,
            recompute=bool(recompute),
            recompute_granularity=recompute or "full",
        )


@dataclass(frozen=True)
class Miss:
    """A layout that is too large.

    Attributes:
        plan: the plan of the layout.
        way: the name of a single change that makes it fit, and the plan with it; None if there is
            no such change.
    """

    plan: Plan
    way: tuple[str, Plan] | None

    @property
    def reason(self) -> str:
        """By how much the layout exceeds the memory, and which change would make it fit."""
        text = reason(self.plan)
        if self.way is None:
            return f"{text}; no single change would do"
        name, plan = self.way
        return f"{text}; {name} would do, at {plan.time.tokens_per_second:,.0f} tokens/s"


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        fitting: fastest first.
        faster: layouts that would be faster than the first of ``fitting``, without the recompute
            that makes them fit; fastest first, at most ``_SHOWN``.
        too_large: layouts that do not fit even with full recompute, the closest first, at most
            ``_SHOWN``.
        too_large_by_state: number of layouts whose weights and optimizer state alone do not fit.
    """

    fitting: tuple[Plan, ...]
    faster: tuple[Miss, ...]
    too_large: tuple[Miss, ...]
    too_large_by_state: int


def search(
    base: Settings,
    config: ModelConfig,
    world: int,
    global_rows: int,
    cluster: Cluster,
    count: int = 10,
    problems: Problems = parallel_problems,
) -> Found:
    """The fastest ``count`` layouts that fit, each with the least recompute that makes it fit.

    Every layout trains the same global batch. The search takes layouts in the order of the time
    that they would take without recompute, and ends when no other layout can be among the fastest.

    Args:
        base: settings of the run; those of the layout are replaced.
        global_rows: sequences of the global batch.
        problems: reasons why a run would refuse settings; a layout that has one is left out.
    """  # fmt: skip
    candidates, by_state = _candidates(base, config, world, global_rows, cluster, problems)
    fitting: list[Plan] = []
    recomputed: list[Miss] = []
    too_large: list[Plan] = []
    for seconds, accumulation, layout in candidates:
        limit = fitting[count - 1].time.seconds if len(fitting) >= count else inf
        if seconds > limit:
            break
        tried = _until_it_fits(base, config, layout, accumulation, cluster, limit)
        if not tried:
            continue
        last = tried[-1]
        (fitting if last.fits else too_large).append(last)
        if last.fits and len(tried) > 1:
            name = f"recompute {last.settings.recompute_granularity}"
            recomputed.append(Miss(tried[0], (name, last)))
        fitting.sort(key=lambda each: each.time.seconds)
    best = fitting[0].time.seconds if fitting else inf
    faster = [miss for miss in recomputed if miss.plan.time.seconds < best]
    nearest = sorted(too_large, key=lambda each: each.short)[:_SHOWN]
    return Found(
        fitting=tuple(fitting[:count]),
        faster=tuple(faster[:_SHOWN]),
        too_large=tuple(Miss(plan, what_would_do(plan)) for plan in nearest),
        too_large_by_state=by_state,
    )


def _candidates(
    base: Settings,
    config: ModelConfig,
    world: int,
    global_rows: int,
    cluster: Cluster,
    problems: Problems,
) -> tuple[list[tuple[float, int, Layout]], int]:
    """The candidates, fastest first, and the number of layouts whose state alone is too large.

    A candidate is: seconds without recompute, micro batches, layout.
    """
    found = []
    by_state = 0
    for layout in _layouts(base, config, world, cluster):
        shards = layout.degrees.data * layout.degrees.sharding
        accumulation, rest = divmod(global_rows, layout.rows * shards)
        if rest or not accumulation or problems(layout.settings(base, accumulation, "")):
            continue
        if _least_state(base, layout, config) > cluster.gpu.memory:
            by_state += 1
            continue
        choices = []
        for each in (layout, *_interleaved(layout, config)):
            settings = each.settings(base, accumulation, "")
            if not problems(settings):
                seconds = time_of(settings, config, each.degrees, cluster).seconds
                choices.append((seconds, accumulation, each))
        found.append(choices[0])
        # Only the fastest interleaved layout. The plain one stays too, as it may need less memory.
        fastest = min(choices, key=lambda each: each[0])
        if fastest is not choices[0]:
            found.append(fastest)
    return sorted(found, key=lambda each: each[0]), by_state


def _interleaved(layout: Layout, config: ModelConfig) -> Iterator[Layout]:
    """The layout with several model chunks in each stage, all with the same number of layers."""
    layers, rest = divmod(config.num_hidden_layers, layout.degrees.pipeline)
    if rest or layout.degrees.pipeline == 1:
        return
    for chunks in range(2, _CHUNKS + 1):
        if layers % chunks == 0:
            yield replace(layout, degrees=replace(layout.degrees, virtual_stages=chunks))


def reason(plan: Plan) -> str:
    """Why a plan does not fit, as a short text."""
    return f"{plan.short / 2**30:.1f} GiB short: {largest_term(plan)}"


def _layouts(base: Settings, config: ModelConfig, world: int, cluster: Cluster) -> Iterator[Layout]:
    node = cluster.gpus_per_node
    for tensor in _divisors(world):
        if tensor > node or (tensor > 1 and tensor_parallel_problems(config, tensor)):
            continue
        divided = replace(base, tensor_parallel_degree=tensor, sequence_parallel=tensor > 1)
        layers = Degrees(tensor=tensor, sequence_parallel=tensor > 1, **divided.linear_options)
        for context, ring in _contexts(config, world // tensor, tensor, base.max_seq_length):
            rows = _ROWS if context == 1 else _ROWS[:1]  # long ones fill a GPU by themselves
            inner = replace(layers, context=context, ring=ring)
            for pipeline in _divisors(world // inner.world_size):
                if pipeline > min(64, config.num_hidden_layers):
                    continue
                shards = world // (inner.world_size * pipeline)
                within = max(1, node // inner.world_size)
                for stage, sharding in _shardings(shards, pipeline, within):
                    degrees = replace(
                        inner, data=shards // sharding, pipeline=pipeline, sharding=sharding
                    )
                    yield from (Layout(degrees, stage, each) for each in rows)


def _contexts(
    config: ModelConfig, world: int, tensor: int, sequence: int
) -> Iterator[tuple[int, bool]]:
    """Degrees of the context axis, each as an exchange of heads and as a ring."""
    yield 1, False
    for degree in _divisors(world)[1:]:
        if sequence // degree < _LEAST_TOKENS:
            return
        if sequence % degree == 0 and not exchange_problems(config, degree, tensor):
            yield degree, False
        if sequence % (2 * degree) == 0:
            yield degree, True


def _shardings(shards: int, pipeline: int, within: int) -> Iterator[tuple[int, int]]:
    """Stage and degree: none, over all ranks that are left, or over those of a machine."""
    yield 0, 1
    stages = (1,) if pipeline > 1 else (1, 2, 3)
    degrees = {each for each in (shards, within) if 1 < each <= shards and shards % each == 0}
    yield from ((stage, degree) for stage in stages for degree in sorted(degrees))


def _divisors(number: int) -> list[int]:
    small = [each for each in range(1, isqrt(number) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})


def _least_state(base: Settings, layout: Layout, config: ModelConfig) -> float:
    """Lower bound of the bytes of a rank that recompute cannot save."""
    degrees, z = layout.degrees, layout.degrees.sharding
    n = config.num_parameters() / (degrees.tensor * degrees.pipeline)
    weight = _WEIGHT / (z if layout.stage == 3 else 1)
    gradient = _GRADIENT / (z if layout.stage >= 2 else 1)
    shape = config.hidden_size, config.intermediate_size  # most parameters are in such matrices
    elements = prod(shape)
    moments = moment_bytes(base.optim, "layers.0.mlp.up_proj.weight", shape, elements) / elements
    state = moments + (0 if base.stochastic_rounding else _MASTER)
    return 0.9 * n * (weight + gradient + state / z)  # stages differ by a layer or so


def _until_it_fits(
    base: Settings,
    config: ModelConfig,
    layout: Layout,
    accumulation: int,
    cluster: Cluster,
    limit: float,
) -> list[Plan]:
    """Plans with increasing recompute, up to the first that fits.

    Empty if the layout cannot be planned, or if the next plan would take more than ``limit``
    seconds.
    """
    tried: list[Plan] = []
    for recompute in _RECOMPUTE:
        settings = layout.settings(base, accumulation, recompute)
        if time_of(settings, config, layout.degrees, cluster).seconds > limit:
            return []
        try:
            plan = _plan(settings, config, layout.degrees, cluster)
        except UserError:
            return []
        tried += [plan] if plan is not None else []
        if plan is not None and plan.fits:
            break
    return tried


def _plan(
    settings: Settings, config: ModelConfig, degrees: Degrees, cluster: Cluster
) -> Plan | None:
    """The plan; None for an interleaved layout that does not fit even without interleaving.

    Of interleaved stages, the first has the most micro batches in flight, and the last has the
    logits. Those between them have fewer micro batches in flight and are not planned.
    """
    if degrees.virtual_stages == 1:
        return make_plan(settings, config, degrees, cluster)
    plain = replace(degrees, virtual_stages=1)
    if not make_plan(settings, config, plain, cluster).fits:
        return None
    return make_plan(settings, config, degrees, cluster, (0, degrees.pipeline - 1))
