"""What a batch script asks before and after it starts a run: note an attempt, and whether to start another.

    python tools/attempt.py begin RUN --attempt 4711.0
    python tools/attempt.py verdict RUN --attempt 4711.0 --give-up-after 3

begin    Call it before the ranks are started, so that an attempt that dies before it can write anything is counted.
         Prints a line; exit code 0, or 30 where RUN/STOP forbids to start.
verdict  Call it when the ranks have ended, however they have ended. Prints ``answer: reason``. The exit code:

           0  done       RUN/DONE exists
          10  stopped    the attempt saved a checkpoint and stopped because it was told to: start the run again
          10  retry      the attempt failed: start the run again
          20  give up    so many attempts in a row failed and left no newer checkpoint: starting again helps nothing.
                         Attempts that are started by hand after that count anew
          30  stop-file  a person made RUN/STOP: do not start the run again while it is there

2 is a mistake in the command. An attempt has a name of its own, the same for all its ranks: under Slurm
SLURM_JOB_ID.SLURM_RESTART_COUNT.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from aki_megatron.supervise.attempts import Answer, begin_attempt, end_attempt, judge, newest_step
from aki_megatron.supervise.run_paths import RunPaths

BEGUN, STOP_FILE = 0, 30

EXIT_CODES: dict[Answer, int] = {"done": 0, "stopped": 10, "retry": 10, "give up": 20, "stop-file": STOP_FILE}


def begin(folder: RunPaths, attempt: str) -> int:
    """Note that an attempt starts; the exit code."""
    if folder.stop.exists():
        print(f"stop-file: {folder.stop} exists; remove it to let the run go on")
        return STOP_FILE
    step = newest_step(folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    begin_attempt(folder, attempt, from_step=step)
    print(f"begin: attempt {attempt} from step {step}")
    return BEGUN


def verdict(folder: RunPaths, attempt: str, give_up_after: int) -> int:
    """Say whether to start the run again; the exit code. Giving up is noted in the run folder."""
    found = judge(folder, attempt, give_up_after=give_up_after)
    if found.answer == "give up":
        end_attempt(folder, attempt, step=newest_step(folder), end="given up", reason=found.reason)
    print(f"{found.answer}: {found.reason}")
    return EXIT_CODES[found.answer]


def count(text: str) -> int:
    """A number of attempts on the command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of attempts; give 1 or more")
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (("begin", "note that an attempt starts"), ("verdict", "whether to start the run again")):
        command = commands.add_parser(name, help=words)
        command.add_argument("run", type=Path, metavar="RUN", help="the run folder (run.dir)")
        command.add_argument("--attempt", required=True, help="name of the attempt")
    command.add_argument("--give-up-after", type=count, default=3, metavar="N",
                         help="attempts in a row without a newer checkpoint; default: %(default)s")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what was asked; the exit code."""
    arguments = parse(argv)
    folder = RunPaths(arguments.run)
    if arguments.command == "begin":
        return begin(folder, arguments.attempt)
    return verdict(folder, arguments.attempt, arguments.give_up_after)


if __name__ == "__main__":
    sys.exit(main())
