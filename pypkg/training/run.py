"""Assembles a run from its settings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pypkg.config import Settings, notices, notices_of_float32
from pypkg.config.options.profiler_options import parse_profiler_options
from pypkg.config.reading.parser import listed
from pypkg.console.progress import phase
from pypkg.data.corpus.made_with import warn_of_other_tokenizers
from pypkg.data.tokenizers.load import Tokenizer, tokenizer_files
from pypkg.device.capabilities import ExecutionPlan, probe, resolve
from pypkg.errors import UserError
from pypkg.generation.prompts import given_prompts
from pypkg.models import ModelConfig
from pypkg.models.building import Model, parameter_shapes
from pypkg.ops import set_matmul_precision
from pypkg.ops.dispatch import half_on_cpu
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_first_rank, is_first_rank
from pypkg.parallel.launch import watchdog
from pypkg.parallel.optimizer.distribute import DistributedModel, distribute
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.parallel.optimizer.loss_scaling import LossScale
from pypkg.parallel.optimizer.updater import Updater
from pypkg.parallel.update_rules import rate_factor
from pypkg.training.checkpoint.checkpointer import Checkpointer
from pypkg.training.checkpoint.reading import load_trainer_state
from pypkg.training.doctor.examination import warn_at_start
from pypkg.training.feed.data_source import DataSource
from pypkg.training.feed.samples import Samples
from pypkg.training.final_report import log_stopped, report_outcome
from pypkg.training.healing.healer import Healer
from pypkg.training.interrupt import ignore_sigterm
from pypkg.training.ledger import current_events
from pypkg.training.reporting.described import run_info
from pypkg.training.reporting.metrics import PeakFlops, Throughput, peak_flops
from pypkg.training.reporting.planned import PlanReporter, compare_with_capacity, plan_of_run
from pypkg.training.reporting.reporters import SAMPLES_FILE, Reporter
from pypkg.training.reporting.run_info import RunInfo, write_run_info
from pypkg.training.reporting.text_samples import TextSamples
from pypkg.training.reporting.trackers import TrackedRun, TrackerReporter, make_reporters
from pypkg.training.start.attention import attention_for
from pypkg.training.start.choose_checkpoint import best_checkpoint, checkpoint_to_resume
from pypkg.training.start.layout import degrees, layout_notices, layout_problems
from pypkg.training.start.output_dir import HeldOutput, held_output_dir
from pypkg.training.start.resume import check_resumed, check_resumed_model, record_resumed
from pypkg.training.start.sources import (
    load_model,
    model_config,
    tokenizer_of,
    tokenizer_source,
)
from pypkg.training.start.verify_data import verify_corpora
from pypkg.training.state import TrainerState
from pypkg.training.step.activations import dropout_notice, set_activations
from pypkg.training.step.engine import Engine
from pypkg.training.step.profiling import StepProfiler
from pypkg.training.step.rank_times import MeasuredEngine, print_rank_times
from pypkg.training.tp_sharding import ModelTpSharding
from pypkg.training.trainer import Trainer

logger = logging.getLogger("pypkg")


def run(settings: Settings) -> int:
    """Trains and evaluates as the settings say; returns the exit code of the process.

    Every rank of a run calls this; rank 0 writes files and log lines.

    Raises:
        UserError: a setting, the layout or an input file is invalid.
    """
    plan = _choose_execution(settings)
    tokenizer = tokenizer_of(settings)
    config = model_config(settings, tokenizer)
    attention = attention_for(config, plan.dtype, plan.capabilities, plan.attention, settings.ring)
    plan = replace(plan, attention=attention)
    with phase("ranks"):
        _start_ranks(settings, config, plan.dtype)
    warn_at_start(plan.capabilities, settings, config, plan.dtype)
    if settings.verify_data:
        from_first_rank(lambda: verify_corpora(settings))
    local = settings.allow_local_output
    with held_output_dir(settings.output_dir, settings.saves, local) as output:
        return _run(settings, plan, tokenizer, config, output)


def _run(
    settings: Settings,
    plan: ExecutionPlan,
    tokenizer: Tokenizer | None,
    config: ModelConfig,
    output: HeldOutput,
) -> int:
    """Runs after the ranks have started and the lock of output_dir is held."""
    checkpoint = checkpoint_to_resume(settings, output.parts)
    resumed = None if settings.ignore_load_lr_and_optim else checkpoint
    state = _starting_state(settings, resumed)
    model, wrapped, updater = _make_model(settings, plan, checkpoint, config)
    if checkpoint:
        check_resumed_model(settings, checkpoint, config, model.config)
    with phase("data index"):
        samples = _make_samples(settings, model.config, state, resumed, tokenizer)
    files = _tokenizer_files(settings, tokenizer)
    checkpointer = _make_checkpointer(settings, model, updater, samples, files, output)
    healer = Healer(
        settings, state, checkpointer=checkpointer, samples=samples, places=output.parts.places,
        start=resumed, events=from_first_rank(lambda: current_events(settings.output_dir)),
    )  # fmt: skip
    if resumed:
        with phase("optimizer"):
            checkpointer.restore(resumed, state)
    elif checkpoint:
        logger.info("weights of %s; the rest starts anew (ignore_load_lr_and_optim)", checkpoint)
    throughput = _make_throughput(settings, model.config, plan)  # before memory is compared
    reporters = _make_reporters(settings, config, plan, state)
    text_samples = _make_text_samples(settings, model, tokenizer, state, reporters)
    engine = _make_engine(settings, samples, wrapped, updater)
    data: DataSource = engine.timed(samples) if isinstance(engine, MeasuredEngine) else samples
    profiler = _make_profiler(settings)
    trainer = Trainer(
        settings, engine, state, data=data, checkpointer=checkpointer, healer=healer,
        reporters=reporters, throughput=throughput, profiler=profiler, text_samples=text_samples,
    )  # fmt: skip
    try:
        outcome = trainer.train() if settings.do_train else trainer.evaluate_only()
        output.check()
        if profiler is not None:
            profiler.close()
        if isinstance(engine, MeasuredEngine):
            print_rank_times(engine.times)
        if outcome.exit_code:
            ignore_sigterm()
            log_stopped(settings, outcome)
            return outcome.exit_code
        best = best_checkpoint(settings, state, output.parts)
        if best is not None:
            logger.info("the best model is %s (validation loss %.4f)", best, state.best_loss)
            model, wrapped, updater = _make_model(settings, plan, best, config)
            engine = _make_engine(settings, samples, wrapped, updater)
        report_outcome(
            settings, outcome, model=model, engine=engine, samples=samples, tokenizer=tokenizer,
            checkpoint=best,
        )  # fmt: skip
        return 0
    finally:
        for reporter in reporters:
            reporter.close()


def _make_throughput(settings: Settings, config: ModelConfig, plan: ExecutionPlan) -> Throughput:
    """Makes the throughput meter. On a CPU this times matrix products to find the peak FLOP/s."""
    return Throughput(config.flops_per_token(settings.max_seq_length), _peak(plan.dtype))


def _starting_state(settings: Settings, resumed: Path | None) -> TrainerState:
    """The state of the checkpoint from which the run resumes; of a new run, the initial state."""
    if resumed is None:
        return TrainerState()
    state = load_trainer_state(resumed, settings.max_seq_length)
    check_resumed(settings, resumed, state)
    if settings.do_train:
        degrees = mesh.current().degrees
        from_first_rank(lambda: record_resumed(settings, resumed, state, degrees))
    return state


def _choose_execution(settings: Settings) -> ExecutionPlan:
    for line in notices(settings):
        logger.info(line)
    plan = resolve(settings, probe(settings.device, settings.ops_backend))
    set_matmul_precision(plan.matmul_precision)
    if plan.device == "cpu" and plan.dtype != "float32":
        half_on_cpu.install()
    for line in notices_of_float32(settings) if plan.dtype == "float32" else ():
        logger.info(line)
    logger.info(plan.describe())
    return plan


def _start_ranks(settings: Settings, config: ModelConfig, dtype: str) -> None:
    """Checks the layout of the settings, and creates the process groups of its mesh.

    Raises:
        UserError: the layout is invalid; the message lists every problem.
    """
    world_size = mesh.launched_processes()
    if problems := layout_problems(settings, config, world_size):
        raise UserError(listed(problems, "problems with the layout"))
    for line in layout_notices(settings, world_size):
        logger.info(line)
    chosen = degrees(settings, world_size)
    adds = chosen.adds_weight_gradients and dtype != "float32"
    with watchdog.starting_fleet():
        mesh.initialize(replace(chosen, adds_weight_gradients=adds))


def _make_model(
    settings: Settings, plan: ExecutionPlan, checkpoint: Path | None, config: ModelConfig
) -> tuple[Model, DistributedModel, Updater]:
    """This rank's model in train mode, with attention, recompute and dropout as chosen.

    Returns:
        The model, the model wrapped for the layout, and the updater.
    """
    is_sliced = settings.sharding_stage == 3 and mesh.current().sharding is not None
    model, read = load_model(settings, plan.dtype, checkpoint, config, filled=not is_sliced)
    model.use_attention(plan.attention)
    set_activations(model, settings)
    model.train()
    config = model.config
    logger.info(
        "model: %s, %.1f M parameters, %d layers, hidden %d, %d heads, vocabulary %d",
        *(config.model_type, config.num_parameters() / 1e6, config.num_hidden_layers),
        *(config.hidden_size, config.num_attention_heads, config.vocab_size),
    )
    if settings.do_train and (notice := dropout_notice(settings, config)):
        logger.info(notice)
    sharding = ModelTpSharding(config)
    options = _update_options(settings, plan.dtype)
    options = replace(options, rate_factors=_rate_factors(settings, config))
    with phase("optimizer"):
        return model, *distribute(model, options, mesh.current(), sharding, read=read)


def _make_samples(
    settings: Settings,
    config: ModelConfig,
    state: TrainerState,
    checkpoint: Path | None,
    tokenizer: Tokenizer | None,
) -> Samples:
    """The samples; rank 0, which reads them, warns of those that another tokenizer has made."""
    samples = Samples(settings, config, state, checkpoint)
    if tokenizer is not None and mesh.current().rank == 0:
        source = tokenizer_source(settings)
        warn_of_other_tokenizers(samples.prefixes(), tokenizer, source)
    return samples


def _tokenizer_files(settings: Settings, tokenizer: Tokenizer | None) -> list[Path]:
    """The tokenizer files that are copied into each checkpoint.

    Raises:
        UserError: the files were removed after the tokenizer was loaded.
    """
    source = tokenizer_source(settings)
    files = tokenizer_files(source)
    if tokenizer is not None and not files:
        raise UserError(
            f"tokenizer_name_or_path {str(source)!r} was removed while the run started, so no "
            "checkpoint could hold the tokenizer. Set it to a folder that stays."
        )
    return files


def _make_checkpointer(
    settings: Settings,
    model: Model,
    updater: Updater,
    samples: Samples,
    tokenizer_files: Sequence[Path],
    output: HeldOutput,
) -> Checkpointer:
    return Checkpointer(
        settings.output_dir,
        model,
        updater,
        samples,
        tokenizer_files=tokenizer_files,
        settings_json=settings.to_json(),
        keep=settings.save_total_limit,
        with_optimizer=not settings.ignore_save_lr_and_optim,
        async_memory=settings.async_save_bytes,
        seq_length=settings.max_seq_length,
        verify_checkpoint=settings.verify_checkpoint,
        check_output_dir=output.check,
        parts=output.parts,
    )


def _make_engine(
    settings: Settings, samples: Samples, model: DistributedModel, updater: Updater
) -> Engine:
    make = Engine if settings.skip_profile_timer else MeasuredEngine
    return make(
        model,
        updater,
        normalization=settings.loss_normalization,
        labels_vary=samples.labels_vary,
    )


def _make_profiler(settings: Settings) -> StepProfiler | None:
    if settings.profiler_options is None or not settings.do_train:
        return None
    options = parse_profiler_options(settings.profiler_options)
    folder = Path(options.folder or Path(settings.output_dir, "profile"))
    return StepProfiler(options, folder, mesh.current().rank)


def _update_options(settings: Settings, dtype: str) -> UpdateOptions:
    return UpdateOptions(
        beta1=settings.adam_beta1,
        beta2=settings.adam_beta2,
        epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        sharding_stage=settings.sharding_stage,
        reduces_once=settings.reduces_once,
        overlaps_weights=settings.overlaps_weights,
        offload=settings.offloads_optimizer,
        loss_scale=LossScale(settings.scale_loss) if settings.fp16 else None,
        master_grad=settings.amp_master_grad and dtype != "float32",
        optim=settings.optim,
        stochastic_rounding=settings.stochastic_rounding,
        muon_momentum=settings.muon_momentum,
        measures_layers=settings.log_layer_grad_norms,
    )


def _rate_factors(settings: Settings, config: ModelConfig) -> dict[str, float]:
    scales = {"embedding": settings.embedding_lr_scale, "head": settings.head_lr_scale}
    return {
        name: rate_factor(name, shape, width=config.width_factor, **scales)
        for name, shape in parameter_shapes(config).items()
    }


def _make_text_samples(
    settings: Settings,
    model: Model,
    tokenizer: Tokenizer | None,
    state: TrainerState,
    reporters: Sequence[Reporter],
) -> TextSamples | None:
    """The writer of text samples, on every rank; None without sample_prompts."""
    if not settings.sample_prompts:
        return None
    assert tokenizer is not None  # sample_tokens need it
    prompts = given_prompts(settings.sample_prompts)
    file = Path(settings.output_dir) / SAMPLES_FILE
    trackers = [each for each in reporters if isinstance(each, TrackerReporter)]
    samples = TextSamples(
        model, tokenizer, prompts, settings.sample_tokens, settings.seed, file, trackers
    )
    samples.rewind(state.global_step)
    return samples


def _make_reporters(
    settings: Settings, config: ModelConfig, plan: ExecutionPlan, state: TrainerState
) -> list[Reporter]:
    """On rank 0, writes run_info.json and opens the trackers; other ranks have no reporters."""
    if not is_first_rank():
        return []
    run_plan = plan_of_run(settings, config, plan.capabilities)
    info = run_info(settings, config, plan, run_plan)
    write_run_info(Path(settings.output_dir), info)
    reporters = make_reporters(
        settings.report_to, Path(settings.output_dir), _tracked(settings, info, state)
    )
    if run_plan is not None:
        compare_with_capacity(run_plan, plan.capabilities.memory_bytes)
        reporters.append(PlanReporter(run_plan, state.global_step))
    return reporters


def _tracked(settings: Settings, info: RunInfo, state: TrainerState) -> TrackedRun:
    """The description of the run for trackers."""
    output_dir = Path(settings.output_dir)
    return TrackedRun(
        folder=Path(settings.logging_dir or output_dir / "runs"),
        name=settings.run_name or output_dir.resolve().name,
        last_step=state.global_step,
        facts={
            "settings": info.settings,
            "model": info.model,
            "layout": info.layout,
            "environment": info.environment,
        },
    )


def _peak(dtype: str) -> PeakFlops | None:
    peak = peak_flops(dtype)
    if peak is None:
        logger.info("MFU is left out: the peak of this GPU is not known")
    else:
        logger.info("MFU is measured against %.3g FLOP/s (%s)", peak.value, peak.source)
    return peak
