"""Micro batches in flight: the counterpart of fleet's PipelineParallel (1F1B).

The schedule uses the same variables as fleet's forward_backward_pipeline, because they determine
how long a message and the graph of a micro batch live. Interleaved stages are in interleaving.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from pypkg.planner import engine
from pypkg.planner.decoder import EMBEDDING, HEAD, Decoder
from pypkg.planner.micro_batch import Batch
from pypkg.planner.operators import ACTIVATIONS, GRADIENTS, INPUTS
from pypkg.planner.tape import Tape, Tensor, gradient_of, leaf_of

FORWARD, BACKWARD = "forward", "backward"


@dataclass(eq=False)
class Message:
    """What a model chunk receives from the previous chunk or sends to the next.

    Attributes:
        stream: the residual stream.
        inputs: copies of the inputs of the micro batch.
    """

    stream: Tensor
    inputs: Tensor

    def clear(self) -> None:
        """Frees the tensors that were sent; the graph of the stream stays."""
        self.stream.clear()
        self.inputs.clear()


class Passes:
    """The passes of micro batches through one model chunk, and its messages.

    Args:
        decoder: the model chunk.
        sent_bytes: bytes of the inputs that are sent with the residual stream.
    """

    def __init__(self, decoder: Decoder, batch: Batch, sent_bytes: int) -> None:
        self._decoder, self._batch, self._sent_bytes = decoder, batch, sent_bytes
        self._tape: Tape = decoder.ops.tape
        self.is_first, self.is_last = decoder.chunk.is_first, decoder.chunk.is_last

    def receive(self) -> Message:
        """The output of the previous chunk."""
        self._decoder.enter(EMBEDDING, FORWARD)
        stream = self._decoder.ops.new(self._elements(), ACTIVATIONS)
        return Message(leaf_of(stream), self._tape.empty(self._sent_bytes, INPUTS))

    def receive_gradient(self) -> Tensor:
        """The gradient of the output."""
        self._decoder.enter(HEAD, BACKWARD)
        return self._decoder.ops.new(self._elements(), GRADIENTS)

    def forward(self, received: Message | None) -> Message | Tensor:
        """The message to the next chunk; of the last one, the loss."""
        self._decoder.enter(EMBEDDING, FORWARD)
        stream = None if received is None else received.stream
        out = self._decoder.run(stream, self._batch)
        if self.is_last:
            return self._decoder.loss_of(out, self._batch)
        return Message(out, self._tape.empty(self._sent_bytes, INPUTS))

    def backward(
        self, received: Message | None, output: Message | Tensor, gradient: Tensor | None
    ) -> Tensor | None:
        """The gradient of what was received."""
        self._decoder.enter(HEAD, BACKWARD)
        if isinstance(output, Message):
            engine.backward_from(self._tape, [output.stream], [gradient])
        else:
            engine.backward(self._tape, output)
        return None if received is None else gradient_of(received.stream)

    def _elements(self) -> int:
        return self._decoder.tp.tokens(self._batch.tokens) * self._decoder.config.hidden_size


def release(output: Message | Tensor | None) -> None:
    """Frees a message that was sent."""
    if isinstance(output, Message):
        output.clear()


def run_1f1b(passes: Passes, startup: int, steady: int) -> None:
    """The micro batches of a step on a stage of one model chunk.

    Args:
        startup: forward passes before the first backward pass.
        steady: pairs of a forward and a backward pass after these.
    """

    def receive() -> Message | None:
        return None if passes.is_first else passes.receive()

    def receive_gradient() -> Tensor | None:
        return None if passes.is_last else passes.receive_gradient()

    inputs: list[Message | None] = []
    outputs: list[Message | Tensor] = []
    for _ in range(startup):
        received = receive()
        output = passes.forward(received)
        inputs.append(received)
        outputs.append(output)
        release(output)
    received = receive() if steady else None
    for step in range(steady):
        output = passes.forward(received)
        gradient = receive_gradient()
        inputs.append(received)
        outputs.append(output)
        release(output)
        received, output = inputs.pop(0), outputs.pop(0)
        sent = passes.backward(received, output, gradient)
        received = None if step == steady - 1 else receive()
    for _ in range(startup):
        received, output = inputs.pop(0), outputs.pop(0)
        gradient = receive_gradient()
        sent = passes.backward(received, output, gradient)
    del sent
