"""The optimizer step of every layout, and access to optimizer state in layout-independent form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import paddle
from paddle import Tensor, nn

from pypkg.parallel.comm import gather
from pypkg.parallel.comm.slices import ReadParameter, read_elements
from pypkg.parallel.host_memory import to_host
from pypkg.parallel.mesh import Mesh
from pypkg.parallel.optimizer.clipping import (
    GlobalNormClip,
    Layers,
    NormContribution,
    layer_of,
)
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.parallel.optimizer.fleet_optimizer import Assignment, FleetOptimizer
from pypkg.parallel.optimizer.loss_scaling import LossScaler
from pypkg.parallel.optimizer.pieces import Piece
from pypkg.parallel.optimizer.protocol import Optimizer, ReadSlices, TpSharding
from pypkg.parallel.optimizer.rules import moments
from pypkg.parallel.optimizer.zero.stages import ZERO_STAGES, ZeroStage0, ZeroStage3, names_of


class HeldState(NamedTuple):
    """This rank's part of a state tensor that has the shape of its parameter.

    Attributes:
        name: of the parameter.
        shape: of the parameter, or of this rank's TP shard of it.
        is_sliced: whether the part is a flat slice.
        num_bytes: size of the part in float32.
        read: returns the part in float32; each call converts state that is stored in another form.
    """

    name: str
    shape: tuple[int, ...]
    is_sliced: bool
    num_bytes: int
    read: Callable[[], Tensor]


class Updater:
    """Averages, clips and applies gradients, and reads and writes optimizer state.

    ``distribute`` creates it.

    Attributes:
        scaler: the dynamic loss scale, or None.
        zero: the ZeRO stage, which holds the wrapped loss.
        optimizer: holds the optimizer state of this rank.
    """

    def __init__(
        self,
        model: nn.Layer,
        options: UpdateOptions,
        mesh: Mesh,
        tp_sharding: TpSharding,
        optimizers: Sequence[Optimizer],
        read: ReadParameter | None = None,
    ) -> None:
        """
        Args:
            read: as in ``distribute``.

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
        # Filled after the ZeRO stage has divided the parameters.
        contributions: dict[str, NormContribution] = {}
        self._clip = GlobalNormClip(
            options.max_grad_norm,
            contributions,
            is_alone=mesh.world_size == 1,
            unscale=None if scaler is None else lambda: scaler.scale,
            layers=self._layers() if options.measures_layers else None,
        )
        assignments = {
            paddle_name: Assignment(
                name, self._optimizer_of[name], options.rate_factors.get(name, 1.0)
            )
            for name, parameter in self._parameters.items()
            for paddle_name in names_of(parameter)
        }
        self.optimizer = FleetOptimizer(
            model.parameters(), assignments, self._clip, options.offload
        )
        stage = options.sharding_stage if mesh.sharding is not None else 0
        if stage == 1 and options.reduces_once:
            stage = 2
        make = ZERO_STAGES[stage] if read is None else partial(ZeroStage3, read=read)
        self.zero: ZeroStage0 = make(model, self.optimizer, mesh, options)
        contributions.update(self.zero.norm_contributions())
        for name, parameter in self._parameters.items():
            bounds = self.zero.placement(parameter).bounds
            piece = Piece(tp_sharding.layout(name), mesh, bounds)
            self.optimizer.pieces.update(dict.fromkeys(names_of(parameter), piece))

    def _layers(self) -> Layers:
        names = tuple(dict.fromkeys(map(layer_of, self._tp_sharding.shapes())))
        index = {name: number for number, name in enumerate(names)}
        return Layers(
            names,
            {
                paddle_name: index[layer_of(name)]
                for name, parameter in self._parameters.items()
                for paddle_name in names_of(parameter)
            },
        )

    def layer_norms(self) -> dict[str, float]:
        """Gradient norm of each layer in the last step, before clipping, by the layer's name.

        Empty unless ``options.measures_layers`` is set. The host waits for the device.
        """
        norms = self._clip.layer_norms
        if norms is None:
            return {}
        return dict(zip(self._layers().names, map(float, to_host(norms)), strict=True))

    def scale(self, loss: Tensor) -> Tensor:
        """``loss`` times the loss scale; ``backward`` is called on the result."""
        return loss if self.scaler is None else loss * self.scaler.scale

    def step(self, learning_rate: float) -> Tensor:
        """Averages the gradients over all sample shards, updates the parameters, and clears them.

        Every rank must call this. If the gradients are not finite, no parameter changes. With a
        loss scale, only the scale changes. Without one, the device decides and the host does not
        wait for it; scalar state, such as AdamW's powers of beta, then advances all the same.

        Returns:
            The global gradient norm before clipping, without the loss scale: a float32 scalar on
            the device, the same on all ranks.
        """
        self.optimizer.set_lr(learning_rate)
        self.zero.step()
        self.zero.clear()
        self._has_state |= not self._clip.skipped
        if self.scaler is not None:
            self.scaler.update(self._clip.skipped)
        return self._clip.norm

    def wait(self) -> None:
        """Waits until this rank holds the updated parameters (``options.overlaps_weights``).

        A layer waits for its own parameters when it is called. Any other use of the parameters must
        call this first.
        """
        self.zero.wait()

    def state_places(self) -> dict[str, tuple[gather.Place, ...]]:
        """The ranks that hold the tensors of ``state_shapes``, as ``gather.places`` returns them.

        Every rank must call this.
        """
        held = {name: self.zero.placement(p).owner for name, p in self._parameters.items()}
        keys = self.state_shapes()
        of_parameters = gather.places(self._tp_sharding.shapes(), held)
        return {
            key: of_parameters[name]
            for key in keys
            if (name := key.rpartition(".")[0]) in of_parameters
        }

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole state tensors by key ``<parameter>.<state name>``, all float32.

        There are none before the first update.
        """
        return self.full_state_shapes() if self._has_state else {}

    def full_state_shapes(self) -> dict[str, tuple[int, ...]]:
        """``state_shapes`` as it is after the first update."""
        return {
            f"{name}.{state_name}": optimizer.undivided_shape(state_name, shape) or shape
            for name, shape in self._tp_sharding.shapes().items()
            for optimizer in (self._optimizer_of[name],)
            for state_name in optimizer.state_names(self._dtype)
        }

    def load_state(self, read: Callable[[str, Sequence[slice]], np.ndarray]) -> None:
        """Restores the state that ``read_state`` returned, possibly under another layout.

        Args:
            read: takes a key and slices, one per axis from the first on, and returns the selected
                elements of the key's array. Little more than this rank's part is read.
        """
        for name, parameter in self._parameters.items():
            optimizer_parameter = self.zero.optimizer_parameter(parameter)
            if optimizer_parameter is None:
                continue
            state = self.optimizer.state_of(optimizer_parameter)
            for state_name in self._optimizer_of[name].state_names(self._dtype):
                of_key = partial(read, f"{name}.{state_name}")
                if self._is_undivided(name, state_name):
                    array = of_key(())
                else:
                    bounds = self.zero.placement(parameter).bounds
                    array = self._held(name, of_key, parameter.shape, bounds)
                self.optimizer.assign(state, state_name, array)
        self._has_state = True

    def _is_undivided(self, name: str, state_name: str) -> bool:
        shape = self._tp_sharding.shapes()[name]
        return self._optimizer_of[name].undivided_shape(state_name, shape) is not None

    def assign_parameters(self, read: ReadParameter) -> None:
        """Overwrites the parameters of this rank in place and removes the optimizer state."""
        self.wait()
        for name, parameter in self._parameters.items():
            self.zero.assign(parameter, partial(read, name, parameter.shape))
        self.optimizer.forget_state()
        self._has_state = False

    def _held(
        self, name: str, read: ReadSlices, shape: Sequence[int], bounds: tuple[int, int] | None
    ) -> np.ndarray:
        """The part of a state tensor that this rank holds.

        Args:
            read: reads elements of the whole tensor.
            shape: of the TP shard.
            bounds: (start, stop) of the slice of the flattened shard; elements beyond its end are
                zero. None: the whole shard.
        """
        if bounds is None:
            return self._tp_sharding.read(name, read)
        return read_elements(lambda rows: self._tp_sharding.read(name, read, rows), shape, bounds)

    def held_state(self, key: str) -> HeldState | None:
        """This rank's float32 part of a state tensor; None if it has none, or it is undivided."""
        name, _, state_name = key.rpartition(".")
        parameter = self._parameters.get(name)
        held = None if parameter is None else self.zero.optimizer_parameter(parameter)
        if parameter is None or held is None or self._is_undivided(name, state_name):
            return None
        is_sliced = self.zero.placement(parameter).bounds is not None
        state = self.optimizer.state_of(held)
        num_bytes = 4 * state[state_name].size
        read = partial(moments.read, state, state_name)
        return HeldState(name, tuple(parameter.shape), is_sliced, num_bytes, read)

    def read_state(self, key: str, writer: int) -> np.ndarray | None:
        """The whole float32 state tensor on the rank ``writer``; None on the others.

        Every rank must call this, for all keys in the order of ``state_places``.

        Args:
            key: ``<parameter>.<state name>``.
            writer: one of ``gather.possible_writers`` for a place of the key.
        """
        if not gather.takes_part(writer):
            return None
        name, _, state_name = key.rpartition(".")
        parameter = self._parameters[name]
        held = self.zero.optimizer_parameter(parameter)
        if held is None:  # another sharding rank holds the whole state tensor
            return None
        value = moments.read(self.optimizer.state_of(held), state_name)
        if self._is_undivided(name, state_name):
            return to_host(value) if self._mesh.rank == writer else None
        if self._mesh.tensor is not None or self.zero.placement(parameter).bounds is not None:
            value = _on_device(value)
        like = parameter if self.zero.placement(parameter).bounds is not None else None
        part = gather.for_tensor_group(value, like, writer)
        return None if part is None else self._tp_sharding.gather(name, part, writer)


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
    """``tensor`` on the device of this rank's collectives; it is not copied if it is there."""
    place = paddle.framework._current_expected_place()
    return tensor if str(tensor.place) == str(place) else tensor._copy_to(place, True)
