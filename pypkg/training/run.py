"""Assembles a run from its settings: device, model, data, trainer, and the report at the end."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from itertools import islice
from pathlib import Path

import paddle

from pypkg.capabilities import ExecutionPlan, probe, resolve
from pypkg.config import Settings, notices
from pypkg.config.parser import listed
from pypkg.data.tokenizers.load import Tokenizer, find_tokenizer, load_tokenizer, tokenizer_files
from pypkg.errors import UserError
from pypkg.models import ModelConfig, from_config, from_pretrained, save_pretrained
from pypkg.models.architecture.registry import load_config
from pypkg.models.weights.hub import find_weights
from pypkg.ops import set_matmul_precision
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_first_rank, is_first_rank
from pypkg.parallel.optimizer.loss_scaling import LossScale
from pypkg.parallel.optimizer.step import UpdateOptions, Updater, make_updater
from pypkg.training.activations import set_activations
from pypkg.training.checkpoint.checkpoint import (
    checkpoints,
    load_optimizer,
    load_trainer_state,
    prepare_output_dir,
    save_checkpoint,
)
from pypkg.training.engine import Engine
from pypkg.training.layout import degrees, layout_notices, layout_problems
from pypkg.training.model_partition import ModelPartition
from pypkg.training.rank_times import MeasuredEngine, table_of_ranks
from pypkg.training.reporting.metrics import Throughput, peak_flops
from pypkg.training.reporting.reporters import Reporter, make_reporters, read_metrics
from pypkg.training.reporting.summary import Summary, draw_loss_curve, write_sample
from pypkg.training.samples import TEST_ITERS, Samples
from pypkg.training.state import TrainerState
from pypkg.training.trainer import Trainer

logger = logging.getLogger("pypkg")

_VOCAB_MULTIPLE = 128


def run(settings: Settings) -> int:
    """Trains and evaluates as the settings say; returns the process's exit code.

    Every process of a run calls this; the first writes files and log lines.

    Raises:
        UserError: anything that its user can mend.
    """
    plan = _choose_execution(settings)
    tokenizer = _load_tokenizer(settings)
    config = _model_config(settings, tokenizer)
    _start_processes(settings, config)
    from_first_rank(lambda: prepare_output_dir(settings.output_dir))
    checkpoint = from_first_rank(lambda: _checkpoint_to_resume(settings))
    state = load_trainer_state(checkpoint) if checkpoint else TrainerState()
    model = _make_model(settings, plan, checkpoint, config)
    logger.info("model: %s", _describe_model(model.config))
    samples = Samples(settings, model.config, state)

    partition = ModelPartition(model.config)
    updater = make_updater(model, _update_options(settings), mesh.current(), partition)
    if checkpoint:
        load_optimizer(checkpoint, updater)
        if updater.scaler is not None and state.loss_scale:
            updater.scaler.load_state(state.loss_scale)
        logger.info("resuming from %s at step %d", checkpoint, state.global_step)
    reporters = _make_reporters(settings, state)
    engine, train_batches = Engine(model, updater), samples.train_batches
    if not settings.skip_profile_timer:
        engine = MeasuredEngine(model, updater)
        train_batches = engine.timed(train_batches)
    trainer = Trainer(
        settings,
        engine,
        state,
        train_batches=train_batches,
        eval_batches=(lambda _: samples.eval_batches()) if "valid" in samples.sources else None,
        save=partial(_save, settings, samples, model, updater),
        reporters=reporters,
        throughput=Throughput(
            model.config.flops_per_token(settings.max_seq_length), _peak(plan.dtype)
        ),
        sources=samples.sources.get("train", ()),
        eval_sources=samples.sources.get("valid", ()),
    )
    try:
        return _train_and_report(trainer, samples, tokenizer)
    finally:
        for reporter in reporters:
            reporter.close()


def _start_processes(settings: Settings, config: ModelConfig) -> None:
    """Makes the mesh that the settings ask for, once it is known to be possible."""
    processes = mesh.launched_processes()
    if problems := layout_problems(settings, config, processes):
        raise UserError(listed(problems, "problems with the layout"))
    for line in layout_notices(settings, processes):
        logger.info(line)
    mesh.initialize(degrees(settings, processes))


def _update_options(settings: Settings) -> UpdateOptions:
    return UpdateOptions(
        beta1=settings.adam_beta1,
        beta2=settings.adam_beta2,
        epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        sharding_stage=settings.sharding_stage,
        offload=settings.offloads_optimizer,
        loss_scale=LossScale(settings.scale_loss) if settings.fp16 else None,
        master_grad=settings.amp_master_grad,
    )


def _make_reporters(settings: Settings, state: TrainerState) -> list[Reporter]:
    if not is_first_rank():
        return []
    return make_reporters(
        settings.report_to, Path(settings.output_dir), settings.logging_dir, state.global_step
    )


def _choose_execution(settings: Settings) -> ExecutionPlan:
    for line in notices(settings):
        logger.info(line)
    plan = resolve(settings, probe(settings.device, settings.ops_backend))
    set_matmul_precision(plan.matmul_precision)
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


def _model_config(settings: Settings, tokenizer: Tokenizer | None) -> ModelConfig:
    """Of the model that a new run trains."""
    if settings.continue_training:
        return load_config(_folder_with_weights(settings)).replace(**settings.model_overrides)
    config = load_config(settings.model_name_or_path).replace(**settings.model_overrides)
    return _grown_to_fit(config, settings, tokenizer)


def _make_model(
    settings: Settings, plan: ExecutionPlan, checkpoint: Path | None, config: ModelConfig
) -> paddle.nn.Layer:
    if checkpoint:
        model = from_pretrained(checkpoint, dtype=plan.dtype)
    elif settings.continue_training:
        model = from_pretrained(
            _folder_with_weights(settings), dtype=plan.dtype, **settings.model_overrides
        )
    else:
        model = from_config(config, dtype=plan.dtype, seed=settings.seed)
    model.use_flash_attention(plan.flash_attention)
    set_activations(model, settings)
    model.train()
    return model


def _folder_with_weights(settings: Settings) -> Path:
    try:
        return find_weights(settings.model_name_or_path, settings.download)
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


def _save(
    settings: Settings,
    samples: Samples,
    model: paddle.nn.Layer,
    updater: Updater,
    state: TrainerState,
) -> Path:
    samples.record(state)
    if updater.scaler is not None:
        state.loss_scale = updater.scaler.state()
    return save_checkpoint(
        settings.output_dir,
        state,
        save_model=partial(_save_model_and_tokenizer, model, settings),
        updater=updater,
        settings_json=settings.to_json(),
        keep=settings.save_total_limit,
    )


def _save_model_and_tokenizer(model: paddle.nn.Layer, settings: Settings, folder: Path) -> None:
    save_pretrained(model, folder)
    if is_first_rank():
        for file in tokenizer_files(_tokenizer_source(settings)):
            shutil.copy(file, folder)


def _train_and_report(trainer: Trainer, samples: Samples, tokenizer: Tokenizer | None) -> int:
    settings = trainer.settings
    outcome = trainer.train() if settings.do_train else trainer.evaluate_only()
    if isinstance(trainer.engine, MeasuredEngine) and trainer.engine.times.steps:
        text = table_of_ranks(trainer.engine.times)
        if is_first_rank():
            print(text)
    found = checkpoints(settings.output_dir)
    if outcome.exit_code:
        saved = f"saved {found[-1][1]}; " if found else ""
        logger.info("stopped at step %d: %sthe same command goes on from there",
                    outcome.state.global_step, saved)  # fmt: skip
        return outcome.exit_code
    model, test_loss, sample = trainer.engine.model, None, None
    if settings.do_predict and "test" in samples.sources:
        test_loss = trainer.engine.evaluate(islice(samples.eval_batches("test"), TEST_ITERS))
    if settings.sample_tokens > 0 and tokenizer is not None:
        sample = write_sample(
            model, tokenizer, settings.sample_prompt, settings.sample_tokens, settings.seed
        )
    if is_first_rank():
        metrics_file = Path(settings.output_dir, "metrics.jsonl")
        summary = Summary(
            outcome.completed_from(read_metrics(metrics_file)),
            checkpoint=found[-1][1] if found else None,
            loss_curve=draw_loss_curve(metrics_file, metrics_file.with_name("loss_curve.png")),
            sample=sample,
            test_loss=test_loss,
            data=samples.usage(outcome.state.consumed_samples),
        )
        summary.write(metrics_file.with_name("summary.json"))
        print(summary.text())
    return 0
