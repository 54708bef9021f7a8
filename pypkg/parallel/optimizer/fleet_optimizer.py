"""The optimizer that fleet calls: clips gradients, keeps the state and calls the update rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import paddle
from paddle import Tensor

from pypkg.parallel.optimizer.clipping import GlobalNormClip
from pypkg.parallel.optimizer.pieces import Piece
from pypkg.parallel.optimizer.protocol import Optimizer, ParameterUpdate
from pypkg.parallel.optimizer.rules import moments


class Assignment(NamedTuple):
    """Which optimizer updates a parameter.

    Attributes:
        name: the parameter's name in the model.
        rate_factor: factor of the learning rate.
    """

    name: str
    optimizer: Optimizer
    rate_factor: float = 1.0


class _Arranged(NamedTuple):
    """The updates of a step.

    Attributes:
        updates: in the order of the parameters.
        groups: the same by optimizer and factor of the learning rate.
    """

    updates: list[ParameterUpdate]
    groups: list[tuple[Optimizer, float, list[ParameterUpdate]]]


class FleetOptimizer(paddle.optimizer.Optimizer):
    """Passes parameters and gradients from fleet's ZeRO stages to ``Optimizer`` objects.

    It derives from Paddle's class because fleet checks for that; Paddle's accumulators are not
    used.

    Attributes:
        pieces: what this rank updates of each parameter, by the names of ``assignments``; set after
            the ZeRO stage has divided the parameters.

    Args:
        parameters: those of this rank's model.
        assignments: by the Paddle names under which fleet may pass a parameter (``names_of``).
        clip: called with all gradients of this rank before the update.
        offload: whether state in the parameter's shape stays in host memory, and is on the device
            only while its parameter is updated. On a CPU this only costs a copy.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        assignments: Mapping[str, Assignment],
        clip: GlobalNormClip,
        offload: bool = False,
    ) -> None:
        super().__init__(learning_rate=0.0, parameters=list(parameters))
        self._own = {id(parameter) for parameter in self._parameter_list}
        self._assignments, self._clip, self._offload = assignments, clip, offload
        self.pieces: dict[str, Piece] = {}
        self._state: dict[str, dict[str, Tensor]] = {}
        # Kept for the host's time, as most updates are of the same parameters.
        self._arranged = _Arranged([], [])

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """State tensors of an optimizer parameter, by state name. The first call creates them."""
        name = parameter.name
        if name not in self._state:
            with paddle.no_grad():
                make = self._assignments[name].optimizer.make_state
                self._state[name] = make(parameter, self.pieces[name].layout.shape)
            if self._offload:
                _move(self._sharded_state(parameter), _host())
        return self._state[name]

    def state_tensors(self) -> list[Tensor]:
        """All state tensors that this rank holds now."""
        return [tensor for state in self._state.values() for tensor in state.values()]

    def forget_state(self) -> None:
        """Removes all state. The next update creates it anew."""
        self._state.clear()
        self._arranged = _Arranged([], [])

    @staticmethod
    def assign(state: dict[str, Tensor], name: str, array: np.ndarray) -> None:
        """Overwrites a tensor of ``state_of`` in place, on the device or in host memory.

        Args:
            array: float32; converted if the state is stored in another form.
        """
        kept = state[name]
        place = kept.place
        if kept.dtype == paddle.float32:
            kept.set_value(np.ascontiguousarray(array))
        else:
            moments.write(state, name, paddle.to_tensor(array))
        held = [each for key, each in state.items() if key.startswith(name)]
        _move([each for each in held if str(each.place) != str(place)], place)

    @paddle.no_grad()
    def step(self) -> None:
        """Paddle's ``Optimizer.step``; faster for parameters whose gradient is in ``grad``."""
        parameters = self._param_groups  # ZeRO reduces these to the rank's own
        if hasattr(parameters[0], "main_grad"):
            super().step()
            return
        pairs = [
            (p, gradient)
            for p in parameters
            if not p.stop_gradient and (gradient := p._grad_ivar()) is not None
        ]
        self._apply_optimize(loss=None, startup_program=None, params_grads=pairs)

    def _apply_optimize(
        self,
        loss: object,
        startup_program: object,
        params_grads: list[tuple[Tensor, Tensor]],
        param_group_idx: int = 0,
    ) -> None:
        """Clips and updates. Fleet and Paddle's ``step`` call it with the rank's gradients."""
        kept = self._clip(params_grads)
        if not self._offload:
            self._update(kept)
            return
        for parameter, gradient in kept:
            state = self._sharded_state(parameter)
            _move(state, parameter.place)
            self._update([(parameter, gradient)])
            _move(state, _host())

    def _update(self, params_grads: list[tuple[Tensor, Tensor]]) -> None:
        """Calls each optimizer once for all of its parameters with the same learning rate."""
        updates, groups = self._arranged
        if len(updates) != len(params_grads) or not all(
            [update.parameter is pair[0] for update, pair in zip(updates, params_grads)]
        ):
            updates, groups = arranged = self._arrange(params_grads)
            # Not slices of ZeRO stage 3, whose memory is freed when a layer gathers its weight.
            is_own = all(id(parameter) in self._own for parameter, _ in params_grads)
            self._arranged = arranged if is_own else _Arranged([], [])
        for update, (_, gradient) in zip(updates, params_grads, strict=True):
            update.gradient = gradient
        for optimizer, factor, own in groups:
            optimizer.update(own, self.get_lr() * factor, self._clip.factor)
        for update in updates:
            del update.gradient

    def _arrange(self, params_grads: list[tuple[Tensor, Tensor]]) -> _Arranged:
        updates = []
        groups: dict[tuple[int, float], tuple[Optimizer, float, list[ParameterUpdate]]] = {}
        for parameter, gradient in params_grads:
            name, optimizer, factor = self._assignments[parameter.name]
            piece, state = self.pieces[parameter.name], self.state_of(parameter)
            update = ParameterUpdate(name, parameter, gradient, state, piece)
            updates.append(update)
            key = id(optimizer), factor
            groups.setdefault(key, (optimizer, factor, []))[2].append(update)
        return _Arranged(updates, list(groups.values()))

    def _sharded_state(self, parameter: Tensor) -> list[Tensor]:
        optimizer = self._assignments[parameter.name].optimizer
        shape = self.pieces[parameter.name].layout.shape
        return [
            value
            for name, value in self.state_of(parameter).items()
            if optimizer.undivided_shape(name, shape) is None
        ]


def _host() -> object:
    # A GPU copies from and to pinned memory without an intermediate buffer.
    return paddle.CUDAPinnedPlace() if paddle.is_compiled_with_cuda() else paddle.CPUPlace()


def _move(tensors: Iterable[Tensor], place: object) -> None:
    """Moves the data of tensors to ``place``; the tensor objects stay the same."""
    for tensor in tensors:
        tensor._copy_to(place, True)._share_buffer_to(tensor)
