"""The decoder: embedding, layers, final norm, head.

A layer hands two tensors on: the output of its last branch and the residual stream without it.
The add happens in the next norm, fused with it, so the stream is read and written once per norm.
"""

from __future__ import annotations

import paddle
from paddle import nn

from pypkg import ops
from pypkg.models.attention import Attention
from pypkg.models.config import ModelConfig
from pypkg.models.mlp import GatedMLP
from pypkg.models.norm import RMSNorm
from pypkg.models.positions import RotaryTable
from pypkg.parallel.layers import vocab_embedding


class DecoderLayer(nn.Layer):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self,
        x: paddle.Tensor,
        residual: paddle.Tensor | None,
        cos: paddle.Tensor,
        sin: paddle.Tensor,
        mask: ops.AttentionMask,
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """One layer.

        Args:
            x: [batch, sequence, hidden], output of the branch before.
            residual: [batch, sequence, hidden], the stream without x; None at the first layer.
            cos, sin: float32 [positions, head_dim / 2].

        Returns:
            The same two for the next layer.
        """
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, cos, sin, mask)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Layer):
    """A decoder-only language model. ``config`` holds its shape."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = vocab_embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.LayerList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else vocab_embedding(config.vocab_size, config.hidden_size)
        )
        self._rotary_table = RotaryTable(config)

    @property
    def head_weight(self) -> paddle.Tensor:
        """[vocab_size, hidden_size]: the head's own, or the embedding table if they are tied."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight

    def use_flash_attention(self, enabled: bool) -> None:
        """Chooses flash attention, the default, or one that stores [sequence, sequence]."""
        for layer in self.layers:
            layer.self_attn.use_flash_attention = enabled

    def hidden_states(self, input_ids: paddle.Tensor) -> paddle.Tensor:
        """The normalised final hidden states.

        Args:
            input_ids: int64 [batch, sequence], each in [0, vocab_size).

        Returns:
            [batch, sequence, hidden_size] in the dtype of the model.
        """
        cos, sin = self._rotary_table(input_ids.shape[1])
        mask = ops.AttentionMask()
        x, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, cos, sin, mask)
        return self.norm(x, residual)[0]

    def logits(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """[..., hidden_size] to [..., vocab_size]."""
        return paddle.matmul(hidden, self.head_weight, transpose_y=True)

    def forward(self, input_ids: paddle.Tensor) -> paddle.Tensor:
        """Logits, [batch, sequence, vocab_size], of the token after each of ``input_ids``."""
        return self.logits(self.hidden_states(input_ids))

    def loss(
        self, input_ids: paddle.Tensor, labels: paddle.Tensor, reduction: str = "mean"
    ) -> paddle.Tensor:
        """Cross entropy of the next tokens, without ever holding the logits of the whole batch.

        Args:
            input_ids: int64 [batch, sequence].
            labels: int64 [batch, sequence], the token after each of ``input_ids``; -100 where
                none counts.
            reduction: "mean" over the labels that count, or "sum".

        Returns:
            A float32 scalar.
        """
        hidden = self.hidden_states(input_ids)
        return ops.linear_cross_entropy(hidden, self.head_weight, labels, reduction=reduction)
