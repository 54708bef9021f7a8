"""Fleet's wrapper for ZeRO stage 3, with cheaper slicing, gathering and reduction.

Slicing. Fleet slices parameters that are whole on every rank: it broadcasts them, and copies each
to the host and back. Here a parameter without memory is read slice by slice and never whole. A
parameter that has its values is sliced without those copies.

Gathering. Fleet's prefetching requires that each layer is used once in a fixed order, which neither
recompute nor tied embeddings do. Here the order of one micro batch predicts the order of the next,
so weights are gathered while earlier layers compute. A wrong prediction only costs time.

Reduction. Fleet all-reduces each gradient and waits. Here each gradient is reduce-scattered during
the backward pass, which sends half as much. The average over replicas follows once in a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.distributed.communication import stream
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_stage3 import (
    GroupShardedStage3,
    _all_gather,
)

from pypkg.parallel.comm.slices import read_elements
from pypkg.parallel.host_memory import to_host
from pypkg.parallel.mesh import Mesh
from pypkg.parallel.optimizer.data_parallel import average

# Number of sublayers whose weights are gathered ahead; a decoder layer has four with a matrix.
AHEAD = 4
# Maximum number of reductions in flight.
IN_FLIGHT = 2
# ``ReadParameter`` of one parameter: overwrites a tensor, given its elements (None: all).
Read = Callable[[Tensor, tuple[int, int] | None], None]


def sliced(
    model: nn.Layer, optimizer: Any, mesh: Mesh, slices_above: int, read: Mapping[str, Read]
) -> SlicedLayers:
    """Wraps ``model``; the attribute ``_optim`` of the result is the optimizer that updates it.

    Args:
        optimizer: the optimizer that fleet's optimizer wraps.
        slices_above: parameters with at most this number of elements stay whole on every rank.
        read: fills parameters that have no memory yet, by Paddle name.
    """
    for parameter in model.parameters():
        if not parameter._is_initialized() and parameter.size <= slices_above:
            parameter.initialize()
            read[parameter.name](parameter, None)
    return SlicedLayers(
        model,
        optimizer,
        read,
        group=mesh.sharding,
        dp_group=mesh.replicas,
        segment_size=slices_above,
        sync_comm=True,
        pretrain_sync_models=False,  # every rank makes the same weights
    )


class SlicedLayers(GroupShardedStage3):
    """Fleet's wrapper. A call is the forward pass of a micro batch."""

    def __init__(
        self, model: nn.Layer, optimizer: Any, read: Mapping[str, Read], **options: Any
    ) -> None:
        self._read = read
        # Layers in the order in which the last micro batch and this one use their weights.
        self._expected: list[nn.Layer] = []
        self._used: list[nn.Layer] = []
        self._predicts = False
        self._coming: dict[str, tuple[Tensor, Any]] = {}  # whole weights and tasks, by name
        self._reductions: deque[tuple[Tensor, Tensor, Tensor, Any]] = deque()
        super().__init__(model, optimizer, **options)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        self.wait()
        if self._used:
            self._expected, self._used = self._used, []
        self._predicts = paddle.is_grad_enabled()
        return super().forward(*inputs, **named)

    def wait(self) -> None:
        """Waits for all communication; the gradients of the slices are then complete."""
        while self._reductions:
            self._add_first_reduction()
        for _, task in self._coming.values():  # gathers of a wrong prediction
            task.wait()
        self._coming.clear()

    def _register_forward_all_hooks(self, sub_layer: nn.Layer, task_flow: Any) -> None:
        """Registers hooks that run before those of fleet, which gather missing weights and wait."""
        layer: Any = sub_layer  # Paddle's annotation has no hooks that return nothing
        layer.register_forward_pre_hook(lambda layer, _: self._fetch(layer))
        super()._register_forward_all_hooks(sub_layer, task_flow)
        layer.register_forward_post_hook(self._fetch_in_backward)

    def _fetch_in_backward(self, layer: nn.Layer, _: Any, outputs: Any) -> None:
        """Fetches the weights when the output's gradient is computed, before fleet's own hook."""
        output = outputs if isinstance(outputs, Tensor) else outputs[0]
        if not output.stop_gradient:
            output.register_hook(lambda _: self._fetch(layer))

    @paddle.no_grad()
    def _fetch(self, layer: nn.Layer) -> None:
        """Waits for the weights of ``layer``, and starts to gather those of the next layers."""
        for parameter in self._trainable_params[id(layer)]:
            if parameter.name in self._coming:
                self._take(parameter, *self._coming.pop(parameter.name))
        if not self._predicts:
            return
        place = len(self._used)
        self._used.append(layer)
        if place < len(self._expected) and self._expected[place] is layer:
            for following in self._expected[place + 1 : place + 1 + AHEAD]:
                if following is not layer:
                    self._gather(following)

    def _gather(self, layer: nn.Layer) -> None:
        """Starts to gather the weights of ``layer`` that are neither whole nor being gathered."""
        for parameter in self._trainable_params[id(layer)]:
            if parameter.status == "part" and parameter.name not in self._coming:
                size = self._param2buffer_size[parameter.name]
                self._coming[parameter.name] = _all_gather(parameter.fw_storage, size, self._group)

    def _take(self, parameter: Tensor, whole: Tensor, task: Any) -> None:
        """Sets ``parameter`` to its gathered value, with the attributes that fleet would set."""
        task.wait()
        whole._slice(0, parameter.size)._share_buffer_to(parameter)
        parameter.fw_storage._clear()
        parameter.fw_storage, parameter.status = None, "all"
        self._task_flow.full_param[parameter.name] = whole, task

    def _get_allreduce_fn(self, param: Tensor) -> Callable[..., None]:
        """The function that runs when the gradient of ``param`` for a micro batch is computed."""
        release = super()._get_allreduce_fn(param)

        @paddle.no_grad()
        def reduce(*_: object) -> None:
            gradient = self._task_flow.full_grad.pop(param.name, None)
            if gradient is not None:
                self._reduce(param, gradient)
                if self.use_main_grad:
                    param.main_grad = None
                else:
                    param.clear_gradient(False)
            release()

        return reduce

    def _reduce(self, parameter: Tensor, gradient: Tensor) -> None:
        """Scales ``gradient``, which is flat and padded, and starts its reduce-scatter."""
        while len(self._reductions) >= IN_FLIGHT:
            self._add_first_reduction()
        gradient.scale_(self._world_size_scaling)
        own = paddle.empty([gradient.size // self._group.nranks], gradient.dtype)
        task = stream.reduce_scatter(own, gradient, group=self._group, sync_op=False)
        self._reductions.append((parameter, own, gradient, task))

    @paddle.no_grad()
    def _add_first_reduction(self) -> None:
        parameter, own, _, task = self._reductions.popleft()
        task.wait()
        if parameter.bw_storage is None:
            parameter.bw_storage = own
        else:
            parameter.bw_storage.add_(own)

    def _update_params(self) -> Any:
        """Completes the gradients of the slices; fleet then gives the slices to the optimizer."""
        self.wait()
        if self._dp_group is not None:
            divided = {p.name: p for layer in self._trainable_params.values() for p in layer}
            average([p.bw_storage for p in divided.values()], self._dp_group)
        return super()._update_params()

    @paddle.no_grad()
    def _param_storage(self, param: Tensor, buffer_size: int) -> None:
        """Creates this rank's slice. Fleet calls this once for each parameter that it divides."""
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
