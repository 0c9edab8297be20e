"""Record the start of an attempt, and decide whether to start another; for batch scripts.

    python tools/attempt.py begin RUN --attempt 4711.0
    python tools/attempt.py decide RUN --attempt 4711.0 --give-up-after 3

begin   Run it before the ranks are started, so that an attempt that fails before it can write anything counts.
        Prints ``begin: ...``; exit code 0, or 30 where the file RUN/STOP forbids to start.
decide  Run it when the ranks have ended, however they have ended. Prints ``decision: reason``. The exit code:

          0  done       RUN/DONE exists
         10  stopped    the attempt saved a checkpoint and stopped because it was asked to: start the run again
         10  retry      the attempt failed: start the run again
         20  give up    so many attempts in a row failed and left no newer checkpoint: another one would not help.
                        Attempts that a user starts after that count from one again
         30  stop-file  a user created RUN/STOP: do not start the run again while it exists

2 is a mistake in the command, or a run folder that cannot be read or written. An attempt has a name of its own, the
same for all its ranks: under Slurm SLURM_JOB_ID.SLURM_RESTART_COUNT.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from aki_megatron.errors import UserError
from aki_megatron.supervise.attempts import Decision, begin_attempt, decide_restart
from aki_megatron.supervise.run_paths import RunPaths

MISTAKE = 2

EXIT_CODES: dict[Decision, int] = {"begin": 0, "done": 0, "stopped": 10, "retry": 10, "give up": 20, "stop-file": 30}


def number_of_attempts(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of attempts; give 1 or more")
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("begin", "record that an attempt starts"), ("decide", "whether to start the run again")):
        command = commands.add_parser(name, help=text)
        command.add_argument("run", type=Path, metavar="RUN", help="the run folder (run.dir)")
        command.add_argument("--attempt", required=True, help="name of the attempt")
    command.add_argument("--give-up-after", type=number_of_attempts, default=3, metavar="N",
                         help="attempts in a row without a newer checkpoint; default: %(default)s")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Record or decide; return the exit code."""
    arguments = parse(argv)
    paths = RunPaths(arguments.run)
    try:
        if arguments.command == "begin":
            decision = begin_attempt(paths, arguments.attempt)
        else:
            decision = decide_restart(paths, arguments.attempt, give_up_after=arguments.give_up_after)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    print(f"{decision.decision}: {decision.reason}")
    return EXIT_CODES[decision.decision]


if __name__ == "__main__":
    sys.exit(main())
