"""Draws which tensor lives where, one picture per strategy: python docs/parallelism/draw.py

What is divided over tensor-parallel ranks and pipeline stages is asked of the code that divides it,
for a LLaMA of four layers; how sharding cuts the state is shown to scale of parameters.
"""

from __future__ import annotations

from pathlib import Path

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.layer_split import layer_ranges
from pypkg.models.architecture.registry import config_from_huggingface
from pypkg.models.weights.tp_shards import part_of

FOLDER = Path(__file__).parent
HELD, FREE, EDGE, TEXT = "#7fb0ee", "#eef1f5", "#8a94a3", "#1f2630"
STATE = {"weights": "#7fb0ee", "gradients": "#d9822b", "AdamW state": "#3a9d5d"}
ROW, LABEL, GAP = 46, 120, 10

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


class Picture:
    """An SVG drawing; coordinates in pixels."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self._size = width, height
        self._parts = [self._text(GAP, 18, title, 14, "bold")]

    def _text(self, x: float, y: float, text: str, size: int = 11, weight: str = "normal") -> str:
        return (
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" '
            f'fill="{TEXT}">{text}</text>'
        )

    def text(self, x: float, y: float, text: str) -> None:
        self._parts.append(self._text(x, y, text))

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{colour}"/>'
        )

    def frame(self, x: float, y: float, width: float, height: float) -> None:
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="none" '
            f'stroke="{EDGE}"/>'
        )

    def write(self, file: Path) -> None:
        width, height = self._size
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" height="{height:g}" font-family="sans-serif">',
            f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
            *self._parts,
            "</svg>",
        ]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_tensor_parallel(degree: int) -> None:
    tensors = {"embed_tokens": OUTSIDE["embed_tokens"], **IN_LAYER, "lm_head": OUTSIDE["lm_head"]}
    picture = Picture(
        LABEL + 92 * len(tensors), 60 + ROW * degree, f"tensor_parallel_degree {degree}: one layer"
    )
    for column, (name, shape) in enumerate(tensors.items()):
        x = LABEL + 92 * column
        picture.text(x, 40, name.split(".")[-1].removeprefix("input_"))
        for rank in range(degree):
            _draw_part(picture, CONFIG, name, shape, (degree, rank), (x, 50 + ROW * rank))
    for rank in range(degree):
        picture.text(GAP, 50 + ROW * rank + 20, f"tensor rank {rank}")
    picture.write(FOLDER / "tensor.svg")


def _draw_part(
    picture: Picture,
    config: ModelConfig,
    name: str,
    shape: tuple[int, ...],
    place: tuple[int, int],
    at: tuple[float, float],
) -> None:
    """A parameter as a rectangle, rows downwards, with what rank place[1] of place[0] holds."""
    x, y = at
    width, height = 72, (ROW - 14 if len(shape) == 2 else 8)
    inside = name if name in OUTSIDE else f"layers.0.{name}"
    part = part_of(config, f"{inside}.weight", *place)
    picture.box(x, y, width, height, HELD if part is None else FREE)
    for start, stop in part.ranges if part else ():
        first, last = start / shape[part.axis], stop / shape[part.axis]
        if part.axis == 0:
            picture.box(x, y + first * height, width, (last - first) * height, HELD)
        else:
            picture.box(x + first * width, y, (last - first) * width, height, HELD)
    picture.frame(x, y, width, height)


def draw_pipeline(degree: int) -> None:
    blocks = ["embed", *(f"layer {i}" for i in range(CONFIG.num_hidden_layers)), "norm, head"]
    picture = Picture(
        LABEL + 82 * len(blocks), 40 + 36 * degree, f"pipeline_parallel_degree {degree}"
    )
    for rank in range(degree):
        y = 34 + 36 * rank
        picture.text(GAP, y + 17, f"stage {rank}")
        layers = layer_ranges(CONFIG.num_hidden_layers, degree)[rank]
        for column, block in enumerate(blocks):
            held = column - 1 in layers
            held |= (column == 0 and rank == 0) or (block == blocks[-1] and rank == degree - 1)
            x = LABEL + 82 * column
            picture.box(x, y, 74, 26, HELD if held else FREE)
            picture.frame(x, y, 74, 26)
            picture.text(x + 6, y + 17, block if held else "")
    picture.write(FOLDER / "pipeline.svg")


def draw_sharding(degree: int) -> None:
    """Weights, gradients and optimizer state of each rank, per stage."""
    width, stages = 150, ("data parallel", "stage 1", "stage 2", "stage 3")
    picture = Picture(
        LABEL + (width + 20) * 3, 46 + len(stages) * (degree * 20 + 22), f"sharding over {degree}"
    )
    for column, name in enumerate(STATE):
        picture.text(LABEL + (width + 20) * column, 40, name)
    for stage, title in enumerate(stages):
        top = 50 + stage * (degree * 20 + 22)
        picture.text(GAP, top + 14, title)
        divided = {"AdamW state": stage >= 1, "gradients": stage >= 2, "weights": stage >= 3}
        for rank in range(degree):
            y = top + 20 * rank
            for column, (name, colour) in enumerate(STATE.items()):
                x, share = LABEL + (width + 20) * column, width / degree
                picture.box(x, y, width, 16, FREE if divided[name] else colour)
                if divided[name]:
                    picture.box(x + rank * share, y, share, 16, colour)
                picture.frame(x, y, width, 16)
    picture.write(FOLDER / "sharding.svg")


if __name__ == "__main__":
    draw_tensor_parallel(2)
    draw_pipeline(2)
    draw_sharding(2)
