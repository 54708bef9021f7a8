"""A model for lm-evaluation-harness (the package lm-eval, extra ``eval``).

    import lm_eval
    from pypkg.inference.lm_eval import PypkgLM

    results = lm_eval.simple_evaluate(PypkgLM("checkpoints"), tasks=["lambada_openai"])

The harness turns a task into requests and scores the answers. ``PypkgLM`` answers the requests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pypkg.device.threads import configure_cpu, import_paddle

_IGNORED = -100
_LONGEST = 2048  # upper limit of the default max_length
_MOST_NEW_TOKENS = 256

# (text before, text to score), and the tokens of both
_Scored = tuple[tuple[str, str], list[int], list[int]]


class PypkgLM(TemplateLM):
    """A checkpoint that answers the requests of lm-evaluation-harness, in one process.

    Args:
        checkpoint, tokenizer, dtype, device: as in ``pypkg.inference.loading.Source``.
        batch_size: requests per batch.
        max_length: maximum number of tokens that the model reads at once; longer contexts are
            truncated on the left. None: its max_position_embeddings, at most 2,048.
        num_threads: threads on a CPU; ignored if Paddle is already imported. 0: all cores.

    Raises:
        UserError: the model or its tokenizer cannot be loaded.
    """

    def __init__(
        self,
        checkpoint: str,
        tokenizer: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 8,
        max_length: int | str | None = None,
        num_threads: int | str = 0,
    ) -> None:
        super().__init__()
        if "paddle" not in sys.modules:  # otherwise its threads are already set
            configure_cpu(int(num_threads))
            import_paddle()
        from pypkg.generation.text import encode_prompt
        from pypkg.inference.loading import Source, load
        from pypkg.inference.windows import Windowing

        source = Source(checkpoint, tokenizer, dtype, device)
        self._tokens = source.need_tokenizer("lm-evaluation-harness")
        self._model = load(source)
        config = self._model.config
        self._ends = source.end_ids(config, self._tokens)
        self._batch_size = int(batch_size)
        self.max_length = int(max_length or min(config.max_position_embeddings, _LONGEST))
        start = self._tokens.eos_id
        if start is None:
            start = encode_prompt(self._tokens, config, "")[0]
        self._start = start
        self._windowing = Windowing(config, self.max_length, self.max_length - 1, start)

    @property
    def eot_token_id(self) -> int:
        """The token that the harness puts before a text without context."""
        return self._start

    def tok_encode(self, string: str, **options: Any) -> list[int]:
        """Token ids of ``string``, without special tokens around them."""
        return self._tokens.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[_Scored], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether greedy decoding yields it."""
        order = sorted(range(len(requests)), key=lambda each: -sum(map(len, requests[each][1:])))
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for first in range(0, len(order), self._batch_size):
            members = order[first : first + self._batch_size]
            found = self._score([requests[each][1:] for each in members])
            for member, score in zip(members, found, strict=True):
                scores[member] = score
        return scores

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        import paddle

        from pypkg.inference.windows import Window

        # A causal model predicts token 1 first: ``Windowing.row`` puts token 0 before it.
        least = 0 if self._windowing.config.prefix_lm else 1
        texts = [np.asarray([*context, *continuation]) for context, continuation in pairs]
        windows = []
        for number, (context, continuation) in enumerate(pairs):
            stop = len(context) + len(continuation)
            first = max(stop - self.max_length, least)
            windows.append(Window(number, first, max(len(context), first), stop))
        batch = self._windowing.batch(texts, windows)
        rows, places = np.nonzero(batch["labels"] != _IGNORED)
        wanted = batch["labels"][rows, places]
        with paddle.no_grad():
            hidden = self._model.hidden_states(paddle.to_tensor(batch["input_ids"]))
            picked = hidden[paddle.to_tensor(rows), paddle.to_tensor(places)]
            logits = self._model.logits(picked).astype("float32").numpy()
        highest = logits.max(axis=-1)
        of_all = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=-1))
        of_wanted = logits[np.arange(len(wanted)), wanted]
        for number in range(len(pairs)):
            own = rows == number
            total = float((of_wanted[own] - of_all[own]).sum(dtype=np.float64))
            yield total, bool((of_wanted[own] == highest[own]).all())

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each whole text, summed over the harness's rolling windows."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self._start,
                max_seq_len=self.max_length,
                context_len=1,
            )
            scored = [(("", ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(scored)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The completion of each context, up to the first of its ``until`` texts."""
        from pypkg.generation.text import complete
        from pypkg.models.sampling import Sampling

        written: list[str] = []
        for first, options, contexts in _grouped_by_options(requests, self._batch_size):
            until = options.get("until") or []
            count = int(options.get("max_gen_toks", _MOST_NEW_TOKENS))
            count = min(count, self.max_length - 1)
            sampled = bool(options.get("do_sample", options.get("temperature", 0)))
            sampling = Sampling(
                float(options.get("temperature", 1.0)) if sampled else 0.0,
                int(options.get("top_k", 0)),
                float(options.get("top_p", 1.0)),
            )
            found = complete(
                self._model,
                self._tokens,
                contexts,
                count,
                sampling,
                end_ids=self._ends,
                stops=[until] if isinstance(until, str) else until,
                first_number=first,
                most_prompt_tokens=self.max_length - count,
            )
            written += [each.text for each in found]
        return written


def _grouped_by_options(
    requests: Sequence[Instance], most: int
) -> Iterator[tuple[int, dict[str, Any], list[str]]]:
    """Consecutive requests with equal options, at most ``most`` of them in a group.

    Yields:
        The index of the first request, the options, and the contexts.
    """
    first = 0
    while first < len(requests):
        options = requests[first].args[1]
        stop = first + 1
        while stop < min(first + most, len(requests)) and requests[stop].args[1] == options:
            stop += 1
        yield first, options, [request.args[0] for request in requests[first:stop]]
        first = stop
