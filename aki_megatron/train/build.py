"""RunConfig to Run: the only place that constructs. One function per part."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.initial_weights import weight_source
from aki_megatron.config.combinations import offload_device
from aki_megatron.config.cross_checks import micro_batch_size
from aki_megatron.config.deepspeed import settings_for_engine
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import dump
from aki_megatron.data.bad_samples import BadSampleBudget
from aki_megatron.data.loader import Loader, NoBatches
from aki_megatron.data.pipeline import build_reading, build_tokenizer
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.engine.base import Engine, ShardedStage
from aki_megatron.engine.ddp_stage import DDPStage
from aki_megatron.engine.optimizer import adamw, learning_rate
from aki_megatron.engine.pipeline import PipelineEngine
from aki_megatron.engine.zero_stage import ZeroStage
from aki_megatron.errors import CheckpointError
from aki_megatron.evaluate.run_report import RunRecord, write_report
from aki_megatron.model.stage import Stage, build_stage
from aki_megatron.parallel.megatron import build_linears
from aki_megatron.parallel.pipeline_partition import stage_layers
from aki_megatron.parallel.topology import Topology
from aki_megatron.supervise.control import ControlSignals
from aki_megatron.supervise.events import record
from aki_megatron.supervise.loss_spikes import LossSpikeGuard, Note
from aki_megatron.supervise.run_paths import RunPaths, read_metrics
from aki_megatron.supervise.signals import StopSignals
from aki_megatron.supervise.watchdog import ProgressTracker, collective_seconds
from aki_megatron.train.callbacks import (
    CheckpointCallback,
    ConsoleCallback,
    LogCallback,
    MetricsCallback,
    RunFinalizer,
    TensorBoardCallback,
)
from aki_megatron.train.loop import Callback, Progress, Run
from aki_megatron.train.run_summary import describe, micro_batches, recomputes
from aki_megatron.train.sample_audit import SampleAuditCallback
from aki_megatron.train.wandb_callback import WandbCallback

logger = logging.getLogger("aki_megatron.train")


def build_steps(config: RunConfig, tokenizer: Tokenizer, topology: Topology, console: Console) -> Loader | NoBatches:
    """This rank's batches; none where another rank reads them."""
    if not topology.reads_data:
        return NoBatches()
    reading = build_reading(
        config,
        tokenizer,
        micro_rows=micro_batch_size(config, topology.world_size),
        data_rank=topology.data_rank,
        data_size=topology.data,
        progress=console.print if topology.rank == 0 else lambda line: None,
    )
    return Loader(
        reading.planner,
        reading.micro_batches,
        losses=BadSampleBudget(config.data.max_bad_fraction),
        workers=config.data.num_workers,
        prefetch_steps=config.data.prefetch_steps,
        pin_memory=topology.device.type == "cuda",
    )


def cut_model(config: RunConfig) -> list[range]:
    """Decoder layers of each of the pipeline x virtual_stages stages, in model order."""
    parallel = config.parallel
    return stage_layers(
        config.model,
        stages=parallel.pipeline * parallel.virtual_stages,
        layers_per_stage=parallel.layers_per_stage,
        text_tokens=config.data.max_text_tokens,
        recompute=recomputes(config),
    )


def build_stages(config: RunConfig, stages: Sequence[range], topology: Topology) -> Iterator[Stage]:
    """This pipeline rank's stages, one per chunk, as this tensor rank holds them, with their first random weights."""
    linears = build_linears(topology)
    for layers in stages[topology.pipeline_rank :: topology.pipeline]:
        yield build_stage(
            config.model,
            layers,
            rule=config.attention.rule,
            seed=config.train.seed,
            linears=linears,
            recompute=recomputes(config),
        )


def build_runner(config: RunConfig, stage: Stage, topology: Topology) -> ShardedStage:
    """A stage with its optimizer state, split over the data ranks by ZeRO or not at all."""
    o = config.optimizer
    settings = settings_for_engine(config)
    optimizer = adamw(
        stage,
        weight_decay=o.weight_decay,
        beta1=o.beta1,
        beta2=o.beta2,
        eps=o.eps,
        fused=offload_device(config, "offload_optimizer") != "none",
    )
    if config.parallel.zero_stage == 0:
        return DDPStage(stage, topology, optimizer)
    return ZeroStage(
        stage,
        topology,
        optimizer,
        zero_stage=config.parallel.zero_stage,
        precision=config.train.precision,
        deepspeed_config=settings,
    )


def build_engine(
    config: RunConfig,
    stages: Sequence[range],
    topology: Topology,
    *,
    fill: Callable[[Stage], None],
    accept: Callable[[float, float], bool] = lambda loss, norm: True,
    at: Callable[[str], None] = lambda place: None,
) -> Engine:
    """The engine over this rank's stages; ``fill`` puts the weights the run starts from into each.

    ``accept`` and ``at``: see PipelineEngine.

    One stage is whole in memory at a time: its runner partitions it before the next is built.
    """
    runners = []
    for stage in build_stages(config, stages, topology):
        fill(stage)
        runners.append(build_runner(config, stage, topology))
    return PipelineEngine(
        runners,
        topology,
        micro_batches=micro_batches(config, topology.world_size),
        precision=config.train.precision,
        max_grad_norm=config.optimizer.max_grad_norm,
        mask_check_interval=config.parallel.mask_check_interval,
        accept=accept,
        at=at,
    )


def build_saver(config: RunConfig, topology: Topology) -> Checkpointer:
    """What saves and loads the run's checkpoints; collective."""
    c = config.checkpoint
    return Checkpointer(
        RunPaths(config.run.dir).checkpoints,
        keep_last=c.keep_last,
        keep_every=c.keep_every,
        config_yaml=dump(config),
        async_save=c.async_save,
        group=topology.new_gloo_group(collective_seconds(config.watch)),
    )


def extra_of(progress: Progress, judge: LossSpikeGuard) -> dict[str, Any]:
    """What a checkpoint holds besides the engine's state; ``restore`` returns it."""
    return {
        "step": progress.step,
        "data_step": progress.data_step,
        "data": dict(progress.data),
        "judge": judge.state(),
    }


def restore(engine: Engine, saver: Checkpointer, checkpoint: Path) -> dict[str, Any]:
    """Load a checkpoint into the engine; what ``extra_of`` returned when it was saved."""
    tensors = engine.state()
    saved = saver.load(checkpoint, tensors)
    engine.load_state(tensors)
    return saved


def rollback(engine: Engine, saver: Checkpointer) -> Mapping[str, Any]:
    """``restore`` the newest checkpoint in the middle of a run.

    Errors: CheckpointError where there is none.
    """
    try:
        saver.wait()
    except CheckpointError as error:
        logger.error("the last checkpoint failed, so the run goes back to one before: %s", error)
    if (checkpoint := saver.latest()) is None:
        raise CheckpointError(
            f"The run should go back to a checkpoint (watch.on_non_finite, watch.on_loss_spike), but {saver.folder} has none: not "
            "even the first could be written, and the logs say why."
        )
    return restore(engine, saver, checkpoint)


def report_of(folder: RunPaths) -> None:
    """Write the run's own report."""
    record = RunRecord(folder.path.name, read_metrics(folder.metrics), folder.config.read_text())
    write_report(folder.report, f"Run {folder.path.name}", [record])


def build_saving(
    config: RunConfig,
    saver: Checkpointer,
    save: Callable[[int], None],
    console: Console | None,
    at: Callable[[str], None],
    note: Note,
) -> CheckpointCallback:
    """What decides when to ``save``. A run that may have to go back has a checkpoint from the beginning."""
    goes_back = "rollback" in (config.watch.on_non_finite, config.watch.on_loss_spike)
    every, steps = config.checkpoint.interval, config.train.steps
    return CheckpointCallback(saver, save, every, steps, console, at_start=goes_back, at=at, note=note)


def build_curve(config: RunConfig) -> Callable[[int], float]:
    """Learning rate of the optimizer step with a number, counted from 0."""
    o = config.optimizer
    return partial(learning_rate, lr=o.lr, min_lr=o.min_lr, warmup_steps=o.warmup_steps, steps=config.train.steps)


def announce(config: RunConfig, stages: Sequence[range], topology: Topology, console: Console) -> None:
    """Write the resolved configuration, and say what the run is."""
    RunPaths(config.run.dir).config.write_text(dump(config))
    for line in describe(config, stages, world_size=topology.world_size):
        console.print(line)


def build_hooks(
    config: RunConfig,
    loader: Loader | NoBatches,
    saving: CheckpointCallback,
    ending: RunFinalizer,
    topology: Topology,
    console: Console,
) -> list[Callback]:
    """Hooks in the order in which they act: a step is recorded before it is saved, and DONE comes last."""
    folder, log = RunPaths(config.run.dir), config.log
    callbacks: list[Callback] = []
    if isinstance(loader, Loader):
        callbacks.append(LogCallback(loader.losses.describe, console))
        callbacks.append(
            SampleAuditCallback(folder.ledger, loader.last, data_rank=topology.data_rank, data_size=topology.data)
        )
    else:
        callbacks.append(LogCallback(str, console))
    if topology.rank != 0:
        return [*callbacks, saving]
    callbacks += [MetricsCallback(folder.metrics), ConsoleCallback(config.train.steps, log.interval, console)]
    if log.tensorboard:
        callbacks.append(TensorBoardCallback(folder.path / "tensorboard", log.interval))
    if log.wandb != "disabled":
        values = config.model_dump(mode="json")
        callbacks.append(
            WandbCallback(folder.path, project=log.wandb_project, mode=log.wandb, every=log.interval, config=values)
        )
    return [*callbacks, saving, ending]


def build_run(
    config: RunConfig,
    topology: Topology,
    console: Console,
    *,
    attempt: str,
    stop_signals: StopSignals,
    pulse: ProgressTracker,
) -> Run:
    """Every part of a run, put together.

    attempt     names this start of the run
    stop_signals  signals that ask it to stop
    pulse       is told what this rank does
    """
    folder, first = RunPaths(config.run.dir), topology.rank == 0
    tokenizer = build_tokenizer(config)
    saver = build_saver(config, topology)
    checkpoint = saver.latest()
    stages = cut_model(config)
    if first:
        announce(config, stages, topology, console)
    loader = build_steps(config, tokenizer, topology, console)
    engine = build_engine(
        config,
        stages,
        topology,
        fill=weight_source(config, topology, resuming=checkpoint is not None),
        accept=lambda loss, norm: judge.accept(loss, norm),  # the judge's past is in the checkpoint: it is made below
        at=pulse.at,
    )
    saved = restore(engine, saver, checkpoint) if checkpoint else {}
    note: Note = partial(record, folder) if first else lambda step, kind, text: None
    judge = LossSpikeGuard(config.watch, saved.get("judge"), note=note)
    progress = Progress(saved["step"], saved["data_step"], saved["data"]) if saved else Progress()
    control_signals = ControlSignals(folder, stop_signals, looks=first)

    def save(step: int) -> None:
        saver.save(step, engine.state(), extra_of(progress, judge))

    saving = build_saving(config, saver, save, console if first else None, pulse.at, note)
    ending = RunFinalizer(folder, attempt, control_signals.why_stop, note, report_of, console)
    return Run(
        engine=engine,
        loader=loader,
        callbacks=[pulse, *build_hooks(config, loader, saving, ending, topology, console)],
        judge=judge,
        steps=config.train.steps,
        learning_rate=build_curve(config),
        progress=progress,
        control_signals=control_signals,
        rollback=partial(rollback, engine, saver),
        at=pulse.at,
    )
