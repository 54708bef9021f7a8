"""A training step of one rank on the tape: forward and backward passes, and the update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.layer_split import ModelChunk
from pypkg.parallel.mesh import Degrees
from pypkg.planner.decoder import EMBEDDING, HEAD, Batch, Decoder
from pypkg.planner.operators import INPUTS, Operators
from pypkg.planner.parameters import ParameterShape, parameters
from pypkg.planner.pipeline import BACKWARD, FORWARD, Schedule
from pypkg.planner.sliced_layers import Stage3
from pypkg.planner.tape import Part, Peak, Tape
from pypkg.planner.tensor_parallel import Shard
from pypkg.planner.zero import Stage0, Stage1, Stage2, UpdateLayout, fullest, owners

UPDATE = "update"
TABLES = "tables"
_FLOAT = 4


@dataclass(frozen=True)
class StepPlan:
    """What a rank does in a step.

    Attributes:
        chunk: of the model.
        pipeline_rank, tensor_rank: of the rank.
        dtype_bytes: of the model's elements.
        is_gpu: whether GPUs' kernels run.
        batch: a micro batch; ``micro_batches`` of them make the rank's share of a global batch.
        input_bytes: of a micro batch on the device; ``label_bytes`` of them are labels.
        stage: of ZeRO.
        update: its layout.
        recompute: granularity by layer number.
    """

    config: ModelConfig
    chunk: ModelChunk
    degrees: Degrees
    pipeline_rank: int
    tensor_rank: int
    dtype_bytes: int
    is_gpu: bool
    batch: Batch
    micro_batches: int
    input_bytes: int
    label_bytes: int
    stage: int
    update: UpdateLayout
    recompute: Mapping[int, str]


@dataclass(frozen=True)
class StepMemory:
    """The peaks of a step, by phase and part of the chunk, and what is there all the time.

    Attributes:
        peaks: without ``state``.
        state: bytes by term.
    """

    peaks: Mapping[tuple[str, Part], Peak]
    state: Mapping[str, int]


def run_step(plan: StepPlan) -> StepMemory:
    """The memory of a step after the first one."""
    shapes = _shapes(plan)
    expected: Sequence[str] = ()
    if plan.stage == 3:  # the order of a step is the prediction of the next
        first = _Step(plan, shapes)
        first.run(1)
        expected = first.zero.order
    step = _Step(plan, shapes, expected)
    step.run(min(plan.micro_batches, step.different_passes()))
    return StepMemory(step.tape.peaks(), step.zero.state())


def run_update(plan: StepPlan) -> StepMemory:
    """The update alone, after passes that have left all gradients."""
    step = _Step(plan, _shapes(plan))
    step.zero.begin_step(1)
    step.zero.accumulate_all()
    step.update()
    found = {key: peak for key, peak in step.tape.peaks().items() if key[0] == UPDATE}
    return StepMemory(found, step.zero.state())


def _shapes(plan: StepPlan) -> list[ParameterShape]:
    return parameters(plan.config, plan.chunk, plan.degrees.tensor, plan.tensor_rank)


class _Step:
    def __init__(self, plan: StepPlan, shapes: Sequence[ParameterShape], expected: Sequence[str] = ()) -> None:
        self.tape = Tape()
        self.tape.phase = FORWARD
        ops = Operators(self.tape, plan.dtype_bytes, plan.is_gpu)
        self.plan, self.zero = plan, _zero(plan, ops, shapes, expected)
        shard = Shard(plan.config, plan.degrees.tensor, plan.tensor_rank)
        self.decoder = Decoder(
            *(ops, shard, plan.chunk, plan.degrees, self.zero.parameters),
            call=self.zero.call,
            recompute=plan.recompute,
        )
        self.tables = self.tape.empty(_table_bytes(plan, shard), TABLES)

        self.schedule = Schedule(
            self.decoder,
            plan.batch,
            plan.input_bytes - plan.label_bytes,
            plan.pipeline_rank,
            plan.degrees.pipeline,
        )

    def different_passes(self) -> int:
        """Micro batches after which a step only repeats itself: the second that has as many others
        in flight finds the gradients of the first."""
        return self.schedule.startup_steps(self.plan.micro_batches) + 2

    def run(self, passes: int) -> None:
        plan, tape, zero = self.plan, self.tape, self.zero
        inputs = tape.empty(plan.micro_batches * plan.input_bytes, INPUTS)
        zero.begin_step(passes)
        if plan.degrees.pipeline > 1:
            self.schedule.run(passes)
        else:
            for _ in range(passes):
                self._pass()
        del inputs
        self.update()

    def update(self) -> None:
        self.zero.wait()
        self.tape.enter("", UPDATE)
        self.zero.step()
        self.zero.clear()

    def _pass(self) -> None:
        """A micro batch of a model that is not divided into stages."""
        plan, tape = self.plan, self.tape
        tape.enter(EMBEDDING, FORWARD)
        self.zero.begin_pass()
        loss = self.decoder.loss_of(self.decoder.run(None, plan.batch), plan.batch)
        tape.enter(HEAD, BACKWARD)
        tape.backward(loss)
        del loss


def _zero(plan: StepPlan, ops: Operators, shapes: Sequence[ParameterShape], expected: Sequence[str]) -> Stage0:
    if plan.stage == 3:
        return Stage3(ops, shapes, plan.update, expected)
    return (Stage0, Stage1, Stage2)[plan.stage](ops, shapes, plan.update)


def _table_bytes(plan: StepPlan, shard: Shard) -> int:
    """Cosines and sines (layers/positions.py), or ALiBi slopes (layers/masks.py)."""
    config = plan.config
    if config.position_embedding == "rope":
        positions = max(plan.batch.sequence, config.max_position_embeddings)
        return positions * config.rotary_dim * _FLOAT
    return shard.heads * _FLOAT if config.position_embedding == "alibi" else 0


def sharding_rank(plan: StepPlan) -> int:
    """The rank in the sharding group that owns most."""
    if plan.stage not in (1, 2):
        return 0
    shapes = _shapes(plan)
    found = owners(shapes, plan.update.sharding, is_sorted=plan.stage == 1)
    return fullest(shapes, found, plan.update.sharding)
