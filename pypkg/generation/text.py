"""Text that a model writes after prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from pypkg.data.tokenizers.base import Tokenizer
from pypkg.errors import UserError
from pypkg.generation.prompts import check_is_text
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.building import Model
from pypkg.models.generate import equal_groups, stream
from pypkg.models.sampling import Sampling

_UNFINISHED = "\ufffd"  # what a tokenizer makes of the first bytes of a character
_CONTEXT = 16  # prompt tokens that are decoded with the text, because spaces may depend on them


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    Attributes:
        prompt: as it was given.
        text: the generated text, without the prompt, end token and stop text.
        tokens: number of generated tokens, including those left out of ``text``.
        finish: why it ends: "end" (an end token), "stop" (a stop text) or "length".
    """

    prompt: str
    text: str
    tokens: int
    finish: str


class TextStream:
    """Detokenizes one row token by token.

    Text that may still change is held back: an incomplete character, and the beginning of a stop
    text.

    Args:
        prompt_ids: token ids before the text.
        stops: texts at which the row ends; they are left out.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._before = len(tokenizer.decode(self._ids))
        self.text = ""  # the text returned so far
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Adds a token and returns the text that it makes final."""
        self._ids.append(token)
        text = self._decoded()
        return self._emit(text[: len(text) - self._uncertain(text)])

    def finish(self) -> str:
        """The rest of the text, once no token follows."""
        return "" if self.is_stopped else self._emit(self._decoded())

    def _decoded(self) -> str:
        text = self._tokenizer.decode(self._ids)[self._before :]
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.is_stopped = bool(places)
        return text[: min(places)] if places else text

    def _uncertain(self, text: str) -> int:
        """Number of trailing characters that may still change or become part of a stop text."""
        if self.is_stopped:
            return 0
        begun = [
            length
            for stop in self._stops
            for length in range(1, len(stop))
            if text.endswith(stop[:length])
        ]
        return max([*begun, len(text) - len(text.rstrip(_UNFINISHED))])

    def _emit(self, text: str) -> str:
        new, self.text = text[len(self.text) :], text
        return new


def complete(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    end_ids: Collection[int] = (),
    stops: Sequence[str] = (),
    with_bos: bool = False,
    first_number: int = 0,
    most_prompt_tokens: int | None = None,
    on_text: Callable[[int, str], None] = lambda row, text: None,
) -> list[Completion]:
    """Completes ``prompts`` as one batch.

    Every rank of a layout must call this with the same arguments.

    Args:
        model: in evaluation mode.
        max_new_tokens, sampling, end_ids: as in ``pypkg.models.generate.stream``.
        stops: texts at which a row ends.
        with_bos: as in ``encode_prompt``.
        first_number: number of the first prompt. A prompt's random numbers depend on its number.
        most_prompt_tokens: longer prompts are truncated on the left to this length; None: never.
        on_text: called with the index of a prompt in ``prompts`` and the next piece of its text.

    Raises:
        UserError: as in ``encode_prompt`` and ``stream``.
    """
    ids = [encode_prompt(tokenizer, model.config, prompt, with_bos) for prompt in prompts]
    if most_prompt_tokens is not None:
        ids = [row[-most_prompt_tokens:] for row in ids]
    streams = [TextStream(tokenizer, row, stops) for row in ids]
    counts, finishes = [0] * len(prompts), ["length"] * len(prompts)
    for members in equal_groups(model.config, ids):
        open_rows = set(members)
        group = [ids[row] for row in members]
        numbers = [first_number + row for row in members]
        for tokens in stream(model, group, max_new_tokens, sampling, end_ids, numbers):
            for row, token in zip(members, tokens, strict=True):
                if token is None or row not in open_rows:
                    continue
                counts[row] += 1
                if token in end_ids:
                    finishes[row] = "end"
                else:
                    on_text(row, streams[row].add(token))
                    if streams[row].is_stopped:
                        finishes[row] = "stop"
                if finishes[row] != "length":
                    open_rows.remove(row)
            if not open_rows:
                break
    for row, each in enumerate(streams):
        on_text(row, each.finish())
    return [
        Completion(prompt, each.text, count, finish)
        for prompt, each, count, finish in zip(prompts, streams, counts, finishes, strict=True)
    ]


def encode_prompt(
    tokenizer: Tokenizer, config: ModelConfig, prompt: str, with_bos: bool = False
) -> list[int]:
    """The token ids of a prompt, at least one.

    A ``prefix_lm`` model gets a blank after the prompt, as in its pre-training. For another model
    an empty prompt becomes the tokenizer's bos_token, else its eos_token, else token 0.

    Args:
        with_bos: whether to put the bos_token first.

    Raises:
        UserError: the prompt is not Unicode, the tokenizer has no bos_token, or a token id is
            not below the model's vocab_size.
    """
    check_is_text(prompt)
    ids = tokenizer.encode(prompt)
    if with_bos:
        if tokenizer.bos_id is None:
            raise UserError(f"{tokenizer.file} names no bos_token; leave out --bos")
        ids = [tokenizer.bos_id, *ids]
    if config.prefix_lm:
        gmask, sop = config.gmask_token_id, config.sop_token_id
        assert gmask is not None and sop is not None  # ModelConfig requires them
        ids = [*ids, gmask, sop]
    elif not ids:
        starts = (tokenizer.bos_id, tokenizer.eos_id, 0)
        ids = [next(each for each in starts if each is not None)]
    if max(ids) >= config.vocab_size:
        raise UserError(
            f"{tokenizer.file} gives {prompt[:40]!r} the token {max(ids)}, but vocab_size of the "
            f"model is {config.vocab_size}; give the tokenizer of the model"
        )
    return ids


def end_tokens(config: ModelConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """The token ids that end a text: eos_token_id of config.json and the tokenizer's eos_token."""
    named = config.eos_token_id
    ends = named if isinstance(named, list) else [named]
    return frozenset(each for each in (*ends, tokenizer.eos_id) if each is not None)
