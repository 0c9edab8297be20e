"""RunConfig to Run: the only place that constructs. One function per part."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from aki_megatron.checkpoint.saver import Saver
from aki_megatron.config.check import micro_batch
from aki_megatron.config.deepspeed import settings_for_engine
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import dump
from aki_megatron.data.loader import Loader, NoBatches
from aki_megatron.data.shards import ShardIndex
from aki_megatron.data.sources import open_sources
from aki_megatron.data.stream import CaptionStream, ConversationStream, SampleStream
from aki_megatron.data.template import Template
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
from aki_megatron.train.loop import Hook, Run, StepSource
from aki_megatron.train.weights import weight_source


def build_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer, proven to have exactly the tokens the model's tables have."""
    tokenizer = Tokenizer(config.data.tokenizer)
    tokenizer.check_vocabulary(config.model.decoder)
    return tokenizer


def build_template(config: RunConfig, tokenizer: Tokenizer) -> Template:
    """How text becomes tokens in this run."""
    return Template(
        tokenizer,
        image_tokens=config.model.resampler.latents,
        max_text_tokens=config.data.max_text_tokens,
        system_message=config.data.system_message,
    )


def build_stream(config: RunConfig, template: Template) -> SampleStream:
    """The numbered samples of the run."""
    data, seed, size = config.data, config.train.seed, config.model.vision.image_size
    if data.kind == "captions":
        index = ShardIndex([shard for captions in data.captions for shard in captions.shards], data.root)
        return CaptionStream(index, template, seed=seed, image_size=size, max_bad_fraction=data.max_bad_fraction)
    weights: dict[str, float] = {source.name: source.weight for source in data.sources}
    sources = open_sources(data.root, list(weights), "train")
    return ConversationStream(
        sources, weights, template, seed=seed, image_size=size, max_bad_fraction=data.max_bad_fraction
    )


def build_steps(config: RunConfig, tokenizer: Tokenizer, stream: SampleStream | None, topology: Topology) -> StepSource:
    """This rank's batches; none where another rank reads them."""
    if stream is None:
        return NoBatches()
    return Loader(
        stream,
        pad_id=tokenizer.pad,
        image_size=config.model.vision.image_size,
        global_batch=config.train.global_batch,
        micro_batch=micro_batch(config, topology.world_size),
        data_rank=topology.data_rank,
        data_size=topology.data,
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
        fused="offload_optimizer" in settings.get("zero_optimization", {}),
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


def restore(engine: Engine, saver: Saver, checkpoint: Path | None) -> int:
    """Load a checkpoint into the engine; returns how many optimizer steps are done."""
    if checkpoint is None:
        return 0
    tensors = engine.state()
    step = int(saver.load(checkpoint, tensors)["step"])
    engine.load_state(tensors)
    return step


def report_of(folder: RunFolder) -> None:
    """Write the run's own report."""
    record = RunRecord(folder.path.name, read_metrics(folder.metrics), folder.config.read_text())
    write_report(folder.report, f"Run {folder.path.name}", [record])


def build_hooks(
    config: RunConfig, engine: Engine, stream: SampleStream | None, saver: Saver, topology: Topology, console: Console
) -> list[Hook]:
    """Hooks in the order in which they act: a step is recorded before it is saved, and DONE comes last."""
    folder, log, steps = RunFolder(config.run.dir), config.log, config.train.steps
    first = topology.rank == 0
    logs = LogHook(stream.losses.describe if stream else str, console)

    def save(step: int) -> Path:
        return saver.save(step, engine.state(), {"step": step})

    saving = SaveHook(save, config.checkpoint.every, steps, console if first else None)
    if not first:
        return [logs, saving]
    hooks: list[Hook] = [logs, MetricsHook(folder.metrics), ConsoleHook(steps, log.every, console)]
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
    stream = build_stream(config, build_template(config, tokenizer)) if topology.reads_data else None
    saver = Saver(folder.checkpoints, keep_last=config.checkpoint.keep_last)
    checkpoint = saver.latest()
    stages = cut_model(config)
    if topology.rank == 0:
        folder.config.write_text(dump(config))
        for line in describe(config, stages, world_size=topology.world_size):
            console.print(line)
    engine = build_engine(
        config, stages, topology, fill=weight_source(config, topology, resuming=checkpoint is not None)
    )
    o = config.optimizer
    curve: Callable[[int], float] = partial(
        learning_rate, lr=o.lr, min_lr=o.min_lr, warmup_steps=o.warmup_steps, steps=config.train.steps
    )
    return Run(
        engine=engine,
        loader=build_steps(config, tokenizer, stream, topology),
        hooks=build_hooks(config, engine, stream, saver, topology, console),
        steps=config.train.steps,
        learning_rate=curve,
        step=restore(engine, saver, checkpoint),
    )
