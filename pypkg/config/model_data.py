"""The settings that say which model is trained on which data, and what else is done."""

from __future__ import annotations

from dataclasses import dataclass

from pypkg.config.setting import setting


@dataclass(frozen=True, kw_only=True)
class ModelDataSettings:
    """The first fields of ``Settings``: PaddleNLP's ModelArguments and DataArguments, and more."""

    model_name_or_path: str = setting(
        "",
        "folder in Hugging Face format, or the name of a shipped model configuration",
        required=True,
    )
    tokenizer_name_or_path: str | None = setting(
        None, "folder of the tokenizer; by default model_name_or_path"
    )
    input_dir: str = setting(
        "", "folder of .bin/.idx files, or 'weight1 prefix1 weight2 prefix2 ...'", required=True
    )
    output_dir: str = setting("", "folder for checkpoints, metrics and logs", required=True)
    split: str = setting(
        "949,50,1",
        "proportions of the documents for training, validation and test; missing ones are 0",
    )
    data_cache: str | None = setting(
        None, "folder that keeps the sample indices; by default index-cache beside the data"
    )
    share_folder: bool = setting(
        False,
        "all machines see the folder of the sample indices: the first process of all builds them, "
        "otherwise the first of each machine",
    )
    max_seq_length: int = setting(1024, "tokens in a sample", at_least=1)
    continue_training: bool = setting(
        False, "start from the weights in model_name_or_path instead of random ones"
    )
    num_hidden_layers: int | None = setting(
        None, "overrides the depth in the model's configuration", at_least=1
    )
    initializer_range: float | None = setting(
        None, "overrides the standard deviation of random weights", above=0
    )

    # What to do
    do_train: bool = setting(False, "run the training loop")
    do_eval: bool = setting(False, "evaluate on the validation split")
    do_predict: bool = setting(False, "after training, evaluate on the test split")
    seed: int = setting(
        42,
        "seed of the random weights and of the order of samples",
        at_least=0,
        at_most=2**32 - 1,  # numpy.random.RandomState takes no larger one
    )
    max_steps: int = setting(
        -1, "number of optimizer steps of the whole run", at_least=1, required=True
    )
    per_device_train_batch_size: int = setting(8, "samples in a micro batch", at_least=1)
    per_device_eval_batch_size: int = setting(8, "samples in an evaluation batch", at_least=1)
    gradient_accumulation_steps: int = setting(1, "micro batches in an optimizer step", at_least=1)
    skip_data_intervals: tuple[tuple[int, ...], ...] = setting(
        (),
        "[[first, last], ...]: numbers of steps, from 1, whose samples are skipped",
    )
    dataloader_num_workers: int = setting(
        0, "threads that read batches ahead; 0 reads in the training thread", at_least=0
    )
    distributed_dataloader: bool = setting(
        False, "one of the ranks that train on the same samples reads and broadcasts them"
    )
