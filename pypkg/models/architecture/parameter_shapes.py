"""Names and shapes of the parameters of a model, from its configuration.

Tests compare them with the layers of every family. Nothing here imports Paddle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.layer_split import ModelChunk


@dataclass(frozen=True)
class ParameterShape:
    """A parameter, or the part of it that a rank holds.

    Attributes:
        name: the parameter's name in this package.
        shape: of the parameter or its part.
        layer: index of its layer in the model; None outside the layers.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def whole_parameters(
    config: ModelConfig, chunk: ModelChunk | None = None
) -> Iterator[ParameterShape]:
    """The whole parameters of a model or of a model chunk, in the order of models/decoder.py."""
    chunk = chunk or ModelChunk(range(config.num_hidden_layers))
    for name, shape, layer in _whole(config, chunk):
        yield ParameterShape(name, shape, layer)


_Named = tuple[str, tuple[int, ...], int | None]


def _whole(config: ModelConfig, chunk: ModelChunk) -> Iterator[_Named]:
    """Name, shape and layer of each whole parameter, in the order of models/decoder.py."""
    hidden, width, vocabulary = config.hidden_size, config.embedding_size, config.vocab_size
    is_first, is_last, is_tied = chunk.is_first, chunk.is_last, config.tie_word_embeddings
    if is_first or (is_last and is_tied):
        yield "embed_tokens.weight", (vocabulary, width), None
    if is_first and width != hidden:
        yield "project_in.weight", (width, hidden), None
    if is_first and config.position_embedding == "learned":
        rows = config.max_position_embeddings + config.position_offset
        yield "embed_positions.weight", (rows, hidden), None
    if is_first and config.embedding_norm:
        yield from _norm(config, "embed_norm", None)
    for number in chunk.layers:
        yield from _layer(config, number)
    if is_last and config.final_norm:
        yield from _norm(config, "norm", None)
    if is_last and width != hidden:
        yield "project_out.weight", (hidden, width), None
    if is_last and not is_tied:
        yield "lm_head.weight", (vocabulary, width), None


def _layer(config: ModelConfig, number: int) -> Iterator[_Named]:
    at, hidden, ffn = f"layers.{number}.", config.hidden_size, config.intermediate_size
    attention, mlp = f"{at}self_attn.", f"{at}mlp."
    up = 2 * ffn if config.gated_mlp else ffn
    qkv = config.query_size + 2 * config.key_value_size
    yield from _norm(config, f"{at}input_layernorm", number)
    yield from _linear(f"{attention}qkv_proj", hidden, qkv, config.qkv_bias, number)
    output_bias = config.attention_output_bias
    yield from _linear(f"{attention}o_proj", config.query_size, hidden, output_bias, number)
    if config.qk_norm:
        yield f"{attention}q_norm.weight", (config.head_dim,), number
        yield f"{attention}k_norm.weight", (config.head_dim,), number
    yield from _norm(config, f"{at}post_attention_layernorm", number)
    name = "gate_up_proj" if config.gated_mlp else "up_proj"
    yield from _linear(f"{mlp}{name}", hidden, up, config.mlp_bias, number)
    yield from _linear(f"{mlp}down_proj", ffn, hidden, config.mlp_bias, number)
    if config.branch_norm:
        yield from _norm(config, f"{at}attention_branch_norm", number)
        yield from _norm(config, f"{at}mlp_branch_norm", number)


def _norm(config: ModelConfig, name: str, layer: int | None) -> Iterator[_Named]:
    yield f"{name}.weight", (config.hidden_size,), layer
    if config.norm == "layer_norm":
        yield f"{name}.bias", (config.hidden_size,), layer


def _linear(
    name: str, inputs: int, outputs: int, has_bias: bool, layer: int | None
) -> Iterator[_Named]:
    yield f"{name}.weight", (inputs, outputs), layer
    if has_bias:
        yield f"{name}.bias", (outputs,), layer
