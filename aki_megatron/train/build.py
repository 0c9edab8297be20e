"""RunConfig to Run: the only place that constructs. One function per part."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from aki_megatron.checkpoint.saver import Saver
from aki_megatron.config.check import micro_batch
from aki_megatron.config.combinations import offload_device
from aki_megatron.config.deepspeed import settings_for_engine
from aki_megatron.config.interrupts import Interrupts
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import dump
from aki_megatron.data.loader import Loader, NoBatches
from aki_megatron.data.losses import Losses
from aki_megatron.data.text import Tokenizer
from aki_megatron.engine.base import Engine, StageRunner
from aki_megatron.engine.optimizer import adamw, learning_rate
from aki_megatron.engine.pipeline import PipelineEngine
from aki_megatron.engine.replica import ReplicaStage
from aki_megatron.engine.zero import ZeroStage
from aki_megatron.evaluate.report import RunRecord, write_report
from aki_megatron.flow import CheckpointError
from aki_megatron.model.stage import Stage, build_stage
from aki_megatron.parallel.cut import stage_layers
from aki_megatron.parallel.megatron import build_linears
from aki_megatron.parallel.topology import Topology
from aki_megatron.train.describe import describe, micro_batches, recomputes
from aki_megatron.train.events import record
from aki_megatron.train.folder import RunFolder, read_metrics
from aki_megatron.train.hooks import ConsoleHook, EndHook, LogHook, MetricsHook, SaveHook, TensorBoardHook
from aki_megatron.train.hooks_wandb import WandbHook
from aki_megatron.train.ledger import LedgerHook
from aki_megatron.train.loop import Hook, Progress, Run
from aki_megatron.train.reading import build_reading, build_tokenizer
from aki_megatron.train.spikes import Judge, Note
from aki_megatron.train.watch import Pulse, collective_seconds
from aki_megatron.train.weights import weight_source
from aki_megatron.train.wishes import Wishes

logger = logging.getLogger("aki_megatron.train")


def build_steps(config: RunConfig, tokenizer: Tokenizer, topology: Topology, console: Console) -> Loader | NoBatches:
    """This rank's batches; none where another rank reads them."""
    if not topology.reads_data:
        return NoBatches()
    reading = build_reading(
        config,
        tokenizer,
        micro_rows=micro_batch(config, topology.world_size),
        data_rank=topology.data_rank,
        data_size=topology.data,
        progress=console.print if topology.rank == 0 else lambda line: None,
    )
    return Loader(
        reading.planner,
        reading.micro_batches,
        losses=Losses(config.data.max_bad_fraction),
        workers=config.data.workers,
        prefetch_steps=config.data.prefetch_steps,
        pin_memory=topology.device.type == "cuda",
    )


def cut_model(config: RunConfig) -> list[range]:
    """Decoder layers of each of the pipeline x chunks stages, in model order."""
    parallel = config.parallel
    return stage_layers(
        config.model,
        stages=parallel.pipeline * parallel.chunks,
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


def build_runner(config: RunConfig, stage: Stage, topology: Topology) -> StageRunner:
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
        return ReplicaStage(stage, topology, optimizer)
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
        clip_norm=config.optimizer.clip_norm,
        check_every=config.parallel.check_every,
        accept=accept,
        at=at,
    )


def build_saver(config: RunConfig, topology: Topology) -> Saver:
    """What saves and loads the run's checkpoints; collective."""
    c = config.checkpoint
    return Saver(
        RunFolder(config.run.dir).checkpoints,
        keep_last=c.keep_last,
        keep_every=c.keep_every,
        config_yaml=dump(config),
        asynchronous=c.asynchronous,
        group=topology.new_gloo_group(collective_seconds(config.watch)),
    )


def extra_of(progress: Progress, judge: Judge) -> dict[str, Any]:
    """What a checkpoint holds besides the engine's state; ``restore`` returns it."""
    return {
        "step": progress.step,
        "data_step": progress.data_step,
        "data": dict(progress.data),
        "judge": judge.state(),
    }


def restore(engine: Engine, saver: Saver, checkpoint: Path) -> dict[str, Any]:
    """Load a checkpoint into the engine; what ``extra_of`` returned when it was saved."""
    tensors = engine.state()
    saved = saver.load(checkpoint, tensors)
    engine.load_state(tensors)
    return saved


def go_back(engine: Engine, saver: Saver) -> Mapping[str, Any]:
    """``restore`` the newest checkpoint in the middle of a run.

    Errors: CheckpointError where there is none.
    """
    try:
        saver.wait()
    except CheckpointError as error:
        logger.error("the last checkpoint failed, so the run goes back to one before: %s", error)
    if (checkpoint := saver.latest()) is None:
        raise CheckpointError(
            f"The run should go back to a checkpoint (watch.non_finite, watch.spike), but {saver.folder} has none: not "
            "even the first could be written, and the logs say why."
        )
    return restore(engine, saver, checkpoint)


def report_of(folder: RunFolder) -> None:
    """Write the run's own report."""
    record = RunRecord(folder.path.name, read_metrics(folder.metrics), folder.config.read_text())
    write_report(folder.report, f"Run {folder.path.name}", [record])


def build_saving(
    config: RunConfig,
    saver: Saver,
    save: Callable[[int], None],
    console: Console | None,
    at: Callable[[str], None],
    note: Note,
) -> SaveHook:
    """What decides when to ``save``. A run that may have to go back has a checkpoint from the beginning."""
    goes_back = "rollback" in (config.watch.non_finite, config.watch.spike)
    every, steps = config.checkpoint.every, config.train.steps
    return SaveHook(saver, save, every, steps, console, at_start=goes_back, at=at, note=note)


def build_curve(config: RunConfig) -> Callable[[int], float]:
    """Learning rate of the optimizer step with a number, counted from 0."""
    o = config.optimizer
    return partial(learning_rate, lr=o.lr, min_lr=o.min_lr, warmup_steps=o.warmup_steps, steps=config.train.steps)


def announce(config: RunConfig, stages: Sequence[range], topology: Topology, console: Console) -> None:
    """Write the resolved configuration, and say what the run is."""
    RunFolder(config.run.dir).config.write_text(dump(config))
    for line in describe(config, stages, world_size=topology.world_size):
        console.print(line)


def build_hooks(
    config: RunConfig,
    loader: Loader | NoBatches,
    saving: SaveHook,
    ending: EndHook,
    topology: Topology,
    console: Console,
) -> list[Hook]:
    """Hooks in the order in which they act: a step is recorded before it is saved, and DONE comes last."""
    folder, log = RunFolder(config.run.dir), config.log
    hooks: list[Hook] = []
    if isinstance(loader, Loader):
        hooks.append(LogHook(loader.losses.describe, console))
        hooks.append(LedgerHook(folder.ledger, loader.last, data_rank=topology.data_rank, data_size=topology.data))
    else:
        hooks.append(LogHook(str, console))
    if topology.rank != 0:
        return [*hooks, saving]
    hooks += [MetricsHook(folder.metrics), ConsoleHook(config.train.steps, log.every, console)]
    if log.tensorboard:
        hooks.append(TensorBoardHook(folder.path / "tensorboard", log.every))
    if log.wandb != "disabled":
        values = config.model_dump(mode="json")
        hooks.append(WandbHook(folder.path, project=log.wandb_project, mode=log.wandb, every=log.every, config=values))
    return [*hooks, saving, ending]


def build_run(
    config: RunConfig, topology: Topology, console: Console, *, attempt: str, interrupts: Interrupts, pulse: Pulse
) -> Run:
    """Every part of a run, put together.

    attempt     names this start of the run
    interrupts  signals that ask it to stop
    pulse       is told what this rank does
    """
    folder, first = RunFolder(config.run.dir), topology.rank == 0
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
    judge = Judge(config.watch, saved.get("judge"), note=note)
    progress = Progress(saved["step"], saved["data_step"], saved["data"]) if saved else Progress()
    wishes = Wishes(folder, interrupts, looks=first)

    def save(step: int) -> None:
        saver.save(step, engine.state(), extra_of(progress, judge))

    saving = build_saving(config, saver, save, console if first else None, pulse.at, note)
    ending = EndHook(folder, attempt, wishes.why_stop, note, report_of, console)
    return Run(
        engine=engine,
        loader=loader,
        hooks=[pulse, *build_hooks(config, loader, saving, ending, topology, console)],
        judge=judge,
        steps=config.train.steps,
        learning_rate=build_curve(config),
        progress=progress,
        wishes=wishes,
        go_back=partial(go_back, engine, saver),
        at=pulse.at,
    )
