"""What earlier attempts left in a run folder, so that no start erases it or goes on with another run's."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aki_megatron.checkpoint import files
from aki_megatron.config.changes import HISTORY
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import check_resume, load_saved
from aki_megatron.errors import ConfigError
from aki_megatron.supervise.attempts import read_attempts
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.train.data_changes import movable_keys

logger = logging.getLogger("aki_megatron.train")


@dataclass(frozen=True)
class RunHistory:
    """What earlier attempts of a run have trained and saved."""

    checkpoint: Path | None
    """The newest complete checkpoint."""
    has_metrics: bool
    """metrics.jsonl has at least one complete line."""
    saved_step: int | None
    """Step of the last checkpoint that is known to have been completed, whether it still exists or not."""

    @property
    def is_empty(self) -> bool:
        """No attempt has completed a step, so that a start may have any configuration."""
        return self.checkpoint is None and not self.has_metrics and self.saved_step is None


def read_history(paths: RunPaths) -> RunHistory:
    """Read what a run folder holds; a missing folder holds nothing."""
    checkpoint = files.latest_checkpoint(paths.checkpoints)
    has_metrics = False
    if paths.metrics.exists():
        with paths.metrics.open("rb") as file:
            has_metrics = file.readline().endswith(b"\n")
    return RunHistory(checkpoint, has_metrics, _saved_step(paths))


def _saved_step(paths: RunPaths) -> int | None:
    try:
        return int(paths.saved.read_text())
    except (OSError, ValueError):  # missing or damaged: whoever resumed did so from a checkpoint
        resumed = [attempt.from_step for attempt in read_attempts(paths) if attempt.from_step]
        return max(resumed, default=0 if paths.saved.exists() else None)


def record_saved(paths: RunPaths, step: int) -> None:
    """Note that the checkpoint of ``step`` is complete."""
    try:
        paths.saved.write_text(f"{step}\n")
    except OSError as error:  # a full disk: the checkpoint itself is what counts
        logger.warning("cannot write %s: %s", paths.saved, error)


def with_saved_init(paths: RunPaths, config: RunConfig) -> RunConfig:
    """Return the run with the init.* it began with, where it goes on and is given none.

    Raises ConfigError where the saved configuration cannot be read.
    """
    checkpoint = read_history(paths).checkpoint
    if checkpoint is None:
        return config
    saved = load_saved(paths.config if paths.config.exists() else checkpoint / files.CONFIG).init
    missing = {key: value for key, value in saved if value is not None and getattr(config.init, key) is None}
    return config.model_copy(update={"init": config.init.model_copy(update=missing)})


def check_history(paths: RunPaths, config: RunConfig, allow_change: Sequence[str]) -> None:
    """Check that a start goes on with what the run folder holds; nothing to check where it holds nothing.

    allow_change  keys and sections that may differ (--allow_change)

    Raises ConfigError where the checkpoints that the run had are away, where config.yaml is away and nothing else tells
    of which run the folder is, or where the newest checkpoint is of another run.
    """
    history = read_history(paths)
    if history.checkpoint is None and history.saved_step is not None:
        raise ConfigError(
            f"{paths.path} has lost its checkpoints: the run had saved step {history.saved_step}, and "
            f"{paths.checkpoints} has no complete checkpoint (not mounted? moved? deleted?). Bring the folder back to "
            "go on. To begin at step 0 give the run another folder (--run.dir), or delete this one."
        )
    has_config = paths.config.exists()
    if history.checkpoint is None:
        if history.has_metrics and not has_config:
            raise ConfigError(
                f"{paths.path} holds the metrics of a run ({paths.metrics.name}) and no {paths.config.name} that tells "
                "of which one. Bring the file back to go on, or give this run a folder of its own (--run.dir)."
            )
        return
    saved = history.checkpoint / files.CONFIG
    try:
        load_saved(saved)
    except ConfigError:
        if has_config:  # it was compared; loading the checkpoint verifies its files and names one that is damaged
            return
        raise
    free = (*movable_keys(paths, config), *(_changed_keys(paths.config) if has_config else ()))
    what = f"the checkpoint {history.checkpoint}"
    check_resume(saved, config, allow_change=allow_change, free=free, what=what)


def _changed_keys(config_file: Path) -> tuple[str, ...]:
    """Return the keys that were changed, as allowed, since the run started; older checkpoints have other values."""
    lines = config_file.read_text(encoding="utf-8").splitlines()
    keys = [line.removeprefix(HISTORY).partition(" ")[0] for line in lines if line.startswith(HISTORY)]
    return tuple(re.sub(r"\[\d+\]", "", key) for key in keys)
