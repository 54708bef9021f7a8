"""``ModelConfig``: one dataclass for all families, with a field for each of their differences.

Nothing here imports Paddle, so planning and parameter counts run without it.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from pypkg.errors import UserError
from pypkg.models.architecture.checks import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    check_consistency,
    check_size,
    check_types,
    chosen,
    normalised_rope_scaling,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of a decoder-only language model.

    Fields that Hugging Face configurations have too have the same names and meanings. Sizes count
    elements, lengths count tokens. Dropout is not included, because it is a training setting.

    Raises:
        UserError: a value has the wrong type, or values contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None  # type: ignore[assignment]  # None: num_attention_heads
    head_dim: int = None  # type: ignore[assignment]  # None: hidden_size / num_attention_heads
    # Width of the embedding and of the head. If it differs from hidden_size, linear layers project
    # to hidden_size and back. None: hidden_size.
    embedding_size: int = None  # type: ignore[assignment]
    max_position_embeddings: int = 2048

    norm: str = "rms_norm"  # or layer_norm
    norm_eps: float = 1e-6
    embedding_norm: bool = False  # a norm right after the embedding
    branch_norm: bool = False  # a norm on the output of each branch, before it is added
    final_norm: bool = True
    # How a branch f (attention or MLP) updates the residual stream x:
    # pre: x + f(norm(x)); post: norm(x + f(x)); normed: residual_alpha * norm(x) + f(norm(x)).
    residual: str = "pre"
    residual_alpha: float = 1.0

    position_embedding: str = "rope"  # or alibi, learned, none
    position_offset: int = 0  # row of the learned table for position 0
    rope_theta: float = 10000.0
    # None, or a dict with rope_type (linear, dynamic, llama3 or yarn) and the parameters of that
    # type under their Hugging Face names.
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0  # rotated fraction of each head, its first dimensions
    rope_interleaved: bool = False  # pairs are dimensions 2i and 2i + 1, not i and i + half
    position_encoding_2d: bool = False  # half of each head by position, half by block position
    # Evaluation only, for sequences longer than this length: dynamic NTK increases the rotary base;
    # logn attention scales queries with the logarithm of their position. None: never.
    dynamic_ntk_length: int | None = None
    logn_attention_length: int | None = None

    sliding_window: int | None = None  # a token sees itself and the sliding_window - 1 before it
    # "full_attention" or "sliding_attention" for each layer, as in Hugging Face files. None:
    # sliding_attention in all layers if sliding_window is set, else full_attention.
    layer_types: tuple[str, ...] = None  # type: ignore[assignment]
    # Scores are q k^T / sqrt(query_pre_attn_scalar); None: head_dim. A soft cap c turns scores into
    # c tanh(scores / c) before the mask (Gemma 2: Gemma Team, 2024); None: no cap.
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    # Tokens before the first sop_token_id of a row attend to each other in both directions.
    # Positions from there on depend on the gmask_token_id or mask_token_id of the row (masks.py).
    prefix_lm: bool = False
    sop_token_id: int | None = None
    gmask_token_id: int | None = None
    mask_token_id: int | None = None

    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # an RMS norm of each query and key head before they are rotated
    activation: str = "silu"  # or gelu (exact), gelu_tanh, relu
    gated_mlp: bool = True  # down(activation(gate(x)) * up(x)), not down(activation(up(x)))
    tie_word_embeddings: bool = False
    norm_head: bool = False  # rows of the head are normalised to length 1 in each forward
    embedding_gradient_scale: float = 1.0  # factor of the gradient of the embedding output

    initializer_range: float = 0.02
    initialization: str = "normal"  # or scaled_residual, deepnorm (initialization.py)
    # muP: hidden_size of the model for which hyperparameters were tuned; None: no muP.
    mup_base_width: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    model_type: str = "llama"  # family whose file format is used to read and write the model

    def __post_init__(self) -> None:
        check_size("hidden_size", self.hidden_size)
        check_size("num_attention_heads", self.num_attention_heads)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.embedding_size is None:
            object.__setattr__(self, "embedding_size", self.hidden_size)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(
                    f"hidden_size ({self.hidden_size}) is not divisible by num_attention_heads "
                    f"({self.num_attention_heads}); change one of them, or set head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        check_types(vars(self))
        types = self._same_layer_types() if self.layer_types is None else tuple(self.layer_types)
        object.__setattr__(self, "layer_types", types)
        scaling = normalised_rope_scaling(self.rope_scaling, self.max_position_embeddings)
        object.__setattr__(self, "rope_scaling", scaling)
        check_consistency(vars(self), self.rotary_dim)

    def _same_layer_types(self) -> tuple[str, ...]:
        """The default of ``layer_types``."""
        windowed = self.sliding_window is not None
        return (SLIDING_ATTENTION if windowed else FULL_ATTENTION,) * self.num_hidden_layers

    @property
    def width_factor(self) -> float:
        """hidden_size / mup_base_width; 1 without muP."""
        return self.hidden_size / (self.mup_base_width or self.hidden_size)

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together, equal to that of all value heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions of a head that are rotated by one sequence of positions."""
        if self.position_encoding_2d:
            return self.head_dim // 2
        return int(self.head_dim * self.partial_rotary_factor)

    def replace(self, **overrides: Any) -> ModelConfig:
        """A copy with some fields changed.

        ``head_dim``, ``num_key_value_heads`` and ``embedding_size`` are derived again from the new
        sizes if they had their default, unless ``overrides`` gives them. So is ``layer_types`` if
        all layers have the same type. If the types differ, a model with fewer layers keeps the
        types of its first layers.

        Raises:
            UserError: a field is unknown, or the result is not a valid configuration.
        """
        names = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in names:
                raise UserError(f"{name!r} is not a field of ModelConfig{nearest(name, names)}")
        values = {name: getattr(self, name) for name in names}
        if self.query_size == self.hidden_size:
            values["head_dim"] = None
        if self.num_key_value_heads == self.num_attention_heads:
            values["num_key_value_heads"] = None
        if self.embedding_size == self.hidden_size:
            values["embedding_size"] = None
        if self.layer_types == self._same_layer_types():
            values["layer_types"] = None
        else:
            depth = overrides.get("num_hidden_layers", self.num_hidden_layers)
            values["layer_types"] = self.layer_types[:depth]
        return ModelConfig(**{**values, **overrides})

    def num_parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        h, ffn, width = self.hidden_size, self.intermediate_size, self.embedding_size
        norm = chosen("norm", self.norm, {"rms_norm": h, "layer_norm": 2 * h})
        qkv = self.query_size + 2 * self.key_value_size
        attention = h * qkv + self.qkv_bias * qkv + self.qk_norm * 2 * self.head_dim
        attention += self.query_size * h + self.attention_output_bias * h
        up = 2 * ffn if self.gated_mlp else ffn
        mlp = h * up + ffn * h + self.mlp_bias * (up + h)
        layer = attention + mlp + (4 if self.branch_norm else 2) * norm
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size * width
        if width != h:
            tables += 2 * width * h
        if self.position_embedding == "learned":
            tables += (self.max_position_embeddings + self.position_offset) * h
        norms = (self.embedding_norm + self.final_norm) * norm
        return self.num_hidden_layers * layer + norms + tables

    def flops_per_token(self, seq_length: int) -> float:
        """Floating-point operations of one training step per token, forward and backward.

        The formula is 6 N + 12 L h s (Chowdhery et al., 2022, appendix B). N is
        ``num_parameters()``, which includes the embedding table; L is the number of layers, h the
        total width of the query heads and s ``seq_length``. Attention is counted in full, without
        halving for the causal mask, and recomputation is not counted. Published values of model
        FLOPs utilisation use this convention: MFU = flops_per_token * tokens_per_second /
        peak_flops.
        """
        attention = 12 * self.num_hidden_layers * self.query_size * seq_length
        return float(6 * self.num_parameters() + attention)


def nearest(name: str, known: list[str]) -> str:
    """A suggestion for an error message about an unknown name: "; did you mean X?", or ""."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(by_lower[match] for match in close)}?" if close else ""
