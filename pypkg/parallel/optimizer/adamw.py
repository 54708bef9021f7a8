"""AdamW whose state is reached by parameter, and can wait in host memory between the updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import paddle
from paddle import Tensor

from pypkg import ops
from pypkg.parallel.optimizer.clipping import HALF, GlobalNormClip

_MASTER_WEIGHT = "master_weight"
_MOMENTS = ("moment1", "moment2")
_POWERS = ("beta1_pow_acc", "beta2_pow_acc")


class AdamW(paddle.optimizer.AdamW):
    """AdamW (Loshchilov and Hutter, 2019) whose learning rate the caller sets before each step.

    Parameters of 16 bits are updated through float32 master weights. The factor of the clip goes
    into the update, in float32.

    Args:
        decays: whether weight decay applies to a parameter, by its Paddle name.
        clip: sees all gradients of this process before the update.
        offload: keep moments and master weights in host memory, and bring those of one parameter
            at a time to the device. Where the device is the CPU this changes nothing but a copy.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        beta1: float,
        beta2: float,
        epsilon: float,
        weight_decay: float,
        decays: Callable[[str], bool],
        clip: GlobalNormClip,
        offload: bool = False,
    ) -> None:
        super().__init__(
            learning_rate=0.0,
            beta1=beta1,
            beta2=beta2,
            epsilon=epsilon,
            parameters=list(parameters),
            weight_decay=weight_decay,
            apply_decay_param_fun=decays,
            grad_clip=clip,
            multi_precision=True,
        )
        self._clip = clip
        self._decay, self._decays = weight_decay, decays
        self._offload = offload
        self._pending: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    def kinds(dtype: paddle.dtype) -> tuple[str, ...]:
        """What the optimizer keeps for a parameter of ``dtype``."""
        return (*((_MASTER_WEIGHT,) if dtype in HALF else ()), *_MOMENTS, *_POWERS)

    @staticmethod
    def is_scalar(kind: str) -> bool:
        """Whether a kind of state is one number, and not shaped like the parameter."""
        return kind in _POWERS

    def state_of(self, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What the optimizer keeps for ``parameter``, by kind; nothing before its first update."""
        if parameter.name not in self._already_create_accumulator:
            return
        for kind in self.kinds(parameter.dtype):
            if kind == _MASTER_WEIGHT:
                yield kind, self._master_weights[parameter.name]
            else:
                yield kind, self._get_accumulator_master(kind, parameter)

    def make_state(self, parameter: Tensor) -> None:
        """Makes what ``state_of`` gives, as the first update would."""
        block = paddle.static.default_main_program().global_block()
        self._create_accumulators(block, [parameter])

    @staticmethod
    def assign(value: Tensor, array: np.ndarray) -> None:
        """Writes to what ``state_of`` gave, and leaves it in the memory where it is."""
        place = value.place
        value.set_value(np.ascontiguousarray(array))
        if str(value.place) != str(place):
            _move([value], place)

    def _add_moments_pows(self, p: Tensor) -> None:
        super()._add_moments_pows(p)
        if self._offload:
            moments = [self._get_accumulator(kind, p) for kind in _MOMENTS]
            masters = [master for master in self._master_weights.values() if master is p]
            _move([*moments, *masters], _host())

    def _append_optimize_op(self, block: object, param_and_grad: tuple[Tensor, Tensor]) -> None:
        """Puts off the update, so that one call can make all of them; offloaded ones at once."""
        if not self._offload:
            self._pending.append(param_and_grad)
            return
        parameter = param_and_grad[0]
        state = [value for kind, value in self.state_of(parameter) if not self.is_scalar(kind)]
        _move(state, parameter.place)
        self._update([param_and_grad])
        _move(state, _host())

    def _finish_update(self, block: object, parameters_and_grads: object) -> None:
        pending, self._pending = self._pending, []
        if pending:
            self._update(pending)

    def _update(self, params_and_grads: list[tuple[Tensor, Tensor]]) -> None:
        parameters, gradients = zip(*params_and_grads)
        states = [dict(self.state_of(each)) for each in parameters]
        kinds = (*_MOMENTS, *_POWERS, *((_MASTER_WEIGHT,) if _MASTER_WEIGHT in states[0] else ()))
        ops.adamw_(
            *(parameters, gradients),
            *([state[kind] for state in states] for kind in kinds),
            learning_rate=self.get_lr(),
            weight_decays=[self._decay if self._decays(each.name) else 0.0 for each in parameters],
            beta1=self._beta1,
            beta2=self._beta2,
            epsilon=self._epsilon,
            grad_scale=self._clip.factor,
        )


def _host() -> object:
    # Pinned memory is what a GPU copies from and to without an intermediate buffer.
    return paddle.CUDAPinnedPlace() if paddle.is_compiled_with_cuda() else paddle.CPUPlace()


def _move(tensors: Iterable[Tensor], place: object) -> None:
    """To ``place``, each as the same tensor object."""
    for tensor in tensors:
        tensor._copy_to(place, True)._share_buffer_to(tensor)
