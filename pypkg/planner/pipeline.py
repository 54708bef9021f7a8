"""Micro batches in flight: the counterpart of fleet's PipelineParallel (1F1B).

The schedule is written with the variables of fleet's forward_backward_pipeline, since these decide
how long a message and the graph of a micro batch live.
"""

from __future__ import annotations

from dataclasses import dataclass

from pypkg.planner.decoder import EMBEDDING, HEAD, Batch, Decoder
from pypkg.planner.operators import ACTIVATIONS, GRADIENTS, INPUTS
from pypkg.planner.tape import Tape, Tensor, gradient_of, leaf_of

FORWARD, BACKWARD = "forward", "backward"


@dataclass(eq=False)
class _Message:
    """What a stage receives from the one before, or hands to the next.

    Attributes:
        stream: the residual stream.
        inputs: copies of the inputs of the micro batch.
    """

    stream: Tensor
    inputs: Tensor

    def clear(self) -> None:
        """What is sent is freed; the graph of the stream stays."""
        self.stream.clear()
        self.inputs.clear()


class Schedule:
    """The micro batches of a step on one stage.

    Args:
        decoder: the model chunk of the stage.
        sent_bytes: of the inputs that go along with the residual stream.
    """

    def __init__(self, decoder: Decoder, batch: Batch, sent_bytes: int) -> None:
        self._decoder, self._batch, self._sent_bytes = decoder, batch, sent_bytes
        self._tape: Tape = decoder.ops.tape

    def run(self, startup: int, steady: int) -> None:
        """The passes of a step.

        Args:
            startup: forward passes before the first backward pass.
            steady: pairs of a forward and a backward pass after these.
        """
        inputs: list[_Message | None] = []
        outputs: list[_Message | Tensor] = []
        for _ in range(startup):
            received = self._receive()
            output = self._forward(received)
            inputs.append(received)
            outputs.append(output)
            self._release(output)
        received = self._receive() if steady else None
        for step in range(steady):
            output = self._forward(received)
            gradient = self._receive_gradient()
            inputs.append(received)
            outputs.append(output)
            self._release(output)
            received, output = inputs.pop(0), outputs.pop(0)
            sent = self._backward(received, output, gradient)
            received = None if step == steady - 1 else self._receive()
        for _ in range(startup):
            received, output = inputs.pop(0), outputs.pop(0)
            gradient = self._receive_gradient()
            sent = self._backward(received, output, gradient)
        del sent

    def _receive(self) -> _Message | None:
        if self._decoder.chunk.is_first:
            return None
        self._tape.enter(EMBEDDING, FORWARD)
        elements = self._decoder.tp.tokens(self._batch.tokens) * self._decoder.config.hidden_size
        stream = self._decoder.ops.new(elements, ACTIVATIONS)
        return _Message(leaf_of(stream), self._tape.empty(self._sent_bytes, INPUTS))

    def _forward(self, received: _Message | None) -> _Message | Tensor:
        self._tape.enter(EMBEDDING, FORWARD)
        stream = None if received is None else received.stream
        out = self._decoder.run(stream, self._batch)
        if self._decoder.chunk.is_last:
            return self._decoder.loss_of(out, self._batch)
        return _Message(out, self._tape.empty(self._sent_bytes, INPUTS))

    def _release(self, output: _Message | Tensor) -> None:
        if isinstance(output, _Message):
            output.clear()

    def _receive_gradient(self) -> Tensor | None:
        if self._decoder.chunk.is_last:
            return None
        self._tape.enter(HEAD, BACKWARD)
        elements = self._decoder.tp.tokens(self._batch.tokens) * self._decoder.config.hidden_size
        return self._decoder.ops.new(elements, GRADIENTS)

    def _backward(
        self, received: _Message | None, output: _Message | Tensor, gradient: Tensor | None
    ) -> Tensor | None:
        """The gradient of what was received."""
        self._tape.enter(HEAD, BACKWARD)
        if isinstance(output, _Message):
            self._tape.backward_from([output.stream], [gradient])
        else:
            self._tape.backward(output)
        return None if received is None else gradient_of(received.stream)
