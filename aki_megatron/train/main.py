"""Train a run on this rank: check it, join the other ranks, build, train, and report a failure once."""

import atexit
import gc
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from aki_megatron.config.batch_sizes import check_world
from aki_megatron.config.cross_checks import check_run
from aki_megatron.config.run import RunConfig
from aki_megatron.console import IsolatedConsole
from aki_megatron.data.run_sources import missing_source_files
from aki_megatron.data.shards import missing_shards
from aki_megatron.data.validation_set import missing_validation_files
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.evaluate.benchmarks.registry import find_benchmark
from aki_megatron.masking import mask_text
from aki_megatron.parallel.launch import check_master
from aki_megatron.parallel.topology import Launch, discover_launch, init_distributed
from aki_megatron.supervise.attempts import End, newest_step, record_end, record_start
from aki_megatron.supervise.events import record_event
from aki_megatron.supervise.exit_codes import INTERRUPTED
from aki_megatron.supervise.failure import FailureReporter
from aki_megatron.supervise.progress import ProgressTracker
from aki_megatron.supervise.run_folder import check_run_dir, describe_os_error, open_run_folder
from aki_megatron.supervise.run_lock import RunLock, check_not_held_by_another
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.signals import StopSignals
from aki_megatron.supervise.watchdog import Watchdog, collective_timeout
from aki_megatron.train.build import build_trainer
from aki_megatron.train.continuation import check_continuation, reason_not_to_start
from aki_megatron.train.frozen_parameters import init_path, needed_keys
from aki_megatron.train.history import read_history, with_saved_init

logger = logging.getLogger("aki_megatron")

LOST_FOLDER_SECONDS = 60.0
"""How long a run whose folder is gone may take to reach its next step, which ends it in an orderly way."""


def missing_inputs(config: RunConfig) -> list[str]:
    """Return every file and folder that the run would read and that does not exist, with the key that names it.

    A run that goes on reads its weights from its own checkpoint, but for those that the checkpoint leaves out.
    """
    data = config.data
    inputs: dict[str, Path | None] = {"data.tokenizer": data.tokenizer, "data.root": data.root}
    checkpoint = read_history(RunPaths(config.run.dir)).checkpoint
    inputs |= {key: init_path(config.init, key) for key in needed_keys(config, checkpoint)}
    missing = [f"{path} ({key})" for key, path in inputs.items() if path is not None and not path.exists()]
    if data.kind == "captions":
        for captions in data.captions:
            shards = [] if captions.skip_missing else missing_shards(captions.shards, data.root)
            missing += [f"{tar} (data.captions {captions.name})" for tar in shards]
    else:
        missing += missing_source_files(data)
    return missing + missing_validation_files(config)


def check_inputs(config: RunConfig) -> None:
    """Raise one DataError with everything that is missing, before any process group or model exists."""
    if missing := missing_inputs(config):
        raise DataError(
            f"This run needs files that do not exist (looked for from {Path.cwd()}):\n  "
            + "\n  ".join(missing)
            + "\nPut them there, or set the keys in parentheses to other paths (for example --data.root /datasets).\n"
            "To see the whole system work without any of them: make demo"
        )


class MaskingFormatter(logging.Formatter):
    """Format records and their tracebacks without the secrets of commands and URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_text(super().format(record))


class LogFileHandler(logging.FileHandler):
    """Write records to a file; where that fails (a full disk), say so once instead of once per record."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (of logging)
        if not self.failed:
            self.failed = True
            with suppress(OSError, ValueError):
                error = sys.exc_info()[1]
                sys.stderr.write(f"{self.baseFilename} cannot be written to, so records are missing there: {error}\n")


def log_to_file(paths: RunPaths, rank: int) -> None:
    """Write this rank's log to its own file."""
    path = paths.log(rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = LogFileHandler(path)
    handler.setFormatter(MaskingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logger.setLevel(logging.INFO)


def check_before_start(config: RunConfig, launch: Launch) -> None:
    """Run every check that needs neither data nor model."""
    check_run(config)
    for name in config.evaluate.benchmarks:
        find_benchmark(name)
    check_world(config, launch.world_size)
    check_master(launch)
    check_inputs(config)


def train_in_world(
    config: RunConfig,
    launch: Launch,
    console: IsolatedConsole,
    reporter: FailureReporter,
    tracker: ProgressTracker,
    allow_change: Sequence[str],
) -> None:
    """Join the other ranks, build, train, and leave together with them."""
    topology = init_distributed(
        launch,
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        timeout_seconds=collective_timeout(config.watch),
    )
    reporter.mark_joined()
    try:
        if launch.rank == 0:
            paths, world_size = reporter.paths, launch.world_size
            step = newest_step(paths)
            record_start(paths, launch.attempt, from_step=step, world_size=world_size, hosts=reporter.hosts())
        trainer = build_trainer(
            config,
            topology,
            console,
            attempt=launch.attempt,
            stop_signals=reporter.stop_signals,
            tracker=tracker,
            allow_change=allow_change,
        )
        # what was built lives as long as the run: collecting garbage need not visit it again and again
        gc.collect()
        gc.freeze()
        reporter.training_started = True
        trainer.train()
        # no rank leaves before rank 0 has recorded the end of the run: launchers end all ranks when one exits
        topology.barrier()
    except BaseException:
        if launch.world_size == 1:  # an orderly shutdown of several ranks can wait for dead ones
            topology.shutdown()
        raise
    reporter.end()
    topology.shutdown()


def train_supervised(
    config: RunConfig,
    launch: Launch,
    console: IsolatedConsole,
    stop_signals: StopSignals,
    lock: RunLock | None,
    allow_change: Sequence[str],
) -> int:
    """Train with failure reports and watchdog, to the end of the run or until asked to stop; return the exit code.

    lock          of the run folder, on rank 0
    allow_change  see build_trainer

    With several ranks a failure ends this process instead of returning.
    """
    paths = RunPaths(config.run.dir)

    def record_failure(text: str, code: int) -> None:
        with suppress(OSError):  # a full disk, for example: the error message matters more
            if launch.rank == 0:
                end: End = "interrupted" if code == INTERRUPTED else "failed"
                record_end(paths, launch.attempt, step=None, end=end, reason=text)

    reporter = FailureReporter(
        paths,
        launch.rank,
        launch.world_size,
        stop_signals,
        sigterm_from_scheduler=launch.launcher == "srun",
        start_id=launch.start_id,
        on_failure=record_failure,
        on_exit=lock.release if lock else lambda: None,
    )
    tracker = ProgressTracker(config.watch)
    watchdog = Watchdog(paths, launch.rank, launch.world_size, tracker, reporter.report_rank_failure)
    try:
        log_to_file(paths, launch.rank)
        reporter.begin()
        watchdog.begin()
    except OSError as error:
        raise ConfigError(f"The run folder {paths.path} cannot be written to: {describe_os_error(error)}.") from error
    if lock:
        lock.watch(partial(end_without_folder, reporter))
    try:
        train_in_world(config, launch, console, reporter, tracker, allow_change)
    except BaseException as error:
        if launch.world_size == 1 and isinstance(error, KeyboardInterrupt):
            return record_interrupt(paths, launch.attempt, tracker.step, console)
        if launch.world_size == 1 and not isinstance(error, Exception):
            raise
        if lock and (lost := lock.lost()):  # the error follows from that
            error = DataError(lost)
        code = reporter.report(error)
        if launch.world_size > 1:
            reporter.exit_now(code)
        return code
    finally:
        watchdog.end()
    return 0


def end_without_folder(reporter: FailureReporter, text: str) -> None:
    """End training because the run folder is not this run's any more: at the next step, or soon. In a thread."""
    reporter.stop_signals.failure = text
    time.sleep(LOST_FOLDER_SECONDS)
    reporter.report_rank_failure(reporter.rank, text)


def record_interrupt(paths: RunPaths, attempt: str, step: int, console: IsolatedConsole) -> int:
    """Record that Ctrl-C ended an attempt of a single process after ``step``; return the exit code."""
    reason = "interrupted by Ctrl-C (SIGINT)"
    saved = newest_step(paths)
    with suppress(OSError):
        record_event(paths, step, "stop", reason)
        record_end(paths, attempt, step=step, end="interrupted", reason=reason)
    where = f"resumes after step {saved:,}" if saved else "begins again: no checkpoint was saved"
    console.print(f"interrupted after step {step:,}; started again the run {where}", soft_wrap=True)
    return INTERRUPTED


def hold_run_folder(paths: RunPaths, launch: Launch, console: IsolatedConsole) -> RunLock | None:
    """Make sure that no other start trains in the run folder; return the lock on rank 0.

    Raises ConfigError that names the process that trains there, or why the folder cannot be used.
    """
    open_run_folder(paths)
    if launch.rank != 0:
        check_not_held_by_another(paths, launch.start_id)
        return None

    def on_waiting(text: str) -> None:
        console.print(text, soft_wrap=True)

    lock = RunLock(paths, launch.attempt, launch.start_id, on_waiting=on_waiting)
    try:
        lock.acquire()
    except OSError as error:
        raise ConfigError(f"The run folder {paths.path} cannot be written to: {describe_os_error(error)}.") from error
    return lock


def main(
    config: RunConfig, environ: Mapping[str, str], stop_signals: StopSignals, allow_change: Sequence[str] = ()
) -> int:
    """Train a run in the world that the environment describes; return the exit code: 0, or that of the failure.

    allow_change  keys that may differ from those of the run in the folder (--allow_change)

    0 does not mean that the run is done: the file DONE does. Raises UserError for a mistake that is found before the
    ranks join; whatever fails later is reported once (supervise/failure.py).
    """
    console = IsolatedConsole(sys.stdout, width=None if sys.stdout.isatty() else 160)
    paths = RunPaths(config.run.dir)
    launch = discover_launch(environ)
    check_run_dir(paths)
    config = with_saved_init(paths, config)
    if reason := reason_not_to_start(paths) or check_continuation(paths, config, allow_change):
        if launch.rank == 0:
            console.print(reason, soft_wrap=True)
        return 0
    check_before_start(config, launch)
    lock = hold_run_folder(paths, launch, console)
    if launch.rank == 0:
        paths.stopped(launch.attempt).unlink(missing_ok=True)  # two starts in one allocation have one name
    if lock:
        atexit.register(lock.release)  # after the thread that may still write a checkpoint
    code = train_supervised(config, launch, console, stop_signals, lock, allow_change)
    if lock and code == 0:
        lock.release()
    return code
