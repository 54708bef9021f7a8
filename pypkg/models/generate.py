"""Continuing token sequences with a model, one token after the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import paddle

from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.building import Model
from pypkg.models.cached_pass import cached_pass
from pypkg.models.cached_step import step_logits
from pypkg.models.decoder import Decoder
from pypkg.models.layers.kv_cache import KVCache
from pypkg.models.layers.positions import depends_on_length, inverse_frequencies
from pypkg.models.sampling import Sampler, Sampling
from pypkg.parallel.comm.collective import broadcast_from_first_rank

Prompts = Sequence[Sequence[int]]
_PLAIN = Sampling()
_PADDING = 0  # the token of padding, which no other token sees


def generate(
    model: Model,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling = _PLAIN,
    end_ids: Collection[int] = (),
) -> list[list[int]]:
    """The tokens that follow each of ``prompts``, without the one that ends them.

    Arguments and errors are those of ``stream``. Prompts may differ in length for every model.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for members in equal_groups(model.config, prompts):
        group = [prompts[row] for row in members]
        for tokens in stream(model, group, max_new_tokens, sampling, end_ids, members):
            for row, token in zip(members, tokens, strict=True):
                if token is not None and token not in end_ids:
                    rows[row].append(token)
    return rows


def equal_groups(config: ModelConfig, prompts: Prompts) -> list[list[int]]:
    """The numbers of the prompts that may be given to ``stream`` together."""
    if not depends_on_length(config):
        return [list(range(len(prompts)))]
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    return list(by_length.values())


def stream(
    model: Model,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling = _PLAIN,
    end_ids: Collection[int] = (),
    numbers: Sequence[int] | None = None,
) -> Iterator[list[int | None]]:
    """Yields the next token of each row, until all rows have ended.

    Every rank of a layout has to call it, with the same arguments, and gets the same tokens. The
    model has to be in evaluation mode; sequence parallelism is not supported, since it divides the
    tokens of a pass.

    Args:
        model: in evaluation mode.
        prompts: at least one, each of at least one token. Their lengths have to be equal if the
            rotary frequencies of the model depend on the length.
        max_new_tokens: most tokens of a row. A model with learned positions stops earlier, where
            its positions end.
        sampling: how tokens are chosen.
        end_ids: tokens after which a row has ended; they are yielded too.
        numbers: of the prompts, which the random numbers of each depend on; None: 0, 1, ...

    Yields:
        The tokens of one step, None for rows that have ended before.

    Raises:
        UserError: a prompt is empty, or has more tokens than the model has learned positions.
    """
    room = room_for(model.config, prompts, max_new_tokens)
    sampler = Sampler(sampling, range(len(prompts)) if numbers is None else numbers)
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    rows = np.full([len(prompts), longest], _PADDING, dtype=np.int64)
    for row, (pad, prompt) in enumerate(zip(padding, prompts, strict=True)):
        rows[row, pad:] = prompt
    cache, new = KVCache(model.config, padding), rows
    frequencies = _frequencies(model.config, longest)
    has_ended = np.zeros(len(prompts), dtype=bool)
    ends = np.asarray(sorted(end_ids), dtype=np.int64)
    for _ in range(room):
        logits = next_logits(model, paddle.to_tensor(new), cache).astype("float32").numpy()
        tokens = broadcast_from_first_rank(sampler.choose(logits))
        yield [None if ended else int(token) for ended, token in zip(has_ended, tokens)]
        has_ended = has_ended | np.isin(tokens, ends)
        if has_ended.all():
            return
        new = tokens[:, None]
        if frequencies is None:
            continue
        rows, before = np.concatenate([rows, new], axis=1), frequencies
        frequencies = _frequencies(model.config, rows.shape[1])
        if frequencies != before:
            cache, new = KVCache(model.config, padding), rows  # all keys have changed


@paddle.no_grad()
def next_logits(model: Model, input_ids: paddle.Tensor, cache: KVCache) -> paddle.Tensor:
    """Logits of the token after the last of ``input_ids``, without gradient; they join ``cache``.

    Every rank of a layout has to call it.

    Args:
        input_ids: int64 [batch, sequence], the tokens after those in the cache.

    Returns:
        [batch, vocab_size], on all ranks.
    """
    tokens = cache.advance(input_ids)
    if isinstance(model, Decoder):
        logits = step_logits(model, input_ids, tokens, cache)
        if logits is not None:
            return logits
        return model.logits(cached_pass(model, None, input_ids, tokens, cache)[:, -1])
    return model.next_logits(input_ids, tokens, cache)


def _frequencies(config: ModelConfig, length: int) -> list[float] | None:
    """The rotary frequencies, where they depend on the length."""
    if not depends_on_length(config):
        return None
    frequencies: list[float] = inverse_frequencies(config, length, training=False)[0].tolist()
    return frequencies


def room_for(config: ModelConfig, prompts: Prompts, max_new_tokens: int) -> int:
    """How many tokens may follow the longest prompt.

    Raises:
        UserError: see ``stream``.
    """
    if not prompts or not all(map(len, prompts)):
        raise UserError("a prompt holds no token; give each at least one")
    lengths = {len(prompt) for prompt in prompts}
    if depends_on_length(config) and len(lengths) > 1:
        raise UserError(
            f"prompts of {min(lengths)} to {max(lengths)} tokens are given together to a model "
            "whose rotary frequencies depend on the length; give those of equal length together"
        )
    if config.position_embedding != "learned":
        return max_new_tokens
    positions, longest = config.max_position_embeddings, max(lengths)
    if longest > positions:
        raise UserError(
            f"a prompt has {longest} tokens, but the model has learned positions for "
            f"max_position_embeddings ({positions}); use a shorter prompt"
        )
    return min(max_new_tokens, positions - longest + 1)
