"""A pass of a whole decoder over one new token of each row, as one operator where it can be."""

from __future__ import annotations

import paddle

from pypkg import ops
from pypkg.models.cached_pass import attention_inputs
from pypkg.models.decoder import Decoder
from pypkg.models.layers.kv_cache import KVCache, NewTokens


def step_logits(
    decoder: Decoder, input_ids: paddle.Tensor, tokens: NewTokens, cache: KVCache
) -> paddle.Tensor | None:
    """Logits [batch, vocab_size] of the tokens after ``input_ids``; None where a pass must do it.

    Args:
        input_ids: int64 [batch, sequence], the new tokens.
        tokens: what ``cache.advance(input_ids)`` returned.
    """
    kept = [cache.step(number) for number in decoder.chunk.layers]
    if None in kept:
        return None
    weights = cache.weights_of_steps(decoder.step_weights)
    if weights is None:
        return None
    inputs = attention_inputs(decoder, input_ids.shape, tokens, cache)
    if not inputs.is_packable:
        return None
    config, rotation, rotary = decoder.config, inputs.rotation, None
    if rotation is not None:
        (position_ids,) = rotation.position_ids  # as the inputs are packable
        assert position_ids is not None  # tokens after the prompts have them
        rotary = (rotation.cos, rotation.sin, position_ids, rotation.interleaved)
    masks = [inputs.masks[each] for each in config.layer_types]
    divisor = config.query_pre_attn_scalar
    return ops.decoder_step(
        decoder.embed(input_ids, tokens.position_ids),
        weights,
        [each for each in kept if each is not None],
        [mask.window for mask in masks],
        rotary,
        masks[0].alibi_slopes,
        (config.head_dim if divisor is None else divisor) ** -0.5,
        config.attn_logit_softcapping or 0.0,
        config.norm_eps,
        config.activation,
    )
