"""From token files to batches. Nothing here imports Paddle."""

from pypkg.data.dataset import Dataset
from pypkg.data.datasets import (
    OrderOptions,
    build_datasets,
    build_train_valid_test_datasets,
    resolve_input_dir,
)
from pypkg.data.index_cache import IndexCache
from pypkg.data.indexed_dataset import IndexedDataset
from pypkg.data.indexed_dataset_writer import IndexedDatasetWriter
from pypkg.data.loader import SOURCES, BatchLoader
from pypkg.data.objectives import IGNORED_LABEL, Batch, BlankInfilling, Objective, causal
from pypkg.data.packing import Packing
from pypkg.data.prefetch import TimedIterator
from pypkg.data.sample_order import SampleOrder
from pypkg.data.vocabulary import check_vocabulary

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
