"""Construct a run from its configuration: one function per part. Its callbacks: train/build_callbacks.py."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.run_text import read_tokenizer_files
from aki_megatron.config.batch_sizes import micro_batch_size, num_microbatches
from aki_megatron.config.deepspeed import offload_device, settings_for_engine
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import dump_run
from aki_megatron.config.trainable import TrainingPlan
from aki_megatron.console import IsolatedConsole
from aki_megatron.data.fingerprint import Fingerprint
from aki_megatron.data.loader import EmptyStepLoader, StepLoader
from aki_megatron.data.pipeline import build_sources, build_step_loader, build_tokenizer
from aki_megatron.data.sample_stream import Source
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.engine.base import Engine, ShardedStage
from aki_megatron.engine.ddp_stage import DDPStage
from aki_megatron.engine.frozen_stage import FrozenStage
from aki_megatron.engine.optimizer import adamw, learning_rate
from aki_megatron.engine.pipeline import PipelineEngine
from aki_megatron.engine.zero_stage import ZeroStage
from aki_megatron.errors import CheckpointError
from aki_megatron.model.stage import Stage, build_stage
from aki_megatron.parallel.megatron import build_linears
from aki_megatron.parallel.pipeline_partition import layers_of_stages
from aki_megatron.parallel.topology import Topology
from aki_megatron.supervise.attempts import newest_step
from aki_megatron.supervise.control import ControlSignals
from aki_megatron.supervise.events import EventLog, EventRecorder, ignore_event
from aki_megatron.supervise.loss_spikes import LossSpikeGuard
from aki_megatron.supervise.progress import ProgressTracker
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.signals import StopSignals
from aki_megatron.supervise.step_log import StepLogs, restore_unwritten
from aki_megatron.supervise.watchdog import collective_timeout
from aki_megatron.train.build_callbacks import (
    build_callbacks,
    build_checkpoint_callback,
    build_evaluation,
    build_trackers,
    write_run_report,
)
from aki_megatron.train.build_validation import build_validator, open_validation_set
from aki_megatron.train.callbacks import ProgressCallback, ReportCallback, RunFinalizer
from aki_megatron.train.continuation import record_configuration
from aki_megatron.train.data_changes import EXTRA_KEY, fingerprint_run, fingerprints_to_json
from aki_megatron.train.frozen_parameters import FrozenParameters
from aki_megatron.train.loop import Trainer, TrainState
from aki_megatron.train.run_summary import summary_lines, uses_recompute
from aki_megatron.train.side_output import OutputFailures, isolate_side_outputs
from aki_megatron.train.training_phases import build_phased_engine, enter_phase, saved_phase
from aki_megatron.train.validation import Validator

logger = logging.getLogger("aki_megatron.train")


def build_loader(
    config: RunConfig,
    tokenizer: Tokenizer,
    topology: Topology,
    console: IsolatedConsole,
    sources: Mapping[str, Source[Any]] | None = None,
) -> StepLoader | EmptyStepLoader:
    """Build the loader of this rank's batches; EmptyStepLoader where another rank of the replica reads them.

    ``sources`` as in build_data_pipeline.
    """
    if not topology.reads_data:
        return EmptyStepLoader()
    return build_step_loader(
        config,
        tokenizer,
        micro_batch_size=micro_batch_size(config, topology.world_size),
        data_rank=topology.data_rank,
        data_size=topology.data,
        pin_memory=topology.device.type == "cuda",
        sources=sources,
        progress=console.print if topology.rank == 0 else lambda line: None,
    )


def partition_layers(config: RunConfig) -> list[range]:
    """Return the decoder layers of each of the pipeline x virtual_stages stages, in model order."""
    parallel = config.parallel
    return layers_of_stages(
        config.model,
        num_stages=parallel.pipeline * parallel.virtual_stages,
        layers_per_stage=parallel.layers_per_stage,
        text_tokens=config.data.max_text_tokens,
        recompute=uses_recompute(config),
    )


def build_stages(config: RunConfig, stages: Sequence[range], topology: Topology, plan: TrainingPlan) -> Iterator[Stage]:
    """Build this pipeline rank's stages, one per virtual stage, with this tensor rank's shard of random weights."""
    linears = build_linears(topology)
    for layers in stages[topology.pipeline_rank :: topology.pipeline]:
        yield build_stage(
            config.model,
            layers,
            attention=config.attention,
            seed=config.train.seed,
            linears=linears,
            recompute=uses_recompute(config),
            plan=plan,
        )


def build_sharded_stage(config: RunConfig, stage: Stage, topology: Topology, plan: TrainingPlan) -> ShardedStage:
    """Build a stage with its optimizer state, which ZeRO partitions over the data ranks or every rank holds."""
    if not any(parameter.requires_grad for parameter in stage.parameters()):
        return FrozenStage(stage, topology, dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    o = config.optimizer
    optimizer = adamw(
        stage,
        weight_decay=o.weight_decay,
        beta1=o.beta1,
        beta2=o.beta2,
        eps=o.eps,
        fused=offload_device(config.deepspeed, "offload_optimizer") != "none",
        plan=plan,
    )
    if config.parallel.zero_stage == 0:
        return DDPStage(stage, topology, optimizer)
    return ZeroStage(
        stage,
        topology,
        optimizer,
        zero_stage=config.parallel.zero_stage,
        precision=config.train.precision,
        deepspeed_config=settings_for_engine(config),
    )


def build_engine(
    config: RunConfig,
    stages: Sequence[range],
    topology: Topology,
    *,
    init_weights: Callable[[Stage], None] = lambda stage: None,
    training_phase: int = 0,
    should_apply_update: Callable[[float, float], bool] = lambda loss, grad_norm: True,
    set_phase: Callable[[str], None] = lambda phase: None,
) -> Engine:
    """Build the engine over this rank's stages.

    init_weights                    sets the weights of a stage from which the run starts
    training_phase                  of RunConfig.training_plans: what the engine trains
    should_apply_update, set_phase  see PipelineEngine

    One stage at a time is held whole in memory: it is sharded before the next is built.
    """
    sharded_stages, plan = [], config.training_plans()[training_phase]
    for stage in build_stages(config, stages, topology, plan):
        init_weights(stage)
        sharded_stages.append(build_sharded_stage(config, stage, topology, plan))
    return PipelineEngine(
        sharded_stages,
        topology,
        num_microbatches=num_microbatches(config, topology.world_size),
        precision=config.train.precision,
        max_grad_norm=config.optimizer.max_grad_norm,
        mask_check_interval=config.parallel.mask_check_interval,
        update_counters=plan.update_counters,
        should_apply_update=should_apply_update,
        set_phase=set_phase,
    )


def build_checkpointer(config: RunConfig, topology: Topology) -> Checkpointer:
    """Build what saves and loads the run's checkpoints; collective."""
    c = config.checkpoint
    return Checkpointer(
        RunPaths(config.run.dir).checkpoints,
        keep_last=c.keep_last,
        keep_every=c.keep_every,
        config_yaml=dump_run(config),
        tokenizer_files=read_tokenizer_files(config.data.tokenizer) if topology.rank == 0 else None,
        async_save=c.async_save,
        group=topology.new_gloo_group(collective_timeout(config.watch)),
    )


def checkpoint_extra(
    state: TrainState,
    guard: LossSpikeGuard,
    fingerprints: Mapping[str, Fingerprint] | None = None,
    validator: Validator | None = None,
) -> dict[str, Any]:
    """Return what a checkpoint holds besides the engine's state, as JSON values; loading it returns them."""
    return {
        "step": state.step,
        "data_step": state.data_step,
        "data": dict(state.data),
        "loss_spike_guard": guard.state_dict(),
        **({"validation": validator.state_dict(state.step)} if validator else {}),
        EXTRA_KEY: fingerprints_to_json(fingerprints or {}),
    }


def load_latest(checkpointer: Checkpointer, load: Callable[[Path], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Load the newest checkpoint during a run, after a save in progress; return what ``load`` returns of it.

    Raises CheckpointError without one.
    """
    try:
        checkpointer.wait()
    except CheckpointError as error:
        logger.error("the last checkpoint failed, so the run rolls back to an earlier one: %s", error)
    if (checkpoint := checkpointer.latest()) is None:
        raise CheckpointError(
            f"The run must roll back to a checkpoint (watch.on_non_finite, watch.on_loss_spike), but "
            f"{checkpointer.folder} has none: even the first could not be written; the logs say why."
        )
    return load(checkpoint)


def build_lr_schedule(config: RunConfig) -> Callable[[int], float]:
    """Return the learning rate as a function of the optimizer step, counted from 0."""
    o = config.optimizer
    return partial(learning_rate, lr=o.lr, min_lr=o.min_lr, warmup_steps=o.warmup_steps, steps=config.train.steps)


def record_start_configuration(
    config: RunConfig, data_changes: Sequence[str], record_event: EventRecorder, console: IsolatedConsole
) -> None:
    """Record the configuration that this start trains with; record and print what it changes. On rank 0."""
    paths = RunPaths(config.run.dir)
    step = newest_step(paths)
    changed = record_configuration(
        paths,
        config,
        step=step,
        learning_rate=lambda run: build_lr_schedule(run)(step),
        record_event=record_event,
    )
    for line in data_changes:
        record_event(step, "change", line)
    for line in [*changed, *data_changes]:
        console.print(line, markup=False)


def build_trainer(
    config: RunConfig,
    topology: Topology,
    console: IsolatedConsole,
    *,
    attempt: str,
    stop_signals: StopSignals,
    tracker: ProgressTracker,
    allow_change: Sequence[str] = (),
) -> Trainer:
    """Build every part of a run and resume from its newest checkpoint; collective.

    attempt       name of this start of the run
    allow_change  keys that may differ from those of the run so far (--allow_change)
    stop_signals  signals that ask the run to stop
    tracker       told what this rank does
    """
    paths, is_rank_zero = RunPaths(config.run.dir), topology.rank == 0
    tokenizer = build_tokenizer(config)
    checkpointer = build_checkpointer(config, topology)
    checkpoint = checkpointer.latest()
    progress = console.print if is_rank_zero else lambda line: None
    sources = build_sources(config.data, progress) if topology.reads_data else {}
    validation_set = open_validation_set(config, tokenizer, topology, progress)
    fingerprints: dict[str, Fingerprint] = {}
    data_changes: list[str] = []
    if is_rank_zero:
        fingerprints, data_changes = fingerprint_run(config, tokenizer, sources, checkpoint, allow_change)
    stages = partition_layers(config)
    event_recorder: EventRecorder = EventLog(paths).record if is_rank_zero else ignore_event
    failures = OutputFailures(lambda: tracker.step, event_recorder, console)
    console.on_failure = failures.report_console
    logs = StepLogs(paths.path, report_failure=failures.report, request_stop=stop_signals.request_stop)
    if is_rank_zero:
        if checkpoint:
            restore_unwritten(checkpoint, paths.path)
        record_start_configuration(config, data_changes, event_recorder, console)
        for line in summary_lines(config, stages, world_size=topology.world_size):
            console.print(line)
        if validation_set:
            console.print(validation_set.describe())
    loader = build_loader(config, tokenizer, topology, console, sources)

    def should_apply_update(loss: float, grad_norm: float) -> bool:
        return guard.should_step(loss, grad_norm)  # built below: its state is loaded first

    build = partial(
        build_engine,
        config,
        stages,
        topology,
        should_apply_update=should_apply_update,
        set_phase=tracker.set_phase,
    )
    frozen = FrozenParameters(config, topology, checkpoint)
    engine = build_phased_engine(config, build, frozen.initializer(), checkpoint)
    frozen.check_built(engine)
    extra = frozen.load(engine, checkpointer, checkpoint) if checkpoint else {}
    if line := frozen.describe():
        progress(line)
    guard = LossSpikeGuard(config.watch, extra.get("loss_spike_guard"), record_event=event_recorder)
    state = TrainState(extra["step"], extra["data_step"], extra["data"]) if extra else TrainState()
    control = ControlSignals(paths, stop_signals, checks_files=is_rank_zero)
    validator = build_validator(
        config, engine, tokenizer, topology, validation_set, checkpointer, control.poll, tracker.set_phase
    )
    if validator and extra:
        validator.load_state_dict(extra.get("validation"))

    def load(checkpoint: Path) -> Mapping[str, Any]:
        return frozen.load(engine, checkpointer, checkpoint, saved_phase(config, checkpoint))

    def record_phase(text: str) -> None:
        progress(text)
        event_recorder(state.step, "change", text)

    def save(step: int, keep_older: bool) -> None:
        extra = checkpoint_extra(state, guard, fingerprints, validator)
        checkpointer.save(
            step,
            engine.state_dict(frozen.is_saved),
            extra,
            rank_files=logs.unwritten_files() | frozen.files(),
            keep_older=keep_older,
            best_step=validator.best_step(step) if validator else None,
        )

    evaluation = build_evaluation(config, failures.report) if is_rank_zero else None
    callbacks = [
        ProgressCallback(tracker),
        *build_callbacks(config, loader, topology, console, logs.open, evaluation),
        build_checkpoint_callback(
            config, checkpointer, save, console if is_rank_zero else None, tracker, event_recorder, evaluation
        ),
    ]
    if is_rank_zero:
        callbacks += [
            ReportCallback(paths, write_run_report),
            RunFinalizer(paths, attempt, stop_reason=control.stop_reason, record_event=event_recorder, console=console),
            *build_trackers(config),
        ]
    isolated = isolate_side_outputs(callbacks, failures.report)
    if evaluation:
        evaluation.listeners = isolated
    return Trainer(
        engine=engine,
        loader=loader,
        callbacks=isolated,
        loss_spike_guard=guard,
        steps=config.train.steps,
        learning_rate=build_lr_schedule(config),
        state=state,
        poll_control=control.poll,
        load_latest=partial(load_latest, checkpointer, load),
        set_phase=tracker.set_phase,
        begin_data_step=partial(enter_phase, config, engine, record=record_phase, set_phase=tracker.set_phase),
        validator=validator,
    )
