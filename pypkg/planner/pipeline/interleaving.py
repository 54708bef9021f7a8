"""Micro batches on a stage of several model chunks: the counterpart of fleet's
PipelineParallelWithInterleave, and with few micro batches of PipelineParallelWithInterleaveFthenB.

As in schedule.py, variables and queues are those of fleet: they decide how long tensors live.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pypkg.planner.pipeline.schedule import Message, Passes, release
from pypkg.planner.tape import Tensor

_Output = Message | Tensor | None


@dataclass(frozen=True)
class Interleaving:
    """The position of a stage in its pipeline.

    Attributes:
        stages: number of pipeline stages.
        stage: this one.
        micro_batches: micro batches of a step; equal to ``stages``, or at least twice that.
    """

    stages: int
    stage: int
    micro_batches: int

    def shortened(self) -> Interleaving:
        """The same stage with only as many micro batches as a step needs to reach its peak.

        A group has ``stages`` micro batches; the first group also has the remainder of the division
        by ``stages``. With two more groups, all chunks have gradients while the most micro batches
        are in flight.
        """
        most = 3 * self.stages + self.micro_batches % self.stages
        return replace(self, micro_batches=min(self.micro_batches, most))

    @property
    def scales(self) -> bool:
        """Whether the micro batches in flight grow linearly with the number of stages.

        They do on the first and the last stage if all groups are full.
        """
        is_at_an_end = self.stage in (0, self.stages - 1)
        return is_at_an_end and self.micro_batches % self.stages == 0

    def scaled(self, stages: int) -> Interleaving:
        """The same position in a shorter pipeline, with the same number of groups."""
        stage = stages - 1 if self.stage == self.stages - 1 else self.stage
        return Interleaving(stages, stage, self.micro_batches // self.stages * stages)


class Interleaved:
    """The micro batches of a step.

    Args:
        chunks: the model chunks of the stage.
    """

    def __init__(self, chunks: Sequence[Passes], place: Interleaving) -> None:
        self._chunks, self._place = chunks, place
        self._is_first = place.stage == 0
        self._is_last = place.stage == place.stages - 1
        self._steps = place.micro_batches * len(chunks)
        rest = place.micro_batches % place.stages
        self._is_all_forward_first = place.micro_batches < 2 * place.stages
        # Micro batches that a chunk runs at the beginning before the next chunk does.
        self._group = rest + place.stages
        if self._is_all_forward_first:
            self._group = place.micro_batches
        self._buffered_from = rest
        self._buffered_until = rest + self._group * (len(chunks) - 1)
        self._inputs: list[list[Message | None]] = [[] for _ in chunks]
        self._outputs: list[list[Message | Tensor]] = [[] for _ in chunks]
        self._gradients: list[list[Tensor | None]] = [[] for _ in chunks]
        self._sending: deque[_Output] = deque()  # on the last stage, outputs for the first one
        self._returning: deque[Tensor | None] = deque()  # on the first stage, for the last one

    def run(self) -> None:
        """All passes of the step."""
        place, last = self._place, len(self._chunks) - 1
        startup = self._steps
        output: _Output
        if not self._is_all_forward_first:
            startup = min(2 * (place.stages - place.stage - 1) + last * self._group, startup)
        steady = self._steps - startup
        self._inputs[0].append(None if self._is_first else self._chunks[0].receive())
        for step in range(startup):
            output = self._forward(step)
            output = self._to_send(step, output)
            received = self._receive_after(step)
            if steady and step == startup - 1:
                gradient = self._first_gradient()
                self._gradients[last].append(gradient)
            self._inputs[self._chunk(step + 1)].append(received)
            release(output)
        for step in range(steady):
            output, returned = self._forward(startup + step), self._backward(step)
            output = self._to_send(startup + step, output)
            returned = self._to_return(step, returned)
            received = self._receive_after(startup + step)
            gradient = self._receive_gradient_after(step)
            self._inputs[self._chunk(startup + step + 1)].append(received)
            self._gradients[self._backward_chunk(step + 1)].append(gradient)
            release(output)
        if not steady:
            self._gradients[last].append(self._first_gradient())
        for step in range(steady, self._steps):
            returned = self._backward(step)
            returned = self._to_return(step, returned)
            following = self._backward_chunk(step + 1)
            self._gradients[following].append(self._receive_gradient_after(step))

    def _chunk(self, step: int) -> int:
        """The chunk of a forward step (_get_virtual_pp_rank)."""
        count = len(self._chunks)
        if step < self._group * count:
            return step // self._group
        return (step - self._group * count) % (self._place.stages * count) // self._place.stages

    def _backward_chunk(self, step: int) -> int:
        return len(self._chunks) - 1 - self._chunk(step)

    def _forward(self, step: int) -> Message | Tensor:
        number = self._chunk(step)
        output = self._chunks[number].forward(self._inputs[number][-1])
        self._outputs[number].append(output)
        return output

    def _backward(self, step: int) -> Tensor | None:
        number = self._backward_chunk(step)
        received, output = self._inputs[number].pop(0), self._outputs[number].pop(0)
        gradient = self._gradients[number].pop(0)
        return self._chunks[number].backward(received, output, gradient)

    def _receive_after(self, step: int) -> Message | None:
        """The input of the next forward step."""
        following = self._chunk(step + 1)
        is_needed = step != self._steps - 1 and not (self._is_first and following == 0)
        return self._chunks[following].receive() if is_needed else None

    def _first_gradient(self) -> Tensor | None:
        return None if self._is_last else self._chunks[-1].receive_gradient()

    def _receive_gradient_after(self, step: int) -> Tensor | None:
        """The gradient for the next backward step."""
        following = self._backward_chunk(step + 1)
        is_loss = self._is_last and following == len(self._chunks) - 1
        is_needed = step != self._steps - 1 and not is_loss
        return self._chunks[following].receive_gradient() if is_needed else None

    def _to_send(self, step: int, output: _Output) -> _Output:
        """Keeps outputs of the last stage for the first one (_process_fwd_buffer)."""
        if not self._is_last:
            return output
        is_loss = self._chunk(step) == len(self._chunks) - 1
        if step >= self._group * len(self._chunks):
            return None if is_loss else output
        if not is_loss:
            self._sending.append(output)
        return self._sending.popleft() if self._is_buffered(step) else None

    def _to_return(self, step: int, gradient: Tensor | None) -> Tensor | None:
        """Keeps gradients of the first stage for the last one (_process_bwd_buffer)."""
        if not self._is_first:
            return gradient
        is_input = self._backward_chunk(step) == 0
        if step >= self._group * len(self._chunks):
            return None if is_input else gradient
        if not is_input:
            self._returning.append(gradient)
        return self._returning.popleft() if self._is_buffered(step) else None

    def _is_buffered(self, step: int) -> bool:
        return self._buffered_from <= step < self._buffered_until
