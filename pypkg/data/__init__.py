"""From token files to batches. Nothing here imports Paddle."""

from pypkg.data.datasets import Dataset, build_train_valid_test_datasets, resolve_input_dir
from pypkg.data.indexed_dataset import IndexedDataset
from pypkg.data.indexed_dataset_writer import IndexedDatasetWriter
from pypkg.data.loader import BatchLoader
from pypkg.data.objectives import Batch, BlankInfilling, Objective, causal
from pypkg.data.vocabulary import check_vocabulary

__all__ = [
    "Batch",
    "BatchLoader",
    "BlankInfilling",
    "Dataset",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "Objective",
    "build_train_valid_test_datasets",
    "causal",
    "check_vocabulary",
    "resolve_input_dir",
]
