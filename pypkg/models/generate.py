"""Sampling text from a model."""

from __future__ import annotations

import numpy as np
import paddle

from pypkg.errors import UserError
from pypkg.models.decoder import Decoder


@paddle.no_grad()
def generate(
    model: Decoder,
    input_ids: paddle.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> paddle.Tensor:
    """Continues ``input_ids`` by sampling one token after the other.

    There is no key-value cache: each new token recomputes the whole prefix, so that the function
    suits short samples. The model sees the last ``max_position_embeddings`` tokens.

    Args:
        input_ids: int64 [batch, sequence], sequence at least 1.
        max_new_tokens: number of tokens to append.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: number of most likely tokens to sample from; 0: all.
        seed: of the sampling. No global random state is used.

    Returns:
        int64 [batch, sequence + max_new_tokens].

    Raises:
        UserError: ``input_ids`` has another shape, or ``temperature`` or ``top_k`` is negative.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] < 1:
        raise UserError(
            f"input_ids must be [batch, sequence] with at least one token, found shape "
            f"{input_ids.shape}"
        )
    if temperature < 0 or top_k < 0:
        raise UserError(f"temperature ({temperature}) and top_k ({top_k}) must not be negative")
    generator = np.random.default_rng(seed)
    for _ in range(max_new_tokens):
        visible = input_ids[:, -model.config.max_position_embeddings :]
        logits = model.logits(model.hidden_states(visible)[:, -1]).astype("float32").numpy()
        tokens = _choose(logits, temperature, top_k, generator)
        input_ids = paddle.concat([input_ids, paddle.to_tensor(tokens)[:, None]], axis=1)
    return input_ids


def _choose(
    logits: np.ndarray, temperature: float, top_k: int, generator: np.random.Generator
) -> np.ndarray:
    """Samples one token for each row of ``logits`` [batch, vocab]."""
    if temperature == 0:
        return logits.argmax(axis=-1)
    logits = logits.astype(np.float64) / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = np.partition(logits, -top_k, axis=-1)[:, -top_k, None]
        logits = np.where(logits < smallest_kept, -np.inf, logits)
    # The largest of logits plus Gumbel noise is a sample of their softmax.
    return (logits + generator.gumbel(size=logits.shape)).argmax(axis=-1)
