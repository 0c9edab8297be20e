"""RunConfig to Run: the only place that constructs. One function per part."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from aki_megatron.checkpoint.saver import Saver
from aki_megatron.config.check import micro_batch
from aki_megatron.config.combinations import offload_device
from aki_megatron.config.deepspeed import settings_for_engine
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import dump
from aki_megatron.data.loader import Loader, NoBatches
from aki_megatron.data.losses import Losses
from aki_megatron.data.steps import State
from aki_megatron.data.text import Tokenizer
from aki_megatron.engine.base import Engine, StageRunner
from aki_megatron.engine.optimizer import adamw, learning_rate
from aki_megatron.engine.pipeline import PipelineEngine
from aki_megatron.engine.replica import ReplicaStage
from aki_megatron.engine.zero import ZeroStage
from aki_megatron.evaluate.report import RunRecord, write_report
from aki_megatron.model.stage import Stage, build_stage
from aki_megatron.parallel.cut import stage_layers
from aki_megatron.parallel.megatron import build_linears
from aki_megatron.parallel.topology import Topology
from aki_megatron.train.describe import describe, micro_batches, recomputes
from aki_megatron.train.folder import RunFolder, read_metrics
from aki_megatron.train.hooks import ConsoleHook, DoneHook, LogHook, MetricsHook, SaveHook, TensorBoardHook
from aki_megatron.train.hooks_wandb import WandbHook
from aki_megatron.train.ledger import LedgerHook
from aki_megatron.train.loop import Hook, Run
from aki_megatron.train.reading import build_reading, build_tokenizer
from aki_megatron.train.weights import weight_source


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
    config: RunConfig, stages: Sequence[range], topology: Topology, *, fill: Callable[[Stage], None]
) -> Engine:
    """The engine over this rank's stages; ``fill`` puts the weights the run starts from into each.

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
    )


def restore(engine: Engine, saver: Saver, checkpoint: Path | None) -> tuple[int, State | None]:
    """Load a checkpoint into the engine; returns how many optimizer steps are done, and where the data stand."""
    if checkpoint is None:
        return 0, None
    tensors = engine.state()
    saved = saver.load(checkpoint, tensors)
    engine.load_state(tensors)
    return int(saved["step"]), saved.get("data")


def report_of(folder: RunFolder) -> None:
    """Write the run's own report."""
    record = RunRecord(folder.path.name, read_metrics(folder.metrics), folder.config.read_text())
    write_report(folder.report, f"Run {folder.path.name}", [record])


def build_hooks(
    config: RunConfig, engine: Engine, loader: Loader | NoBatches, saver: Saver, topology: Topology, console: Console
) -> list[Hook]:
    """Hooks in the order in which they act: a step is recorded before it is saved, and DONE comes last."""
    folder, log, steps = RunFolder(config.run.dir), config.log, config.train.steps
    first = topology.rank == 0

    def save(step: int) -> Path:
        return saver.save(step, engine.state(), {"step": step, "data": dict(loader.last().state)})

    saving = SaveHook(save, config.checkpoint.every, steps, console if first else None)
    hooks: list[Hook] = []
    if isinstance(loader, Loader):
        hooks.append(LogHook(loader.losses.describe, console))
        hooks.append(LedgerHook(folder.ledger, loader.last, data_rank=topology.data_rank, data_size=topology.data))
    else:
        hooks.append(LogHook(str, console))
    if not first:
        return [*hooks, saving]
    hooks += [MetricsHook(folder.metrics), ConsoleHook(steps, log.every, console)]
    if log.tensorboard:
        hooks.append(TensorBoardHook(folder.path / "tensorboard", log.every))
    if log.wandb != "disabled":
        values = config.model_dump(mode="json")
        hooks.append(WandbHook(folder.path, project=log.wandb_project, mode=log.wandb, every=log.every, config=values))
    return [*hooks, saving, DoneHook(folder, report_of, console)]


def build_run(config: RunConfig, topology: Topology, console: Console) -> Run:
    """Every part of a run, put together."""
    folder = RunFolder(config.run.dir)
    tokenizer = build_tokenizer(config)
    saver = Saver(folder.checkpoints, keep_last=config.checkpoint.keep_last)
    checkpoint = saver.latest()
    stages = cut_model(config)
    if topology.rank == 0:
        folder.config.write_text(dump(config))
        for line in describe(config, stages, world_size=topology.world_size):
            console.print(line)
    loader = build_steps(config, tokenizer, topology, console)
    engine = build_engine(
        config, stages, topology, fill=weight_source(config, topology, resuming=checkpoint is not None)
    )
    o = config.optimizer
    curve: Callable[[int], float] = partial(
        learning_rate, lr=o.lr, min_lr=o.min_lr, warmup_steps=o.warmup_steps, steps=config.train.steps
    )
    step, data_state = restore(engine, saver, checkpoint)
    return Run(
        engine=engine,
        loader=loader,
        hooks=build_hooks(config, engine, loader, saver, topology, console),
        steps=config.train.steps,
        learning_rate=curve,
        step=step,
        data_state=data_state,
    )
