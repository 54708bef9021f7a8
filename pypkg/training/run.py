"""Assembles a run from its settings: device, model, data, trainer, and the report at the end."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path

import paddle

from pypkg.capabilities import ExecutionPlan, probe, resolve
from pypkg.config import Settings, notices
from pypkg.data import (
    BatchLoader,
    BlankInfilling,
    Dataset,
    Objective,
    build_train_valid_test_datasets,
    causal,
    check_vocabulary,
    resolve_input_dir,
)
from pypkg.data.tokenize import Tokenizer, find_tokenizer, load_tokenizer, tokenizer_files
from pypkg.errors import UserError
from pypkg.models import ModelConfig, from_config, from_pretrained, save_pretrained
from pypkg.models.hub_cache import find_weights
from pypkg.models.registry import load_config
from pypkg.training.checkpoint import (
    TrainerState,
    checkpoints,
    load_optimizer,
    load_trainer_state,
    prepare_output_dir,
    save_checkpoint,
)
from pypkg.training.metrics import Throughput, peak_flops
from pypkg.training.optimizer import build_adamw
from pypkg.training.reporters import make_reporters
from pypkg.training.summary import Summary, draw_loss_curve, write_sample
from pypkg.training.trainer import BatchSource, Trainer, evaluate

logger = logging.getLogger("pypkg")

_TEST_ITERS = 100  # PaddleNLP's number of batches for do_predict
_VOCAB_MULTIPLE = 128


def run(settings: Settings) -> int:
    """Trains and evaluates as the settings say; returns the process's exit code.

    Raises:
        UserError: anything that its user can mend.
    """
    plan = _choose_execution(settings)
    output_dir = Path(settings.output_dir)
    prepare_output_dir(output_dir)
    tokenizer = _load_tokenizer(settings)
    checkpoint = _checkpoint_to_resume(settings)
    state = load_trainer_state(checkpoint) if checkpoint else TrainerState()
    model = _make_model(settings, plan, checkpoint, tokenizer)
    logger.info("model: %s", _describe_model(model.config))
    train, valid, test = _make_datasets(settings, model.config.vocab_size)
    _check_data_order(settings, state)

    optimizer = build_adamw(
        model,
        beta1=settings.adam_beta1,
        beta2=settings.adam_beta2,
        epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )
    if checkpoint:
        load_optimizer(checkpoint, model, optimizer)
        logger.info("resuming from %s at step %d", checkpoint, state.global_step)
    save = partial(
        save_checkpoint,
        output_dir,
        save_model=partial(_save_model_and_tokenizer, model, settings, plan),
        model=model,
        optimizer=optimizer,
        settings_json=settings.to_json(),
        keep=settings.save_total_limit,
    )
    reporters = make_reporters(
        settings.report_to, output_dir, settings.logging_dir, state.global_step
    )
    trainer = Trainer(
        settings,
        model,
        optimizer,
        state,
        train_batches=_batches(settings, train, settings.per_device_train_batch_size, model.config),
        eval_batches=_batches(settings, valid, settings.per_device_eval_batch_size, model.config),
        save=save,
        reporters=reporters,
        throughput=Throughput(
            model.config.flops_per_token(settings.max_seq_length), _peak(plan.dtype)
        ),
    )
    try:
        return _train_and_report(trainer, test, tokenizer)
    finally:
        for reporter in reporters:
            reporter.close()


def _choose_execution(settings: Settings) -> ExecutionPlan:
    for line in notices(settings):
        logger.info(line)
    plan = resolve(settings, probe(settings.device, settings.ops_backend))
    logger.info(plan.describe())
    return plan


def _peak(dtype: str):
    peak = peak_flops(dtype)
    if peak is None:
        logger.info("MFU is left out: the peak of this GPU is not known")
    else:
        logger.info("MFU is measured against %.3g FLOP/s (%s)", peak.value, peak.source)
    return peak


def _load_tokenizer(settings: Settings) -> Tokenizer | None:
    """The tokenizer; None where it is only looked for beside the model and is not there."""
    source = _tokenizer_source(settings)
    beside_model = settings.tokenizer_name_or_path == settings.model_name_or_path
    if not beside_model or find_tokenizer(source) is not None:
        return load_tokenizer(source)
    if settings.sample_tokens > 0:
        raise UserError(
            f"tokenizer_name_or_path is {str(source)!r}, where there is no tokenizer, but "
            f"sample_tokens ({settings.sample_tokens}) needs it. Give the folder of a tokenizer, "
            "or set sample_tokens to 0."
        )
    logger.info("no tokenizer in %s: checkpoints will hold no tokenizer", source)
    return None


def _tokenizer_source(settings: Settings) -> Path:
    """The folder or file that is given, or what the Hugging Face cache has under that name."""
    path = Path(settings.tokenizer_name_or_path)
    if path.exists():
        return path
    try:
        return find_weights(settings.tokenizer_name_or_path)
    except UserError:
        return path


def _checkpoint_to_resume(settings: Settings) -> Path | None:
    if settings.resume_from_checkpoint:
        return Path(settings.resume_from_checkpoint)
    found = checkpoints(settings.output_dir)
    if not found:
        return None
    if settings.overwrite_output_dir:
        logger.info("overwrite_output_dir: starting anew, removing %d checkpoints", len(found))
        for _, folder in found:
            shutil.rmtree(folder)
        return None
    return found[-1][1]


def _make_model(
    settings: Settings, plan: ExecutionPlan, checkpoint: Path | None, tokenizer: Tokenizer | None
) -> paddle.nn.Layer:
    if checkpoint:
        model = from_pretrained(checkpoint, dtype=plan.dtype)
    elif settings.continue_training:
        model = from_pretrained(
            _folder_with_weights(settings), dtype=plan.dtype, **settings.model_overrides
        )
    else:
        config = load_config(settings.model_name_or_path).replace(**settings.model_overrides)
        config = _grown_to_fit(config, settings, tokenizer)
        model = from_config(config, dtype=plan.dtype, seed=settings.seed)
    model.use_flash_attention(plan.flash_attention)
    model.train()
    return model


def _folder_with_weights(settings: Settings) -> Path:
    try:
        return find_weights(settings.model_name_or_path)
    except UserError as error:
        raise UserError(
            f"continue_training is true, but model_name_or_path has no weights: {error}; or set "
            "continue_training to false to start from random weights"
        ) from error


def _grown_to_fit(
    config: ModelConfig, settings: Settings, tokenizer: Tokenizer | None
) -> ModelConfig:
    """Vocabulary and positions raised to what tokenizer and samples need, as PaddleNLP does."""
    needed = 0
    if tokenizer is not None:
        needed = -(-tokenizer.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    changes = {
        name: value
        for name, value in (
            ("vocab_size", needed),
            ("max_position_embeddings", settings.max_seq_length),
        )
        if value > getattr(config, name)
    }
    for name, value in changes.items():
        logger.info("%s is raised from %d to %d", name, getattr(config, name), value)
    return config.replace(**changes)


def _describe_model(config: ModelConfig) -> str:
    return (
        f"{config.model_type}, {config.num_parameters() / 1e6:.1f} M parameters, "
        f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads, vocabulary {config.vocab_size}"
    )


def _make_datasets(
    settings: Settings, vocab_size: int
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    s = settings
    evaluations = s.max_steps // s.eval_steps + 1 if s.evaluates or s.do_eval else 0
    numbers = [
        s.per_device_train_batch_size * s.gradient_accumulation_steps * s.max_steps * s.do_train,
        s.per_device_eval_batch_size * s.eval_iters * evaluations,
        s.per_device_eval_batch_size * _TEST_ITERS if s.do_predict else 0,
    ]
    datasets = build_train_valid_test_datasets(
        resolve_input_dir(s.input_dir), s.split, s.max_seq_length, numbers, s.seed
    )
    for name, wanted, dataset in zip(("training", "validation", "test"), numbers, datasets):
        if dataset is not None:
            check_vocabulary(dataset, vocab_size)
        elif wanted > 0:
            raise UserError(
                f"the {name} split holds no document: split is {s.split!r} and input_dir "
                f"{s.input_dir!r} has too few documents for it. Change split, or turn off what "
                "needs it (do_eval, do_predict)."
            )
    return datasets


def _check_data_order(settings: Settings, state: TrainerState) -> None:
    """Says when a resumed run will not see the samples that the earlier settings promised."""
    names = ("input_dir", "split", "seed", "max_seq_length", "max_steps",
             "per_device_train_batch_size", "gradient_accumulation_steps")  # fmt: skip
    now = {name: getattr(settings, name) for name in names}
    for name, value in state.data_order.items():
        if now.get(name) != value:
            logger.warning(
                "%s was %r when the checkpoint was saved and is %r now: the order of samples may "
                "differ from that of an uninterrupted run",
                name, value, now.get(name),
            )  # fmt: skip
    state.data_order = now


def _batches(
    settings: Settings, dataset: Dataset | None, batch_size: int, config: ModelConfig
) -> BatchSource | None:
    if dataset is None:
        return None
    objective = objective_of(config, settings.max_seq_length, settings.seed)
    return lambda start: iter(
        BatchLoader(
            dataset,
            batch_size,
            start,
            objective=objective,
            vocab_size=config.vocab_size,
            prefetch=settings.dataloader_num_workers > 0,
        )
    )


def objective_of(config: ModelConfig, seq_length: int, seed: int) -> Objective:
    """What a model is pre-trained on: blank infilling if it sees a prefix, else the next token."""
    if not config.prefix_lm:
        return causal
    eop = config.eos_token_id
    eop = eop[0] if isinstance(eop, list) else eop
    if eop is None:
        raise UserError("the model's config.json lacks eos_token_id, which ends what fills a blank")
    return BlankInfilling(
        seq_length=seq_length,
        mask_id=config.mask_token_id,
        gmask_id=config.gmask_token_id,
        sop_id=config.sop_token_id,
        eop_id=eop,
        two_dimensional=config.position_encoding_2d,
        seed=seed,
    )


def _save_model_and_tokenizer(
    model: paddle.nn.Layer, settings: Settings, plan: ExecutionPlan, folder: Path
) -> None:
    save_pretrained(model, folder)
    for file in tokenizer_files(_tokenizer_source(settings)):
        shutil.copy(file, folder)


def _train_and_report(trainer: Trainer, test: Dataset | None, tokenizer: Tokenizer | None) -> int:
    settings = trainer.settings
    output_dir = Path(settings.output_dir)
    outcome = trainer.train() if settings.do_train else trainer.evaluate_only()
    found = checkpoints(output_dir)
    if outcome.exit_code:
        saved = f"saved {found[-1][1]}; " if found else ""
        logger.info("stopped at step %d: %sthe same command goes on from there",
                    outcome.state.global_step, saved)  # fmt: skip
        return outcome.exit_code
    summary = Summary(
        outcome,
        checkpoint=found[-1][1] if found else None,
        loss_curve=draw_loss_curve(output_dir / "metrics.jsonl", output_dir / "loss_curve.png"),
        sample=None,
    )
    if settings.do_predict and test is not None:
        batches = _batches(
            settings, test, settings.per_device_eval_batch_size, trainer.model.config
        )
        summary.test_loss = evaluate(trainer.model, batches, _TEST_ITERS)
    if settings.sample_tokens > 0 and tokenizer is not None:
        summary.sample = write_sample(
            trainer.model, tokenizer, settings.sample_prompt, settings.sample_tokens, settings.seed
        )
    summary.write(output_dir / "summary.json")
    print(summary.text())
    return 0
