"""The samples of a run: datasets, their order in checkpoints, and batches."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pypkg.config import Settings
from pypkg.data import (
    Batch,
    BatchLoader,
    BlankInfilling,
    Dataset,
    IndexCache,
    IndexedDataset,
    Objective,
    OrderOptions,
    Packing,
    SampleOrder,
    build_datasets,
    causal,
    check_vocabulary,
    resolve_input_dir,
)
from pypkg.errors import UserError
from pypkg.models import ModelConfig
from pypkg.parallel import mesh
from pypkg.training.checkpoint.folders import STATE_FILE
from pypkg.training.feed.batch_size import BatchSize
from pypkg.training.feed.distributed_batches import SharedBatches, from_reader, is_reader
from pypkg.training.feed.same_data import check_same_data
from pypkg.training.state import TrainerState

logger = logging.getLogger("pypkg")

_MOST_SAMPLES = 2**38  # 35 trillion tokens in samples of 128
TEST_ITERS = 100  # PaddleNLP's number of batches for do_predict
_SPLITS = {"train": "training", "valid": "validation", "test": "test"}


class Samples:
    """The train, valid and test samples of a run.

    Attributes:
        sources: names of the corpora by split ("train", "valid", "test"); a split that is empty or
            not used is missing.
        labels_vary: whether samples may differ in their number of labels.
    """

    def __init__(
        self,
        settings: Settings,
        config: ModelConfig,
        state: TrainerState,
        checkpoint: Path | None = None,
    ) -> None:
        """
        Args:
            state: trainer state of the checkpoint to resume, with its order of samples.
            checkpoint: its folder, which errors name.

        Raises:
            UserError: the data cannot be read, are too small, do not fit model or settings, or
                differ between ranks.
        """
        self._settings = settings
        self._config = config
        self._checkpoint = checkpoint
        self._objective = objective_of(
            config, settings.max_seq_length, settings.seed, settings.model_name_or_path
        )
        self._packing = packing_of(settings, config)
        self._order: SampleOrder | None = None
        self._datasets: dict[str, Dataset] = {}
        self._one_reads = settings.distributed_dataloader and not _reads_alone()
        self.sources: dict[str, list[str]] = (
            from_reader(lambda: self._open(state)) if self._one_reads else self._open(state)
        )
        check_same_data(self._corpora() if is_reader() or not self._one_reads else None)
        self.labels_vary = self._has_loss_mask() or config.prefix_lm or settings.eod_mask_loss

    def train_batches(self, start: int) -> Iterator[Batch]:
        """This rank's micro batches from the ``start``-th sample of the run on.

        Each holds int64 ``input_ids`` and ``labels`` of shape [batch, sequence], and what objective
        and packing add (pypkg.data.loading).
        """
        return self._batches("train", self._settings.per_device_train_batch_size, start)

    def eval_batches(self, split: str = "valid") -> Iterator[Batch]:
        """This rank's batches of an evaluation on the split "valid" or "test".

        They are the first eval_iters batches of the split (TEST_ITERS of "test"), or all of them
        with eval_iters -1. In the second case the last batch is padded with rows without labels.
        """
        s = self._settings
        batches = self._batches(split, s.per_device_eval_batch_size, 0)
        if s.whole_splits:
            return batches
        return islice(batches, s.eval_iters if split == "valid" else TEST_ITERS)

    def record(self, state: TrainerState) -> None:
        """Stores the order of samples, and the samples consumed from each corpus, in ``state``."""
        if self._order is not None:
            positions = self._datasets["train"].samples_consumed(state.consumed_samples)
            state.data_order = self._order.to_json(positions)

    def usage(self, consumed_samples: int) -> list[dict[str, Any]]:
        """Exact numbers of samples and tokens that training has consumed from each corpus.

        ``epochs`` is the tokens consumed, divided by the corpus' tokens in the train split.
        """
        if self._order is None:
            return []
        samples_consumed = self._datasets["train"].samples_consumed(consumed_samples)
        length = self._settings.max_seq_length
        return [
            {
                "corpus": name,
                "samples": samples,
                "tokens": samples * length,
                "epochs": samples * length / corpus.tokens,
                "weight": weight,
            }
            for name, corpus, samples, weight in zip(
                self.sources["train"], self._order.corpora, samples_consumed, self._order.weights
            )
        ]

    def documents(self, first: int, stop: int) -> dict[str, list[int]]:
        """Documents by corpus that training samples ``first`` to ``stop`` - 1 contain.

        Rank 0 may call this, and other ranks that read samples.
        """
        dataset, found = self._datasets["train"], dict[str, set[int]]()
        for sample in range(first, stop):
            corpus, documents = dataset.documents(sample)
            name = self.sources["train"][dataset.corpora.index(corpus)]
            found.setdefault(name, set()).update(documents)
        return {name: sorted(documents) for name, documents in found.items()}

    def prefixes(self) -> list[str]:
        """Paths of the corpora without suffixes, on ranks that read samples; rank 0 does."""
        return [corpus.prefix for corpus in self._corpora()]

    def _training_samples(self, state: TrainerState) -> str:
        """The settings that determine the number of training samples, for an error message."""
        s = self._settings
        return (
            f"consumed_samples of the checkpoint is {state.consumed_samples:,} "
            f"({self._checkpoint or 'none'}), max_steps {s.max_steps:,} and a step takes "
            f"{s.per_device_train_batch_size * s.gradient_accumulation_steps:,} per rank. Lower "
            "max_steps, or resume from another checkpoint."
        )

    def _open(self, state: TrainerState) -> dict[str, list[str]]:
        s, shards = self._settings, mesh.current().sample_shards
        numbers = _wanted_samples(s, state, shards)
        options = OrderOptions(
            kind=s.sample_order,
            blend_by=s.blend_by,
            blend_temperature=s.blend_temperature,
            earlier=_earlier_order(state, self._checkpoint),
            consumed=state.consumed_samples,
        )
        prefixes = resolve_input_dir(s.input_dir, weighted=s.blend_by == "weights")
        cache = IndexCache(
            s.data_cache,
            s.share_folder,
            rank=mesh.launched_rank(),
            local_rank=mesh.launched_local_rank(),
        )
        try:
            most = max(number for number in numbers if number is not None)
            if most > _MOST_SAMPLES:
                raise MemoryError
            datasets, self._order = build_datasets(
                prefixes, s.split, s.max_seq_length, numbers, s.seed, options, cache=cache
            )
        except MemoryError as error:
            is_train = numbers[0] == most
            what = self._training_samples(state) if is_train else _evaluation_samples(s)
            raise UserError(
                f"the order of {most:,} samples does not fit into memory: {what}"
            ) from error
        for (split, name), wanted, dataset in zip(_SPLITS.items(), numbers, datasets):
            if dataset is not None:
                check_vocabulary(dataset, self._config.vocab_size)
                self._datasets[split] = dataset
            elif wanted != 0:
                raise UserError(
                    f"the {name} split holds no document: split is {s.split!r} and input_dir "
                    f"{s.input_dir!r} has too few documents for it. Change split, or turn off "
                    "what needs it (do_eval, do_predict)."
                )
        self._log_evaluation_size(numbers)
        return {
            split: short_names([corpus.prefix for corpus in dataset.corpora])
            for split, dataset in self._datasets.items()
        }

    def _corpora(self) -> list[IndexedDataset]:
        """The corpora of all splits, each once, in the order of the blend."""
        found = {
            corpus.prefix: corpus
            for dataset in self._datasets.values()
            for corpus in dataset.corpora
        }
        return list(found.values())

    def _log_evaluation_size(self, numbers: list[int | None]) -> None:
        """Logs how many samples an evaluation takes. ``numbers``: see ``_wanted_samples``."""
        s = self._settings
        batch = s.per_device_eval_batch_size * mesh.current().sample_shards
        for split, wanted, batches in zip(_SPLITS, numbers, (0, s.eval_iters, TEST_ITERS)):
            if not batches or wanted == 0 or split not in self._datasets:
                continue
            there = self._datasets[split].samples_per_epoch
            taken = there if s.whole_splits else batches * batch
            logger.info(
                "an evaluation takes %s samples of the %s split, which has %s%s",
                f"{taken:,}",
                _SPLITS[split],
                f"{there:,}",
                ": some of them count more than once" if taken > there else "",
            )

    def _has_loss_mask(self) -> bool:
        def read() -> bool:
            return any(dataset.has_loss_mask for dataset in self._datasets.values())

        return from_reader(read) if self._one_reads else read()

    def _batches(self, split: str, batch_size: int, start: int) -> Iterator[Batch]:
        if self._one_reads and not is_reader():
            return SharedBatches(None)
        current = mesh.current()
        batches = iter(
            BatchLoader(
                self._datasets[split],
                batch_size,
                start,
                objective=self._objective,
                packing=self._packing,
                with_sources=len(self.sources[split]) > 1,
                data_parallel_rank=current.sample_shard,
                data_parallel_size=current.sample_shards,
                vocab_size=self._config.vocab_size,
                threads=self._settings.dataloader_num_workers,
                every_sample=self._settings.whole_splits and split != "train",
            )
        )
        return SharedBatches(batches) if self._one_reads else batches


def _reads_alone() -> bool:
    """Whether no other rank trains on the same samples."""
    current = mesh.current()
    return current.tensor_degree * current.context_degree * current.pipeline_degree == 1


def _earlier_order(state: TrainerState, checkpoint: Path | None) -> SampleOrder | None:
    """The order of samples in a checkpoint; None for a new run."""
    if not state.data_order:
        return None
    try:
        return SampleOrder.from_json(state.data_order)
    except ValueError as error:
        raise UserError(
            f"{Path(checkpoint or '', STATE_FILE)}: data_order is not valid: {error}. Resume from "
            "another checkpoint, or set overwrite_output_dir to start anew."
        ) from error


def _wanted_samples(s: Settings, state: TrainerState, shards: int) -> list[int | None]:
    """Number of samples of train, valid and test that the run needs, consumed ones included.

    None: the whole split, each sample once.
    """
    steps = max(s.max_steps - state.global_step, 0)
    assert s.eval_steps is not None and s.eval_iters is not None  # Settings derives them
    evaluations = s.max_steps // s.eval_steps + 1 if s.evaluates or s.do_eval else 0
    train = BatchSize(s, shards).after(state.consumed_samples, steps) * s.do_train
    if s.whole_splits:
        return [train, None if evaluations else 0, None if s.do_predict else 0]
    evaluated = s.per_device_eval_batch_size * shards
    return [
        train,
        evaluated * s.eval_iters * evaluations,
        evaluated * TEST_ITERS if s.do_predict else 0,
    ]


def _evaluation_samples(s: Settings) -> str:
    """The settings that determine the number of evaluation samples, for an error message."""
    return (
        f"eval_iters is {s.eval_iters:,}, per_device_eval_batch_size "
        f"{s.per_device_eval_batch_size:,}, and there is an evaluation every {s.eval_steps:,} of "
        f"{s.max_steps:,} steps. Lower one of the first two, or set eval_iters to -1."
    )


def short_names(prefixes: list[str]) -> list[str]:
    """The shortest path suffixes that differ; equal paths are numbered."""
    parts = [os.path.abspath(prefix).split(os.sep) for prefix in prefixes]
    depth = 1
    while len({tuple(path[-depth:]) for path in parts}) < len({tuple(path) for path in parts}):
        depth += 1
    names = ["/".join(path[-depth:]) for path in parts]
    return [
        name if names.count(name) == 1 else f"{name}#{names[:number].count(name) + 1}"
        for number, name in enumerate(names)
    ]


def objective_of(
    config: ModelConfig, seq_length: int, seed: int, model: str | None = None
) -> Objective:
    """The objective of a model: blank infilling for a ``prefix_lm`` model, else the next token.

    Args:
        model: name or folder of the model, which the error names.

    Raises:
        UserError: the configuration lacks the token that ends a blank.
    """
    if not config.prefix_lm:
        return causal
    eop = config.eos_token_id
    eop = eop[0] if isinstance(eop, list) else eop
    if eop is None:
        raise UserError(
            f"the config.json of the model {model or ''} lacks eos_token_id, which ends what fills "
            "a blank; add it, as the original model has it"
        )
    mask, gmask, sop = config.mask_token_id, config.gmask_token_id, config.sop_token_id
    assert mask is not None and gmask is not None and sop is not None  # ModelConfig requires them
    return BlankInfilling(
        seq_length=seq_length,
        mask_id=mask,
        gmask_id=gmask,
        sop_id=sop,
        eop_id=eop,
        two_dimensional=config.position_encoding_2d,
        seed=seed,
    )


def packing_of(settings: Settings, config: ModelConfig) -> Packing | None:
    """How documents within a sample are separated; None: not at all.

    Raises:
        UserError: the model does not support the separation.
    """
    packing = Packing(
        reset_attention_mask=settings.reset_attention_mask,
        reset_position_ids=settings.reset_position_ids,
        eod_mask_loss=settings.eod_mask_loss,
    )
    if not packing:
        return None
    asked = ", ".join(f.name for f in dataclasses.fields(packing) if getattr(packing, f.name))
    if config.prefix_lm:
        raise UserError(
            f"{asked} keep the documents of a sample apart, but a {config.model_type} model is "
            "trained on one context for the whole sample, which it sees in both directions, and "
            "on the blanks in it; leave them out"
        )
    resets = packing.reset_attention_mask or packing.reset_position_ids
    lengths = (config.logn_attention_length, config.dynamic_ntk_length)
    longest = min((length for length in lengths if length is not None), default=None)
    if resets and longest is not None and settings.max_seq_length > longest:
        raise UserError(
            f"{asked} keep the documents of a sample apart, but beyond {longest} tokens a "
            f"{config.model_type} model's attention depends on the length of the whole sample, "
            f"and max_seq_length is {settings.max_seq_length}; set max_seq_length to at most "
            f"{longest}, or leave them out"
        )
    if packing.reset_position_ids and config.position_embedding not in ("rope", "learned"):
        if not packing.reset_attention_mask:
            raise UserError(
                "reset_position_ids is true, but the model's position_embedding is "
                f"{config.position_embedding}, which knows distances between tokens alone; set "
                "reset_attention_mask, after which all distances lie within a document, or leave "
                "reset_position_ids out"
            )
        # The model uses distances only, and those within a document do not depend on its position.
        packing = dataclasses.replace(packing, reset_position_ids=False)
    return packing
