"""Pipeline parallelism: runs micro batches through the stages of a model with fleet's schedules.

A stage sends a dictionary of tensors to the next stage. Fleet sends it as a tuple of tensors
together with their names. All stages get the same micro batches.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel import (
    PipelineLayer,
    PipelineParallel,
    PipelineParallelWithInterleave,
    PipelineParallelWithInterleaveFthenB,
)
from paddle.distributed.fleet.meta_parallel.pp_utils.p2p_communication import P2pHelper
from paddle.distributed.fleet.meta_parallel.pp_utils.utils import (
    dict_to_tuple_helper,
    tuple_to_dict_helper,
)

from pypkg.errors import UserError
from pypkg.parallel import mesh

State = dict[str, Tensor]
MicroBatch = Mapping[str, Any]


def pipeline_degree() -> int:
    """Number of pipeline stages."""
    return mesh.current().pipeline_degree


def pipeline_rank() -> int:
    """The pipeline stage of this rank, from 0."""
    return mesh.current().pipeline_rank


def virtual_stages() -> int:
    """Number of model chunks of each pipeline stage."""
    return mesh.current().degrees.virtual_stages


class Schedule:
    """Runs micro batches through the model chunks: 1F1B, interleaved if a stage has several chunks.

    Its construction broadcasts parameters over the groups whose ranks hold the same ones, so every
    rank must construct it. It does not reduce, clip or scale gradients.

    Args:
        chunks: the model chunks of this stage, in their order. Each takes and returns a dictionary
            of tensors. The first chunk of the model takes a micro batch without labels. The last
            one may return anything that ``loss`` takes. A chunk must copy a tensor that it passes
            on unchanged, because fleet frees tensors that it has sent.
        label_names: entries of a micro batch that only ``loss`` takes.
        loss: called with the output of the last chunk, and with the labels of a micro batch as
            keyword arguments.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Layer],
        label_names: Sequence[str],
        loss: Callable[..., Tensor],
    ) -> None:
        self._chunks, self._label_names, self._loss = chunks, label_names, loss
        self._layers = _pipeline_layer(chunks, lambda output, labels: loss(output, **labels))
        self._engine = _engine(self._layers, 2 * pipeline_degree())
        self._sent: object = None  # signature and schedule for which fleet has cached shapes

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], scale: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Accumulates the gradients of the mean loss over ``micro_batches``.

        All stages must call this.

        Args:
            micro_batches: all with the same names, shapes and dtypes.
            scale: applied to the loss of each micro batch before its backward pass.

        Returns:
            The mean loss, a float32 scalar, on all stages.

        Raises:
            UserError: there are too few micro batches for an interleaved schedule.
            ValueError: micro batches differ in names, shapes or dtypes.
        """
        count = len(micro_batches)
        signatures = {self._signature(batch) for batch in micro_batches}
        if len(signatures) != 1:
            raise ValueError(f"micro batches of a step differ in names or shapes: {signatures}")
        engine = self._engine_for(count)
        if (signature := (*signatures, engine)) != self._sent:
            messages: Any = engine._p2p_helper  # of several classes with this method
            messages.clear_meta_cache()
            self._sent = signature
        loss = engine.forward_backward_pipeline(
            self._inputs_and_labels(micro_batches), SimpleNamespace(scale=scale)
        )
        return loss.reshape([])

    @paddle.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor:
        """The loss of ``batch``, a float32 scalar, on all stages. All stages must call this."""
        ((state, labels),) = self._inputs_and_labels([batch])
        output = self._through_stages(state)
        loss = paddle.zeros([], dtype="float32") if output is None else self._loss(output, **labels)
        return from_last_stage(loss)

    @paddle.no_grad()
    def forward(self, state: State) -> Any:
        """The output of the last chunk, on the last stage; None on the others.

        All stages must call this.

        Args:
            state: inputs of the model by name.
        """
        return self._through_stages(state)

    def _through_stages(self, state: State) -> Any:
        messages = P2pHelper(use_cache=False)
        for number, chunk in enumerate(self._chunks):
            is_first = number == 0 and pipeline_rank() == 0
            if not is_first:
                state = tuple_to_dict_helper(messages.recv_forward(pp_first_stage=False))[0]
            state = chunk(state)
            is_last = number == len(self._chunks) - 1 and pipeline_rank() == pipeline_degree() - 1
            if not is_last:
                messages.send_forward(dict_to_tuple_helper(state), pp_last_stage=False)
        return state if is_last else None

    def _inputs_and_labels(
        self, micro_batches: Sequence[MicroBatch]
    ) -> Iterator[tuple[State, dict[str, Any]]]:
        for batch in micro_batches:
            labels = {name: batch[name] for name in self._label_names if name in batch}
            yield {name: batch[name] for name in batch if name not in labels}, labels

    def _signature(self, batch: MicroBatch) -> object:
        return tuple(
            (name, tuple(value.shape), value.dtype)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        )

    def _engine_for(self, count: int) -> PipelineParallel:
        """fleet's schedule for ``count`` micro batches."""
        stages, engine = pipeline_degree(), self._engine
        if virtual_stages() > 1:
            if count < stages or (count < 2 * stages and count % stages):
                raise UserError(
                    f"gradient_accumulation_steps ({count}) is too small for interleaved stages "
                    f"(virtual_pp_degree {virtual_stages()}); make it {stages}, or at least "
                    f"{2 * stages}, or set virtual_pp_degree to 1"
                )
            if count < 2 * stages:
                engine = self._all_forward_first
        if engine.accumulate_steps != count:
            engine.accumulate_steps = count
            engine._init_user_hooks()  # they depend on the number of micro batches
        return engine

    @functools.cached_property
    def _all_forward_first(self) -> PipelineParallel:
        return _engine(self._layers, pipeline_degree())


def from_last_stage(value: Tensor) -> Tensor:
    """Broadcasts ``value`` of the last stage to all stages, which must call this.

    Args:
        value: of the same shape and dtype on all stages; overwritten on all but the last.
    """
    group = mesh.current().pipeline
    assert group is not None
    dist.broadcast(value, src=group.ranks[-1], group=group)
    return value


def _pipeline_layer(
    chunks: Sequence[nn.Layer], loss: Callable[[Any, Any], Tensor]
) -> PipelineLayer:
    """Fleet's description of the model, with identity layers for the chunks of other stages."""
    stages, rank = pipeline_degree(), pipeline_rank()
    own = iter(chunks)
    layers = [
        next(own) if number % stages == rank else nn.Identity()
        for number in range(stages * virtual_stages())
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No shared comm")
        return PipelineLayer(
            layers,
            topology=fleet.get_hybrid_communicate_group().topology(),
            loss_fn=loss,
            seg_method="layer:.",  # one layer of any name in each segment
            num_virtual_pipeline_stages=virtual_stages(),
        )


def _engine(layers: PipelineLayer, count: int) -> PipelineParallel:
    """Creates fleet's schedule for ``count`` micro batches."""
    strategy = fleet.DistributedStrategy()
    strategy.pipeline_configs = {
        "accumulate_steps": count,
        "micro_batch_size": 1,  # not used: micro batches come as they are
        # As in mesh.py: TP ranks may hold different parts of an activation.
        "enable_partial_send_recv": False,
    }
    if virtual_stages() == 1:
        kind = PipelineParallel
    elif count >= 2 * pipeline_degree():
        kind = PipelineParallelWithInterleave
    else:
        kind = PipelineParallelWithInterleaveFthenB
    return kind(layers, fleet.get_hybrid_communicate_group(), strategy)
