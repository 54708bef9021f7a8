"""All layouts of a run that fit its GPUs, fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pypkg.config import Settings
from pypkg.config.parallel_checks import parallel_problems
from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.weights.tp_shards import tensor_parallel_problems
from pypkg.parallel.mesh import Degrees
from pypkg.planner.search.plan import Plan, largest_term, make_plan, time_of
from pypkg.planner.time.step_time import Cluster

_ROWS = (1, 2, 4, 8)
_RECOMPUTE = ("", "full_attn", "full")  # from the fastest to the one that keeps least
# State that no layout does without, in bytes per parameter: weights, and in 16 bits a gradient, of
# which sharding divides the part that its stage says; master weights and moments.
_WEIGHT, _GRADIENT, _STATE = 2, 2, 12


@dataclass(frozen=True)
class Layout:
    """A layout and micro batch, before it is known how much must be recomputed."""

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
            virtual_pp_degree=1,
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
class Found:
    """What a search has found.

    Attributes:
        fitting: fastest first.
        too_large: layouts that fit with no recompute, each with all of it, nearest first.
        too_large_by_state: number of layouts whose weights and optimizer state alone do not fit.
    """

    fitting: tuple[Plan, ...]
    too_large: tuple[Plan, ...]
    too_large_by_state: int


def search(
    base: Settings,
    config: ModelConfig,
    world: int,
    global_rows: int,
    cluster: Cluster,
    count: int = 10,
) -> Found:
    """The fastest ``count`` layouts that fit, each with the least recompute that makes it fit.

    Every layout trains the same global batch. The search takes layouts in the order of the time
    that they would take without recompute, and ends when no other one can be among the fastest.

    Args:
        base: settings of the run; those of the layout are replaced.
        global_rows: sequences of the global batch.
    """  # fmt: skip
    candidates = []
    by_state = 0
    for layout in _layouts(config, world, cluster):
        shards = layout.degrees.data * layout.degrees.sharding
        accumulation, rest = divmod(global_rows, layout.rows * shards)
        if rest or not accumulation:
            continue
        settings = layout.settings(base, accumulation, "")
        if parallel_problems(settings):
            continue
        if _least_state(layout, config) > cluster.gpu.memory:
            by_state += 1
            continue
        seconds = time_of(settings, config, layout.degrees, cluster).seconds
        candidates.append((seconds, accumulation, layout))
    fitting: list[Plan] = []
    too_large: list[Plan] = []
    for seconds, accumulation, layout in sorted(candidates, key=lambda each: each[0]):
        if len(fitting) >= count and seconds > fitting[count - 1].time.seconds:
            break
        plan = _least_recompute(base, config, layout, accumulation, cluster)
        if plan is None:
            continue
        (fitting if plan.fits else too_large).append(plan)
        fitting.sort(key=lambda each: each.time.seconds)
    too_large.sort(key=lambda each: each.short)
    return Found(tuple(fitting[:count]), tuple(too_large), by_state)


def reason(plan: Plan) -> str:
    """Why a plan does not fit, in a few words."""
    return f"{plan.short / 2**30:.1f} GiB short: {largest_term(plan)}"


def _layouts(config: ModelConfig, world: int, cluster: Cluster) -> Iterator[Layout]:
    node = cluster.gpus_per_node
    for tensor in _divisors(world):
        if tensor > node or (tensor > 1 and tensor_parallel_problems(config, tensor)):
            continue
        for pipeline in _divisors(world // tensor):
            if pipeline > min(64, config.num_hidden_layers):
                continue
            shards = world // (tensor * pipeline)
            for stage, sharding in _shardings(shards, pipeline, max(1, node // tensor)):
                degrees = Degrees(
                    data=shards // sharding,
                    pipeline=pipeline,
                    sharding=sharding,
                    tensor=tensor,
                    sequence_parallel=tensor > 1,
                )
                yield from (Layout(degrees, stage, rows) for rows in _ROWS)


def _shardings(shards: int, pipeline: int, within: int) -> Iterator[tuple[int, int]]:
    """Stage and degree: none, over all ranks that are left, or over those of a machine."""
    yield 0, 1
    stages = (1,) if pipeline > 1 else (1, 2, 3)
    degrees = {each for each in (shards, within) if 1 < each <= shards and shards % each == 0}
    yield from ((stage, degree) for stage in stages for degree in sorted(degrees))


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _least_state(layout: Layout, config: ModelConfig) -> float:
    """Bytes of a rank that no recompute saves; at least."""
    degrees, z = layout.degrees, layout.degrees.sharding
    n = config.num_parameters() / (degrees.tensor * degrees.pipeline)
    weight = _WEIGHT / (z if layout.stage == 3 else 1)
    gradient = _GRADIENT / (z if layout.stage >= 2 else 1)
    return 0.9 * n * (weight + gradient + _STATE / z)  # stages differ by a layer or so


def _least_recompute(
    base: Settings, config: ModelConfig, layout: Layout, accumulation: int, cluster: Cluster
) -> Plan | None:
    """The plan with the least recompute that fits, else with the most; None: not planned yet."""
    plan = None
    for recompute in _RECOMPUTE:
        settings = layout.settings(base, accumulation, recompute)
        try:
            plan = make_plan(settings, config, layout.degrees, cluster)
        except UserError:
            return None
        if plan.fits:
            break
    return plan
