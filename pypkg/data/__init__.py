"""Token files, samples and batches. Nothing here imports Paddle.

From bottom to top: ``tokenizers``, ``corpus`` (.bin/.idx), ``index`` (which tokens make sample i),
``datasets`` (samples), ``loading`` (batches), ``preprocess`` (text to .bin/.idx). Ranks and world
size come as values. The sample order is PaddleNLP's and stays the same in all versions.
"""

from pypkg.data.corpus.reader import IndexedDataset
from pypkg.data.corpus.writer import IndexedDatasetWriter
from pypkg.data.datasets.base import Dataset
from pypkg.data.datasets.build import (
    OrderOptions,
    build_datasets,
    build_train_valid_test_datasets,
    resolve_input_dir,
)
from pypkg.data.datasets.order import SampleOrder
from pypkg.data.index.cache import IndexCache
from pypkg.data.loading.loader import SOURCES, BatchLoader
from pypkg.data.loading.objectives import IGNORED_LABEL, Batch, BlankInfilling, Objective, causal
from pypkg.data.loading.packing import Packing
from pypkg.data.loading.prefetch import TimedIterator
from pypkg.data.loading.vocabulary import check_vocabulary

__all__ = [
    "IGNORED_LABEL",
    "SOURCES",
    "Batch",
    "BatchLoader",
    "BlankInfilling",
    "Dataset",
    "IndexCache",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "Objective",
    "OrderOptions",
    "Packing",
    "SampleOrder",
    "TimedIterator",
    "build_datasets",
    "build_train_valid_test_datasets",
    "causal",
    "check_vocabulary",
    "resolve_input_dir",
]
