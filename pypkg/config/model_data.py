"""The settings of the model, of the data, and of the tasks of a run."""

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
        "",
        "training data: a folder of .bin/.idx files, or 'weight1 prefix1 weight2 prefix2 ...'",
        required=True,
    )
    output_dir: str = setting("", "folder for checkpoints, metrics and logs", required=True)
    split: str = setting(
        "949,50,1",
        "shares of the documents for training, validation and test; missing ones are 0",
    )
    data_cache: str | None = setting(
        None, "folder for the sample indices; by default index-cache beside the data"
    )
    share_folder: bool = setting(
        False,
        "whether all machines share the folder of the sample indices. true: rank 0 builds them; "
        "false: the first rank of each machine does",
    )
    max_seq_length: int = setting(1024, "tokens in a sample", at_least=1)
    continue_training: bool = setting(
        False, "start from the weights in model_name_or_path instead of random weights"
    )
    num_hidden_layers: int | None = setting(
        None, "number of layers, instead of that in the model's config.json", at_least=1
    )
    initializer_range: float | None = setting(
        None,
        "standard deviation of random weights, instead of that in the model's config.json",
        above=0,
    )

    mup_base_width: int | None = setting(
        None,
        "muP: hidden_size of the model for which learning_rate and initializer_range were tuned; "
        "both are scaled for the matrices of this model",
        at_least=1,
    )

    # What to do
    do_train: bool = setting(False, "run the training loop")
    do_eval: bool = setting(False, "evaluate on the validation split")
    do_predict: bool = setting(False, "after training, evaluate on the test split")
    seed: int = setting(
        42,
        "seed of random weights, dropout and the order of samples",
        at_least=0,
        at_most=2**32 - 1,  # the limit of numpy.random.RandomState
    )
    max_steps: int = setting(
        -1, "number of optimizer steps of the whole run", at_least=1, required=True
    )
    per_device_train_batch_size: int = setting(8, "samples in a micro batch of a rank", at_least=1)
    per_device_eval_batch_size: int = setting(
        8, "samples in an evaluation batch of a rank", at_least=1
    )
    gradient_accumulation_steps: int = setting(
        1, "micro batches of a rank in an optimizer step", at_least=1
    )
    skip_data_intervals: tuple[tuple[int, ...], ...] = setting(
        (),
        "[[first, last], ...]: ranges of steps, counted from 1, that are skipped: their samples "
        "are not trained on",
    )
    dataloader_num_workers: int = setting(
        0, "threads that read batches ahead; 0: the training thread reads them", at_least=0
    )
    distributed_dataloader: bool = setting(
        False,
        "of the ranks that train on the same samples, only one reads them, and broadcasts them to "
        "the others",
    )
