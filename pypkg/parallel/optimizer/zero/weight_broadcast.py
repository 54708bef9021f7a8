"""Updated weights that come from their owners beside the next forward pass (ZeRO stages 1 and 2).

After the update the owner of each parameter starts to broadcast it, in the order in which a forward
pass uses them. A layer waits for its own weights when it is called, so that the weights of later
layers come while earlier ones compute.

Fleet's overlap of broadcasts registers new hooks on every innermost layer after each update. Here
the hooks stay and are on whole blocks, whose projections remain without hooks of their own.
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

    All ranks of the group have to make it alike. Every parameter must be used in a call of the
    layer that waits for it: the layer in a ``LayerList`` that it belongs to, or else the layer that
    owns it.

    Args:
        owners: rank in the group that has the updated values, by Paddle name.
    """

    def __init__(self, model: nn.Layer, owners: Mapping[str, int], group: Group) -> None:
        self._group, self._owners = group, owners
        self._order: list[Tensor] = []
        self._tasks: dict[str, Any] = {}  # under way, by Paddle name
        for layer, parameters in _waiting_layers(model):
            trained = [p for p in parameters if not p.stop_gradient]
            self._order += [p for p in trained if all(p is not other for other in self._order)]
            self._wait_before(layer, [p.name for p in trained])

    def _wait_before(self, layer: Any, names: Sequence[str]) -> None:
        layer.register_forward_pre_hook(lambda *_: self._wait(names))

    @paddle.no_grad()
    def start(self) -> None:
        """Starts the broadcasts; all ranks of the group have to call it after their update."""
        for parameter in self._order:
            self._tasks[parameter.name] = dist.broadcast(
                parameter,
                self._group.ranks[self._owners[parameter.name]],
                group=self._group,
                sync_op=False,
            )

    def wait(self) -> None:
        """Until this rank has all weights."""
        self._wait(list(self._tasks))

    def _wait(self, names: Sequence[str]) -> None:
        if not self._tasks:
            return
        for name in names:
            task = self._tasks.pop(name, None)
            if task is not None:
                task.wait()


def _waiting_layers(layer: nn.Layer) -> Iterator[tuple[nn.Layer, list[Tensor]]]:
    """Layers of a model and the parameters that they wait for, in the order of a forward pass."""
    own = layer.parameters(include_sublayers=False)
    if own:
        yield layer, own
    for child in layer.children():
        if isinstance(layer, nn.LayerList):
            yield child, child.parameters()
        else:
            yield from _waiting_layers(child)
