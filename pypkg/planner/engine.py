"""Backward passes in the order of Paddle's engine (paddle/fluid/eager/backward.cc).

Nodes that have all their gradients wait in a queue, first come, first served. A recomputed function
is one node until its turn comes; then the nodes of its second run take its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from pypkg.planner.tape import Node, Parameter, Tape, Tensor

# Gradients that have arrived, by what they are of: one for each output.
_Incoming = dict[Node | Parameter, list[Tensor | None]]


def backward(tape: Tape, loss: Tensor) -> None:
    """Runs the backward passes of all that led to ``loss``, a scalar."""
    backward_from(tape, [loss], [tape.empty(4, "gradients")])


def backward_from(tape: Tape, outputs: list[Tensor], gradients: list[Tensor | None]) -> None:
    """Runs the backward passes of all that led to ``outputs``, given their gradients.

    Both lists are emptied, so that what they alone refer to is freed in time.
    """
    incoming = _arrived(outputs, gradients)
    graph = [node for node in incoming if isinstance(node, Node)]  # all of it hangs on them
    waiting = _consumers(graph)
    ready: deque[Node | Parameter] = deque(node for node in graph if not waiting[node])
    while ready:
        node = ready.popleft()
        if isinstance(node, Parameter):
            _accumulate(node, incoming)
            continue
        if node.turns and ready:
            node.turns -= 1
            ready.append(node)
            continue
        arrived = incoming.pop(node, [None] * node.num_outputs)
        if node.rerun is not None:
            if node.part != tape.part:
                tape.enter(node.part)
            _splice(node, arrived, incoming, waiting, ready)
            continue
        assert node.backward is not None, "a second backward pass through one result"
        if node.part != tape.part:
            tape.enter(node.part)
        gradients = list(node.backward(arrived))
        node.backward = node.hooks = None
        _hand_on(node, gradients, incoming, waiting, ready)
        del gradients, arrived
    del graph


def _arrived(outputs: list[Tensor], gradients: list[Tensor | None]) -> _Incoming:
    """The gradients by the nodes of the outputs; both lists are emptied."""
    incoming: _Incoming = {}
    while outputs:
        output, gradient = outputs.pop(), gradients.pop()
        if output.node is not None:
            held = incoming.setdefault(output.node, [None] * output.node.num_outputs)
            held[output.slot] = gradient
    return incoming


def _accumulate(parameter: Parameter, incoming: _Incoming) -> None:
    gradient = incoming.pop(parameter)[0]
    if gradient is not None:
        parameter.accumulate(gradient)


def _hand_on(
    node: Node,
    gradients: list[Tensor | None],
    incoming: _Incoming,
    waiting: dict[Node | Parameter, int],
    ready: deque[Node | Parameter],
) -> None:
    """Gives the gradients that ``node`` has made to what they are of."""
    for target, slot, gradient in zip(node.targets, node.slots, gradients, strict=True):
        if target is None:
            continue
        outputs = 1 if isinstance(target, Parameter) else target.num_outputs
        held = incoming.setdefault(target, [None] * outputs)
        if held[slot] is None:  # else it is added in place
            held[slot] = gradient
        waiting[target] -= 1
        if waiting[target]:
            continue
        if isinstance(target, Parameter) or target.follows_at_once:
            ready.appendleft(target)
        else:
            ready.append(target)


def _splice(
    node: Node,
    arrived: list[Tensor | None],
    incoming: _Incoming,
    waiting: dict[Node | Parameter, int],
    ready: deque[Node | Parameter],
) -> None:
    """Puts the nodes of a function that ran again in the place of ``node``, which held it back.

    Paddle runs it when the first of them asks for what was saved, so that one comes first.
    """
    rerun, node.rerun = node.rerun, None
    assert rerun is not None
    outputs = rerun(arrived)
    for target in node.targets:
        if target is not None:
            waiting[target] -= 1
    of_outputs = _arrived(outputs, arrived)
    roots = [each for each in of_outputs if isinstance(each, Node)]
    incoming.update(of_outputs)
    for new in _count_consumers(roots, waiting):
        new.hooks = rerun
    ready.extendleft(each for each in roots if not waiting[each])


def _consumers(roots: Iterable[Node]) -> dict[Node | Parameter, int]:
    """How many gradients each node and parameter waits for."""
    found: dict[Node | Parameter, int] = {}
    _count_consumers(roots, found)
    return found


def _count_consumers(roots: Iterable[Node], found: dict[Node | Parameter, int]) -> list[Node]:
    """Adds to ``found`` those that lead from ``roots`` to what it holds already.

    Returns:
        The nodes that it did not hold.
    """
    new = list(roots)
    ready = new[:]
    found.update(dict.fromkeys(ready, 0))
    while ready:
        for target in ready.pop().targets:
            if target is None:
                continue
            if target not in found:
                found[target] = 0
                if isinstance(target, Node):
                    new.append(target)
                    ready.append(target)
            found[target] += 1
    return new
