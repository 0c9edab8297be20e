"""What a launcher calls: check, join the world, build, train, and tell a user's mistake from a fault of ours."""

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from aki_megatron.config.cross_checks import check_world
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import check_resume
from aki_megatron.config.start import refuse
from aki_megatron.data.shards import missing_shards
from aki_megatron.data.sources import missing_files
from aki_megatron.errors import DataError, UserError
from aki_megatron.parallel.topology import Launch, discover_launch, start
from aki_megatron.supervise.attempts import begin_attempt, end_attempt, newest_step
from aki_megatron.supervise.failure import FailureReporter, leave
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.signals import StopSignals
from aki_megatron.supervise.watchdog import ProgressTracker, Watchdog, collective_seconds
from aki_megatron.train.build import build_run
from aki_megatron.train.loop import train

logger = logging.getLogger("aki_megatron")


def missing_inputs(config: RunConfig) -> list[str]:
    """Every file and folder the run would read and does not find, with the key that names it."""
    init, data = config.init, config.data
    wanted = {"init.vision": init.vision, "init.language": init.language, "init.weights": init.weights,
              "data.tokenizer": data.tokenizer, "data.root": data.root}  # fmt: skip
    missing = [f"{path} ({key})" for key, path in wanted.items() if path is not None and not path.exists()]
    if data.kind == "captions":
        for captions in data.captions:
            missing += [f"{tar} (data.captions {captions.name})" for tar in missing_shards(captions.shards, data.root)]
    else:
        missing += missing_files(data.root, [source.name for source in data.sources], "train")
    return missing


def check_inputs(config: RunConfig) -> None:
    """Raise one DataError with everything that is missing, before any process group or model exists."""
    if missing := missing_inputs(config):
        raise DataError(
            f"This run needs files that are not there (looked for from {Path.cwd()}):\n  "
            + "\n  ".join(missing)
            + "\nPut them there, or point the keys in brackets elsewhere (for example --data.root /datasets).\n"
            "To see the whole system work without any of them: make demo"
        )


def log_to_file(folder: RunPaths, rank: int) -> None:
    """Send this rank's log to its own file."""
    path = folder.log(rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logger.setLevel(logging.INFO)


def prepare(config: RunConfig, launch: Launch) -> None:
    """Every check that needs neither data nor model."""
    check_world(config, launch.world_size)
    check_resume(RunPaths(config.run.dir).config, config)
    check_inputs(config)


def train_in_world(
    config: RunConfig, launch: Launch, console: Console, watch: FailureReporter, pulse: ProgressTracker
) -> None:
    """Join the other ranks, build, train, leave together."""
    topology = start(
        launch,
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        timeout_seconds=collective_seconds(config.watch),
    )
    watch.joined()
    try:
        if launch.rank == 0:
            folder = watch.folder
            begin_attempt(
                folder,
                launch.attempt,
                from_step=newest_step(folder),
                world_size=launch.world_size,
                hosts=watch.hosts(),
            )
        run = build_run(config, topology, console, attempt=launch.attempt, stop_signals=watch.stop_signals, pulse=pulse)
        watch.training = True
        train(run)
        # No rank leaves before rank 0 has written the end of the run: launchers end everybody when one exits.
        topology.barrier()
    except BaseException:
        if launch.world_size == 1:  # leaving a world in order can wait for ranks that are gone
            topology.shutdown()
        raise
    watch.end()
    topology.shutdown()


def run_training(config: RunConfig, launch: Launch, console: Console, stop_signals: StopSignals) -> int:
    """Train one run in the world of ``launch``, to its end or until it is asked to stop; the exit code.

    With several ranks a failure ends this process instead of returning.
    """
    folder = RunPaths(config.run.dir)
    log_to_file(folder, launch.rank)

    def note_failure(text: str) -> None:
        with suppress(OSError):  # a full disk, say: the message matters more
            if launch.rank == 0:
                end_attempt(folder, launch.attempt, step=None, end="failed", reason=text)

    watch = FailureReporter(
        folder,
        launch.rank,
        launch.world_size,
        stop_signals,
        by_scheduler=launch.launcher == "srun",
        note=note_failure,
    )
    watch.begin()
    pulse = ProgressTracker(config.watch)
    hangs = Watchdog(folder, launch.rank, launch.world_size, pulse, watch.accuse)
    hangs.begin()
    try:
        train_in_world(config, launch, console, watch, pulse)
    except BaseException as error:
        if launch.world_size == 1 and not isinstance(error, Exception):
            raise
        code = watch.failed(error)
        if launch.world_size > 1:
            leave(folder, launch.rank, code)
        return code
    finally:
        hangs.end()
    return 0


def nothing_to_do(folder: RunPaths) -> str:
    """Why a run is not started, in one sentence; empty where it is."""
    if folder.done.exists():
        return f"{folder.path} is done already ({folder.done} exists). --run.dir starts another run."
    if folder.stop.exists():
        return f"{folder.path} was stopped by a person and stays so ({folder.stop} exists): remove the file to go on."
    return ""


def main(config: RunConfig, environ: Mapping[str, str], stop_signals: StopSignals) -> int:
    """Run a launcher's run; the exit code: 0, USER_ERROR for a user's mistake, another for an error of ours.

    0 says nothing of whether the run is done: DONE does. Whatever fails, one message says so (supervise/failure.py).
    """
    console = Console(file=sys.stdout, width=160 if not sys.stdout.isatty() else None, highlight=False)
    folder = RunPaths(config.run.dir)
    try:
        launch = discover_launch(environ)
        if reason := nothing_to_do(folder):
            if launch.rank == 0:
                console.print(reason, soft_wrap=True)
            return 0
        prepare(config, launch)
    except UserError as error:
        return refuse(error, environ, stop_signals)
    if launch.rank == 0:
        folder.stopped(launch.attempt).unlink(missing_ok=True)  # two starts in one allocation have one name
    return run_training(config, launch, console, stop_signals)
