"""A forward pass over tokens that follow those in a key-value cache."""

from __future__ import annotations

import paddle

from pypkg.models.decoder import DecoderChunk
from pypkg.models.layers.attention import AttentionInputs
from pypkg.models.layers.kv_cache import KVCache, NewTokens
from pypkg.models.layers.positions import depends_on_length, logn_query_scale


def cached_pass(
    chunk: DecoderChunk,
    x: paddle.Tensor | None,
    input_ids: paddle.Tensor,
    tokens: NewTokens,
    cache: KVCache,
) -> paddle.Tensor:
    """``DecoderChunk.run`` in evaluation mode, for the tokens after those in ``cache``.

    Args:
        x: output of the previous chunk; None for the first chunk.
        input_ids: int64 [batch, sequence], the new tokens.
        tokens: the result of ``cache.advance(input_ids)``.

    Returns:
        The result of ``DecoderChunk.run`` for the new tokens.
    """
    if chunk.chunk.is_first:
        x = chunk.embed(input_ids, tokens.position_ids)
    inputs = attention_inputs(chunk, input_ids.shape, tokens, cache)
    assert x is not None  # only the first chunk is called without it
    return chunk.run_layers(x, inputs, input_ids.shape)


def attention_inputs(
    chunk: DecoderChunk, shape: list[int], tokens: NewTokens, cache: KVCache
) -> AttentionInputs:
    """Masks and rotation for the attention of all layers, for input ids of ``shape``."""
    config, positions = chunk.config, tokens.position_ids
    rotation = None
    if config.position_embedding == "rope":
        # Tables for the whole capacity are computed once for many passes. Only frequencies that
        # depend on the length need the current length.
        length = tokens.stop if depends_on_length(config) else cache.capacity
        rotation = chunk.rotary_table(length, positions, training=False)
    batch, sequence = shape
    return AttentionInputs(
        batch,
        sequence,
        chunk.masks(tokens.prefix_lengths, tokens.document_starts),
        rotation,
        logn_query_scale(config, tokens.stop, False, positions),
        cache,
    )
