"""A training step without numbers: which tensors exist when, and how many bytes they take.

A ``Tensor`` here has a size and no values. Operators record what their backward passes need, and
``Tape.backward`` runs these in the order of Paddle's engine. Memory is freed as Paddle frees it:
with the last reference. The model of the planner is therefore written like the model itself, with
the same local variables, and CPython's reference counts do the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Peak:
    """The most bytes that were allocated at once.

    Attributes:
        total: bytes.
        terms: the same by what they were for.
    """

    total: int = 0
    terms: dict[str, int] = field(default_factory=dict)


class Tape:
    """Counts what is allocated, by term, and remembers the peak.

    Args:
        granularity: each allocation is rounded up to a multiple of it, in bytes.
    """

    def __init__(self, granularity: int = 1) -> None:
        self.allocated = 0
        self.terms: dict[str, int] = {}
        self.peak = Peak()
        self.is_recording = True
        self._granularity = granularity

    def allocate(self, num_bytes: int, term: str) -> Memory:
        """Memory that is freed with its last reference."""
        rounded = -(-num_bytes // self._granularity) * self._granularity
        self._add(rounded, term)
        if self.allocated > self.peak.total:
            self.peak = Peak(self.allocated, dict(self.terms))
        return Memory(self, rounded, term)

    def free(self, num_bytes: int, term: str) -> None:
        """Called by ``Memory`` alone."""
        self._add(-num_bytes, term)

    def _add(self, num_bytes: int, term: str) -> None:
        self.allocated += num_bytes
        self.terms[term] = self.terms.get(term, 0) + num_bytes


class Memory:
    """Allocated bytes; views of a tensor share one."""

    __slots__ = ("_tape", "num_bytes", "term")

    def __init__(self, tape: Tape, num_bytes: int, term: str) -> None:
        self._tape, self.num_bytes, self.term = tape, num_bytes, term

    def __del__(self) -> None:
        self._tape.free(self.num_bytes, self.term)


class Tensor:
    """A tensor without values.

    Attributes:
        num_bytes: of its elements.
        memory: where they are.
        node: what made it, and ``slot``, its number among the outputs; None: an input, a parameter,
            or what was made while nothing was recorded.
    """

    __slots__ = ("memory", "node", "num_bytes", "slot")

    def __init__(
        self, num_bytes: int, memory: Memory, node: Node | None = None, slot: int = 0
    ) -> None:
        self.num_bytes, self.memory, self.node, self.slot = num_bytes, memory, node, slot


class Parameter(Tensor):
    """A tensor whose gradient accumulates."""

    __slots__ = ("gradient", "on_gradient")

    def __init__(self, num_bytes: int, memory: Memory) -> None:
        super().__init__(num_bytes, memory)
        self.gradient: Tensor | None = None
        # Called after each accumulation, as Paddle's backward hooks are.
        self.on_gradient: Callable[[Parameter], None] | None = None


# The gradient of an input: its own memory (None), that of the gradient of output k (k), or none.
NO_GRADIENT = -1


class Node:
    """The backward pass of an operator; see ``Tape.op`` for its arguments."""

    __slots__ = ("gradients", "num_outputs", "run", "saved", "scratch", "slots", "targets")

    def __init__(
        self,
        inputs: Sequence[Tensor],
        num_outputs: int,
        saved: Sequence[Tensor],
        gradients: Sequence[int | None],
        scratch: int,
    ) -> None:
        self.targets = [each if isinstance(each, Parameter) else each.node for each in inputs]
        self.slots = [each.slot for each in inputs]
        self.saved = [each.memory for each in saved]
        self.gradients = [each.num_bytes for each in inputs] and list(gradients)
        self.num_outputs, self.scratch = num_outputs, scratch
