"""The process groups of a hybrid-parallel run.

The ranks form a grid with the axes data, pipeline, sharding, context and tensor. Only this module
starts fleet and translates the names of the settings (tensor_parallel_degree) to those of fleet
(mp).
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # commands that run without Paddle import this module
    from paddle.distributed.communication.group import Group

# PaddleNLP's hybrid_parallel_topo_order in fleet's names, from the outermost axis to the innermost.
# Tensor parallelism is innermost: it sends most, so its ranks belong on the fastest links.
TOPOLOGY_ORDERS = {
    "pp_first": ("dp", "pp", "sharding", "sep", "mp"),
    "sharding_first": ("dp", "sharding", "pp", "sep", "mp"),
}


_AXES = {
    "dp": "data",
    "pp": "pipeline",
    "sharding": "sharding",
    "sep": "context",
    "mp": "tensor",
}


@dataclass(frozen=True)
class Degrees:
    """The number of ranks on each axis, and options of the axes.

    Attributes:
        data: data-parallel replicas; each trains on its own samples.
        pipeline: pipeline stages; each holds consecutive layers.
        sharding: ranks that train on their own samples and divide one optimizer state (ZeRO).
        tensor: TP shards of each layer; each rank holds one.
        context: ranks that train on the same samples, each on its own tokens of them.
        ring: whether the context group runs ring attention; else its ranks exchange heads for
            tokens around attention (Ulysses).
        sequence_parallel: whether the tensor group splits the tokens between the layers.
        overlap_input_gradients: whether a column-parallel layer computes its weight gradient while
            the tensor group sums its input gradient.
        skip_identity: whether column- and row-parallel layers do not copy their inputs.
        adds_weight_gradients: whether the product that computes a weight gradient of a linear layer
            adds it to the weight's ``main_grad`` (parallel/linear_gradients.py).
        topology_order: a key of TOPOLOGY_ORDERS, the order of the axes.
        virtual_stages: model chunks per pipeline stage (1: not interleaved).
    """

    data: int = 1
    pipeline: int = 1
    sharding: int = 1
    tensor: int = 1
    context: int = 1
    ring: bool = False
    sequence_parallel: bool = False
    overlap_input_gradients: bool = False
    skip_identity: bool = False
    adds_weight_gradients: bool = False
    topology_order: str = "pp_first"
    virtual_stages: int = 1

    @property
    def world_size(self) -> int:
        return prod((self.data, self.pipeline, self.sharding, self.context, self.tensor))


class Coordinates(NamedTuple):
    """Index of a rank on each axis of the grid."""

    data: int
    pipeline: int
    sharding: int
    context: int
    tensor: int


@dataclass(frozen=True)
class Mesh:
    """The rank grid as seen by one rank.

    Attributes:
        degrees: the number of ranks on each axis.
        rank: of this process, from 0 to ``world_size`` - 1.
        data, pipeline, sharding, context, tensor: paddle.distributed groups of the ranks that
            differ from this one on that axis only; None where the degree is 1.
        replicas: the group of the ranks that differ from this one on the data and context axes
            only and hold the same parameters; None if there is only this one.
    """

    degrees: Degrees = Degrees()
    rank: int = 0
    data: Group | None = None
    pipeline: Group | None = None
    sharding: Group | None = None
    context: Group | None = None
    tensor: Group | None = None
    replicas: Group | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks: the product of the degrees."""
        return self.degrees.world_size

    @property
    def sequence_parallel(self) -> bool:
        """Whether the tensor group splits the tokens between the layers."""
        return self.degrees.sequence_parallel

    @property
    def data_degree(self) -> int:
        """Number of data-parallel replicas."""
        return self.degrees.data

    @property
    def pipeline_degree(self) -> int:
        """Number of pipeline stages."""
        return self.degrees.pipeline

    @property
    def sharding_degree(self) -> int:
        """Number of ranks that divide one optimizer state."""
        return self.degrees.sharding

    @property
    def tensor_degree(self) -> int:
        """Number of TP shards of each layer."""
        return self.degrees.tensor

    @property
    def context_degree(self) -> int:
        """Number of ranks that divide the tokens of a sample."""
        return self.degrees.context

    @property
    def data_rank(self) -> int:
        """Index of this rank's replica."""
        return _rank_in(self.data)

    @property
    def pipeline_rank(self) -> int:
        """Pipeline stage of this rank; 0 holds the embedding."""
        return _rank_in(self.pipeline)

    @property
    def sharding_rank(self) -> int:
        """Index of this rank in its sharding group."""
        return _rank_in(self.sharding)

    @property
    def tensor_rank(self) -> int:
        """Index of this rank's TP shard."""
        return _rank_in(self.tensor)

    @property
    def context_rank(self) -> int:
        """Index of this rank among those that divide the tokens of a sample."""
        return _rank_in(self.context)

    @property
    def replica_rank(self) -> int:
        """Index of this rank among ``replicas``."""
        return _rank_in(self.replicas)

    @property
    def sample_shards(self) -> int:
        """Number of ranks or rank groups with own samples: data x sharding."""
        return self.data_degree * self.sharding_degree

    @property
    def sample_shard(self) -> int:
        """Index of this rank's samples among the ``sample_shards``; data is the outer axis."""
        return self.data_rank * self.sharding_degree + self.sharding_rank

    @property
    def token_shards(self) -> int:
        """Number of ranks or rank groups with own tokens: data x sharding x context."""
        return self.sample_shards * self.context_degree

    @property
    def token_shard(self) -> int:
        """Index of this rank's tokens among the ``token_shards``; context is the inner axis."""
        return self.sample_shard * self.context_degree + self.context_rank

    @property
    def token_groups(self) -> tuple[Group, ...]:
        """The groups to reduce over, one after the other, for a sum over all ``token_shards``."""
        groups = (self.replicas, self.sharding)
        return tuple(group for group in groups if group is not None)

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of the global rank ``rank`` in the grid."""
        return self._grid[rank]

    @cached_property  # asked for each tensor of a save, while training pauses
    def _grid(self) -> tuple[Coordinates, ...]:
        return tuple(self._place(rank) for rank in range(self.world_size))

    def _place(self, rank: int) -> Coordinates:
        found = {}
        for axis in reversed(TOPOLOGY_ORDERS[self.degrees.topology_order]):
            rank, found[axis] = divmod(rank, getattr(self.degrees, _AXES[axis]))
        return Coordinates(**{name: found[axis] for axis, name in _AXES.items()})


def _rank_in(group: Group | None) -> int:
    return 0 if group is None else group.rank


_current = Mesh()


def current() -> Mesh:
    """The mesh of this process; a single rank until ``initialize`` has been called."""
    return _current


def launched_processes() -> int:
    """World size that the launcher set (PADDLE_TRAINERS_NUM); 1 without a launcher."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


def launched_rank() -> int:
    """Global rank that the launcher set (PADDLE_TRAINER_ID); 0 without a launcher."""
    return int(os.environ.get("PADDLE_TRAINER_ID", "0"))


def launched_local_rank() -> int:
    """Rank on this machine that the launcher set (PADDLE_RANK_IN_NODE)."""
    return int(os.environ.get("PADDLE_RANK_IN_NODE", launched_rank()))


def initialize(degrees: Degrees) -> Mesh:
    """Starts fleet and creates all groups, unless the run has one process.

    Every rank must call this.

    Raises:
        ValueError: the product of the degrees differs from the number of processes.
    """
    global _current
    processes = launched_processes()
    if degrees.world_size != processes:
        raise ValueError(
            f"{degrees} need {degrees.world_size} processes, but {processes} were launched"
        )
    _current = Mesh(degrees) if processes == 1 else _start_fleet(degrees)
    return _current


def _start_fleet(degrees: Degrees) -> Mesh:
    import paddle
    from paddle.distributed import fleet

    from pypkg.parallel.process_end import skip_destructors

    skip_destructors()
    on_cpu = paddle.device.get_device().startswith("cpu")
    if on_cpu:
        from pypkg.parallel.gloo.install import install

        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
        install()
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {
        "dp_degree": degrees.data,
        "pp_degree": degrees.pipeline,
        "sharding_degree": degrees.sharding,
        "sep_degree": degrees.context,
        "mp_degree": degrees.tensor,
        "order": list(TOPOLOGY_ORDERS[degrees.topology_order]),
    }
    # Each TP rank would send a part of an activation, assuming that all ranks hold the same. With
    # sequence or context parallelism they do not.
    strategy.pipeline_configs = {"enable_partial_send_recv": False}
    with warnings.catch_warnings():  # about groups of which this process is not a member
        warnings.filterwarnings("ignore", message="Current global rank .* is not in group")
        fleet.init(is_collective=True, strategy=strategy, log_level=logging.WARNING)
    if on_cpu:  # a rank that serves a store must not end while others still use it to connect
        paddle.distributed.barrier()
    groups = fleet.get_hybrid_communicate_group()
    data = groups.get_data_parallel_group() if degrees.data > 1 else None
    context = groups.get_sep_parallel_group() if degrees.context > 1 else None
    replicas = data if context is None else context
    if data is not None and context is not None:
        replicas = groups.get_dp_sep_parallel_group()
    return Mesh(
        degrees,
        groups.get_global_rank(),
        data=data,
        pipeline=groups.get_pipe_parallel_group() if degrees.pipeline > 1 else None,
        sharding=groups.get_sharding_parallel_group() if degrees.sharding > 1 else None,
        context=context,
        tensor=groups.get_model_parallel_group() if degrees.tensor > 1 else None,
        replicas=replicas,
    )
