"""Bytes that a decoder layer reads and writes."""

from __future__ import annotations

from pypkg.bench.report.result import Result
from pypkg.console.markdown import table

TITLE = "Memory passes of a layer"


def render(result: Result) -> list[str]:
    body = []
    for row in result["rows"]:
        moved = row["forward"] + row["backward"]
        least = row["least_forward"] + row["least_backward"]
        counts = [row["forward"], row["backward"], moved, least]
        cells = [f"{count / 1e9:.2f}" for count in counts]
        body.append([row["way"], row["operator"], *cells, f"{moved / least:.2f}"])
    head = ["the layer as", "operator", "forward, GB", "backward, GB", "both, GB", "least, GB"]
    return [
        f"- {result['workload']}",
        "- Counted from the sizes of the inputs and outputs of every operator that runs; not "
        "timed. Those of the backward pass belong to the nodes of the graph. The least reads each "
        "operand of a step once and writes each result once. The gradient of a product is two "
        "products",
        "- `blocks`: the layer as it runs in training. `single operators`: as it runs where a hook "
        "or another feature separates the parts of a block",
        "",
        *table([*head, "both / least"], body, text_columns=2),
    ]
