"""Who updates which parameter: one class for each way of dividing the optimizer state.

=====  ==================  ==============================  ==================================
stage  parameters          gradients                       optimizer state
=====  ==================  ==============================  ==================================
0      whole               whole                           whole
1      whole               whole until the update          each parameter's on its owner
2      whole               each parameter's on its owner   each parameter's on its owner
3      flat equal slices   flat equal slices               flat equal slices
=====  ==================  ==============================  ==================================

(Rajbhandari et al., 2020.) Fleet does the work: DygraphShardingOptimizer for stage 1 and
group_sharded_parallel for 2 and 3. Stages 2 and 3 reduce gradients in every backward pass, stages
0 and 1 once before the update.

What fleet holds beyond that: in stage 2, from the forward to the backward pass, one bucket of
gradients for each owner, of at most ``BUCKET_ELEMENTS`` elements (32 MiB in float32), which is as
long on every process as on the one that owns most; in stage 3, vectors and matrices that are no
larger whole everywhere. Each layer's weights are gathered as they are needed, one layer at a time,
without overlap: fleet's prefetching depends on each layer being used once in a fixed order, which
neither recompute nor tied embeddings keep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn

from pypkg.parallel.mesh import Mesh
from pypkg.parallel.optimizer.adamw import AdamW
from pypkg.parallel.optimizer.clipping import Share, tensor_share
from pypkg.parallel.optimizer.data_parallel import average_gradients
from pypkg.parallel.optimizer.main_grad import with_main_grad

BUCKET_ELEMENTS = 2**23  # fleet's own default
_SLICE = "slice@"  # before the name of a parameter, fleet's name of its slice


def names_of(parameter: Tensor) -> tuple[str, str]:
    """Paddle names under which an optimizer may see ``parameter``: its own and its slice's."""
    return parameter.name, _SLICE + parameter.name


@dataclass(frozen=True)
class Placement:
    """Where in the sharding group the optimizer state of a parameter is.

    Attributes:
        owner: the only process that has it; None: not divided that way.
        bounds: this process's slice of the flattened parameter, which may end behind it.
    """

    owner: int | None = None
    bounds: tuple[int, int] | None = None


class Stage0:
    """Stage 0, and what the others have in common.

    Attributes:
        loss: computes the loss of a batch; its backward pass leaves gradients in the parameters.
    """

    def __init__(self, model: nn.Layer, adamw: AdamW, mesh: Mesh, has_main_grad: bool) -> None:
        self.loss: Callable[..., Tensor] = model.loss if hasattr(model, "loss") else None
        self.parameters = [p for p in model.parameters() if not p.stop_gradient]
        self._mesh = mesh
        self._optimizer: Any = with_main_grad(self.parameters, adamw) if has_main_grad else adamw

    def placement(self, parameter: Tensor) -> Placement:
        """Where the state of ``parameter`` is."""
        return Placement()

    def holder(self, parameter: Tensor) -> Tensor | None:
        """What stands for ``parameter`` in this process's optimizer, by name, shape and dtype."""
        placement = self.placement(parameter)
        if placement.bounds is not None:
            start, stop = placement.bounds
            name = names_of(parameter)[1]
            return paddle.base.framework.EagerParamBase([stop - start], parameter.dtype, name=name)
        return parameter if placement.owner in (None, self._mesh.sharding_rank) else None

    def shares(self, mesh: Mesh) -> dict[str, Share]:
        """What this process adds to the global norm, by Paddle names."""
        found = {}
        for parameter in self.parameters:
            share, placement = tensor_share(parameter, mesh), self.placement(parameter)
            own, of_slice = names_of(parameter)
            if placement.bounds is not None:
                found[of_slice] = replace(share, start=placement.bounds[0])
            elif mesh.sharding_rank == (placement.owner or 0):
                found[own] = share
            else:
                found[own] = Share(False)
        return found

    def step(self) -> None:
        """Takes the mean of the gradients over the sample shards and updates the parameters."""
        if self._mesh.data is not None:
            average_gradients(self.parameters, self._mesh.data)
        self._optimizer.step()

    def clear(self) -> None:
        """Forgets the gradients."""
        self._optimizer.clear_grad(set_to_zero=False)


class Stage1(Stage0):
    """Gradients go to their owners once, before the update; parameters come back after it."""

    def __init__(self, model: nn.Layer, adamw: AdamW, mesh: Mesh, has_main_grad: bool) -> None:
        from paddle.distributed import fleet
        from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer import (
            dygraph_sharding_optimizer,
        )

        super().__init__(model, adamw, mesh, has_main_grad)
        self._groups = fleet.get_hybrid_communicate_group()
        # It handles main gradients itself.
        self._optimizer = dygraph_sharding_optimizer.DygraphShardingOptimizer(adamw, self._groups)
        self._owned = self._optimizer.filter_parameters(self.parameters, self._groups)

    def placement(self, parameter: Tensor) -> Placement:
        return Placement(owner=self._optimizer._param2rank[parameter.name])

    def step(self) -> None:
        self._optimizer.reduce_gradients(self.parameters, self._groups)
        if self._mesh.data is not None:
            average_gradients(self._owned, self._mesh.data)
        self._optimizer.step()


class _GroupSharded(Stage0):
    """What stages 2 and 3 have in common: fleet reduces the gradients, over the data group too."""

    _LEVEL = ""

    def __init__(self, model: nn.Layer, adamw: AdamW, mesh: Mesh, has_main_grad: bool) -> None:
        from paddle.distributed.sharding import group_sharded_parallel

        super().__init__(model, adamw, mesh, has_main_grad)
        self._check_names()
        # Fleet's offloading of stage 2 needs float16 and no data parallelism; AdamW has ours.
        self._wrapped, self._optimizer, _ = group_sharded_parallel(
            _Loss(model),
            self._optimizer,
            self._LEVEL,
            group=mesh.sharding,
            dp_group=mesh.data,
            buffer_max_size=BUCKET_ELEMENTS,
            segment_size=max((p.size for p in self.parameters if p.ndim == 1), default=0),
            sync_comm=True,
        )
        self.loss = self._wrapped

    def _check_names(self) -> None:
        """Fleet lays gradients out in the order of Paddle's names, which therefore must agree."""
        names: list[list[str]] = []
        dist.all_gather_object(names, [p.name for p in self.parameters], group=self._mesh.sharding)
        if any(each != names[0] for each in names):
            raise RuntimeError("parameters have other Paddle names in other processes")

    def step(self) -> None:
        self._optimizer.step()

    def clear(self) -> None:
        self._optimizer.clear_grad()


class _Loss(nn.Layer):
    """Calls the loss of a model where fleet calls a layer."""

    def __init__(self, model: nn.Layer) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        return self.model.loss(**batch)


class Stage2(_GroupSharded):
    """Gradients go to their owners in every backward pass; parameters come back after updates."""

    _LEVEL = "os_g"

    def placement(self, parameter: Tensor) -> Placement:
        return Placement(owner=self._optimizer.param2rank[parameter.name])


class Stage3(_GroupSharded):
    """Each process keeps a slice of every matrix; layers gather theirs as they are called."""

    _LEVEL = "p_g_os"

    def placement(self, parameter: Tensor) -> Placement:
        bounds = self._wrapped._param2buffer.get(parameter.name)
        return Placement() if bounds is None else Placement(bounds=bounds[self._mesh.sharding_rank])


STAGES = {0: Stage0, 1: Stage1, 2: Stage2, 3: Stage3}
