"""Texts that the model writes after fixed prompts as it learns: into samples.jsonl and the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from pypkg.console import progress
from pypkg.data.tokenizers.base import Tokenizer
from pypkg.errors import UserError
from pypkg.files import append_line, read_lines, write_file
from pypkg.generation.text import Completion, complete, encode_prompt, end_tokens
from pypkg.models.building import Model
from pypkg.models.generate import room_for
from pypkg.models.sampling import Sampling
from pypkg.parallel.comm.collective import is_first_rank
from pypkg.parallel.launch import watchdog
from pypkg.training.reporting.trackers import TrackerReporter

logger = logging.getLogger("pypkg")

_TEMPERATURE, _TOP_K = 0.8, 40
_WAY_OUT = "Move it away, or set output_dir to another folder."


class TextSamples:
    """The same prompts and random numbers each time, so that texts of two steps compare.

    samples.jsonl has a line for each text: {"step": N, "prompt": "...", "text": "..."}; the text
    is what the model wrote, without the prompt. All ranks of a run have one of these; the first
    writes.

    Args:
        model: of this rank.
        prompts: at least one.
        tokens: most tokens of a text.
        seed: of the choices.
        file: samples.jsonl of the run.
        trackers: receive the texts too; none but on the first rank.

    Raises:
        UserError: a prompt is too long for the model, or has tokens that the model lacks.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        tokens: int,
        seed: int,
        file: Path,
        trackers: Sequence[TrackerReporter] = (),
    ) -> None:
        self._model, self._tokenizer, self._prompts = model, tokenizer, prompts
        self._tokens, self._seed, self._file = tokens, seed, file
        self._trackers = trackers
        for prompt in prompts:
            room_for(model.config, [encode_prompt(tokenizer, model.config, prompt)], tokens)

    def write(self, step: int) -> list[Completion]:
        """A text after each prompt. All ranks have to call it.

        Raises:
            UserError: the file cannot be written.
        """
        watchdog.at(step, "writing samples of text")
        self._model.eval()
        samples = complete(
            self._model,
            self._tokenizer,
            self._prompts,
            self._tokens,
            Sampling(_TEMPERATURE, _TOP_K, seed=self._seed),
            end_ids=end_tokens(self._model.config, self._tokenizer),
            on_text=lambda row, text: progress.report("writing samples of text"),
        )
        self._model.train()
        if is_first_rank():
            for each in samples:
                logger.info("step %d, %r -> %r", step, each.prompt, each.text)
                self._append({"step": step, "prompt": each.prompt, "text": each.text})
        for tracker in self._trackers:
            tracker.report_texts(step, [(each.prompt, each.text) for each in samples])
        return samples

    def rewind(self, step: int) -> None:
        """Drops the texts after ``step``, whose steps will be taken again.

        Raises:
            UserError: the file cannot be read or written, or holds something else.
        """
        if not is_first_rank():
            return
        lines, torn = read_lines(self._file, _WAY_OUT)
        kept = [line for line in lines if self._step_of(line) <= step]
        if torn or len(kept) < len(lines):
            write_file(self._file, b"".join(line + b"\n" for line in kept))

    def _step_of(self, line: bytes) -> int:
        try:
            step = json.loads(line)["step"]
        except (ValueError, RecursionError, TypeError, KeyError):
            step = None
        if type(step) is not int:
            raise UserError(
                f"{self._file} has a line that this program does not write: {line[:60]!r}. "
                f"{_WAY_OUT}"
            )
        return step

    def _append(self, row: dict[str, object]) -> None:
        try:
            append_line(self._file, json.dumps(row, ensure_ascii=False).encode())
        except OSError as error:
            raise UserError(
                f"{self._file} cannot be written: {error.strerror}. Free some space, then start "
                "the same command again."
            ) from error
