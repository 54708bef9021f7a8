"""A tied embedding table under pipeline parallelism: the first and last stage hold a copy each."""

from __future__ import annotations

import functools

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.distributed import fleet
from paddle.distributed.communication.group import Group

from pypkg.parallel import mesh


class TiedCopies:
    """The two copies of a parameter, which have equal values and get the same updates.

    Every rank must construct it at about the same time, because it may create process groups.

    Attributes:
        parameter: this rank's copy; None on the stages between the first and the last.
    """

    def __init__(self, parameter: Tensor | None) -> None:
        self.parameter = parameter
        self._group = _ends(mesh.current())

    @paddle.no_grad()
    def sum_gradients(self) -> None:
        """Replaces the gradient of each copy (``main_grad`` or ``grad``) by the sum of both.

        Every rank must call this, as the last reduction: the gradients must be means over the
        sample shards already. A sum of two terms has the same bits on both stages. An average after
        it could be rounded differently on each stage, because the order of its terms depends on the
        offset of the gradient in its bucket.
        """
        if self.parameter is None:
            return
        main_gradient: Tensor | None = getattr(self.parameter, "main_grad", None)
        gradient = self.parameter.grad if main_gradient is None else main_gradient
        assert gradient is not None  # after a backward pass
        dist.all_reduce(gradient, group=self._group)


@functools.cache
def _ends(of: mesh.Mesh) -> Group | None:
    """The group of the first and last stage of this rank's pipeline; None on the stages between.

    Every rank must call this.
    """
    if of.pipeline_degree == 2:
        return of.pipeline
    pipelines = fleet.get_hybrid_communicate_group().topology().get_comm_list("pipe")
    groups = [dist.new_group([ranks[0], ranks[-1]]) for ranks in pipelines]
    return next((g for g in groups if of.rank in g.ranks), None)
