"""Broadcasts of updated weights during the next forward pass (ZeRO stages 1 and 2).

After the update, the owners of the parameters start to broadcast them, in the order in which a
forward pass uses them. A layer waits for its own weights when it is called. The weights of later
layers therefore arrive while earlier layers compute.

Fleet's overlap of broadcasts registers new hooks on every innermost layer after each update. Here
hooks are registered once, and only on whole decoder layers, not on the projections inside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn
from paddle.distributed.communication.group import Group


class WeightBroadcast:
    """The broadcasts of the trainable parameters of ``model``.

    All ranks of the group must construct it with equal arguments. A parameter may only be used in
    calls of the layer that waits for it: the element of a ``LayerList`` that contains it, or else
    the layer that owns it.

    Args:
        owners: index in the group of the rank that has the updated values, by Paddle name.
    """

    def __init__(self, model: nn.Layer, owners: Mapping[str, int], group: Group) -> None:
        self._group, self._owners = group, owners
        self._order: list[Tensor] = []
        self._tasks: dict[str, Any] = {}  # broadcasts in flight, by Paddle name
        for layer, parameters in _waiting_layers(model):
            trained = [p for p in parameters if not p.stop_gradient]
            self._order += [p for p in trained if all(p is not other for other in self._order)]
            self._wait_before(layer, [p.name for p in trained])

    def _wait_before(self, layer: Any, names: Sequence[str]) -> None:
        layer.register_forward_pre_hook(lambda *_: self._wait(names))

    @paddle.no_grad()
    def start(self) -> None:
        """Starts the broadcasts. Every rank of the group must call this after its update."""
        for parameter in self._order:
            self._tasks[parameter.name] = dist.broadcast(
                parameter,
                self._group.ranks[self._owners[parameter.name]],
                group=self._group,
                sync_op=False,
            )

    def wait(self) -> None:
        """Waits until this rank has all weights."""
        self._wait(list(self._tasks))

    def _wait(self, names: Sequence[str]) -> None:
        if not self._tasks:
            return
        for name in names:
            task = self._tasks.pop(name, None)
            if task is not None:
                task.wait()


def _waiting_layers(layer: nn.Layer) -> Iterator[tuple[nn.Layer, list[Tensor]]]:
    """(layer, parameters that it waits for), in forward order."""
    own = layer.parameters(include_sublayers=False)
    if own:
        yield layer, own
    for child in layer.children():
        if isinstance(layer, nn.LayerList):
            yield child, child.parameters()
        else:
            yield from _waiting_layers(child)
