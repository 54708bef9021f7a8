"""Wraps a model for its parallel layout and creates its updater."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from paddle import Tensor, nn

from pypkg.parallel.comm.slices import ReadParameter
from pypkg.parallel.host_memory import to_host
from pypkg.parallel.mesh import Mesh
from pypkg.parallel.optimizer.factory import UpdateOptions, make_optimizers
from pypkg.parallel.optimizer.pieces import MatrixLayout
from pypkg.parallel.optimizer.protocol import Optimizer, ReadSlices, TpSharding
from pypkg.parallel.optimizer.updater import Updater


class DistributedModel(Protocol):
    """A model as a training step calls it. A pipeline stage implements it with a schedule.

    A micro batch holds the arguments of the model's ``loss`` by name: int64 ``input_ids`` and
    ``labels`` of shape [batch, sequence], and optional ones such as position ids.
    """

    def train(self) -> object: ...

    def eval(self) -> object: ...

    def forward_backward(
        self, micro_batches: Sequence[Mapping[str, Any]], scale: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Accumulates the gradients of the mean loss over ``micro_batches``.

        Args:
            scale: applied to each loss before its backward pass.

        Returns:
            The mean loss, a float32 scalar on the device, without ``scale``.
        """

    def evaluate(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of ``batch``, a float32 scalar on the device."""


class WrappedModel:
    """The ``DistributedModel`` of a model without pipeline stages.

    Args:
        model: the layer, for its mode.
        loss: the layer's loss, wrapped for data parallelism or a ZeRO stage.
        begin_step: called with the number of micro batches before their backward passes.
    """

    def __init__(
        self, model: nn.Layer, loss: Callable[..., Tensor], begin_step: Callable[[int], None]
    ) -> None:
        self._model, self.loss, self._begin_step = model, loss, begin_step

    def train(self) -> None:
        self._model.train()

    def eval(self) -> None:
        self._model.eval()

    def forward_backward(
        self, micro_batches: Sequence[Mapping[str, Any]], scale: Callable[[Tensor], Tensor]
    ) -> Tensor:
        self._begin_step(len(micro_batches))
        total = None
        for batch in micro_batches:
            loss = self.loss(**batch) / len(micro_batches)
            value = loss.detach()
            scale(loss).backward()
            # Frees the graph, which holds the inputs kept for recompute, before the next forward.
            del loss
            total = value if total is None else total + value
        assert total is not None  # a step has at least one micro batch
        return total

    def evaluate(self, batch: Mapping[str, Any]) -> Tensor:
        return self.loss(**batch)


def distribute(
    model: nn.Layer,
    options: UpdateOptions,
    mesh: Mesh,
    tp_sharding: TpSharding | None = None,
    optimizers: Sequence[Optimizer] | None = None,
    read: ReadParameter | None = None,
) -> tuple[DistributedModel, Updater]:
    """Wraps ``model`` for data parallelism and ZeRO. Every rank must call this, once.

    Args:
        model: has ``loss(**batch)``, or is a pipeline stage and a ``DistributedModel`` already. All
            parameters have one dtype: float32, float16 or bfloat16.
        options: of the update.
        mesh: of this rank.
        tp_sharding: required with tensor or pipeline parallelism.
        optimizers: the first that takes a parameter updates it; None: those of ``make_optimizers``.
        read: only for ZeRO stage 3 and a model whose parameters have no memory yet: fills this
            rank's slices. This rank then never holds more than its slices and one layer. None: the
            parameters have their values.

    Returns:
        The wrapped model, and the updater of its parameters.

    Raises:
        ValueError: the options do not fit the mesh, or no optimizer takes a parameter.
    """
    if tp_sharding is None:
        if mesh.tensor_degree > 1 or mesh.pipeline_degree > 1:
            raise ValueError("tp_sharding is None, but each rank holds only a part of the model")
        tp_sharding = _WholeParameters(model)
    if mesh.sharding is not None and options.sharding_stage == 0:
        raise ValueError(f"sharding_stage is 0, but the sharding degree is {mesh.sharding_degree}")
    if mesh.pipeline is not None and options.sharding_stage > 1:
        raise ValueError(
            f"sharding_stage is {options.sharding_stage}; with pipeline parallelism it is 0 or 1"
        )
    if mesh.pipeline is not None and options.reduces_once:
        raise ValueError("reduces_once does not sum tied gradients over pipeline stages")
    if read is not None and (mesh.sharding is None or options.sharding_stage < 3):
        raise ValueError(f"read is given, but sharding_stage is {options.sharding_stage}")
    if optimizers is None:
        optimizers = make_optimizers(model, options)
    updater = Updater(model, options, mesh, tp_sharding, optimizers, read)
    zero = updater.zero
    wrapped = model if zero.loss is None else WrappedModel(model, zero.loss, zero.begin_step)
    return wrapped, updater


class _WholeParameters:
    """The ``TpSharding`` of a model without tensor and pipeline parallelism."""

    def __init__(self, model: nn.Layer) -> None:
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def layout(self, name: str) -> MatrixLayout:
        return MatrixLayout(self._shapes[name])

    def gather(self, name: str, shard: Tensor, writer: int) -> np.ndarray | None:
        return to_host(shard)

    def read(self, name: str, read: ReadSlices, rows: tuple[int, int] | None = None) -> np.ndarray:
        return read(()) if rows is None else read((slice(*rows),))
