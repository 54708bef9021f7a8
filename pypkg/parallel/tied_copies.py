"""A parameter that the first and the last pipeline stage both hold: a tied embedding table."""

from __future__ import annotations

import functools

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.distributed import fleet
from paddle.distributed.communication.group import Group

from pypkg.parallel import mesh


class TiedCopies:
    """The copies of a parameter, which have equal values and get the same updates.

    All ranks make one, at about one time.

    Attributes:
        parameter: this rank's copy; None on the stages between.
    """

    def __init__(self, parameter: Tensor | None) -> None:
        self.parameter = parameter
        self._group = _ends(mesh.current())

    @paddle.no_grad()
    def sum_gradients(self) -> None:
        """Replaces the gradient of each copy, or ``main_grad``, by the sum over both.

        The gradient has to be the mean over the sample shards already. The sum is then the last
        one. It has two terms, so both stages get the same bits. A mean that came after it could be
        rounded otherwise on each stage: the order of its terms depends on the place of the gradient
        in its bucket.
        """
        if self.parameter is None:
            return
        main_gradient: Tensor | None = getattr(self.parameter, "main_grad", None)
        gradient = self.parameter.grad if main_gradient is None else main_gradient
        assert gradient is not None  # after a backward pass
        dist.all_reduce(gradient, group=self._group)


@functools.cache
def _ends(of: mesh.Mesh) -> Group | None:
    """The first and the last stage of this process's pipeline; all processes have to call it."""
    if of.pipeline_degree == 2:
        return of.pipeline
    pipelines = fleet.get_hybrid_communicate_group().topology().get_comm_list("pipe")
    groups = [dist.new_group([ranks[0], ranks[-1]]) for ranks in pipelines]
    return next((g for g in groups if of.rank in g.ranks), None)
