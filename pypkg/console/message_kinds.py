"""The kinds of error messages, with the phrases that identify them, the cause, and the way out.

``troubleshooting.py`` writes docs/guides/troubleshooting.md from them. A message belongs to the
first kind with a phrase that it contains, so specific kinds come before general ones.
"""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of message.

    Attributes:
        title: heading of the page; its anchor is the title in lower case, with hyphens.
        phrases: regular expressions; ``re.search`` finds one of them in the message.
        example: the beginning of such a message.
        cause, way_out: Markdown, a few sentences each.
    """

    title: str
    phrases: tuple[str, ...]
    example: str
    cause: str
    way_out: str


_SETTINGS = (
    Kind(
        "Unknown setting",
        ("unknown setting '", "no setting has .* in its name"),
        "unknown setting 'max_stepz' on the command line; did you mean max_steps?",
        "A key of the settings file or an option of the command line is no setting.",
        "Correct the name. `pypkg config WORD` lists the settings about WORD.",
    ),
    Kind(
        "Settings file",
        ("the settings file ", "the first argument is ", "is not valid (JSON|YAML)",
         "is not usable (JSON|YAML)", "is not JSON: ", r'expected an object \{\"key\"',
         "must hold a JSON object", "occurs more than once in"),
        "run.json is not valid JSON: Expecting ',' delimiter at line 3, column 3",
        "The file is missing, is not JSON or YAML in UTF-8, or holds something other than an "
        "object.",
        "The message gives the line and the column. JSON has no comments and no comma after the "
        "last item. Give each setting once.",
    ),
    Kind(
        "Layout and number of processes",
        ("_parallel_degree", "virtual_pp_degree", "sharding_degree", "sharding is '",
         "model chunks"),
        "tensor_parallel_degree (2) x pipeline_parallel_degree (2) needs a multiple of 4 "
        "processes",
        "The degrees of parallelism do not fit the number of processes, the sizes of the model, "
        "or one another.",
        "The number of processes is a multiple of the product of the degrees. "
        "[parallelism.md](../parallelism.md) says which sizes each degree divides. `pypkg plan "
        "run.json --gpus N` looks for a layout that fits.",
    ),
    Kind(
        "Output_dir in use",
        ("is in use by ", "was taken over by", "the lock .* cannot be taken",
         "was removed or replaced while the run", "another process is writing"),
        "output_dir 'checkpoints' is in use by process 4242 on host a",
        "Another run writes into the folder, or has taken it over. Only one run at a time may "
        "write there.",
        "Wait for the other run, end it, or set `output_dir` to another folder. If the named "
        "process no longer runs, remove the file `.lock` that the message names "
        "([training.md](../training.md#one-run-for-each-output_dir)).",
    ),
    Kind(
        "Output_dir not shared",
        ("is not the same folder on all machines", "is in none of .* wrote it"),
        "output_dir checkpoints is not the same folder on all machines",
        "Machines of one run see different files under the same path.",
        "Use a file system that all machines mount. Without one, set `allow_local_output` "
        "([several_hosts.md](../several_hosts.md)).",
    ),
    Kind(
        "Ranks that differ",
        ("the ranks read different data", "the ranks have different settings"),
        "the ranks read different data: corpus web has 9,000 tokens in 90 sequences, ...",
        "A machine has another version of the data, of `run.json` or of pypkg than the others.",
        "The message names the ranks and their machines. Copy the data, the settings file or the "
        "environment of one machine to the others ([several_hosts.md](../several_hosts.md)).",
    ),
)  # fmt: skip
_TRAINING = (
    Kind(
        "Loss not finite",
        (r"the (loss|gradient norm) is (nan|-?inf|[\d.e+]+ at step)", "not finite in float16",
         "NaN or infin", "Lower learning_rate or lengthen the warm-up"),
        "the loss is nan at step 1200 (learning_rate 0.003, ...), and there is no checkpoint to "
        "go back to",
        "The optimization diverges, samples are unusual, or a value exceeds the range of its "
        "type.",
        "[Debugging a loss](debugging_a_loss.md#the-loss-is-nan-or-infinite) goes through the "
        "causes. A lower `learning_rate` or more `warmup_steps` is the first thing to try.",
    ),
    Kind(
        "Checkpoint damaged",
        ("which is damaged", "the checkpoint .* is damaged",
         "no checkpoint in output_dir .* is whole", "is damaged and cannot be renamed",
         "has another size or checksum", "cannot be merged", "Resume from an older one"),
        "resume_from_checkpoint is run/checkpoint-500, which is damaged: model.safetensors has "
        "...",
        "Files of the checkpoint differ from its manifest: a disk, a copy or a person changed "
        "them.",
        "Resume from an older checkpoint, or copy it anew. `pypkg checkpoint verify FOLDER` names "
        "every damaged file ([training.md](../training.md#damage)).",
    ),
    Kind(
        "Checkpoint of something else",
        ("belongs to another model", "optimizer state of", "PaddleNLP's optimizer state",
         "of another model or not complete", "Resume from another", "ignore_load_lr_and_optim",
         r"has completed \S+ steps", "are of (step|different)", "hold different", "is of step",
         "named after step", "the data position, "),
        "max_steps is 100, but run/checkpoint-200 has completed 200 steps",
        "The run resumes from a checkpoint that its settings do not continue: another model, "
        "optimizer, data, or more steps than `max_steps`.",
        "To go on, give the settings of the run that wrote the checkpoint and a larger "
        "`max_steps`. To start from its weights alone, set `ignore_load_lr_and_optim` and a new "
        "`output_dir`.",
    ),
    Kind(
        "No run or checkpoint",
        ("is not a checkpoint", "is no checkpoint", "neither a checkpoint nor", "holds no run",
         "is no folder; give the output_dir", "is a file; give the folder",
         r"has no manifest\.json", "have no step of", "is a whole checkpoint, not"),
        "checkpoint holds no run: none of metrics.jsonl, run_info.json, ledger.jsonl",
        "The folder is not the `output_dir` of a run, or not one of its `checkpoint-N` folders.",
        "Give the `output_dir` for a run and `output_dir/checkpoint-N` for a checkpoint; the "
        "message says which. `pypkg checkpoint list OUTPUT_DIR` shows what is there.",
    ),
    Kind(
        "Record of another version",
        ("is not one that this program writes", "is not what (was written|this version writes)",
         "which no run writes", "that this program does not write", "is not of format",
         r"has format \S+ and checksum", "is not a sample", "is not a record of attention",
         "is not a result of pypkg"),
        "line 12 of checkpoints/ledger.jsonl is not what was written",
        "A file that a run keeps was edited, was cut by a disk, or comes from another version.",
        "Restore the file, or move it away; checkpoints do not depend on it. Use the version of "
        "pypkg that wrote it if the message says so.",
    ),
    Kind(
        "Processes do not meet",
        ("--nproc", r"PADDLE_\w+", "cannot listen at", "cannot be listened at",
         "could not join rank 0", "no heartbeat", "cannot serve files", "gloo groups",
         "expected host:port", "several processes were"),
        "rank 1 could not join rank 0 at 10.1.0.1:6170 within 300 s",
        "Ranks do not reach rank 0: it has not started, its port is taken or closed, or an "
        "address is that of another network.",
        "Look at the output of rank 0 first. Then check the address, the port and the firewall "
        "([several_hosts.md](../several_hosts.md)). `pypkg doctor` tests the connections.",
    ),
    Kind(
        "Launch line of supervise",
        ("launch line",),
        "there is no launch line; give it after --, such as -- pypkg pretrain",
        "`pypkg supervise` does not find the command to start, or the `output_dir` in it.",
        "Write `pypkg supervise -- pypkg pretrain run.json`, with options of `supervise` before "
        "`--`.",
    ),
)  # fmt: skip
_DATA = (
    Kind(
        "No data",
        (r"has no file named \*\.idx", "there is neither a folder nor", "gave no tokens",
         "has no file ending in", "holds no document", "has no token; give",
         "is not there; give text", "is no prefix of", "holds no list of prompts",
         "there is no prompt", "prompt holds no token", "without any token; the corpus",
         "Give more text", "larger share in split", "expected at least one, and one left"),
        "input_dir data has no file named *.idx, *_idx.npz or *_ids.npz",
        "The path holds no text or corpus, or a split has fewer tokens than one sample takes.",
        "`input_dir` is a folder with `.bin` and `.idx` files, or their path without the suffix; "
        "`pypkg preprocess` makes them ([data.md](../data.md)). A split needs more than "
        "`max_seq_length` tokens: give more text, or a larger share in `split`.",
    ),
    Kind(
        "Corpus damaged",
        ("is not a whole NumPy file", "array '.*' is missing",
         "Make the file again, or copy it anew", "is shorter than .* says",
         "Truncated, or the two files", "problems with the corpora"),
        "data/corpus.bin is shorter than data/corpus.idx says",
        "A `.bin` or `.idx` file is cut, was changed, or belongs to another one.",
        "Copy both files anew, or run `pypkg preprocess` again. `pypkg preprocess validate "
        "PREFIX` reads all of a corpus; `verify_data` compares it with its checksums at the start "
        "of a run.",
    ),
    Kind(
        "Blend of corpora",
        (r"\bblend", "input_dir holds the weight", r"holds \d+ corpora",
         "token type that holds those of all"),
        "the blend '0.3 a 0.7' has 3 parts",
        "Weights and paths of several corpora are not in pairs, or do not go with `blend_by`.",
        "Write weight and path in turn, `0.3 data/a 0.7 data/b`, or paths alone with `blend_by` "
        "([data.md](../data.md)).",
    ),
    Kind(
        "Token outside of the vocabulary",
        ("vocab_size of the model is", "the model's vocab_size", "holds the token id",
         r"vocab_size \(", "cannot shrink to"),
        "data/corpus.bin: document 7 holds the token id 32001; the model's vocab_size is 32000",
        "The data was made with a tokenizer that has more tokens than the model.",
        "Make the data with the tokenizer of the model, or enlarge the vocabulary of the model "
        "([weights.md](../weights.md)).",
    ),
    Kind(
        "Tokenizer",
        ("[Tt]okenizer", r"\btiktoken", "tekken", "SentencePiece", r"vocab\.json",
         "letters that stand for bytes", "single bytes", "ranks? of", "no (bos|eos)_token",
         "to an empty token", "added_tokens_decoder", "has no token '", "added tokens",
         "largest token id", "the vocabulary of", "num_image_tokens", "cn_whole_word_segment",
         "names no eos"),
        "no tokenizer in my-tokenizer: expected one of tokenizer.json, ...",
        "The folder holds no tokenizer, or its files are incomplete or contradict one another.",
        "`tokenizer_name_or_path` names a folder with `tokenizer.json`, `tokenizer.model` or "
        "`vocab.json` and `merges.txt`. Copy all files of the tokenizer from its source. "
        "`--train_tokenizer` of `pypkg preprocess` trains a new one.",
    ),
    Kind(
        "Input changed while it was read",
        ("changed while it was read", "became shorter while", "lost file shard",
         "was removed while the run", "a worker process", "go, but holds",
         "process that writes the files has ended"),
        "corpus/a.jsonl changed while it was read, so that no corpus is written",
        "Another program wrote to an input during the work, or ended one of its processes.",
        "Run the same command again when the input is complete. If memory ran out, use fewer "
        "`--workers`.",
    ),
    Kind(
        "Data cache",
        ("data_cache",),
        "data_cache cannot keep the index of samples: No space left on device",
        "The folder of the index maps is full, cannot be written, or another process holds it.",
        "Free space, or set `data_cache` to another folder. Without the setting the maps are "
        "built at each start.",
    ),
    Kind(
        "Sequence too long",
        ("learned positions", "exceed(s)? max_position_embeddings", "the format allows",
         "cannot be divided over tensor", "a window has", "filling in blanks needs",
         "rotary frequencies depend on"),
        "the sequence has 4096 tokens, but the model has learned positions for 2048",
        "A sequence has more tokens than the model has positions for, or than a layout divides.",
        "Lower `max_seq_length`, `--window` or the prompt. Split documents beyond the limit of "
        "the format with `--doc_spliter`.",
    ),
)  # fmt: skip
_MODELS = (
    Kind(
        "Model not found",
        ("nor a known model", "so .* is not a model", "nor a model in the Hugging Face cache",
         "has no weights", r"has none of model\.safetensors", "config with a folder that has one",
         "add the one of the model", "holds neither a checkpoint-N"),
        "my-model is neither a folder nor a known model",
        "`model_name_or_path` names no folder with a config.json and no known model, or the "
        "folder has no weights.",
        "`pypkg models` lists the known names. Weights come from a folder, or from the Hugging "
        "Face cache with `download` ([training.md](../training.md#where-the-weights-come-from)).",
    ),
    Kind(
        "Model not supported",
        ("is not supported; (use one of|supported are)", "PaddleNLP has no ",
         "model does not support", "is read with", "supported are", "the original implementation"),
        "model_type mamba is not supported; use one of llama, ...",
        "The architecture, or a variant that its config.json asks for, is not implemented.",
        "[models.md](../models.md) lists the families. A model with another name but the same "
        "layers can often be given the `model_type` of its family.",
    ),
    Kind(
        "Weights do not fit",
        ("do not fit its configuration", "do not belong together",
         "files of all ranks", "lists the (tensor|file)", "has no weight_map",
         "the file is of another model", "of dtype", "gated layer",
         "must be the name of a file beside it", "has none of", "no rank has an embedding",
         "without its head", "has PaddleNLP's names", "which lists it, is missing",
         r"expected \[", "has shape"),
        "the tensors in my-model do not fit its configuration",
        "The weights belong to another config.json, or files of them are missing.",
        "Compare with `pypkg convert inspect FOLDER`, which lists tensors and shapes. Fetch the "
        "files that are missing. Take away settings that override sizes of the model.",
    ),
    Kind(
        "Weight file damaged",
        ("is truncated", "is corrupt", "is damaged or truncated", "is damaged", "zip archive",
         "no tensors by name", "was not loaded", "arrays in pieces", "is compressed, which",
         "little-endian", r"data\.pkl"),
        "model.safetensors is truncated: tensor lm_head.weight ends at byte 900, the file has 800",
        "The file is incomplete, or not of the format that its name says.",
        "Fetch it again and compare its size with the source. A pickle that holds more than "
        "tensors is not loaded, because it could run code; save it as a plain state dict.",
    ),
    Kind(
        "Config of the model",
        (r"config\.json( holds| cannot hold| lacks|: | make a)", r"the config\.json of",
         r"must be (one of|at most|true or false|a positive|a list|an object|an integer)",
         r"must be \S+, found",
         "is not divisible by", "rope_scaling", "layer_types", "partial_rotary", "head_dim",
         "hidden_size", "num_hidden_layers", "prefix_lm", "position_", "mup_base_width",
         "is not a field of", "norm_head", "gated_mlp", "pretraining_tp"),
        "model/config.json: hidden_size (100) is not divisible by num_attention_heads (3)",
        "A value of config.json is missing, has the wrong type, or contradicts another one.",
        "Correct the named value. The original config.json of the model is the safest source.",
    ),
)  # fmt: skip
_MACHINE = (
    Kind(
        "Operators of another build",
        ("was built for Paddle", "was built with CUDA", "was compiled from other sources",
         "belongs to pypkg", "it is unknown which Paddle", "cannot be loaded: ",
         "Triton operators", "compiled operators", "asks for '", "Paddle cannot be imported",
         "need Paddle "),
        "_lib/libpypkg_ops.so was built for Paddle 3.2.0, but Paddle 3.3.1 is running",
        "The compiled operators belong to another Paddle, CUDA or source tree, or were not built.",
        "Install the package again in the environment that runs it, or `make build` in a "
        "checkout. `PYPKG_OPS_BACKEND=reference` runs without them.",
    ),
    Kind(
        "No GPU",
        (r'device is \"gpu\"', "--device cuda", "run is on a CPU", "AVX512_BF16", "no oneDNN",
         "plans are for GPUs"),
        'device is "gpu", but the installed Paddle 3.3.1 was built without CUDA',
        "The setting asks for a device or an instruction that this machine or this Paddle lacks.",
        "Set `device` to `cpu`, or install paddlepaddle-gpu on a machine with a GPU. `pypkg "
        "doctor` says what is there.",
    ),
    Kind(
        "Package not installed",
        ("not installed", "needs the package", "cannot run .*; see", "cannot be run: "),
        "report_to is 'wandb', but its package is not installed",
        "An optional package is missing from the environment.",
        "Run the `pip install` line of the message in the environment that runs pypkg.",
    ),
    Kind(
        "Memory is exhausted",
        ("memory is exhausted",),
        "memory is exhausted: Out of memory error on GPU 0. Cannot allocate 2.0GB memory on GPU 0, "
        "78.5GB memory has been allocated and available memory is only 0.6GB",
        "A tensor did not fit into the memory that the GPU, or on a CPU the machine, had left. "
        "Most often a batch or a model is too large; sometimes other programs use the same GPU.",
        "`pypkg plan run.json --gpus N` computes the memory of a run by its terms, and settings "
        "that fit. A smaller `per_device_train_batch_size` with more "
        "`gradient_accumulation_steps` keeps the global batch. `recompute` keeps fewer "
        "activations. `sharding`, tensor and pipeline parallelism divide the model. In an "
        "evaluation, `per_device_eval_batch_size` counts. `nvidia-smi` shows other programs.",
    ),
    Kind(
        "Limit of the system",
        ("open files in this process", "does not fit into memory", "Raise the limits", "ulimit"),
        "the corpora need about 3000 open files in this process, whose limit is 1024",
        "A limit of the operating system is too low: open files, memory.",
        "Raise the limit that the message names: `ulimit -n`, `LimitNOFILE=` of systemd, `docker "
        "run --ulimit`. For memory, lower the batch or use more machines (`pypkg plan`).",
    ),
    Kind(
        "File cannot be written",
        ("cannot be written", "cannot write", "cannot save", "cannot be made in",
         "cannot be removed", "takes no file of", "the disk is full", "is not empty; give",
         "exists already", "is a file; give the name", "holds the source",
         "which would overwrite", "saving .* failed", "is the corpus .* itself",
         "is '.*', a folder; expected"),
        "checkpoints/metrics.jsonl cannot be written: the disk is full",
        "The disk is full, the folder is not yours to write, or something is there already.",
        "Free space, or choose another folder. Checkpoints that were complete stay as they were.",
    ),
    Kind(
        "File cannot be read",
        ("cannot be read", "cannot read", "cannot list", "is a link to", "does not exist$",
         "is not .* in UTF-8"),
        "cannot read data/corpus.bin: Permission denied",
        "The file is missing or not yours to read, or a link leads nowhere.",
        "Check the path and its permissions (`ls -lL FILE`). On several machines check it on "
        "each.",
    ),
)  # fmt: skip
_VALUES = (
    Kind(
        "Value not possible",
        ("(is|are|has|holds) .*(expected|which is none of|is none of|must )", "has no value",
         "expected ", "is unknown; use one of", "use one of"),
        "split is '1,2,3,4'; expected the shares of train, valid and test",
        "A setting or option has the wrong type, is out of its range, or is none of its choices.",
        "Give a value as the message expects it. `pypkg config NAME` prints type, default and "
        "meaning of a setting; `--help` after a command explains its options.",
    ),
    Kind(
        "Settings that do not go together",
        (r"leave (it|them|one|out|\S+ out)", "has no effect", "have no effect", "set only one",
         "keep only", "keep one of", "is above ", "is longer than", "are longer than",
         "are both true", "; set ", "set it to", "belongs to no --key",
         "needs? (all|a checkout)", "; give ", ", but "),
        "--output has no effect with --watch; leave one of them out",
        "Two settings or options exclude each other, one needs another that is not given, or one "
        "has no effect beside the other.",
        "Change, add or leave out one of them; the message names both.",
    ),
)  # fmt: skip
KINDS = (*_SETTINGS, *_TRAINING, *_DATA, *_MODELS, *_MACHINE, *_VALUES)
