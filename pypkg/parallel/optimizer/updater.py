"""The optimizer step of every layout, and optimizer state as one process would hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor, nn

from pypkg.parallel.comm import gather
from pypkg.parallel.host import to_host
from pypkg.parallel.mesh import Mesh
from pypkg.parallel.optimizer.clipping import GlobalNormClip, NormContribution
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.parallel.optimizer.fleet_optimizer import Assignment, FleetOptimizer
from pypkg.parallel.optimizer.loss_scaling import LossScaler
from pypkg.parallel.optimizer.protocol import Optimizer, TpSharding
from pypkg.parallel.optimizer.zero import ZERO_STAGES, ZeroStage0, names_of


class Updater:
    """Averages, clips and applies gradients, and reads and writes optimizer state.

    It knows parameters, gradients and state; ``distribute`` makes it beside the model.

    Attributes:
        scaler: the dynamic loss scale, or None.
        zero: the ZeRO stage, which holds the wrapped loss.
    """

    def __init__(
        self,
        model: nn.Layer,
        options: UpdateOptions,
        mesh: Mesh,
        tp_sharding: TpSharding,
        optimizers: Sequence[Optimizer],
    ) -> None:
        """
        Raises:
            ValueError: none of the optimizers takes a parameter.
        """
        scaler = None if options.loss_scale is None else LossScaler(options.loss_scale)
        self.scaler = scaler
        self._parameters = {n: p for n, p in model.named_parameters() if not p.stop_gradient}
        self._dtype = next(iter(self._parameters.values())).dtype
        self._mesh = mesh
        self._tp_sharding = tp_sharding
        self._optimizer_of = _assign(optimizers, tp_sharding.shapes())
        self._has_state = False
        contributions: dict[
            str, NormContribution
        ] = {}  # filled when the ZeRO stage has divided the parameters
        self._clip = GlobalNormClip(
            options.max_grad_norm,
            contributions,
            is_alone=mesh.world_size == 1,
            unscale=None if scaler is None else lambda: scaler.scale,
        )
        assignments = {
            paddle_name: Assignment(name, self._optimizer_of[name])
            for name, parameter in self._parameters.items()
            for paddle_name in names_of(parameter)
        }
        self.optimizer = FleetOptimizer(
            model.parameters(), assignments, self._clip, options.offload
        )
        stage = options.sharding_stage if mesh.sharding is not None else 0
        self.zero: ZeroStage0 = ZERO_STAGES[stage](model, self.optimizer, mesh, options.master_grad)
        contributions.update(self.zero.norm_contributions())

    def scale(self, loss: Tensor) -> Tensor:
        """``loss`` times the loss scale: what to call ``backward`` on."""
        return loss if self.scaler is None else loss * self.scaler.scale

    def step(self, learning_rate: float) -> Tensor:
        """Updates the parameters by the mean gradient over all sample shards, and clears it.

        All ranks have to call it. A step whose gradients are not finite changes no parameter. With
        a loss scale it changes the scale alone. Without one, the devices decide, and scalar state,
        such as AdamW's powers of beta, counts the step.

        Returns:
            The global norm before clipping, without the loss scale: a float32 scalar, the same on
            all ranks and not synchronised with the host.
        """
        self.optimizer.set_lr(learning_rate)
        self.zero.step()
        self.zero.clear()
        self._has_state |= not self._clip.skipped
        if self.scaler is not None:
            self.scaler.update(self._clip.skipped)
        return self._clip.norm

    def state(self) -> Iterator[tuple[str, np.ndarray]]:
        """Optimizer state of whole parameters as (``<parameter>.<state name>``, array).

        All ranks have to iterate to the end; rank 0 gets every array. Before the first update there
        is none.
        """
        keys = list(self.state_shapes())
        held = {key for key in keys if key.rpartition(".")[0] in self._parameters}

        def read(key: str) -> np.ndarray:
            name, _, state_name = key.rpartition(".")
            return self._read(name, state_name)

        yield from gather.over_stages(keys, held, read)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what ``state`` yields, all float32, in its order."""
        if not self._has_state:
            return {}
        return {
            f"{name}.{state_name}": (1,) if optimizer.is_scalar(state_name) else shape
            for name, shape in self._tp_sharding.shapes().items()
            for optimizer in (self._optimizer_of[name],)
            for state_name in optimizer.state_names(self._dtype)
        }

    def load_state(self, read: Callable[[str], np.ndarray]) -> None:
        """Restores what ``state`` yielded, under any layout.

        Args:
            read: returns the array of a key; called for the keys that this rank needs.

        Raises:
            KeyError: from ``read``, for a key that is missing.
        """
        for name, parameter in self._parameters.items():
            optimizer_parameter = self.zero.optimizer_parameter(parameter)
            if optimizer_parameter is None:
                continue
            for state_name, value in self.optimizer.state_of(optimizer_parameter).items():
                array = read(f"{name}.{state_name}")
                if not self._optimizer_of[name].is_scalar(state_name):
                    array = self._tp_sharding.take(name, array)
                    array = _slice(array, self.zero.placement(parameter).bounds)
                self.optimizer.assign(value, array)
        self._has_state = True

    def assign_parameters(self, read: Callable[[str, Sequence[int]], np.ndarray]) -> None:
        """Overwrites the parameters of this rank in place, and forgets the optimizer state.

        Args:
            read: returns a parameter, or this rank's TP shard of it, by name and shape.
        """
        for name, parameter in self._parameters.items():
            self.zero.assign(parameter, read(name, parameter.shape))
        self.optimizer.forget_state()
        self._has_state = False

    def _read(self, name: str, state_name: str) -> np.ndarray:
        """One state tensor of a parameter of this pipeline stage, whole."""
        parameter = self._parameters[name]
        is_scalar = self._optimizer_of[name].is_scalar(state_name)
        placement = self.zero.placement(parameter)
        optimizer_parameter = self.zero.optimizer_parameter(parameter)
        value = None
        if optimizer_parameter is not None:
            value = self.optimizer.state_of(optimizer_parameter)[state_name]
        if placement.owner is not None:
            shape = [1] if is_scalar else parameter.shape
            sent = paddle.empty(shape, "float32") if value is None else _on_device(value)
            group = self._mesh.sharding
            assert group is not None  # which has the owner
            dist.broadcast(sent, src=group.ranks[placement.owner], group=group)
            value = sent
        assert value is not None  # this rank's, or received from the owner
        if is_scalar:
            return to_host(value)
        value = _on_device(value)
        if placement.bounds is not None:
            value = gather.joined(value, parameter)
        return self._tp_sharding.gather(name, value)


def _assign(
    optimizers: Sequence[Optimizer], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Optimizer]:
    """The optimizer of each parameter of the whole model: the first that takes it."""
    found = {}
    for name, shape in shapes.items():
        taking = [each for each in optimizers if each.takes(name, shape)]
        if not taking:
            raise ValueError(f"no optimizer takes the parameter {name} of shape {list(shape)}")
        found[name] = taking[0]
    return found


def _on_device(tensor: Tensor) -> Tensor:
    """A copy on the device whose collectives this rank uses."""
    return tensor._copy_to(paddle.framework._current_expected_place(), True)


def _slice(whole: np.ndarray, bounds: tuple[int, int] | None) -> np.ndarray:
    """``whole[start:stop]`` of the flattened array, padded with zeros; None: ``whole`` itself."""
    if bounds is None:
        return whole
    start, stop = bounds
    held = whole.reshape(-1)[start:stop]
    return np.pad(held, (0, stop - start - held.size))
