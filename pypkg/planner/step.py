"""The passes of a training step of one rank on the tape, and the update after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.layer_split import ModelChunk
from pypkg.models.architecture.parameter_shapes import ParameterShape
from pypkg.parallel.mesh import Degrees
from pypkg.planner.decoder import EMBEDDING, HEAD, Decoder
from pypkg.planner.engine import backward
from pypkg.planner.micro_batch import Batch
from pypkg.planner.operators import Operators
from pypkg.planner.parallel.parameters import parameters
from pypkg.planner.parallel.tensor_parallel import Shard
from pypkg.planner.pipeline.interleaving import Interleaved, Interleaving
from pypkg.planner.pipeline.schedule import BACKWARD, FORWARD, Passes, run_1f1b
from pypkg.planner.sliced_layers import Stage3
from pypkg.planner.tape import Parameter, Part, Peak, Tape
from pypkg.planner.zero import Stage0, Stage1, Stage2, UpdateLayout, fullest, owners

UPDATE, TABLES = "update", "tables"
_FLOAT = 4
# Bytes to whose multiples Paddle's GPU allocator rounds up (GpuMinChunkSize in gpu_info.cc).
_GPU_CHUNK = 256

Peaks = Mapping[tuple[str, Part], Peak]  # by phase and part of the chunk


@dataclass(frozen=True)
class StepPlan:
    """What a rank does in a step.

    Attributes:
        chunks: model chunks, with layers counted from 0; an interleaved stage has several.
        tensor_rank: rank in the tensor group.
        dtype_bytes: bytes of an element of the model.
        is_gpu: whether GPU kernels run.
        batch: the micro batch.
        startup, steady: numbers of micro batches before the first backward pass (warm-up) and after
            it that are run; further ones are like the last. For stages of one chunk.
        interleaving: for stages of several chunks.
        sent_bytes: bytes of the inputs that are sent between stages with a micro batch.
        stage: ZeRO stage.
        update: how the update is divided.
        recompute: granularity of each layer by chunk; "" for none.
    """

    config: ModelConfig
    chunks: tuple[ModelChunk, ...]
    degrees: Degrees
    tensor_rank: int
    dtype_bytes: int
    is_gpu: bool
    batch: Batch
    startup: int
    steady: int
    sent_bytes: int
    stage: int
    update: UpdateLayout
    recompute: tuple[tuple[str, ...], ...]
    interleaving: Interleaving | None = None


def run_passes(plan: StepPlan) -> Peaks:
    """The peaks of a step after the first, without optimizer state and input batch."""
    shapes = _shapes(plan)
    expected: Sequence[str] = ()
    if plan.stage == 3:  # the order of a micro batch is the prediction of the next
        first = _Step(plan, shapes)
        first.run()
        expected = first.zero.order
    step = _Step(plan, shapes, expected)
    step.run()
    return step.tape.peaks()


def kept_after_forward(plan: StepPlan) -> int:
    """Bytes that the forward pass of a micro batch saves for its backward pass."""
    step = _Step(plan, _shapes(plan))
    return step.kept()


def run_update(plan: StepPlan) -> tuple[Peak, Mapping[str, int]]:
    """The peak of an update without optimizer state, and the bytes of that state by term."""
    step = _Step(plan, _shapes(plan))
    step.zero.begin_step(1)
    step.zero.accumulate_all()
    step.zero.wait()
    step.tape.enter("", UPDATE)
    step.zero.step()
    return step.tape.peaks()[UPDATE, ""], step.zero.state()


def sharding_rank(plan: StepPlan) -> int:
    """The rank in the sharding group that owns most."""
    if plan.stage not in (1, 2):
        return 0
    shapes = _shapes(plan)
    found = owners(shapes, plan.update.sharding, is_sorted=plan.stage == 1)
    return fullest(shapes, found, plan.update.sharding)


def _shapes(plan: StepPlan) -> list[ParameterShape]:
    return [shape for chunk in plan.chunks for shape in _shapes_of(plan, chunk)]


def _shapes_of(plan: StepPlan, chunk: ModelChunk) -> list[ParameterShape]:
    return parameters(plan.config, chunk, plan.degrees.tensor, plan.tensor_rank)


class _Step:
    def __init__(
        self, plan: StepPlan, shapes: Sequence[ParameterShape], expected: Sequence[str] = ()
    ) -> None:
        self._plan, self.tape = plan, Tape(_GPU_CHUNK if plan.is_gpu else 1)
        self.tape.phase = FORWARD
        ops = Operators(self.tape, plan.dtype_bytes, plan.is_gpu)
        shard = Shard(plan.config, plan.degrees.tensor, plan.tensor_rank)
        self.zero = _zero(plan, ops, shapes, expected)
        self._decoders = [
            Decoder(
                *(ops, shard, chunk, plan.degrees, self._parameters_of(chunk)),
                call=self.zero.call,
                begin_recompute=self.zero.begin_recompute,
                recompute=plan.recompute[number],
                has_hooks=plan.stage == 3,
                number=number,
            )
            for number, chunk in enumerate(plan.chunks)
        ]
        tables = len(plan.chunks) * _table_bytes(plan, shard)
        self._tables = self.tape.empty(tables, TABLES)

    def _parameters_of(self, chunk: ModelChunk) -> dict[str, Parameter]:
        names = [shape.name for shape in _shapes_of(self._plan, chunk)]
        return {name: self.zero.parameters[name] for name in names}

    def run(self) -> None:
        """The passes."""
        plan = self._plan
        self.zero.begin_step(plan.startup + plan.steady)
        chunks = [Passes(each, plan.batch, plan.sent_bytes) for each in self._decoders]
        if plan.interleaving is not None:
            Interleaved(chunks, plan.interleaving).run()
        elif plan.degrees.pipeline > 1:
            run_1f1b(chunks[0], plan.startup, plan.steady)
        else:
            for _ in range(plan.steady):
                self._pass()

    def kept(self) -> int:
        """Bytes that a forward pass has allocated and not freed."""
        (decoder,), batch = self._decoders, self._plan.batch
        before = self.tape.allocated
        loss = decoder.loss_of(decoder.run(None, batch), batch)
        kept = self.tape.allocated - before
        del loss
        return kept

    def _pass(self) -> None:
        """A micro batch of a model that is not divided into stages."""
        (decoder,), batch = self._decoders, self._plan.batch
        decoder.enter(EMBEDDING, FORWARD)
        self.zero.begin_pass()
        loss = decoder.loss_of(decoder.run(None, batch), batch)
        decoder.enter(HEAD, BACKWARD)
        backward(self.tape, loss)


def _zero(
    plan: StepPlan, ops: Operators, shapes: Sequence[ParameterShape], expected: Sequence[str]
) -> Stage0:
    if plan.stage == 3:
        return Stage3(ops, shapes, plan.update, expected)
    return (Stage0, Stage1, Stage2)[plan.stage](ops, shapes, plan.update)


def _table_bytes(plan: StepPlan, shard: Shard) -> int:
    """Cosines and sines (layers/positions.py), or ALiBi slopes (layers/masks.py), of a chunk."""
    config = plan.config
    if config.position_embedding == "rope":
        positions = max(plan.batch.sequence, config.max_position_embeddings)
        return positions * config.rotary_dim * _FLOAT
    return shard.heads * _FLOAT if config.position_embedding == "alibi" else 0
