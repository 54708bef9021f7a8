"""The optimizer step of every layout: gradients averaged, clipped, applied, and its state.

An updater is all that a trainer sees of data parallelism and of sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor, nn

from pypkg.parallel.comm import gather
from pypkg.parallel.mesh import Mesh
from pypkg.parallel.optimizer.adamw import AdamW
from pypkg.parallel.optimizer.clipping import GlobalNormClip
from pypkg.parallel.optimizer.loss_scaling import LossScale, LossScaler
from pypkg.parallel.optimizer.zero import STAGES, Stage0, names_of


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norm weights and biases.

    Loshchilov and Hutter (2019) decay every weight; leaving out one-dimensional parameters is the
    custom since GPT-2, and PaddleNLP does the same by name.
    """
    return parameter.ndim > 1 and not name.endswith("bias")


@dataclass(frozen=True)
class UpdateOptions:
    """How parameters are updated.

    Attributes:
        max_grad_norm: the global norm that gradients are clipped to; 0: not clipped.
        sharding_stage: 0 to 3, see zero.py; without a sharding group it is 0.
        offload: optimizer state waits in host memory between the updates.
        loss_scale: for float16; None: the loss is not scaled.
        master_grad: gradients accumulate in float32, for parameters of 16 bits.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    sharding_stage: int = 0
    offload: bool = False
    loss_scale: LossScale | None = None
    master_grad: bool = False


class Updater:
    """See ``make_updater``.

    Attributes:
        model: the model, as it was given.
        scaler: the loss scale at work, or None.
    """

    def __init__(
        self, model: nn.Layer, options: UpdateOptions, mesh: Mesh, partition: gather.Partition
    ) -> None:
        self.model = model
        self.scaler = None if options.loss_scale is None else LossScaler(options.loss_scale)
        self._mesh = mesh
        self._partition = partition
        self._has_state = False
        shares: dict = {}  # filled when the stage has divided the parameters
        self._clip = GlobalNormClip(
            options.max_grad_norm,
            shares,
            is_alone=mesh.world_size == 1,
            unscale=None if self.scaler is None else lambda: self.scaler.scale,
        )
        self._adamw = _make_adamw(model, options, self._clip)
        stage = options.sharding_stage if mesh.sharding is not None else 0
        self._stage: Stage0 = STAGES[stage](model, self._adamw, mesh, options.master_grad)
        shares.update(self._stage.shares(mesh))

    def loss(self, **batch: Tensor) -> Tensor:
        """The model's loss of one batch, from which a backward pass may go."""
        return self._stage.loss(**batch)

    def scale(self, loss: Tensor) -> Tensor:
        """What to call backward on instead of ``loss``."""
        return loss if self.scaler is None else loss * self.scaler.scale

    def step(self, learning_rate: float) -> Tensor:
        """Updates the parameters by the mean gradient over all sample shards, and clears it.

        With a loss scale, a step whose gradients are not finite changes nothing but the scale.

        Returns:
            The global norm before clipping, without the loss scale: a float32 scalar, the same on
            all processes and not synchronised with the host.
        """
        self._adamw.set_lr(learning_rate)
        self._stage.step()
        self._stage.clear()
        self._has_state |= not self._clip.skipped
        if self.scaler is not None:
            self.scaler.update(self._clip.skipped)
        return self._clip.norm

    def state(self) -> Iterator[tuple[str, np.ndarray]]:
        """Optimizer state of whole parameters: ``<parameter>.<kind>``, as one process has it.

        Kinds are moment1, moment2, beta1_pow_acc and beta2_pow_acc, and before them master_weight
        for parameters of 16 bits. Every process has to go through it; the one of rank 0 gets all.
        Before the first update there is none.
        """
        parameters = {n: p for n, p in self.model.named_parameters() if not p.stop_gradient}
        keys = list(self.state_shapes())
        held = {key for key in keys if key.rpartition(".")[0] in parameters}

        def read(key: str) -> np.ndarray:
            name, _, kind = key.rpartition(".")
            return self._read(name, kind, parameters[name])

        yield from gather.over_stages(keys, held, read)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what ``state`` gives, all float32, by name and in its order."""
        if not self._has_state:
            return {}
        kinds = AdamW.kinds(next(iter(self._stage.parameters)).dtype)
        return {
            f"{name}.{kind}": (1,) if AdamW.is_scalar(kind) else shape
            for name, shape in self._partition.shapes().items()
            for kind in kinds
        }

    def load_state(self, read: Callable[[str], np.ndarray]) -> None:
        """Puts back what ``state`` gave, under whatever layout that was.

        Args:
            read: the array of a name; called for what this process needs.

        Raises:
            KeyError: from ``read``, for a name that is missing.
        """
        for name, parameter in self.model.named_parameters():
            holder = None if parameter.stop_gradient else self._stage.holder(parameter)
            if holder is None:
                continue
            self._adamw.make_state(holder)
            for kind, value in self._adamw.state_of(holder):
                array = read(f"{name}.{kind}")
                if not AdamW.is_scalar(kind):
                    array = self._partition.take(name, array)
                    array = _slice(array, self._stage.placement(parameter).bounds)
                AdamW.assign(value, array)
        self._has_state = True

    def _read(self, name: str, kind: str, parameter: Tensor) -> np.ndarray:
        """One kind of state of a whole parameter of this stage."""
        holder, placement = self._stage.holder(parameter), self._stage.placement(parameter)
        value = None if holder is None else dict(self._adamw.state_of(holder))[kind]
        if placement.owner is not None:
            shape = [1] if AdamW.is_scalar(kind) else parameter.shape
            sent = paddle.empty(shape, "float32") if value is None else _on_device(value)
            group = self._mesh.sharding
            dist.broadcast(sent, src=group.ranks[placement.owner], group=group)
            value = sent
        if AdamW.is_scalar(kind):
            return value.numpy()
        value = _on_device(value)
        if placement.bounds is not None:
            value = gather.joined(value, parameter)
        return self._partition.gather(name, value)


class _Undivided:
    """The Partition of a model without tensor and pipeline parallelism."""

    def __init__(self, model: nn.Layer) -> None:
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def gather(self, name: str, part: Tensor) -> np.ndarray:
        return part.numpy()

    def take(self, name: str, whole: np.ndarray) -> np.ndarray:
        return whole


def make_updater(
    model: nn.Layer,
    options: UpdateOptions,
    mesh: Mesh,
    partition: gather.Partition | None = None,
) -> Updater:
    """The updater of ``model`` for a layout. All processes have to call this.

    Args:
        model: has ``loss(**batch)``, unless it is a pipeline stage, which makes its gradients
            itself. Parameters may be in 16 bits; all in the same dtype.
        mesh: of this process.
        partition: how the parameters are divided; needed with tensor or pipeline parallelism.

    Raises:
        ValueError: the options do not fit the mesh.
    """
    if partition is None:
        if mesh.tensor_degree > 1 or mesh.pipeline_degree > 1:
            raise ValueError("partition is None, but a process has only a part of the model")
        partition = _Undivided(model)
    if mesh.sharding is not None and options.sharding_stage == 0:
        raise ValueError(f"sharding_stage is 0, but sharding has {mesh.sharding_degree} processes")
    if mesh.pipeline is not None and options.sharding_stage > 1:
        raise ValueError(f"sharding_stage {options.sharding_stage} and pipeline parallelism")
    return Updater(model, options, mesh, partition)


def _make_adamw(model: nn.Layer, options: UpdateOptions, clip: GlobalNormClip) -> AdamW:
    decayed = {
        each
        for name, parameter in model.named_parameters()
        if decays(name, parameter)
        for each in names_of(parameter)
    }
    return AdamW(
        model.parameters(),
        beta1=options.beta1,
        beta2=options.beta2,
        epsilon=options.epsilon,
        weight_decay=options.weight_decay,
        decays=decayed.__contains__,
        clip=clip,
        offload=options.offload,
    )


def _on_device(tensor: Tensor) -> Tensor:
    """A copy where the collectives of this process work."""
    return tensor._copy_to(paddle.framework._current_expected_place(), True)


def _slice(whole: np.ndarray, bounds: tuple[int, int] | None) -> np.ndarray:
    """``bounds`` of the flattened array, with the zeros behind it; None: all as it is."""
    if bounds is None:
        return whole
    start, stop = bounds
    held = whole.reshape(-1)[start:stop]
    return np.pad(held, (0, stop - start - held.size))
