"""What a launcher does before anything heavy is imported: read the command line and refuse what is wrong."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.errors import UserError
from aki_megatron.supervise.signals import StopSignals

USER_ERROR = 2
"""Exit code of a mistake the user can mend."""

RANK_NAMES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")

GRACE_SECONDS = 5.0
"""Mostly every rank meets the same mistake, and launchers end all ranks when one ends: rank 0 speaks first."""


def refuse(
    error: UserError, environ: Mapping[str, str], stop_signals: StopSignals, *, grace_seconds: float = GRACE_SECONDS
) -> int:
    """Print the message of a mistake and return the exit code.

    Rank 0 speaks at once. Another rank is told to end by its launcher before it speaks, unless the mistake is its own
    (a node without the data, say).
    """
    rank = next((environ[name] for name in RANK_NAMES if name in environ), "0")
    if rank != "0" and stop_signals.wait(grace_seconds):
        return USER_ERROR
    print(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    return USER_ERROR


def start(
    argv: Sequence[str],
    environ: Mapping[str, str],
    stop_signals: StopSignals,
    *,
    default_config: Path,
    prog: str,
    description: str,
    train: Callable[[RunConfig], int],
) -> int:
    """``train`` the run the command line asks for; its exit code, or 2 after one message where the run is wrong."""
    try:
        run = load_run(argv, default_config=default_config, prog=prog, description=description)
    except UserError as error:
        return refuse(error, environ, stop_signals)
    return train(run)
