"""The decoder: embedding, layers, final norm, head."""

from __future__ import annotations

from collections.abc import Callable

import paddle
import paddle.nn.functional as F
from paddle import nn

from pypkg import ops
from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.layer_split import ModelChunk
from pypkg.models.layers import recompute
from pypkg.models.layers.attention import AttentionInputs
from pypkg.models.layers.decoder_layer import DecoderLayer
from pypkg.models.layers.dropout import dropout
from pypkg.models.layers.learned_positions import LearnedPositions
from pypkg.models.layers.masks import Masks, derived_positions, derived_prefix_lengths
from pypkg.models.layers.norm import make_block_norm, make_norm, weight_of_norm
from pypkg.models.layers.positions import RotaryTable, logn_query_scale
from pypkg.models.layers.recompute import Recompute
from pypkg.parallel.context.tokens import context_degree, is_ring, own_tokens, whole_length
from pypkg.parallel.tp_layers import (
    gather_tokens,
    gathered_vocab_logits,
    has_call_hooks,
    replicated_linear,
    split_tokens,
    tensor_group,
    vocab_embedding,
)

_POSITION_EMBEDDINGS = ("rope", "alibi", "learned", "none")


class DecoderChunk(nn.Layer):
    """A model chunk: consecutive layers; the first chunk has the embedding, the last the head.

    Parameter names are those of the whole model. If the head is tied, the last chunk has a copy of
    the embedding table.
    """

    def __init__(self, config: ModelConfig, chunk: ModelChunk) -> None:
        super().__init__()
        self.config, self.chunk = config, chunk
        width, hidden = config.embedding_size, config.hidden_size
        is_first, is_last, is_tied = chunk.is_first, chunk.is_last, config.tie_word_embeddings
        if config.position_embedding not in _POSITION_EMBEDDINGS:
            raise UserError(
                f"position_embedding must be one of {', '.join(_POSITION_EMBEDDINGS)}, found "
                f"{config.position_embedding!r}"
            )
        is_projected, is_learned = width != hidden, config.position_embedding == "learned"

        def table() -> nn.Layer:
            return vocab_embedding(config.vocab_size, width)

        self.embed_tokens = table() if is_first or (is_last and is_tied) else None
        self.project_in = (
            replicated_linear(width, hidden, False) if is_first and is_projected else None
        )
        self.embed_positions = LearnedPositions(config) if is_first and is_learned else None
        self.embed_norm = make_norm(config) if is_first and config.embedding_norm else None
        self.layers = nn.LayerList()
        for number in chunk.layers:
            self.layers.add_sublayer(str(number), DecoderLayer(config, number))
        self.norm = make_block_norm(config) if is_last and config.final_norm else None
        self.project_out = (
            replicated_linear(hidden, width, False) if is_last and is_projected else None
        )
        self.lm_head = table() if is_last and not is_tied else None
        self._embedding_dropout = 0.0
        self.rotary_table = RotaryTable(config)
        self.masks = Masks(config)
        self._z_loss = 0.0

    @property
    def head_weight(self) -> paddle.Tensor:
        """The weight of the head, [vocab_size, embedding_size]; the embedding table if tied.

        Under tensor parallelism it has the rows of this rank, padded as in ``vocab_embedding``.
        """
        weight = self._head_table.weight
        return F.normalize(weight, axis=1, epsilon=1e-12) if self.config.norm_head else weight

    def _head(self, use: Callable[[paddle.Tensor], paddle.Tensor]) -> paddle.Tensor:
        """``use(head_weight)``, called inside the layer that owns the weight."""
        return self._head_table(lambda _: use(self.head_weight))

    @property
    def _head_table(self) -> nn.Layer:
        """The layer that owns the weight of the head: the head, or the embedding if tied."""
        table = self.embed_tokens if self.lm_head is None else self.lm_head
        assert table is not None  # the last chunk has a head or an embedding
        return table

    def use_attention(self, backend: str) -> None:
        """Chooses the implementation of attention: "pypkg" (the default), "paddle" or "reference".

        The reference stores scores of [batch, heads, sequence, sequence]. Paddle's flash attention
        needs a GPU and a 16-bit dtype, and supports neither ALiBi nor a soft cap.
        """
        for layer in self.layers:
            layer.self_attn.backend = backend

    def use_recompute(self, choice: Recompute | None) -> None:
        """Chooses the activations that are recomputed in backward passes; None (default): none."""
        recompute.use_recompute(zip(self.chunk.layers, self.layers, strict=True), choice)

    def use_dropout(self, probability: float) -> None:
        """Sets the probability of hidden dropout in training; the default is 0.

        Dropout applies to the output of each branch, and to the embedding of a model with learned
        positions. parallel/comm/random_states.py describes its random numbers.
        """
        self._embedding_dropout = probability if self.embed_positions is not None else 0.0
        for layer in self.layers:
            layer.hidden_dropout = probability

    def use_z_loss(self, factor: float) -> None:
        """Sets the factor of the z-loss in training (``ops.linear_cross_entropy``); default 0."""
        self._z_loss = factor

    def run(
        self,
        x: paddle.Tensor | None,
        input_ids: paddle.Tensor,
        position_ids: paddle.Tensor | None = None,
        prefix_lengths: paddle.Tensor | None = None,
        document_starts: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """The forward pass of this chunk.

        Args:
            x: output of the previous chunk; None for the first chunk.
            input_ids, position_ids, prefix_lengths, document_starts: as in
                ``Decoder.hidden_states``; the same for all chunks of a micro batch. Under context
                parallelism, ``input_ids`` are the tokens of this rank, and the other inputs are
                those of the whole sequence (parallel/context/tokens.py).

        Returns:
            On the last chunk the normalised final hidden states, as ``Decoder.hidden_states``
            returns them. On the others the residual stream, [batch, sequence, hidden_size], or this
            rank's tokens of it under sequence parallelism (parallel/tp_layers.py).

        Raises:
            UserError: the model does not support one of the inputs, see ``Decoder.hidden_states``.
        """
        if self.config.prefix_lm:
            self._check_given(position_ids, prefix_lengths)
            if document_starts is not None:
                raise UserError(
                    "document_starts are given to a prefix language model, whose prefix belongs to "
                    "the whole row; leave them out"
                )
            if position_ids is None and self.config.position_embedding in ("rope", "learned"):
                position_ids = derived_positions(self.config, input_ids)
            if prefix_lengths is None:
                prefix_lengths = derived_prefix_lengths(self.config, input_ids)
        if self.chunk.is_first:
            x = split_tokens(self.embed(input_ids, position_ids))
        inputs = self._attention_inputs(
            input_ids.shape, position_ids, prefix_lengths, document_starts
        )
        assert x is not None  # only the first chunk is called without it
        return self.run_layers(x, inputs, input_ids.shape)

    def run_layers(
        self, x: paddle.Tensor, inputs: AttentionInputs, shape: list[int]
    ) -> paddle.Tensor:
        """Output of the layers and ``finish`` for ``x``; ``shape`` is that of the input ids."""
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, inputs)
        return self.finish(x, residual, shape)

    def _check_given(
        self, position_ids: paddle.Tensor | None, prefix_lengths: paddle.Tensor | None
    ) -> None:
        """Checks the inputs of a prefix language model under context parallelism.

        Raises:
            UserError: positions or prefixes would have to be derived from tokens of other ranks.
        """
        if context_degree() > 1 and (position_ids is None or prefix_lengths is None):
            raise UserError(
                "position_ids and prefix_lengths of a prefix language model are derived from all "
                f"tokens, but context parallelism divides the tokens over {context_degree()} "
                "ranks; give both"
            )

    def finish(
        self, x: paddle.Tensor, residual: paddle.Tensor | None, shape: list[int]
    ) -> paddle.Tensor:
        """The output of the chunk, given that of its last layer.

        Args:
            x, residual: as ``DecoderLayer`` returns them.
            shape: of the input ids, [batch, sequence].
        """
        if self.norm is not None:
            x = self.norm(x, residual)[0]
        elif residual is not None:
            x = x + residual
        if not self.chunk.is_last:
            return x
        x = gather_tokens(x, *shape)
        return x if self.project_out is None else self.project_out(x)

    def embed(self, input_ids: paddle.Tensor, position_ids: paddle.Tensor | None) -> paddle.Tensor:
        """The embedding of ``input_ids``, [batch, sequence, hidden_size]."""
        assert self.embed_tokens is not None  # the first chunk has it
        x = self.embed_tokens(input_ids)
        scale = self.config.embedding_gradient_scale
        if scale != 1.0:
            x = x * scale + x.detach() * (1.0 - scale)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.embed_positions is not None:
            x = x + self.embed_positions(whole_length(input_ids.shape[1]), position_ids)
            x = dropout(x, self._embedding_dropout, self.training, is_split=False)
        return x if self.embed_norm is None else self.embed_norm(x)[0]

    def _attention_inputs(
        self,
        shape: list[int],
        position_ids: paddle.Tensor | None,
        prefix_lengths: paddle.Tensor | None,
        document_starts: paddle.Tensor | None,
    ) -> AttentionInputs:
        """Masks and rotation for the attention of all layers, for input ids of ``shape``."""
        config, rotation = self.config, None
        batch, seq_length = shape[0], whole_length(shape[1])
        if config.position_embedding == "rope":
            positions = position_ids
            if is_ring():  # each rank rotates its own queries and keys, before they are sent
                if positions is None:
                    positions = paddle.arange(seq_length, dtype="int64").expand([batch, -1])
                positions = own_tokens(positions)
            rotation = self.rotary_table(seq_length, positions, self.training)
        elif position_ids is not None and config.position_embedding != "learned":
            raise UserError(
                f"position_ids have no effect on a model whose position_embedding is "
                f"{config.position_embedding}; leave them out"
            )
        query_scale = logn_query_scale(config, seq_length, self.training)
        if query_scale is not None and is_ring():
            query_scale = own_tokens(query_scale)
        masks = self.masks(prefix_lengths, document_starts)
        return AttentionInputs(batch, seq_length, masks, rotation, query_scale)

    def logits(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """Logits [..., vocab_size] from ``hidden`` [..., embedding_size]."""
        return self._head(
            lambda weight: gathered_vocab_logits(hidden, weight, self.config.vocab_size)
        )

    def loss_of(
        self,
        hidden: paddle.Tensor,
        labels: paddle.Tensor,
        reduction: str = "mean",
        token_losses: list[paddle.Tensor] | None = None,
        loss_weight: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """``Decoder.loss`` from the final hidden states.

        Args:
            hidden: [batch, sequence, embedding_size], output of the last chunk.
        """
        loss = self._head(
            lambda weight: ops.linear_cross_entropy(
                hidden,
                weight,
                labels,
                reduction=reduction,
                group=tensor_group(),
                vocab_size=self.config.vocab_size,
                token_losses=token_losses,
                z_loss=self._z_loss if self.training else 0.0,
            )
        )
        return loss if loss_weight is None else loss * loss_weight


class Decoder(DecoderChunk):
    """A decoder-only language model with the architecture ``config``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, ModelChunk(range(config.num_hidden_layers)))

    def hidden_states(
        self,
        input_ids: paddle.Tensor,
        position_ids: paddle.Tensor | None = None,
        prefix_lengths: paddle.Tensor | None = None,
        document_starts: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """The normalised final hidden states.

        Args:
            input_ids: int64 [batch, sequence], each in [0, vocab_size).
            position_ids: int64 [batch, sequence], or [batch, 2, sequence] with
                ``position_encoding_2d``.
            prefix_lengths: int32 [batch], number of leading tokens of each row that attend to each
                other in both directions.
            document_starts: int32 [batch, sequence], index in the row of the first token of each
                token's document; a token attends only to its own document. None: a row is one
                document. Not allowed for a ``prefix_lm`` model.

        If ``position_ids`` or ``prefix_lengths`` is None, a ``prefix_lm`` model derives it from
        the special tokens in ``input_ids`` (masks.py). Other models then use positions 0, 1, 2,
        ... and no prefix.

        Returns:
            [batch, sequence, embedding_size] in the dtype of the model.

        Raises:
            UserError: ``position_ids`` or ``document_starts`` are given to a model that does not
                support them.
        """
        return self.run(None, input_ids, position_ids, prefix_lengths, document_starts)

    def forward(
        self,
        input_ids: paddle.Tensor,
        position_ids: paddle.Tensor | None = None,
        prefix_lengths: paddle.Tensor | None = None,
        document_starts: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """Logits of the next token after each of ``input_ids``, [batch, sequence, vocab_size].

        The arguments are those of ``hidden_states``.
        """
        return self.logits(
            self.hidden_states(input_ids, position_ids, prefix_lengths, document_starts)
        )

    def step_weights(self) -> ops.DecoderWeights | None:
        """Weights for ``ops.decoder_step``; None if that operator cannot run the model."""
        layers = [each for each in (layer.step_weights() for layer in self.layers) if each]
        final_norm, head = weight_of_norm(self.norm), self._head_table
        if len(layers) < len(self.layers) or final_norm is None or self.project_out is not None:
            return None
        if self.config.norm_head or tensor_group() is not None or has_call_hooks(head):
            return None
        return ops.DecoderWeights(layers, final_norm, head.weight)

    def loss(
        self,
        input_ids: paddle.Tensor,
        labels: paddle.Tensor,
        reduction: str = "mean",
        *,
        position_ids: paddle.Tensor | None = None,
        prefix_lengths: paddle.Tensor | None = None,
        document_starts: paddle.Tensor | None = None,
        token_losses: list[paddle.Tensor] | None = None,
        loss_weight: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """Cross entropy of the next tokens in nats, without storing the logits of the whole batch.

        Args:
            input_ids: int64 [batch, sequence].
            labels: int64 [batch, sequence], the token after each of ``input_ids``, or -100 for
                positions without loss.
            reduction: "mean" over the labels other than -100, or "sum".
            position_ids, prefix_lengths, document_starts: as in ``hidden_states``.
            token_losses: a list to which the loss of each label is appended, float32 [batch,
                sequence], without gradient.
            loss_weight: float32 scalar, a factor of the result.

        Returns:
            A float32 scalar.
        """
        hidden = self.hidden_states(input_ids, position_ids, prefix_lengths, document_starts)
        return self.loss_of(hidden, labels, reduction, token_losses, loss_weight)
