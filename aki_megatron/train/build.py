"""RunConfig to Run: the only place that constructs. One function per part."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from aki_megatron.checkpoint.huggingface import load_pretrained
from aki_megatron.checkpoint.saver import Saver, read_weights
from aki_megatron.config.check import data_size, micro_batch
from aki_megatron.config.deepspeed import settings_for_engine
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import dump
from aki_megatron.data.loader import Loader
from aki_megatron.data.shards import ShardIndex
from aki_megatron.data.sources import open_sources
from aki_megatron.data.stream import CaptionStream, ConversationStream, SampleStream
from aki_megatron.data.template import Template
from aki_megatron.data.text import Tokenizer
from aki_megatron.engine.optimizer import adamw, learning_rate
from aki_megatron.engine.zero import ZeroEngine
from aki_megatron.evaluate.report import RunRecord, write_report
from aki_megatron.flow import CheckpointError
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.parallel.topology import Topology
from aki_megatron.train.folder import RunFolder, read_metrics
from aki_megatron.train.hooks import ConsoleHook, DoneHook, LogHook, MetricsHook, SaveHook, TensorBoardHook
from aki_megatron.train.hooks_wandb import WandbHook
from aki_megatron.train.loop import Hook, Run

logger = logging.getLogger("aki_megatron.train")


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
        index = ShardIndex(data.shards, data.root)
        return CaptionStream(index, template, seed=seed, image_size=size, max_bad_fraction=data.max_bad_fraction)
    weights: dict[str, float] = {source.name: source.weight for source in data.sources}
    sources = open_sources(data.root, list(weights), "train")
    return ConversationStream(
        sources, weights, template, seed=seed, image_size=size, max_bad_fraction=data.max_bad_fraction
    )


def build_loader(config: RunConfig, stream: SampleStream, tokenizer: Tokenizer, topology: Topology) -> Loader:
    """This rank's batches."""
    return Loader(
        stream,
        pad_id=tokenizer.pad,
        image_size=config.model.vision.image_size,
        global_batch=config.train.global_batch,
        micro_batch=micro_batch(config, topology.world_size),
        data_rank=topology.data_rank,
        data_size=data_size(config, topology.world_size),
        prefetch_steps=config.data.prefetch_steps,
        pin_memory=topology.device.type == "cuda",
    )


def load_weights(model: Stage, checkpoint: Path) -> None:
    """Copy every weight of a checkpoint (or of the newest one of a run folder) into the model.

    Errors: CheckpointError where there is none, or with the names that do not fit.
    """
    weights = read_weights(checkpoint)
    own = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    saved = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [
        f"{name}: {saved.get(name, 'missing')} in the checkpoint, {own.get(name, 'missing')} in the model"
        for name in sorted(own.keys() | saved.keys())
        if own.get(name) != saved.get(name)
    ]
    if wrong:
        listing = "\n  ".join(wrong[:10])
        raise CheckpointError(f"{checkpoint} is of another model ({len(wrong)} tensors differ):\n  {listing}")
    model.load_state_dict(weights, strict=False)


def build_initialized_model(config: RunConfig, *, resuming: bool) -> Stage:
    """The model with the weights the run starts from; a run that resumes gets them from its checkpoint later."""
    torch.manual_seed(config.train.seed)
    model = build_model(config.model, rule=config.attention.rule)
    if resuming:
        return model
    init = config.init
    if init.weights is not None:
        load_weights(model, init.weights)
    elif init.vision is not None or init.language is not None:
        fresh = load_pretrained(model, vision=init.vision, language=init.language)
        logger.info("random initialization of %d tensors: %s", len(fresh), ", ".join(fresh))
    return model


def build_engine(config: RunConfig, model: Stage, topology: Topology) -> ZeroEngine:
    """The ZeRO engine around the model."""
    o = config.optimizer
    optimizer = adamw(model, weight_decay=o.weight_decay, beta1=o.beta1, beta2=o.beta2, eps=o.eps)
    return ZeroEngine(
        model,
        topology,
        optimizer,
        zero_stage=config.parallel.zero_stage,
        precision=config.train.precision,
        clip_norm=o.clip_norm,
        deepspeed_config=settings_for_engine(config),
    )


def restore(engine: ZeroEngine, saver: Saver, checkpoint: Path | None) -> int:
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
    config: RunConfig, engine: ZeroEngine, stream: SampleStream, saver: Saver, topology: Topology, console: Console
) -> list[Hook]:
    """Hooks in the order in which they act: a step is recorded before it is saved, and DONE comes last."""
    folder, log, steps = RunFolder(config.run.dir), config.log, config.train.steps
    first = topology.rank == 0
    logs = LogHook(stream.losses.describe, console)

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
    stream = build_stream(config, build_template(config, tokenizer))
    saver = Saver(folder.checkpoints, keep_last=config.checkpoint.keep_last)
    checkpoint = saver.latest()
    model = build_initialized_model(config, resuming=checkpoint is not None)
    if topology.rank == 0:
        folder.config.write_text(dump(config))
        parameters = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        console.print(f"model: {parameters:,} parameters, {trained:,} of them trained")
        ranks, at_once = data_size(config, topology.world_size), micro_batch(config, topology.world_size)
        parts = config.train.global_batch // ranks // at_once
        console.print(
            f"step: {config.train.global_batch} samples = {ranks} data ranks x {parts} micro-batches x {at_once}; "
            f"ZeRO-{config.parallel.zero_stage}, {config.train.precision}, rule {config.attention.rule}"
        )
    engine = build_engine(config, model, topology)
    o = config.optimizer
    curve: Callable[[int], float] = partial(
        learning_rate, lr=o.lr, min_lr=o.min_lr, warmup_steps=o.warmup_steps, steps=config.train.steps
    )
    return Run(
        engine=engine,
        loader=build_loader(config, stream, tokenizer, topology),
        hooks=build_hooks(config, engine, stream, saver, topology, console),
        steps=config.train.steps,
        learning_rate=curve,
        step=restore(engine, saver, checkpoint),
    )
