"""Fleet's layers of ZeRO stage 3, sliced one parameter at a time.

Fleet slices parameters that are whole on every rank: it broadcasts them, and copies each to the
host and back. Here a parameter without memory is never made whole, and one that has its values is
sliced without those copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_stage3 import GroupShardedStage3

from pypkg.parallel.comm.slices import read_elements
from pypkg.parallel.host_memory import to_host
from pypkg.parallel.mesh import Mesh

# ``ReadParameter`` of one parameter: overwrites a tensor, given elements, or None for all.
Read = Callable[[Tensor, tuple[int, int] | None], None]


def sliced(
    model: nn.Layer, optimizer: Any, mesh: Mesh, slices_above: int, read: Mapping[str, Read]
) -> GroupShardedStage3:
    """``model`` in fleet's wrapper, whose attribute ``_optim`` updates it.

    Args:
        optimizer: what fleet's optimizer wraps.
        slices_above: parameters with at most so many elements stay whole on every rank.
        read: fills parameters that have no memory yet, by their Paddle names.
    """
    for parameter in model.parameters():
        if not parameter._is_initialized() and parameter.size <= slices_above:
            parameter.initialize()
            read[parameter.name](parameter, None)
    return _SlicedLayers(
        model,
        optimizer,
        read,
        group=mesh.sharding,
        dp_group=mesh.data,
        segment_size=slices_above,
        sync_comm=True,
        pretrain_sync_models=False,  # every rank makes the same weights
    )


class _SlicedLayers(GroupShardedStage3):
    def __init__(
        self, model: nn.Layer, optimizer: Any, read: Mapping[str, Read], **options: Any
    ) -> None:
        self._read = read
        super().__init__(model, optimizer, **options)

    @paddle.no_grad()
    def _param_storage(self, param: Tensor, buffer_size: int) -> None:
        """Makes the slice of this rank; fleet calls it once for each parameter that it divides."""
        elements = self._param2buffer[param.name][self._rank]
        held = paddle.empty([elements[1] - elements[0]], param.dtype)
        if param._is_initialized():
            whole = to_host(param)
            held.set_value(read_elements(lambda rows: whole[slice(*rows)], whole.shape, elements))
        else:
            self._read[param.name](held, elements)
        held.name = "slice@" + param.name
        param.fw_storage, param.status = held, "part"
        param._clear_data()
