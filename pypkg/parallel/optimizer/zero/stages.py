"""ZeRO stages: which rank of the sharding group updates which parameter (Rajbhandari et al., 2020).

=====  ==================  ==============================  ==================================
stage  parameters          gradients                       optimizer state
=====  ==================  ==============================  ==================================
0      whole               whole                           whole
1      whole               whole until the update          on the owner of the parameter
2      whole               on the owner of the parameter   on the owner of the parameter
3      flat equal slices   flat equal slices               flat equal slices
=====  ==================  ==============================  ==================================

The stages use fleet's classes: DygraphShardingOptimizer (1), GroupShardedOptimizerStage2 (2) and
GroupShardedStage3 (3). gradient_reducer.py reduces the gradients of stage 2. Stages 2 and 3 reduce
gradients in every backward pass, stages 0 and 1 once before the update.

Ranks need more memory than the table says. In stage 2, a backward pass has buckets of other owners'
gradients that are being filled or sent (gradient_reducer.py). In stage 3, every rank holds vectors,
and matrices no larger than the largest vector, whole. It also holds the gathered matrices of a few
layers (sliced_layers.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn
from paddle.distributed.communication.group import Group

from pypkg.parallel.comm import gather
from pypkg.parallel.comm.slices import ReadParameter
from pypkg.parallel.mesh import Mesh
from pypkg.parallel.optimizer.clipping import NormContribution, norm_contribution
from pypkg.parallel.optimizer.data_parallel import average_gradients
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.parallel.optimizer.fleet_optimizer import FleetOptimizer
from pypkg.parallel.optimizer.main_grad import with_main_grad
from pypkg.parallel.optimizer.zero.gradient_reducer import GradientReducer
from pypkg.parallel.optimizer.zero.weight_broadcast import WeightBroadcast
from pypkg.parallel.tied_copies import TiedCopies

_SLICE = "slice@"  # fleet's prefix of a slice's name


def names_of(parameter: Tensor) -> tuple[str, str]:
    """Paddle names under which fleet may pass ``parameter``: its own, and that of its slice."""
    return parameter.name, _SLICE + parameter.name


@dataclass(frozen=True)
class Placement:
    """The ranks of the sharding group that hold the optimizer state of a parameter.

    Attributes:
        owner: the only sharding rank that holds the state. None: all hold it, or a slice of it.
        bounds: (start, stop) of this rank's slice of the flattened parameter; the last slice may
            extend beyond the parameter's end. None: the state is not sliced.
    """

    owner: int | None = None
    bounds: tuple[int, int] | None = None


class ZeroStage0:
    """Stage 0, and the common base of all stages.

    Attributes:
        loss: the model's loss function, wrapped for this stage: call ``backward`` on its result.
            None for a pipeline stage, which has no ``loss``.
        parameters: the trainable parameters of this rank.

    Args:
        model: of this rank. Stages 2 and 3 change its parameters in place.
        optimizer: the optimizer that fleet's optimizer wraps.
        options: of the update.
    """

    def __init__(
        self, model: nn.Layer, optimizer: FleetOptimizer, mesh: Mesh, options: UpdateOptions
    ) -> None:
        self.loss: Callable[..., Tensor] | None = getattr(model, "loss", None)
        self.parameters = [p for p in model.parameters() if not p.stop_gradient]
        self._tied: TiedCopies | None = getattr(model, "tied", None)
        self._mesh = mesh
        self._coming: WeightBroadcast | None = None  # updated weights that are being sent
        self._optimizer: Any = (
            with_main_grad(self.parameters, optimizer) if options.master_grad else optimizer
        )

    def placement(self, parameter: Tensor) -> Placement:
        """The placement of the optimizer state of ``parameter``."""
        return Placement()

    def optimizer_parameter(self, parameter: Tensor) -> Tensor | None:
        """The tensor that this rank's optimizer updates: ``parameter``, or its slice.

        None if another rank updates the parameter.
        """
        placement = self.placement(parameter)
        if placement.bounds is not None:
            # Fleet names its slice only for an update.
            slice_of_rank = parameter.fw_storage.detach()
            slice_of_rank.name = names_of(parameter)[1]
            return slice_of_rank
        return parameter if placement.owner in (None, self._mesh.sharding_rank) else None

    def norm_contributions(self) -> dict[str, NormContribution]:
        """This rank's contributions to the global norm, by Paddle name of the parameter."""
        found = {}
        for parameter in self.parameters:
            placement = self.placement(parameter)
            contribution = norm_contribution(parameter, self._mesh)
            own, of_slice = names_of(parameter)
            if placement.bounds is not None:
                found[of_slice] = replace(contribution, start=placement.bounds[0])
            elif self._mesh.sharding_rank == (placement.owner or 0):
                found[own] = contribution
            else:
                found[own] = NormContribution(False)
        return found

    @paddle.no_grad()
    def assign(
        self, parameter: Tensor, read: Callable[[Tensor, tuple[int, int] | None], None]
    ) -> None:
        """Overwrites this rank's part of ``parameter`` in place.

        Args:
            read: takes the tensor to overwrite, and (start, stop) of the slice or None for all.
        """
        is_sliced = gather.is_sliced(parameter)
        held = parameter.fw_storage if is_sliced else parameter
        copied = paddle.empty(held.shape, held.dtype)
        read(copied, self.placement(parameter).bounds if is_sliced else None)
        paddle.assign(copied, held.detach())

    def begin_step(self, micro_batches: int) -> None:
        """Sets the number of backward passes before the next ``step``."""

    def wait(self) -> None:
        """Waits until this rank holds the updated parameters. A forward pass waits by itself."""
        if self._coming is not None:
            self._coming.wait()

    def step(self) -> None:
        """Averages the gradients over the token shards and updates the parameters."""
        if self._mesh.replicas is not None:
            average_gradients(self.parameters, self._mesh.replicas)
        if self._tied is not None:
            self._tied.sum_gradients()
        self._optimizer.step()

    def clear(self) -> None:
        """Clears the gradients."""
        self._optimizer.clear_grad(set_to_zero=False)


class ZeroStage1(ZeroStage0):
    """Owners receive gradients once, before the update, and broadcast parameters after it."""

    def __init__(
        self, model: nn.Layer, optimizer: FleetOptimizer, mesh: Mesh, options: UpdateOptions
    ) -> None:
        from paddle.distributed import fleet
        from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer import (
            dygraph_sharding_optimizer,
        )

        super().__init__(model, optimizer, mesh, options)
        self._groups = fleet.get_hybrid_communicate_group()
        # Reads main_grad itself, so it wraps the optimizer without MixPrecisionOptimizer.
        self._optimizer = dygraph_sharding_optimizer.DygraphShardingOptimizer(
            optimizer, self._groups
        )
        self._owned = self._optimizer.filter_parameters(self.parameters, self._groups)
        if options.overlaps_weights:
            assert mesh.sharding is not None  # stage 1 needs a sharding group
            self._coming = WeightBroadcast(model, self._optimizer._param2rank, mesh.sharding)
            self._optimizer._sharding_sync_parameters = self._coming.start

    def placement(self, parameter: Tensor) -> Placement:
        return Placement(owner=self._optimizer._param2rank[parameter.name])

    def step(self) -> None:
        self.wait()
        tied = None if self._tied is None else self._tied.parameter
        # The two stages may give their copies to different owners, so all ranks average them.
        of_all = [] if tied is None else [tied]
        others = [p for p in self.parameters if p is not tied]
        self._optimizer.reduce_gradients(others, self._groups)
        assert self._mesh.sharding is not None  # as in every stage above 0
        average_gradients(of_all, self._mesh.sharding)
        if self._mesh.replicas is not None:
            owned = [p for p in self._owned if p is not tied]
            average_gradients([*owned, *of_all], self._mesh.replicas)
        if self._tied is not None:
            self._tied.sum_gradients()
        self._optimizer.step()


class _GroupSharded(ZeroStage0):
    """The common base of stages 2 and 3, whose gradients are averaged during backward passes."""

    def __init__(
        self, model: nn.Layer, optimizer: FleetOptimizer, mesh: Mesh, options: UpdateOptions
    ) -> None:
        super().__init__(model, optimizer, mesh, options)
        assert mesh.sharding is not None  # stages 2 and 3 need a sharding group
        self._check_names(mesh.sharding)

    def _check_names(self, sharding: Group) -> None:
        """Checks that Paddle's names agree across ranks, because fleet orders gradients by them.

        Raises:
            RuntimeError: the names differ.
        """
        names: list[list[str]] = []
        dist.all_gather_object(names, [p.name for p in self.parameters], group=sharding)
        if any(each != names[0] for each in names):
            raise RuntimeError("the Paddle names of parameters differ across the sharding group")

    def step(self) -> None:
        self._optimizer.step()

    def clear(self) -> None:
        self._optimizer.clear_grad()


class _Loss(nn.Layer):
    """A layer whose ``forward`` is the model's loss, because fleet wraps ``forward``."""

    def __init__(self, model: nn.Layer) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        return self.model.loss(**batch)


class ZeroStage2(_GroupSharded):
    """Owners receive gradients in every backward pass and broadcast parameters after the update.

    With ``options.reduces_once`` it implements stage 1 with reductions during the last backward
    pass. Fleet's own overlap for stage 1 fuses parameters, so an optimizer would not see their
    names and shapes.

    Attributes:
        reducer: holds and reduces the gradients.
    """

    def __init__(
        self, model: nn.Layer, optimizer: FleetOptimizer, mesh: Mesh, options: UpdateOptions
    ) -> None:
        from paddle.distributed.fleet.meta_parallel.sharding import (
            group_sharded_optimizer_stage2,
        )
        from paddle.distributed.fleet.utils.mix_precision_utils import MixPrecisionOptimizer

        super().__init__(model, optimizer, mesh, replace(options, master_grad=False))
        assert mesh.sharding is not None
        self._has_main_grad = options.master_grad
        self._reduces_once = options.reduces_once
        if options.master_grad:
            for parameter in self.parameters:
                parameter.main_grad = None
        # Fleet's own offload requires float16 without data parallelism, so FleetOptimizer offloads.
        self._optimizer = group_sharded_optimizer_stage2.GroupShardedOptimizerStage2(
            optimizer._parameter_list,
            MixPrecisionOptimizer(optimizer) if options.master_grad else optimizer,
            group=mesh.sharding,
            pretrain_sync_models=False,  # every rank makes the same weights
            dp_group=mesh.replicas,
        )
        optimizer._master_weights.clear()  # fleet makes these copies for Paddle's own optimizers
        self.reducer = GradientReducer(
            self.parameters,
            self._optimizer.param2rank,
            mesh.sharding,
            paddle.float32 if options.master_grad else self.parameters[0].dtype,
        )
        if options.overlaps_weights:
            self._coming = WeightBroadcast(model, self._optimizer.param2rank, mesh.sharding)
            self._optimizer._broadcast_params = self._coming.start

    def placement(self, parameter: Tensor) -> Placement:
        return Placement(owner=self._optimizer.param2rank[parameter.name])

    def begin_step(self, micro_batches: int) -> None:
        self.reducer.begin_step(micro_batches if self._reduces_once else 1)

    def step(self) -> None:
        self.wait()
        self.reducer.finish(over=self._mesh.replicas)
        for parameter, gradient in self.reducer.gradients():
            if self._has_main_grad:
                parameter.main_grad = gradient
            else:
                parameter._copy_gradient_from(gradient)  # shares the memory
        self._optimizer.step()

    def clear(self) -> None:
        for parameter in self.parameters:
            if self._has_main_grad:
                parameter.main_grad = None
            else:
                parameter.clear_gradient(False)
        self.reducer.clear()


class ZeroStage3(_GroupSharded):
    """Each rank holds a slice of every matrix; a layer gathers its weights when it is called.

    Args:
        read: fills this rank's slices, for a model whose parameters have no memory yet. None: the
            parameters have their values.
    """

    def __init__(
        self,
        model: nn.Layer,
        optimizer: FleetOptimizer,
        mesh: Mesh,
        options: UpdateOptions,
        read: ReadParameter | None = None,
    ) -> None:
        from pypkg.parallel.optimizer.zero.sliced_layers import sliced

        super().__init__(model, optimizer, mesh, options)
        self._wrapped = sliced(
            _Loss(model),
            self._optimizer,
            mesh,
            slices_above=max((p.size for p in self.parameters if p.ndim == 1), default=0),
            read={}
            if read is None
            else {
                p.name: partial(read, name, tuple(p.shape)) for name, p in model.named_parameters()
            },
        )
        self._optimizer = self._wrapped._optim
        optimizer._master_weights.clear()  # fleet makes these copies for Paddle's own optimizers
        self.loss = self._wrapped

    def placement(self, parameter: Tensor) -> Placement:
        bounds = self._wrapped._param2buffer.get(parameter.name)
        return Placement() if bounds is None else Placement(bounds=bounds[self._mesh.sharding_rank])


ZERO_STAGES = {0: ZeroStage0, 1: ZeroStage1, 2: ZeroStage2, 3: ZeroStage3}
