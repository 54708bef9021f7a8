"""Which processes work together on what: the groups of a hybrid-parallel run.

The ranks form a grid with the axes data, pipeline, sharding and tensor. This is the only place
where the field's names (tensor_parallel_degree) become fleet's (mp), and where fleet is started.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from math import prod

# PaddleNLP's hybrid_parallel_topo_order, in fleet's names, slowest to fastest varying. Tensor
# parallelism is innermost: it sends most, so its ranks should sit on the fastest links.
TOPOLOGY_ORDERS = {
    "pp_first": ("dp", "pp", "sharding", "sep", "mp"),
    "sharding_first": ("dp", "sharding", "pp", "sep", "mp"),
}


@dataclass(frozen=True)
class Degrees:
    """How many processes each axis has, and what comes with them.

    Attributes:
        data: copies of everything, each of which trains on other samples.
        pipeline: stages of consecutive layers.
        sharding: processes that train on other samples and divide the optimizer state.
        tensor: processes that divide every layer.
        sequence_parallel: between the layers, the tensor group divides the tokens.
        topology_order: a key of TOPOLOGY_ORDERS.
        virtual_stages: parts of the model that each pipeline stage has, which micro batches go
            through in turn.
    """

    data: int = 1
    pipeline: int = 1
    sharding: int = 1
    tensor: int = 1
    sequence_parallel: bool = False
    topology_order: str = "pp_first"
    virtual_stages: int = 1

    @property
    def world_size(self) -> int:
        return prod((self.data, self.pipeline, self.sharding, self.tensor))


@dataclass(frozen=True)
class Mesh:
    """This process's place in the grid.

    ``data``, ``pipeline``, ``sharding`` and ``tensor`` are the paddle.distributed groups of the
    processes that differ from this one along that axis alone; None where the degree is 1.
    """

    degrees: Degrees = Degrees()
    rank: int = 0
    data: object | None = None
    pipeline: object | None = None
    sharding: object | None = None
    tensor: object | None = None

    @property
    def world_size(self) -> int:
        return self.degrees.world_size

    @property
    def sequence_parallel(self) -> bool:
        return self.degrees.sequence_parallel

    @property
    def data_degree(self) -> int:
        return self.degrees.data

    @property
    def pipeline_degree(self) -> int:
        return self.degrees.pipeline

    @property
    def sharding_degree(self) -> int:
        return self.degrees.sharding

    @property
    def tensor_degree(self) -> int:
        return self.degrees.tensor

    @property
    def data_rank(self) -> int:
        return _rank_in(self.data)

    @property
    def pipeline_rank(self) -> int:
        return _rank_in(self.pipeline)

    @property
    def sharding_rank(self) -> int:
        return _rank_in(self.sharding)

    @property
    def tensor_rank(self) -> int:
        return _rank_in(self.tensor)

    @property
    def sample_shards(self) -> int:
        """How many processes train on samples of their own: data times sharding."""
        return self.data_degree * self.sharding_degree

    @property
    def sample_shard(self) -> int:
        """Which of the ``sample_shards`` this process's samples are."""
        return self.data_rank * self.sharding_degree + self.sharding_rank


def _rank_in(group: object | None) -> int:
    return 0 if group is None else group.rank


_current = Mesh()


def current() -> Mesh:
    """The mesh of this process; one process by itself until ``initialize`` was called."""
    return _current


def launched_processes() -> int:
    """Processes of this run, as the launcher says; 1 without a launcher."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


def launched_rank() -> int:
    """The number of this process among them."""
    return int(os.environ.get("PADDLE_TRAINER_ID", "0"))


def launched_local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("PADDLE_RANK_IN_NODE", launched_rank()))


def initialize(degrees: Degrees) -> Mesh:
    """Starts fleet and makes every group; all processes of the run have to call it.

    One process by itself starts nothing.

    Raises:
        ValueError: the degrees do not make up the number of processes.
    """
    global _current
    processes = launched_processes()
    if degrees.world_size != processes:
        raise ValueError(f"{degrees} make {degrees.world_size} processes, launched are {processes}")
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
        "sep_degree": 1,
        "mp_degree": degrees.tensor,
        "order": list(TOPOLOGY_ORDERS[degrees.topology_order]),
    }
    # Fleet would send a part of each activation and gather it, wrongly where tokens are split.
    strategy.pipeline_configs = {"enable_partial_send_recv": False}
    with warnings.catch_warnings():  # of groups that this process is rightly not in
        warnings.filterwarnings("ignore", message="Current global rank .* is not in group")
        fleet.init(is_collective=True, strategy=strategy, log_level=logging.WARNING)
    if on_cpu:  # A rank that serves a store must not end while others still connect through it.
        paddle.distributed.barrier()
    groups = fleet.get_hybrid_communicate_group()
    return Mesh(
        degrees,
        groups.get_global_rank(),
        data=groups.get_data_parallel_group() if degrees.data > 1 else None,
        pipeline=groups.get_pipe_parallel_group() if degrees.pipeline > 1 else None,
        sharding=groups.get_sharding_parallel_group() if degrees.sharding > 1 else None,
        tensor=groups.get_model_parallel_group() if degrees.tensor > 1 else None,
    )
