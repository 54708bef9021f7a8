"""Draws which rank holds which tensors, one figure per strategy: python docs/parallelism/draw.py

The tensor-parallel and pipeline figures show how the code of the package divides a LLaMA of four
layers. The sharding figure shows the state of each rank in each ZeRO stage.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pypkg.console.svg import svg
from pypkg.models.architecture.layer_split import layer_ranges
from pypkg.models.architecture.registry import config_from_huggingface
from pypkg.models.weights.tp_shards import tp_shard

FOLDER = Path(__file__).parent
HELD, FREE, EDGE, TEXT = "#7fb0ee", "#eef1f5", "#8a94a3", "#1f2630"
STATE = {"weights": "#7fb0ee", "gradients": "#d9822b", "AdamW state": "#3a9d5d"}
PIXELS_PER_INCH = 90

CONFIG = config_from_huggingface(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
    }
)
# A layer's parameters with their shapes, and those outside of the layers.
IN_LAYER = {
    "input_layernorm": (64,),
    "self_attn.qkv_proj": (64, 128),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_up_proj": (64, 256),
    "mlp.down_proj": (128, 64),
}
OUTSIDE = {"embed_tokens": (256, 64), "lm_head": (256, 64)}


class Canvas:
    """A figure to draw boxes and text in; coordinates in pixels, y downwards."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self._figure = Figure((width / PIXELS_PER_INCH, height / PIXELS_PER_INCH))
        self._axes = Axes(self._figure, (0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        self._figure.add_axes(self._axes).set_axis_off()
        self.text(10, 18, title, fontsize=10, fontweight="bold")

    def text(self, x: float, y: float, text: str, **style: object) -> None:
        self._axes.text(x, y, text, **{"color": TEXT, "fontsize": 9, **style})

    def box(
        self, x: float, y: float, width: float, height: float, color: str, edge: str = "none"
    ) -> None:
        self._axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=edge))

    def write(self, name: str) -> None:
        (FOLDER / name).write_text(svg(self._figure), encoding="utf-8")


def draw_tensor_parallel(degree: int) -> None:
    tensors = {"embed_tokens": OUTSIDE["embed_tokens"], **IN_LAYER, "lm_head": OUTSIDE["lm_head"]}
    title = f"tensor_parallel_degree {degree}: one layer"
    canvas = Canvas(110 + 104 * len(tensors), 60 + 46 * degree, title)
    for rank in range(degree):
        canvas.text(10, 70 + 46 * rank, f"TP rank {rank}")
    for column, (name, shape) in enumerate(tensors.items()):
        x = 110 + 104 * column
        canvas.text(x, 40, name.split(".")[-1].removeprefix("input_"))
        for rank in range(degree):
            _draw_shard(canvas, name, shape, (degree, rank), (x, 50 + 46 * rank))
    canvas.write("tensor.svg")


def _draw_shard(
    canvas: Canvas,
    name: str,
    shape: tuple[int, ...],
    place: tuple[int, int],
    at: tuple[float, float],
) -> None:
    """A parameter as a rectangle, rows downwards.

    The shard of rank place[1] of place[0] is blue.
    """
    x, y = at
    width, height = 84, (32 if len(shape) == 2 else 8)
    inside = name if name in OUTSIDE else f"layers.0.{name}"
    shard = tp_shard(CONFIG, f"{inside}.weight", *place)
    canvas.box(x, y, width, height, HELD if shard is None else FREE)
    for start, stop in shard.ranges if shard else ():
        first, share = start / shape[shard.axis], (stop - start) / shape[shard.axis]
        if shard.axis == 0:
            canvas.box(x, y + first * height, width, share * height, HELD)
        else:
            canvas.box(x + first * width, y, share * width, height, HELD)
    canvas.box(x, y, width, height, "none", EDGE)


def draw_pipeline(degree: int) -> None:
    blocks = ["embed", *(f"layer {i}" for i in range(CONFIG.num_hidden_layers)), "norm, head"]
    title = f"pipeline_parallel_degree {degree}"
    canvas = Canvas(90 + 90 * len(blocks), 40 + 36 * degree, title)
    for rank, layers in enumerate(layer_ranges(CONFIG.num_hidden_layers, degree)):
        y = 34 + 36 * rank
        canvas.text(10, y + 17, f"stage {rank}")
        for column, block in enumerate(blocks):
            held = column - 1 in layers
            held |= (column == 0 and rank == 0) or (block == blocks[-1] and rank == degree - 1)
            x = 90 + 90 * column
            canvas.box(x, y, 82, 26, HELD if held else FREE, EDGE)
            canvas.text(x + 6, y + 17, block if held else "")
    canvas.write("pipeline.svg")


def draw_sharding(degree: int) -> None:
    """Weights, gradients and optimizer state of each rank, per ZeRO stage."""
    titles = ("data parallel", "ZeRO stage 1", "ZeRO stage 2", "ZeRO stage 3")
    block = degree * 20 + 22
    canvas = Canvas(120 + 170 * len(STATE), 46 + len(titles) * block, f"sharding over {degree}")
    for column, name in enumerate(STATE):
        canvas.text(120 + 170 * column, 40, name)
    for stage, title in enumerate(titles):
        top = 50 + stage * block
        canvas.text(10, top + 14, title)
        divided = {"AdamW state": stage >= 1, "gradients": stage >= 2, "weights": stage >= 3}
        for rank in range(degree):
            y = top + 20 * rank
            for column, (name, colour) in enumerate(STATE.items()):
                x, share = 120 + 170 * column, 150 / degree
                if divided[name]:
                    canvas.box(x, y, 150, 16, FREE)
                    canvas.box(x + rank * share, y, share, 16, colour)
                    canvas.box(x, y, 150, 16, "none", EDGE)
                else:
                    canvas.box(x, y, 150, 16, colour, EDGE)
    canvas.write("sharding.svg")


if __name__ == "__main__":
    draw_tensor_parallel(2)
    draw_pipeline(2)
    draw_sharding(2)
