"""Backward passes in the order of Paddle's engine (paddle/fluid/eager/backward.cc).

Nodes that have all their gradients wait in a queue, first come, first served. A recomputed function
is one node until its turn comes; then the nodes of its second run take its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from pypkg.planner.tape import Node, Parameter, Rerun, Tape, Tensor

# Gradients that have arrived, by node or parameter; a node has one for each output.
_Incoming = dict[Node | Parameter, list[Tensor | None]]


def backward(tape: Tape, loss: Tensor) -> None:
    """Runs the backward pass from ``loss``, a scalar."""
    backward_from(tape, [loss], [tape.empty(4, "gradients")])


def backward_from(tape: Tape, outputs: list[Tensor], gradients: list[Tensor | None]) -> None:
    """Runs the backward pass from ``outputs``, given their gradients.

    Both lists are emptied, so that tensors that only they refer to are freed in time.
    """
    _BackwardPass(tape, outputs, gradients).run()


class _BackwardPass:
    """The queue of a backward pass, and the gradients that have arrived.

    A local variable of a method ends with the method, and with it a tensor that nothing else holds.
    """

    def __init__(self, tape: Tape, outputs: list[Tensor], gradients: list[Tensor | None]) -> None:
        self._tape = tape
        self._incoming = _arrived(outputs, gradients)
        self._waiting: dict[Node | Parameter, int] = {}  # gradients that have yet to arrive
        # The graph hangs on these nodes. It lives until the end of the pass.
        self._roots = [each for each in self._incoming if isinstance(each, Node)]
        self._count_consumers(self._roots)
        self._ready: deque[Node | Parameter] = deque(
            each for each in self._roots if not self._waiting[each]
        )

    def run(self) -> None:
        while self._ready:
            node = self._ready.popleft()
            if isinstance(node, Parameter):
                self._accumulate(node)
            elif node.turns and self._ready:
                node.turns -= 1
                self._ready.append(node)
            else:
                self._run_node(node)

    def _accumulate(self, parameter: Parameter) -> None:
        gradient = self._incoming.pop(parameter)[0]
        if gradient is not None:
            parameter.accumulate(gradient)

    def _run_node(self, node: Node) -> None:
        arrived = self._incoming.pop(node, [None] * node.num_outputs)
        if node.part != self._tape.part:
            self._tape.enter(node.part)
        if node.rerun is not None:
            self._splice(node, node.rerun, arrived)
            return
        assert node.backward is not None, "a second backward pass through one result"
        gradients = list(node.backward(arrived))
        node.backward = node.hooks = None
        self._pass_on(node, gradients)

    def _pass_on(self, node: Node, gradients: list[Tensor | None]) -> None:
        """Passes the gradients from ``node`` on to the nodes and parameters of its inputs."""
        for target, slot, gradient in zip(node.targets, node.slots, gradients, strict=True):
            if target is None:
                continue
            outputs = 1 if isinstance(target, Parameter) else target.num_outputs
            held = self._incoming.setdefault(target, [None] * outputs)
            if held[slot] is None:  # else it is added in place
                held[slot] = gradient
            self._waiting[target] -= 1
            if self._waiting[target]:
                continue
            if isinstance(target, Parameter):
                self._ready.appendleft(target)
            else:
                self._ready.append(target)

    def _splice(self, node: Node, rerun: Rerun, arrived: list[Tensor | None]) -> None:
        """Runs a recomputed function again, and puts its nodes in the place of ``node``.

        Paddle recomputes when the first of them needs a saved tensor, so that one comes first.
        """
        node.rerun = None
        outputs = rerun(arrived)
        for target in node.targets:
            if target is not None:
                self._waiting[target] -= 1
        of_outputs = _arrived(outputs, arrived)
        roots = [each for each in of_outputs if isinstance(each, Node)]
        self._incoming.update(of_outputs)
        for new in self._count_consumers(roots):
            new.hooks = rerun
        self._ready.extendleft(each for each in roots if not self._waiting[each])

    def _count_consumers(self, roots: Iterable[Node]) -> list[Node]:
        """Counts the gradients that the graph of ``roots`` passes on; returns its new nodes."""
        waiting, new = self._waiting, list(roots)
        unvisited = new[:]
        waiting.update(dict.fromkeys(new, 0))
        while unvisited:
            for target in unvisited.pop().targets:
                if target is None:
                    continue
                if target not in waiting:
                    waiting[target] = 0
                    if isinstance(target, Node):
                        new.append(target)
                        unvisited.append(target)
                waiting[target] += 1
        return new


def _arrived(outputs: list[Tensor], gradients: list[Tensor | None]) -> _Incoming:
    """The gradients by the nodes of the outputs; both lists are emptied."""
    incoming: _Incoming = {}
    while outputs:
        output, gradient = outputs.pop(), gradients.pop()
        if output.node is not None:
            held = incoming.setdefault(output.node, [None] * output.node.num_outputs)
            held[output.slot] = gradient
    return incoming
