"""The capability matrix: models as rows, strategies as columns, and combinations of strategies.

A cell is five optimizer steps of a tiny model of the row's kind under the column's layout, against
the same steps in one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tiny_configs import KEYS, OVERRIDES

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.registry import config_from_huggingface
from pypkg.parallel.mesh import Degrees

# Name of the row: a family of tiny_configs.py, and keys of its config.json that differ.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "LLaMA-65B": ("llama", {"num_key_value_heads": 4}),
    "LLaMA2-70B": ("llama", {}),
    "BaiChuan-13B": ("baichuan_13b", {}),
    "GPT3": ("gpt3", {}),
    "Qwen-7B": ("qwen", {}),
    "Qwen-14B": ("qwen", {"num_attention_heads": 8, "kv_channels": 8}),
    "OPT-66B": ("opt", {}),
    "Bloom-176B": ("bloom", {}),
    "ChatGLM-6B": ("chatglm", {}),
    "ChatGLM2": ("chatglm2", {}),
    "GLM-130B": ("glm130b", {}),
}
# Families beyond the table's.
MORE_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "Baichuan-7B": ("baichuan_7b", {}),
    "Baichuan2-7B": ("baichuan2_7b", {}),
    "Baichuan2-13B": ("baichuan2_13b", {}),
    "OPT-350m": ("opt_350m", {}),
    "Mistral": ("mistral", {}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "GLM-4": ("glm4", {}),
    "StableLM": ("stablelm", {}),
}
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")  # one of them is a family's key
NUM_LAYERS = 3  # does not divide evenly over two stages


@dataclass(frozen=True)
class Layout:
    """How a cell trains.

    Attributes:
        sharding_stage: 1, 2 or 3 if ``degrees`` has a sharding group.
        recompute: a granularity of recompute, or None.
        num_layers: of the model.
        stored_attention: the run in one process that this is compared with uses attention that
            stores its weights, in place of flash attention.
    """

    degrees: Degrees
    sharding_stage: int = 0
    recompute: str | None = None
    num_layers: int = NUM_LAYERS
    stored_attention: bool = False

    @property
    def reference(self) -> str:
        """Names the run in one process that this layout has to equal."""
        attention = "stored" if self.stored_attention else "flash"
        return f"{self.num_layers}-layers-{attention}"


COLUMNS: dict[str, Layout] = {
    "data parallel": Layout(Degrees(data=2)),
    "tensor parallel": Layout(Degrees(tensor=2)),
    "pipeline parallel": Layout(Degrees(pipeline=2)),
    "sequence parallel": Layout(Degrees(tensor=2, sequence_parallel=True)),
    "flash attention": Layout(Degrees(tensor=2), stored_attention=True),
    "selective recompute": Layout(Degrees(tensor=2, sequence_parallel=True), recompute="core_attn"),
    "sharding stage 1 + recompute": Layout(Degrees(sharding=2), sharding_stage=1, recompute="full"),
    "stage 1 + DP": Layout(Degrees(sharding=2, data=2), sharding_stage=1),
    "stage 2 + recompute": Layout(Degrees(sharding=2), sharding_stage=2, recompute="full"),
    "stage 2 + DP": Layout(Degrees(sharding=2, data=2), sharding_stage=2),
    "stage 3 + recompute": Layout(Degrees(sharding=2), sharding_stage=3, recompute="full"),
    "stage 3 + DP": Layout(Degrees(sharding=2, data=2), sharding_stage=3),
}

COMBINATIONS: dict[str, Layout] = {
    "tp2 x pp2": Layout(Degrees(tensor=2, pipeline=2)),
    "tp2 + sp x pp2, recompute attention": Layout(
        Degrees(tensor=2, pipeline=2, sequence_parallel=True), recompute="full_attn"
    ),
    "tp2 + sp x sharding2 stage 2": Layout(
        Degrees(tensor=2, sharding=2, sequence_parallel=True), sharding_stage=2
    ),
    "tp2 x sharding2 stage 3": Layout(Degrees(tensor=2, sharding=2), sharding_stage=3),
    "pp2 x sharding2 stage 1": Layout(Degrees(pipeline=2, sharding=2), sharding_stage=1),
    "tp4 + sp": Layout(Degrees(tensor=4, sequence_parallel=True)),
    "pp3 interleaved": Layout(Degrees(pipeline=3, virtual_stages=2), num_layers=6),
    "tp2 x pp2 x sharding2 stage 1": Layout(
        Degrees(tensor=2, pipeline=2, sharding=2), sharding_stage=1
    ),
    "tp2 x pp2 x dp2": Layout(Degrees(tensor=2, pipeline=2, data=2)),
    "tp2 + sp x sharding2 x dp2 stage 2, recompute": Layout(
        Degrees(tensor=2, sharding=2, data=2, sequence_parallel=True),
        sharding_stage=2,
        recompute="full",
    ),
}

# The tokens of a sample divided: by an exchange of heads (sep), and with a ring (cp).
CONTEXT: dict[str, Layout] = {
    "sep2": Layout(Degrees(context=2)),
    "cp2": Layout(Degrees(context=2, ring=True)),
    "cp2 x tp2": Layout(Degrees(context=2, ring=True, tensor=2)),
    "cp2 x pp2 x sharding2 stage 1": Layout(
        Degrees(context=2, ring=True, pipeline=2, sharding=2), sharding_stage=1
    ),
    "sep2 x tp2 + sp x sharding2 stage 3, recompute": Layout(
        Degrees(context=2, tensor=2, sharding=2, sequence_parallel=True),
        sharding_stage=3,
        recompute="core_attn",
    ),
    "cp2 x sharding2 stage 2 x dp2, recompute": Layout(
        Degrees(context=2, ring=True, sharding=2, data=2), sharding_stage=2, recompute="full"
    ),
}

LAYOUTS = COLUMNS | COMBINATIONS | CONTEXT


def row_config(row: str, layout: Layout) -> ModelConfig:
    """The tiny model of ``row`` with the layers of ``layout``."""
    family, changes = (ROWS | MORE_ROWS)[row]
    layers = next(key for key in _LAYERS if key in KEYS[family])
    keys = {**KEYS[family], **changes, layers: layout.num_layers}
    return config_from_huggingface(keys).replace(**row_overrides(row))


def row_overrides(row: str) -> dict[str, Any]:
    """What the config.json of the row's model does not tell."""
    return OVERRIDES.get((ROWS | MORE_ROWS)[row][0], {})
