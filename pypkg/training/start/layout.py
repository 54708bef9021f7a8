"""The layout of a run: its parallel degrees, and every reason why they are invalid.

All of it is arithmetic on the settings and the model's configuration. Invalid layouts are rejected
before a process group is made; every problem is listed with a fix.
"""

from __future__ import annotations

from math import prod

from pypkg.config import Settings
from pypkg.config.parallel_checks import parallel_problems
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.weights.tp_shards import exchange_problems, tensor_parallel_problems
from pypkg.parallel.mesh import Degrees
from pypkg.training.feed.batch_size import ramp_problems


def degrees(settings: Settings, world_size: int) -> Degrees:
    """The degrees of all axes, for a layout without ``layout_problems``.

    The data-parallel degree is world_size / (tensor x context x pipeline x sharding). Sharding
    without a degree of its own takes world_size / (tensor x context x pipeline).
    """
    tensor, pipeline, context = _tensor(settings), _pipeline(settings), settings.context_degree
    shards = world_size // (tensor * context * pipeline)
    sharding = _sharding(settings, shards)
    return Degrees(
        data=shards // sharding,
        pipeline=pipeline,
        sharding=sharding,
        tensor=tensor,
        context=context,
        ring=settings.ring,
        sequence_parallel=settings.sequence_parallel,
        **settings.linear_options,
        topology_order=settings.hybrid_parallel_topo_order or "pp_first",
        virtual_stages=_chunks(settings),
    )


def layout_problems(settings: Settings, config: ModelConfig, world_size: int) -> list[str]:
    """Every reason why the layout is invalid, each with its values and a fix.

    Args:
        config: configuration of the model as it is trained, with the settings' overrides.
        world_size: number of processes that were launched.
    """
    return [
        *parallel_problems(settings),
        *process_problems(settings, world_size),
        *(tensor_parallel_problems(config, _tensor(settings)) if _tensor(settings) > 1 else ()),
        *exchange_problems(config, settings.sep_parallel_degree, _tensor(settings)),
        *_stage_problems(settings, config),
        *_recompute_problems(settings, config),
    ]


def layout_notices(settings: Settings, world_size: int) -> list[str]:
    """Log lines about settings of the layout that have no effect."""
    if settings.sharding_stage and degrees(settings, world_size).sharding == 1:
        return [
            f"sharding ({' '.join(settings.sharding)}) has no effect: of {world_size} processes, "
            f"tensor_parallel_degree ({_tensor(settings)}) x pipeline_parallel_degree "
            f"({_pipeline(settings)}){_context_factor(settings)} leave one to divide over"
        ]
    return []


def _tensor(s: Settings) -> int:
    return max(s.tensor_parallel_degree, 1)


def _pipeline(s: Settings) -> int:
    return max(s.pipeline_parallel_degree, 1)


def _chunks(s: Settings) -> int:
    """Model chunks of each pipeline stage."""
    return max(s.virtual_pp_degree, 1)


def _context_name(s: Settings) -> str:
    return "context_parallel_degree" if s.ring else "sep_parallel_degree"


def _context_factor(s: Settings) -> str:
    return f" x {_context_name(s)} ({s.context_degree})" if s.context_degree > 1 else ""


def _sharding(s: Settings, shards: int) -> int:
    """The sharding degree. ``shards`` is the number of ranks that train on different samples."""
    if not s.sharding_stage:
        return 1
    if s.wanted_sharding_degree > 0:
        return s.wanted_sharding_degree
    return max(shards // max(s.data_parallel_degree, 1), 1)


def process_problems(s: Settings, world_size: int) -> list[str]:
    """Problems of degrees whose product does not fit the world size, for any model."""
    given = {
        "tensor_parallel_degree": _tensor(s),
        "pipeline_parallel_degree": _pipeline(s),
        "sharding_parallel_degree": _sharding(s, 1),
        _context_name(s): s.context_degree,
    }
    asked = " x ".join(f"{name} ({degree})" for name, degree in given.items() if degree > 1)
    group = prod(given.values())
    if world_size % group:
        fitting = max(world_size // group, 1) * group
        return [
            f"{asked} needs {group} processes or a multiple, but {world_size} "
            f"{'was' if world_size == 1 else 'were'} launched; {_launch(fitting)}, or change the "
            "degrees"
        ]
    problems = []
    if world_size == 1 and s.sharding_stage and s.wanted_sharding_degree < 0:
        problems.append(
            f"sharding is {' '.join(s.sharding)!r}, but there is one process and nothing to divide "
            f"over; {_launch(2)}, or leave sharding out"
        )
    data = degrees(s, world_size).data
    if s.data_parallel_degree > 0 and s.data_parallel_degree != data:
        problems.append(
            f"data_parallel_degree is {s.data_parallel_degree}, but of {world_size} processes "
            f"{asked or 'the other degrees'} leave {data} for it; leave it out, or "
            f"{_launch(s.data_parallel_degree * group)}"
        )
    return problems + ramp_problems(s, world_size // (_tensor(s) * _pipeline(s) * s.context_degree))


def _launch(processes: int) -> str:
    return (
        f"launch {processes} (python -m pypkg.pretrain CONFIG.json --nproc {processes}, or python "
        "-m paddle.distributed.launch)"
    )


def _stage_problems(s: Settings, config: ModelConfig) -> list[str]:
    """Problems of a model with fewer layers than model chunks; chunks may differ in size."""
    layers, stages, chunks = config.num_hidden_layers, _pipeline(s), _chunks(s)
    if stages == 1 or layers >= stages * chunks:
        return []
    asked = f"pipeline_parallel_degree ({stages})"
    if chunks > 1:
        asked += f" x virtual_pp_degree ({chunks})"
    if layers < stages:
        way_out = f"use a pipeline_parallel_degree of at most {layers}"
    else:
        way_out = f"use a virtual_pp_degree of at most {layers // stages}"
    return [f"num_hidden_layers ({layers}) is less than {asked}, so some get no layer; {way_out}"]


def _recompute_problems(s: Settings, config: ModelConfig) -> list[str]:
    beyond = [layer for layer in s.no_recompute_layers if layer >= config.num_hidden_layers]
    if not s.recompute or not beyond:
        return []
    return [
        f"no_recompute_layers holds {', '.join(map(str, beyond))}, but num_hidden_layers is "
        f"{config.num_hidden_layers}, so the last layer is {config.num_hidden_layers - 1}; take "
        "out what is beyond"
    ]
