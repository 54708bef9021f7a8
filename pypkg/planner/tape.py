"""A training step without numbers: which tensors exist when, and how many bytes they take.

A ``Tensor`` here has a size and no values. Operators record what their backward passes keep, and
``Tape.backward`` runs these in the order of Paddle's engine (paddle/fluid/eager/backward.cc).
Memory is freed as Paddle frees it, with its last reference. The planner's model is therefore
written like the model itself, with the same local variables, and the reference counts of CPython
decide.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Peak:
    """The most bytes that were allocated at once.

    Attributes:
        total: bytes.
        terms: the same by what they are for.
    """

    total: int = 0
    terms: dict[str, int] = field(default_factory=dict)


class Memory:
    """Allocated bytes; a tensor and its views share one."""

    __slots__ = ("_tape", "num_bytes", "term")

    def __init__(self, tape: Tape, num_bytes: int, term: str) -> None:
        self._tape, self.num_bytes, self.term = tape, num_bytes, term
        tape._count(num_bytes, term)

    def __del__(self) -> None:
        self._tape._count(-self.num_bytes, self.term)


class Tensor:
    """A tensor without values.

    Attributes:
        num_bytes: of its elements.
        memory: where they are.
        node: what made it, and ``slot``, its number among the outputs. None: an input, or a tensor
            that was made while nothing was recorded.
    """

    __slots__ = ("memory", "node", "num_bytes", "slot")

    def __init__(
        self, num_bytes: int, memory: Memory, node: Node | None = None, slot: int = 0
    ) -> None:
        self.num_bytes, self.memory, self.node, self.slot = num_bytes, memory, node, slot

    def detach(self) -> Tensor:
        """The same memory without a history."""
        return Tensor(self.num_bytes, self.memory)


class Parameter(Tensor):
    """A tensor whose gradient accumulates.

    Attributes:
        gradient: what was accumulated; None: nothing yet.
        on_gradient: called after each accumulation, as Paddle's backward hooks are.
    """

    __slots__ = ("gradient", "on_gradient")

    def __init__(self, tape: Tape, num_bytes: int, term: str) -> None:
        super().__init__(num_bytes, tape.memory(num_bytes, term))
        self.gradient: Tensor | None = None
        self.on_gradient: Callable[[Parameter], None] | None = None

    def accumulate(self, gradient: Tensor) -> None:
        if self.gradient is None:
            self.gradient = gradient
        if self.on_gradient is not None:
            self.on_gradient(self)


Gradients = Sequence[Tensor | None]
Backward = Callable[[list[Tensor | None]], Gradients]


class Node:
    """An operator's backward pass: gradients of the outputs to gradients of ``inputs``."""

    __slots__ = ("backward", "held", "num_outputs", "slots", "targets")

    def __init__(self, inputs: Sequence[Tensor], num_outputs: int, backward: Backward) -> None:
        self.targets: list[Node | Parameter | None] = [
            each if isinstance(each, Parameter) else each.node for each in inputs
        ]
        self.slots = [each.slot for each in inputs]
        self.num_outputs = num_outputs
        self.backward: Backward | None = backward
        self.held: object = None  # what lives as long as the graph


class Tape:
    """Counts what is allocated, by term, and keeps the peak.

    Args:
        granularity: bytes of which each allocation is a multiple.

    Attributes:
        peak: since the last ``reset_peak``.
        is_recording: whether operators keep what their backward passes need.
    """

    def __init__(self, granularity: int = 1) -> None:
        self.allocated = 0
        self.terms: dict[str, int] = {}
        self.peak = Peak()
        self.is_recording = True
        self._granularity = granularity

    def _count(self, num_bytes: int, term: str) -> None:
        rounded = -(-num_bytes // self._granularity) * self._granularity
        self.allocated += rounded
        self.terms[term] = self.terms.get(term, 0) + rounded
        if self.allocated > self.peak.total:
            self.peak = Peak(self.allocated, dict(self.terms))

    def reset_peak(self) -> None:
        self.peak = Peak(self.allocated, dict(self.terms))

    def memory(self, num_bytes: int, term: str) -> Memory:
        """New memory, which is freed with its last reference."""
        return Memory(self, num_bytes, term)

    def empty(self, num_bytes: int, term: str) -> Tensor:
        """A new tensor without history."""
        return Tensor(num_bytes, self.memory(num_bytes, term))

    @contextmanager
    def recording(self, is_on: bool) -> Iterator[None]:
        """Turns ``is_recording`` on or off for the block."""
        before, self.is_recording = self.is_recording, is_on
        try:
            yield
        finally:
            self.is_recording = before

    def record(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], backward: Backward
    ) -> None:
        """Makes ``outputs`` results of an operator.

        Args:
            inputs: what gradients go to.
            outputs: tensors without history.
            backward: given the gradients of the outputs, each a tensor or None, returns those of
                the inputs. What it refers to is kept until it has run.
        """
        is_wanted = any(each.node is not None or isinstance(each, Parameter) for each in inputs)
        if self.is_recording and is_wanted:
            self._always_record(inputs, outputs, backward)

    def _always_record(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], backward: Backward
    ) -> Node:
        node = Node(inputs, len(outputs), backward)
        for slot, output in enumerate(outputs):
            output.node, output.slot = node, slot
        return node

    def backward(self, loss: Tensor) -> None:
        """Runs the backward passes of all that led to ``loss``, a scalar."""
        self.backward_from([loss], [self.empty(4, "gradients")])

    def backward_from(self, outputs: list[Tensor], gradients: list[Tensor | None]) -> None:
        """Runs the backward passes of all that led to ``outputs``, given their gradients.

        Both lists are emptied, so that what they alone refer to is freed in time.
        """
        incoming: dict[Node, list[Tensor | None]] = {}
        while outputs:
            output, gradient = outputs.pop(), gradients.pop()
            if output.node is not None:
                held = incoming.setdefault(output.node, [None] * output.node.num_outputs)
                held[output.slot] = gradient
        waiting = _consumers(incoming)
        del output, gradient
        graph = list(incoming)  # all of it hangs on the nodes of the outputs
        ready = deque(node for node in incoming if not waiting[node])
        while ready:
            node = ready.popleft()
            arrived = incoming.pop(node, [None] * node.num_outputs)
            assert node.backward is not None, "a second backward pass through one result"
            gradients = list(node.backward(arrived))
            node.backward = None
            _hand_on(node, gradients, incoming, waiting, ready)
            del gradients, arrived
        del graph

    def recomputed(
        self, function: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """``function(*inputs)``, of which only the inputs are kept until the backward pass.

        That runs it again and then its backward pass, whose parameters accumulate gradients.
        """
        if not self.is_recording:
            return list(function(*inputs))
        with self.recording(False):
            outputs = list(function(*inputs))
        kept = [None if each is None else each.detach() for each in inputs]

        def backward(incoming: list[Tensor | None]) -> Gradients:
            leaves = [None if each is None else _Leaf.of(each) for each in kept]
            again = list(function(*leaves))
            present = [each for each in again if each is not None]
            del again
            arrived = incoming[:]
            incoming.clear()  # each gradient is freed when its own node has run
            self.backward_from(present, arrived)
            return [each.node.gradient for each in leaves if each is not None]

        present = [each for each in outputs if each is not None]
        node = self._always_record([each for each in inputs if each is not None], present, backward)
        node.held = kept  # Paddle's hooks on saved tensors keep the arguments of the function
        return outputs


class _Leaf(Node):
    """Where a backward pass within another ends: keeps the gradient that arrives."""

    __slots__ = ("gradient",)

    @classmethod
    def of(cls, tensor: Tensor) -> Tensor:
        leaf = cls([], 1, lambda incoming: [])
        leaf.gradient = None

        def keep(incoming: list[Tensor | None]) -> Gradients:
            leaf.gradient = incoming[0]
            return []

        leaf.backward = keep
        return Tensor(tensor.num_bytes, tensor.memory, leaf)


def _hand_on(
    node: Node,
    gradients: list[Tensor | None],
    incoming: dict[Node, list[Tensor | None]],
    waiting: dict[Node, int],
    ready: deque[Node],
) -> None:
    """Gives the gradients that ``node`` has made to what they are of."""
    for target, slot, gradient in zip(node.targets, node.slots, gradients, strict=True):
        if isinstance(target, Parameter):
            if gradient is not None:
                target.accumulate(gradient)
        elif target is not None:
            held = incoming.setdefault(target, [None] * target.num_outputs)
            if held[slot] is None:  # else it is added in place
                held[slot] = gradient
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)


def _consumers(roots: Iterable[Node]) -> dict[Node, int]:
    """How many gradients each node waits for."""
    found: dict[Node, int] = dict.fromkeys(roots, 0)
    ready = list(found)
    while ready:
        for target in ready.pop().targets:
            if target is None or isinstance(target, Parameter):
                continue
            if target not in found:
                found[target] = 0
                ready.append(target)
            found[target] += 1
    return found
