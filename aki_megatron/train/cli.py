"""What launcher/pretrain.py and launcher/sft.py run: read the command line, refuse a mistake, train.

Only the standard library is imported here until signals are handled: the imports of a training run take seconds, in
which an unhandled signal would end the process. Parsing imports no torch, so that --help and a wrong flag are quick.
"""

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from aki_megatron.errors import UserError
from aki_megatron.supervise.exit_codes import INTERRUPTED, USER_ERROR, USER_ERROR_GRACE_SECONDS
from aki_megatron.supervise.signals import StopSignals

ROOT = Path(__file__).resolve().parents[2]

DESCRIPTIONS = {
    "pretrain": "Pretrain a vision-language model on captions.",
    "sft": "Fine-tune a vision-language model on conversations.",
}
"""Launcher (its file below launcher/, its default run below configs/aki4b/) -> what --help says it does."""

RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def run_launcher(launcher: str, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Train the run that the command line ``argv`` of a launcher asks for; return the exit code of the process.

    0: done, or stopped in order and resumable; USER_ERROR after one message for a mistake of the user; INTERRUPTED
    after Ctrl-C in a single process.
    """
    stop_signals = StopSignals()
    stop_signals.listen()
    try:
        from aki_megatron.config.flags import repeated_flags
        from aki_megatron.config.load import load_run, read_command_line

        default_config = Path(os.path.relpath(ROOT / f"configs/aki4b/{launcher}.yaml"))
        run = load_run(
            argv,
            default_config=default_config,
            prog=f"launcher/{launcher}.py",
            description=DESCRIPTIONS[launcher],
        )
        command = read_command_line(argv, default_config)
        if rank_of(environ) == "0":
            for line in repeated_flags(command.overrides):
                print(f"note: {line}", file=sys.stderr, flush=True)
        gc.disable()  # imports make no garbage, but half a million objects that each collection would visit
        from aki_megatron.train.main import main

        gc.freeze()
        gc.enable()
        return main(run, environ, stop_signals, command.allow_change)
    except UserError as error:
        return report_user_error(error, environ, stop_signals)
    except KeyboardInterrupt:
        print("interrupted before training began", file=sys.stderr, flush=True)
        return INTERRUPTED


def rank_of(environ: Mapping[str, str]) -> str:
    """Return the rank of this process as its launcher writes it; "0" for a process that was started alone."""
    return next((environ[name] for name in RANK_VARIABLES if name in environ), "0")


def report_user_error(
    error: UserError,
    environ: Mapping[str, str],
    stop_signals: StopSignals,
    *,
    grace_seconds: float = USER_ERROR_GRACE_SECONDS,
) -> int:
    """Print the message of a mistake and return the exit code.

    Usually every rank meets the same mistake, and launchers end all ranks when one ends. So rank 0 reports at once, and
    another rank waits ``grace_seconds`` for SIGTERM first: it reports only a mistake of its own, such as a node without
    the data.
    """
    rank = rank_of(environ)
    if rank != "0" and stop_signals.wait(grace_seconds):
        return USER_ERROR
    print(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    return USER_ERROR
