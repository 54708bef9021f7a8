"""The optimizer that fleet drives: it clips, keeps the state, and calls the update rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import paddle
from paddle import Tensor

from pypkg.parallel.optimizer.clipping import GlobalNormClip
from pypkg.parallel.optimizer.protocol import Optimizer, ParameterUpdate


class Assignment(NamedTuple):
    """Which optimizer updates a parameter, and the parameter's name in the model."""

    name: str
    optimizer: Optimizer


class FleetOptimizer(paddle.optimizer.Optimizer):
    """Hands parameters and gradients from fleet's ZeRO stages to ``Optimizer`` objects.

    Paddle's class is the base because fleet checks for it; its accumulators are not used.

    Args:
        parameters: those of this rank's model.
        assignments: by the Paddle names under which an optimizer may see a parameter.
        clip: called with all gradients of this rank before the update.
        offload: state in the parameter's shape stays in host memory and is on the device only
            while its parameter is updated. On a CPU this is one copy more and no other change.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        assignments: Mapping[str, Assignment],
        clip: GlobalNormClip,
        offload: bool = False,
    ) -> None:
        super().__init__(learning_rate=0.0, parameters=list(parameters))
        self._assignments, self._clip, self._offload = assignments, clip, offload
        self._state: dict[str, dict[str, Tensor]] = {}

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """State tensors of an optimizer parameter, by state name; the first call creates them."""
        name = parameter.name
        if name not in self._state:
            with paddle.no_grad():
                self._state[name] = self._assignments[name].optimizer.make_state(parameter)
            if self._offload:
                _move(self._sharded_state(parameter), _host())
        return self._state[name]

    def state_tensors(self) -> list[Tensor]:
        """All state tensors that this rank holds now."""
        return [tensor for state in self._state.values() for tensor in state.values()]

    def forget_state(self) -> None:
        """Removes all state, as before the first update."""
        self._state.clear()

    @staticmethod
    def assign(state: Tensor, array: np.ndarray) -> None:
        """Overwrites a tensor of ``state_of`` in the memory where it is."""
        place = state.place
        state.set_value(np.ascontiguousarray(array))
        if str(state.place) != str(place):
            _move([state], place)

    def _apply_optimize(
        self,
        loss: object,
        startup_program: object,
        params_grads: list[tuple[Tensor, Tensor]],
        param_group_idx: int = 0,
    ) -> None:
        """Clips and updates; fleet and Paddle's ``step`` call it with the gradients they hold."""
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
        """One call of each optimizer for all of its parameters."""
        updates: dict[int, tuple[Optimizer, list[ParameterUpdate]]] = {}
        assignments, states = self._assignments, self._state
        for parameter, gradient in params_grads:
            paddle_name = parameter.name
            name, optimizer = assignments[paddle_name]
            state = states.get(paddle_name) or self.state_of(parameter)
            if id(optimizer) not in updates:
                updates[id(optimizer)] = (optimizer, [])
            updates[id(optimizer)][1].append(ParameterUpdate(name, parameter, gradient, state))
        for optimizer, own in updates.values():
            optimizer.update(own, self.get_lr(), self._clip.factor)

    def _sharded_state(self, parameter: Tensor) -> list[Tensor]:
        is_scalar = self._assignments[parameter.name].optimizer.is_scalar
        return [value for name, value in self.state_of(parameter).items() if not is_scalar(name)]


def _host() -> object:
    # A GPU copies from and to pinned memory without an intermediate buffer.
    return paddle.CUDAPinnedPlace() if paddle.is_compiled_with_cuda() else paddle.CPUPlace()


def _move(tensors: Iterable[Tensor], place: object) -> None:
    """Moves tensors to ``place``; each stays the same tensor object."""
    for tensor in tensors:
        tensor._copy_to(place, True)._share_buffer_to(tensor)
