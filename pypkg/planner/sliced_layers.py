"""ZeRO stage 3: the counterpart of parallel/optimizer/zero/sliced_layers.py, and of fleet.

A layer's matrices are gathered before its forward and its backward pass, and released after it.
Weights of the next layers are prefetched meanwhile, in the order of the last micro batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from pypkg.models.architecture.parameter_shapes import ParameterShape
from pypkg.planner.operators import ACTIVATIONS, COMMUNICATION, GRADIENTS, Operators
from pypkg.planner.pipeline.schedule import BACKWARD
from pypkg.planner.tape import Gradients, Parameter, Tensor
from pypkg.planner.zero import IN_FLIGHT, WEIGHTS, Stage0, UpdateLayout, aligned

GATHERED = "gathered weights"
AHEAD = 4  # sliced_layers.py


class Stage3(Stage0):
    """ZeRO stage 3: matrices are sliced. Vectors and matrices no larger than them stay whole.

    Args:
        expected: ``order`` of the last micro batch, the prediction of this one.
    """

    def __init__(
        self,
        ops: Operators,
        shapes: Sequence[ParameterShape],
        layout: UpdateLayout,
        expected: Sequence[str] = (),
    ) -> None:
        self._limit = max((each.size for each in shapes if len(each.shape) == 1), default=0)
        self._slices: dict[str, Tensor] = {}  # of weights, while they are slices
        self._sums: dict[str, Tensor] = {}  # slices of gradients
        self._full_gradients: dict[str, Tensor] = {}
        self._coming: dict[str, Tensor] = {}
        self._reductions: deque[tuple[str, list[Tensor]]] = deque()
        # On a CPU the task of gloo's all-gather, which fleet keeps, holds the slice.
        self._held_by_tasks: dict[str, Tensor] = {}
        self._held_by_recompute: dict[str, Tensor] = {}
        self._uses: dict[str, int] = {}
        self._layers: dict[str, list[str]] = {}
        self._expected = list(expected)
        self._zeros: Tensor | None = None  # made for a layer whose backward pass is prepared
        self._prepared = ""  # the layer whose backward pass is prepared
        super().__init__(ops, shapes, layout)
        whole = [each for each in shapes if not self._is_sliced(each)]
        size = sum(aligned(each.size, ops.dtype_bytes) for each in whole)
        self._flat_gradients = ops.tape.empty(size * self._gradient_bytes, GRADIENTS)

    def _is_sliced(self, shape: ParameterShape) -> bool:
        return shape.size > self._limit

    def _parameter(self, shape: ParameterShape) -> Parameter:
        tape, item = self._ops.tape, self._ops.dtype_bytes
        layer = shape.name.rpartition(".")[0]
        names = self._layers.setdefault(layer, [])
        if not self._is_sliced(shape):
            return tape.parameter(shape.name, shape.size * item, WEIGHTS)
        names.append(shape.name)
        self._uses[shape.name] = 0
        self._slices[shape.name] = tape.empty(self._slice(shape) * item, WEIGHTS)
        return Parameter(shape.name, shape.size * item, None)

    def _slice(self, shape: ParameterShape) -> int:
        """Elements of a rank's slice."""
        return -(-aligned(shape.size, self._ops.dtype_bytes) // self._layout.sharding)

    def owned(self) -> list[ParameterShape]:
        return [
            ParameterShape(each.name, (self._slice(each),), each.layer)
            if self._is_sliced(each)
            else each
            for each in self._shapes
        ]

    def _watch(self) -> None:
        self._sizes = {each.name: self._slice(each) for each in self._shapes}
        for name, parameter in self.parameters.items():
            parameter.on_gradient = self._reduce if name in self._uses else self._keep

    def _keep(self, parameter: Parameter) -> None:
        """Drops the gradient of a whole parameter, which a flat buffer holds."""
        parameter.clear_gradient()

    def accumulate_all(self) -> None:
        for name in self._uses:
            size = self._sizes[name] * self._gradient_bytes
            self._sums[name] = self._ops.tape.empty(size, GRADIENTS)

    def begin_pass(self) -> None:
        self.wait()
        if self.order:
            self._expected, self.order = self.order, []

    def call(self, name: str, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        self._fetch(name)
        self._need(name)
        outputs = list(function())
        if self._ops.tape.phase == BACKWARD:
            self._hold(name)
        self._release(name)
        return self._handed_on(name, outputs)

    def _hold(self, layer: str) -> None:
        """Keeps the memory of a released weight until the backward pass has used it.

        Paddle's recompute shares the memory of a weight that has no gradient yet."""
        if self._layout.has_main_grad:
            return
        for name in self._layers[layer]:
            if self.parameters[name].gradient is None:
                self._held_by_recompute[name] = self.parameters[name].detach()

    def _handed_on(self, name: str, outputs: list[Tensor]) -> list[Tensor]:
        """ForwardPostHooks: copies, whose backward pass gathers the weights and makes gradients."""
        copies = [self._ops.like(each, ACTIVATIONS) for each in outputs]

        sizes = [each.num_bytes for each in outputs]

        def backward(incoming: list[Tensor | None]) -> Gradients:
            for place, size in enumerate(sizes):
                if incoming[place] is None:  # a PyLayer is given zeros
                    zeros = self._zeros or self._ops.tape.empty(size, GRADIENTS)
                    incoming[place], self._zeros = zeros, None
            if name == self._prepared:
                self._prepared = ""
            else:
                self._prepare(name)
            return incoming

        self._ops.tape.record(outputs, copies, backward)
        return copies

    def _prepare(self, layer: str) -> None:
        """Weights and gradients for the backward pass of ``layer``."""
        self._fetch(layer)
        self._need(layer)
        for name in self._layers[layer]:
            if name not in self._full_gradients:
                self._full_gradients[name] = self._whole(name, GRADIENTS, self._gradient_bytes)
                if not self._layout.has_main_grad:
                    self.parameters[name].gradient = self._full_gradients[name].detach()

    def begin_recompute(self, last: str, incoming: list[Tensor | None]) -> None:
        self._prepare(last)
        self._prepared = last
        if "norm" in last and incoming[0] is not None:  # whose sum goes nowhere
            self._zeros = self._ops.like(incoming[0], GRADIENTS)

    def _whole(self, name: str, term: str, item: int) -> Tensor:
        return self._ops.tape.empty(self._sizes[name] * self._layout.sharding * item, term)

    def _fetch(self, layer: str) -> None:
        for name in self._layers[layer]:
            if name in self._coming:
                self._take(name, self._coming.pop(name))
        place = len(self.order)
        self.order.append(layer)
        if place < len(self._expected) and self._expected[place] == layer:
            for following in self._expected[place + 1 : place + 1 + AHEAD]:
                if following != layer:
                    self._gather(following)

    def _gather(self, layer: str) -> None:
        for name in self._layers[layer]:
            if name in self._slices and name not in self._coming:
                self._coming[name] = self._whole(name, GATHERED, self._ops.dtype_bytes)

    def _take(self, name: str, whole: Tensor) -> None:
        self.parameters[name].memory = whole.memory
        part = self._slices.pop(name)
        if not self._ops.is_gpu:
            self._held_by_tasks[name] = part

    def _need(self, layer: str) -> None:
        """Fleet's _allgather_buffer."""
        for name in self._layers[layer]:
            if name in self._slices:
                self._take(name, self._whole(name, GATHERED, self._ops.dtype_bytes))
            self._uses[name] += 1

    def _release(self, layer: str) -> None:
        """Fleet's _release_param."""
        for name in self._layers[layer]:
            self._uses[name] -= 1
            if not self._uses[name]:
                self._drop(name)

    def _drop(self, name: str) -> None:
        item = self._ops.dtype_bytes
        self._slices[name] = self._ops.tape.empty(self._sizes[name] * item, WEIGHTS)
        self._held_by_tasks.pop(name, None)
        self.parameters[name].clear()

    def _reduce(self, parameter: Parameter) -> None:
        """Reduces the gradient of a matrix after a micro batch."""
        name, tape = parameter.name, self._ops.tape
        self._held_by_recompute.pop(name, None)
        gradient = self._full_gradients.pop(name, None)
        if gradient is not None:
            while len(self._reductions) >= IN_FLIGHT:
                self._add_first_reduction()
            own = tape.empty(gradient.num_bytes // self._layout.sharding, GRADIENTS)
            if not self._ops.is_gpu:  # reduce_scatter_tensor of parallel/gloo sums a copy
                self._ops.like(gradient, COMMUNICATION)
            self._reductions.append((name, [own, gradient]))
            parameter.clear_gradient()
        if parameter.memory is not None:
            self._uses[name] = 0
            self._drop(name)

    def _add_first_reduction(self) -> None:
        name, (own, _) = self._reductions.popleft()
        self._sums.setdefault(name, own)

    def wait(self) -> None:
        while self._reductions:
            self._add_first_reduction()
        self._coming.clear()

    def step(self) -> None:
        if self._layout.data > 1:
            self._average(self._sizes[name] for name in self._uses)
        self._update()

    def clear(self) -> None:
        self._sums.clear()
