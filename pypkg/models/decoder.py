"""The decoder: embedding, layers, final norm, head.

A layer hands two tensors on: the output of its last branch and the residual stream without it.
The add happens in the next norm, fused with it, so the stream is read and written once per norm.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
import paddle.nn.functional as F
from paddle import nn

from pypkg import ops
from pypkg.errors import UserError
from pypkg.models.attention import Attention, AttentionInputs
from pypkg.models.config import ModelConfig
from pypkg.models.learned_positions import LearnedPositions
from pypkg.models.masks import Masks, derived_positions, derived_prefix_lengths
from pypkg.models.mlp import make_mlp
from pypkg.models.norm import make_norm
from pypkg.models.positions import RotaryTable, logn_query_scale
from pypkg.parallel.layers import column_linear, row_linear, vocab_embedding

# Output of a branch, and the residual stream without it; None where the first is all of it.
_State = tuple[paddle.Tensor, paddle.Tensor | None]
_Branch = Callable[[paddle.Tensor], paddle.Tensor]


def _pre(norm: nn.Layer, branch: _Branch, state: _State, alpha: float) -> _State:
    """x + branch(norm(x))."""
    x, stream = norm(*state)
    return branch(x), stream


def _normed(norm: nn.Layer, branch: _Branch, state: _State, alpha: float) -> _State:
    """alpha * norm(x) + branch(norm(x)): DeepNorm (Wang et al., 2022) read from norm to norm."""
    x, _ = norm(*state)
    return branch(x), x * alpha


def _post(norm: nn.Layer, branch: _Branch, state: _State, alpha: float) -> _State:
    """norm(x + branch(x)), which leaves no stream beside it."""
    x, _ = state
    return norm(branch(x), x)[0], None


_RESIDUALS = {"pre": _pre, "normed": _normed, "post": _post}


class DecoderLayer(nn.Layer):
    """Attention and feed-forward, each with its norms and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = make_mlp(config)
        self.attention_branch_norm = make_norm(config) if config.branch_norm else None
        self.mlp_branch_norm = make_norm(config) if config.branch_norm else None
        self._add = _RESIDUALS[config.residual]
        self._alpha = config.residual_alpha

    def forward(
        self, x: paddle.Tensor, residual: paddle.Tensor | None, inputs: AttentionInputs
    ) -> _State:
        """One layer.

        Args:
            x: [batch, sequence, hidden], output of the branch before.
            residual: [batch, sequence, hidden], the stream without x; None where x is all of it.

        Returns:
            The same two for the next layer.
        """
        state = self._add(
            self.input_layernorm,
            lambda y: _through(self.attention_branch_norm, self.self_attn(y, inputs)),
            (x, residual),
            self._alpha,
        )
        return self._add(
            self.post_attention_layernorm,
            lambda y: _through(self.mlp_branch_norm, self.mlp(y)),
            state,
            self._alpha,
        )


def _through(norm: nn.Layer | None, x: paddle.Tensor) -> paddle.Tensor:
    return x if norm is None else norm(x)[0]


class Decoder(nn.Layer):
    """A decoder-only language model. ``config`` holds its shape."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.embedding_size, config.hidden_size
        self.embed_tokens = vocab_embedding(config.vocab_size, width)
        self.project_in = None if width == hidden else column_linear(width, hidden, False)
        self.embed_positions = (
            LearnedPositions(config) if config.position_embedding == "learned" else None
        )
        self.embed_norm = make_norm(config) if config.embedding_norm else None
        self.layers = nn.LayerList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config) if config.final_norm else None
        self.project_out = None if width == hidden else row_linear(hidden, width, False)
        self.lm_head = (
            None if config.tie_word_embeddings else vocab_embedding(config.vocab_size, width)
        )
        self._rotary_table = RotaryTable(config)
        self._masks = Masks(config)

    @property
    def head_weight(self) -> paddle.Tensor:
        """[vocab_size, embedding_size]: the head's own, or the embedding table if they are tied."""
        weight = (self.embed_tokens if self.lm_head is None else self.lm_head).weight
        return F.normalize(weight, axis=1, epsilon=1e-12) if self.config.norm_head else weight

    def use_flash_attention(self, enabled: bool) -> None:
        """Chooses flash attention, the default, or one that stores [sequence, sequence]."""
        for layer in self.layers:
            layer.self_attn.use_flash_attention = enabled

    def hidden_states(
        self,
        input_ids: paddle.Tensor,
        position_ids: paddle.Tensor | None = None,
        prefix_lengths: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """The normalised final hidden states.

        Args:
            input_ids: int64 [batch, sequence], each in [0, vocab_size).
            position_ids: int64 [batch, sequence], or [batch, 2, sequence] with
                ``position_encoding_2d``.
            prefix_lengths: int32 [batch]: tokens of each row that see each other both ways.

        Both are told by ``input_ids`` if they are None: by the special tokens of a ``prefix_lm``
        model (masks.py), otherwise positions are 0, 1, 2, ... and there is no prefix.

        Returns:
            [batch, sequence, embedding_size] in the dtype of the model.
        """
        if self.config.prefix_lm:
            if position_ids is None and self.config.position_embedding in ("rope", "learned"):
                position_ids = derived_positions(self.config, input_ids)
            if prefix_lengths is None:
                prefix_lengths = derived_prefix_lengths(self.config, input_ids)
        x, residual = self._embed(input_ids, position_ids), None
        inputs = self._attention_inputs(input_ids.shape[1], position_ids, prefix_lengths)
        for layer, layer_inputs in zip(self.layers, inputs, strict=True):
            x, residual = layer(x, residual, layer_inputs)
        if self.norm is not None:
            x = self.norm(x, residual)[0]
        elif residual is not None:
            x = x + residual
        return x if self.project_out is None else self.project_out(x)

    def _embed(self, input_ids: paddle.Tensor, position_ids: paddle.Tensor | None) -> paddle.Tensor:
        """[batch, sequence, hidden_size]."""
        x = self.embed_tokens(input_ids)
        scale = self.config.embedding_gradient_scale
        if scale != 1.0:
            x = x * scale + x.detach() * (1.0 - scale)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.embed_positions is not None:
            x = x + self.embed_positions(input_ids.shape[1], position_ids)
        return x if self.embed_norm is None else self.embed_norm(x)[0]

    def _attention_inputs(
        self,
        seq_length: int,
        position_ids: paddle.Tensor | None,
        prefix_lengths: paddle.Tensor | None,
    ) -> list[AttentionInputs]:
        """Those of each layer."""
        config, rotation = self.config, None
        if config.position_embedding == "rope":
            rotation = self._rotary_table(seq_length, position_ids, self.training)
        elif position_ids is not None and config.position_embedding != "learned":
            raise UserError(
                f"position_ids have no effect on a model whose position_embedding is "
                f"{config.position_embedding}; leave them out"
            )
        query_scale = logn_query_scale(config, seq_length, self.training)
        return [
            AttentionInputs(mask, rotation, query_scale) for mask in self._masks(prefix_lengths)
        ]

    def logits(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """[..., embedding_size] to [..., vocab_size]."""
        return paddle.matmul(hidden, self.head_weight, transpose_y=True)

    def forward(
        self,
        input_ids: paddle.Tensor,
        position_ids: paddle.Tensor | None = None,
        prefix_lengths: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """Logits, [batch, sequence, vocab_size], of the token after each of ``input_ids``.

        Args: as for ``hidden_states``.
        """
        return self.logits(self.hidden_states(input_ids, position_ids, prefix_lengths))

    def loss(
        self,
        input_ids: paddle.Tensor,
        labels: paddle.Tensor,
        reduction: str = "mean",
        *,
        position_ids: paddle.Tensor | None = None,
        prefix_lengths: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """Cross entropy of the next tokens, without ever holding the logits of the whole batch.

        Args:
            input_ids: int64 [batch, sequence].
            labels: int64 [batch, sequence], the token after each of ``input_ids``; -100 where
                none counts.
            reduction: "mean" over the labels that count, or "sum".
            position_ids, prefix_lengths: as for ``hidden_states``.

        Returns:
            A float32 scalar.
        """
        hidden = self.hidden_states(input_ids, position_ids, prefix_lengths)
        return ops.linear_cross_entropy(hidden, self.head_weight, labels, reduction=reduction)
