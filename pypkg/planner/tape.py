"""A training step without numbers: which tensors exist when, and how many bytes they take.

A ``Tensor`` here has a size and no values. Operators record what their backward passes keep, and
``engine.py`` runs these. Memory is freed as Paddle frees it, with its last reference. The planner's
model is therefore written like the model itself, with the same local variables, and the reference
counts of CPython decide.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

Part = Hashable  # a part of a model, for which a peak is recorded


@dataclass
class Peak:
    """A peak of the allocated bytes.

    Attributes:
        total: bytes.
        terms: bytes by term, which says what the memory is for.
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
        num_bytes: bytes of its elements.
        memory: the memory that holds them; None after ``clear``.
        node: the operator that produced it, and ``slot``, its index among the outputs. None for an
            input or a tensor produced without recording.
    """

    __slots__ = ("memory", "node", "num_bytes", "slot")

    def __init__(
        self, num_bytes: int, memory: Memory | None, node: Node | None = None, slot: int = 0
    ) -> None:
        self.num_bytes, self.memory, self.node, self.slot = num_bytes, memory, node, slot

    def clear(self) -> None:
        """Drops the reference to the memory, which views may still hold."""
        self.memory = None

    def detach(self) -> Tensor:
        """The same memory without a history."""
        return Tensor(self.num_bytes, self.memory)


class Parameter(Tensor):
    """A tensor whose gradient accumulates.

    Attributes:
        name: in the model.
        gradient: the accumulated gradient; None if there is none yet.
        hook: maps a gradient before it is accumulated.
        on_gradient: called after each accumulation, like Paddle's backward hooks.
    """

    __slots__ = ("gradient", "hook", "name", "on_gradient")

    def __init__(self, name: str, num_bytes: int, memory: Memory | None) -> None:
        super().__init__(num_bytes, memory)
        self.name = name
        self.gradient: Tensor | None = None
        self.hook: Callable[[Tensor], Tensor] | None = None
        self.on_gradient: Callable[[Parameter], None] | None = None

    def accumulate(self, gradient: Tensor) -> None:
        """Adds ``gradient`` in place, or takes its memory if there is nothing yet."""
        if self.hook is not None:
            gradient = self.hook(gradient)
        if self.gradient is None:
            self.gradient = gradient
        del gradient
        if self.on_gradient is not None:
            self.on_gradient(self)

    def clear_gradient(self) -> None:
        """Frees the gradient, also where others refer to the same tensor, as Paddle does."""
        if self.gradient is not None:
            self.gradient.clear()
            self.gradient = None


Gradients = Sequence[Tensor | None]
Backward = Callable[[list[Tensor | None]], Gradients]
# Given the gradients of a recomputed function's outputs, runs it again and returns the outputs.
Rerun = Callable[[list[Tensor | None]], list[Tensor]]


class Node:
    """An operator's backward pass: gradients of the outputs to gradients of ``inputs``."""

    __slots__ = (
        "backward",
        "held",
        "hooks",
        "num_outputs",
        "part",
        "rerun",
        "slots",
        "targets",
        "turns",
    )

    def __init__(
        self,
        inputs: Sequence[Tensor],
        num_outputs: int,
        backward: Backward | None,
        part: Part = "",
    ) -> None:
        self.targets: list[Node | Parameter | None] = [
            each if isinstance(each, Parameter) else each.node for each in inputs
        ]
        self.slots = [each.slot for each in inputs]
        self.num_outputs = num_outputs
        self.backward = backward
        self.rerun: Rerun | None = None
        self.hooks: object = None  # keeps what a recomputed node needs until it has run
        self.held: object = None  # what lives as long as the graph
        self.part = part  # that recorded it
        self.turns = 0  # how many times other ready nodes run first


class Tape:
    """Counts allocated bytes by term, and records the peaks.

    Args:
        granularity: bytes of which each allocation is a multiple.

    Attributes:
        allocated: bytes now.
        terms: the same by term.
        is_recording: whether operators save tensors for their backward passes.
        part: the running part of the model; ``parts`` has a peak for each. The backward pass of an
            operator belongs to the part in which the operator was recorded.
        phase: the current phase of the step.
    """

    def __init__(self, granularity: int = 1) -> None:
        self.allocated = 0
        self.terms: dict[str, int] = {}
        self.is_recording = True
        self.part: Part = ""
        self.phase = ""
        self._granularity = granularity
        self._parts: dict[tuple[str, Part], Peak] = {}
        self._highest = 0  # since ``part`` began
        self._is_highest = False  # whether that is now

    def _count(self, num_bytes: int, term: str) -> None:
        if num_bytes < 0 and self._is_highest:
            self._note()
        rounded = self._rounded(num_bytes) if num_bytes > 0 else -self._rounded(-num_bytes)
        self.allocated += rounded
        self.terms[term] = self.terms.get(term, 0) + rounded
        if self.allocated > self._highest:
            self._highest, self._is_highest = self.allocated, True

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self._granularity) * self._granularity

    def _note(self) -> None:
        self._is_highest = False
        key = self.phase, self.part
        known = self._parts.get(key)
        if known is None or self.allocated > known.total:
            self._parts[key] = Peak(self.allocated, dict(self.terms))

    def enter(self, part: Part, phase: str | None = None) -> None:
        """Attributes peaks from now on to ``part``, and to ``phase`` if it is given."""
        if self._is_highest:
            self._note()
        self.part = part
        if phase is not None:
            self.phase = phase
        self._highest, self._is_highest = self.allocated, True

    def peaks(self) -> dict[tuple[str, Part], Peak]:
        """The peak of each part in each phase."""
        self.enter(self.part)
        return dict(self._parts)

    def memory(self, num_bytes: int, term: str) -> Memory:
        """New memory, which is freed with its last reference."""
        return Memory(self, num_bytes, term)

    def empty(self, num_bytes: int, term: str) -> Tensor:
        """A new tensor without history."""
        return Tensor(num_bytes, self.memory(num_bytes, term))

    def several(self, number: int, num_bytes: int, term: str) -> Tensor:
        """``number`` new tensors of ``num_bytes`` each, which are freed together, as one."""
        return self.empty(number * self._rounded(num_bytes), term)

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
        """Records ``outputs`` as the results of an operator.

        Args:
            inputs: tensors and parameters that receive gradients.
            outputs: tensors without history.
            backward: maps the gradients of the outputs, each a tensor or None, to those of the
                inputs. The tensors that it refers to are kept until it has run.
        """
        is_wanted = any(each.node is not None or isinstance(each, Parameter) for each in inputs)
        if self.is_recording and is_wanted:
            self._always_record(inputs, outputs, backward)

    def _always_record(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], backward: Backward | None
    ) -> Node:
        node = Node(inputs, len(outputs), backward, self.part)
        for slot, output in enumerate(outputs):
            output.node, output.slot = node, slot
        return node

    def parameter(self, name: str, num_bytes: int, term: str) -> Parameter:
        """A parameter in new memory."""
        return Parameter(name, num_bytes, self.memory(num_bytes, term))

    def recomputed(
        self,
        function: Callable[..., Sequence[Tensor | None]],
        inputs: Sequence[Tensor | None],
        begin: Callable[[list[Tensor | None]], None] = lambda incoming: None,
        keeps: bool = False,
        turns: int = 0,
    ) -> list[Tensor | None]:
        """``function(*inputs)`` with activation recomputation: only the inputs are saved.

        The backward pass runs the function again, and then the backward passes of its operators.

        Args:
            begin: called before the function runs again, with the gradients of its outputs.
            keeps: whether the inputs live as long as the graph. They do if one of Paddle's
                operators saves a tensor, because its hook refers to them; ours release them.
            turns: how many times other nodes that are ready run before this one.
        """
        if not self.is_recording:
            return list(function(*inputs))
        with self.recording(False):
            outputs = list(function(*inputs))
        # In the same memory; their gradients go where those of the inputs go.
        kept = [
            None if each is None else Tensor(each.num_bytes, each.memory, each.node, each.slot)
            for each in inputs
        ]

        def rerun(incoming: list[Tensor | None]) -> list[Tensor]:
            begin(incoming)
            return [each for each in function(*kept) if each is not None]

        present = [each for each in outputs if each is not None]
        node = self._always_record([each for each in inputs if each is not None], present, None)
        node.rerun = rerun
        node.held = (kept, function) if keeps else None
        node.turns = turns
        return outputs


class _Leaf(Node):
    """A leaf of the graph: stores the gradient that arrives."""

    __slots__ = ("gradient",)

    def __init__(self) -> None:
        super().__init__([], 1, self._keep)
        self.gradient: Tensor | None = None

    def _keep(self, incoming: list[Tensor | None]) -> Gradients:
        self.gradient = incoming[0]
        return []


def gradient_of(leaf: Tensor) -> Tensor | None:
    """The gradient that arrived at a tensor of ``leaf_of``."""
    assert isinstance(leaf.node, _Leaf)
    return leaf.node.gradient


def leaf_of(tensor: Tensor) -> Tensor:
    """A tensor in the same memory that keeps its gradient."""
    return Tensor(tensor.num_bytes, tensor.memory, _Leaf())
