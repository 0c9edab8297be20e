"""Construct the callbacks of a run, in the order in which a step reaches them."""

from collections.abc import Callable
from pathlib import Path

from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import public_values
from aki_megatron.console import IsolatedConsole
from aki_megatron.data.loader import EmptyStepLoader, StepLoader
from aki_megatron.evaluate.run_report import RunRecord, write_report
from aki_megatron.parallel.topology import Topology
from aki_megatron.supervise.evaluations import SubmissionLog
from aki_megatron.supervise.events import EventRecorder
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.progress import ProgressTracker
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.step_log import StepLog
from aki_megatron.supervise.validations import read_validations
from aki_megatron.train.callbacks import ConsoleCallback, LogCallback, MetricsCallback, TensorBoardCallback
from aki_megatron.train.checkpoint_callback import CheckpointCallback
from aki_megatron.train.evaluations import EvaluationCallback, read_evaluations
from aki_megatron.train.history import record_saved
from aki_megatron.train.loop import Callback
from aki_megatron.train.sample_audit import SampleAuditCallback
from aki_megatron.train.validation_log import ValidationLogCallback
from aki_megatron.train.wandb_callback import WandbCallback


def build_checkpoint_callback(
    config: RunConfig,
    checkpointer: Checkpointer,
    save: Callable[[int, bool], None],
    console: IsolatedConsole | None,
    tracker: ProgressTracker,
    event_recorder: EventRecorder,
    evaluation: EvaluationCallback | None = None,
) -> CheckpointCallback:
    """Build the callback that saves; ``console`` is that of rank 0, None on other ranks.

    A run that may roll back has a checkpoint from the beginning.

    evaluation  submits checkpoints that are complete
    """

    def on_saved(step: int) -> None:
        if console is not None:
            record_saved(RunPaths(config.run.dir), step)
        if evaluation is not None:
            evaluation.submit(step)

    return CheckpointCallback(
        checkpointer,
        save,
        config.checkpoint.interval,
        config.train.steps,
        console,
        save_at_start="rollback" in (config.watch.on_non_finite, config.watch.on_loss_spike),
        set_phase=tracker.set_phase,
        record_event=event_recorder,
        on_saved=on_saved,
    )


def build_evaluation(config: RunConfig, report: Callable[[str], None]) -> EvaluationCallback | None:
    """Build what has checkpoints evaluated, on rank 0; None where none is, nor was before.

    report  told what failed
    """
    paths = RunPaths(config.run.dir)
    if not config.evaluate.interval and not SubmissionLog(paths).exists:
        return None
    return EvaluationCallback(config.evaluate, paths, report)


def build_callbacks(
    config: RunConfig,
    loader: StepLoader | EmptyStepLoader,
    topology: Topology,
    console: IsolatedConsole,
    open_log: Callable[[Path], StepLog],
    evaluation: EvaluationCallback | None = None,
) -> list[Callback]:
    """Build the callbacks that log a step on this rank; they come before a checkpoint of the step is saved.

    open_log    returns what writes a file with a line per step
    evaluation  comes before those that take its scores
    """
    paths = RunPaths(config.run.dir)
    callbacks: list[Callback] = []
    if isinstance(loader, StepLoader):
        callbacks.append(LogCallback(loader.bad_sample_budget.summary, console))
        rank, size = topology.data_rank, topology.data
        callbacks.append(
            SampleAuditCallback(paths.sample_audit, loader.last_step, data_rank=rank, data_size=size, open_log=open_log)
        )
    else:
        callbacks.append(LogCallback(str, console))
    if topology.rank != 0:
        return callbacks
    if evaluation is not None:
        callbacks.append(evaluation)
    callbacks.append(MetricsCallback(paths.metrics, open_log))
    if config.validation.interval or paths.validation.exists():  # it may hold steps that are repeated
        callbacks.append(ValidationLogCallback(paths.validation, open_log))
    return [
        *callbacks,
        ConsoleCallback(config.train.steps, config.log.interval, console),
    ]


def build_trackers(config: RunConfig) -> list[Callback]:
    """Build the callbacks of rank 0 for experiment trackers; they come last, because the end of one may take long."""
    paths, log = RunPaths(config.run.dir), config.log
    trackers: list[Callback] = []
    if log.tensorboard:
        trackers.append(TensorBoardCallback(paths.tensorboard, log.interval))
    if log.wandb != "disabled":
        values = public_values(config)
        trackers.append(
            WandbCallback(paths.path, project=log.wandb_project, mode=log.wandb, interval=log.interval, config=values)
        )
    return trackers


def write_run_report(paths: RunPaths) -> None:
    """Write report.html from the metrics and the configuration of a run."""
    evaluations = [evaluation.to_dict() for evaluation in read_evaluations(paths)]
    record = RunRecord.load(paths.config, read_metrics(paths.metrics), read_validations(paths.validation), evaluations)
    write_report(paths.report, f"Run {paths.path.name}", [record])
