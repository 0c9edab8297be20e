"""Whether a run starts, goes on, or is refused, by what its folder holds; and the record of what is changed."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from aki_megatron.checkpoint import files
from aki_megatron.config.changes import Change, check_progress
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import check_resume, load_saved, write_config
from aki_megatron.errors import ConfigError
from aki_megatron.supervise.attempts import newest_step
from aki_megatron.supervise.events import EventRecorder
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.train.data_changes import movable_keys
from aki_megatron.train.history import check_history, read_history


def reason_not_to_start(paths: RunPaths) -> str:
    """Return why a run is not started, in one sentence; empty where it is."""
    if paths.stop.exists():
        return f"{paths.path} was stopped by a user ({paths.stop} exists): remove the file to resume."
    return ""


def check_continuation(paths: RunPaths, config: RunConfig, allow_change: Sequence[str]) -> str:
    """Check a start against what the run folder holds; return why there is nothing to do, empty where there is.

    allow_change  keys and sections that may differ from the saved configuration (--allow_change)

    Raises ConfigError where the folder is of another run, or a change is allowed that contradicts what is done.
    """
    is_done = paths.done.exists()
    if not is_done and read_history(paths).is_empty:
        return ""
    what = f"{paths.path} is done already ({paths.done} exists), and {paths.config}" if is_done else ""
    free = movable_keys(paths, config)
    changes = check_resume(paths.config, config, allow_change=allow_change, free=free, what=what)
    if is_done and not paths.config.exists():
        check_history(paths, config, allow_change)
    step = newest_step(paths)
    if changes and step:
        checkpoint = files.latest_checkpoint(paths.checkpoints)
        assert checkpoint is not None, step
        check_progress(load_saved(paths.config), config, step=step, data_step=read_data_step(checkpoint, default=step))
    if not is_done or (changes and config.train.steps > step):
        check_history(paths, config, allow_change)
        return ""
    if changes:
        raise ConfigError(
            f"{paths.path} is done already after {step} steps ({paths.done} exists), so that "
            f"{', '.join(change.key for change in changes)} can change nothing; to train on, add "
            f"--allow_change train.steps --train.steps {step + max(step // 10, 1)}, or give this run a folder of its "
            "own (--run.dir)."
        )
    return (
        f"{paths.path} is done already ({paths.done} exists). --run.dir starts another run; --allow_change train.steps "
        "with a larger --train.steps goes on with this one."
    )


def read_data_step(checkpoint: Path, default: int = 0) -> int:
    """Return how many steps' worth of data a checkpoint has used; ``default`` where it does not say."""
    try:
        return int(json.loads((checkpoint / files.EXTRA).read_text())["extra"]["data_step"])
    except (OSError, ValueError, KeyError, TypeError):  # loading the checkpoint will name the file
        return default


def record_configuration(
    paths: RunPaths,
    config: RunConfig,
    *,
    step: int,
    learning_rate: Callable[[RunConfig], float],
    record_event: EventRecorder,
) -> list[str]:
    """Write config.yaml of a run that starts or goes on after ``step``; return a line for each change that it records.

    learning_rate  returns the learning rate of the next step under a configuration

    A run that was done goes on: DONE is removed. Call it on one rank, after the checks of every rank.
    """
    if read_history(paths).is_empty:  # what a start that failed before its first step left binds nobody
        paths.config.unlink(missing_ok=True)
    before = load_saved(paths.config) if paths.config.exists() else None
    changes = write_config(paths.config, config, step)
    lines = [f"changed after step {step:,}: {change.short()}" for change in changes]
    if before is not None and any(_changes_rate(change) for change in changes):
        old, new = learning_rate(before), learning_rate(config)
        lines.append(f"learning rate of step {step + 1:,}: {new:.6g} instead of {old:.6g}")
    for line in lines:
        record_event(step, "change", line)
    if changes:
        paths.done.unlink(missing_ok=True)
    return lines


def _changes_rate(change: Change) -> bool:
    return change.key in ("train.steps", "optimizer.lr", "optimizer.min_lr", "optimizer.warmup_steps")
