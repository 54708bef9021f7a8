"""A picture of a plan: the memory of each pipeline stage as stacked bars, against the capacity."""

from __future__ import annotations

from pypkg.errors import UserError
from pypkg.planner.memory import TERMS
from pypkg.planner.output.text import largest_of_each_stage, layout_of
from pypkg.planner.search.plan import Plan

_GIB = 2**30


def picture(plan: Plan) -> str:
    """The SVG document.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        from pypkg.console.svg import svg
    except ModuleNotFoundError as error:
        raise UserError(
            f"--picture needs {error.name}, which is not installed; install it with "
            "`pip install 'pypkg[plot]'`"
        ) from error
    ranks = largest_of_each_stage(plan)
    stages = range(len(ranks))
    figure = Figure(figsize=(5 + 0.5 * len(ranks), 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(f"{plan.config.model_type}, {layout_of(plan)}")
    axes.set_ylabel("memory of a rank, GiB")
    axes.set_xticks(stages, [f"stage {rank.pipeline_rank}" for rank in ranks])
    below = [0.0] * len(ranks)
    for index, term in enumerate(TERMS):
        sizes = [rank.terms.get(term, 0) / _GIB for rank in ranks]
        if any(sizes):
            axes.bar(stages, sizes, bottom=below, color=colormaps["tab20"](index), label=term)
        below = [low + size for low, size in zip(below, sizes, strict=True)]
    for stage, top in enumerate(below):
        axes.text(stage, top, f"{top:.1f}", ha="center", va="bottom")
    for size, name in ((plan.cluster.gpu.memory, "GPU"), (plan.capacity, "tensors")):
        axes.axhline(size / _GIB, color="tab:red", linestyle="--")
        label = f"{size / _GIB:.0f} {name}"
        axes.text(1.01, size / _GIB, label, transform=axes.get_yaxis_transform(), va="center")
    figure.legend(loc="outside right upper")
    return svg(figure)
