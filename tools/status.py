"""Show the status of a run: its step, the time left, its attempts, its last events and errors.

    python tools/status.py runs/pretrain
    python tools/status.py runs/pretrain --watch 10      # again every 10 seconds until the run is done

state      done          RUN/DONE exists
           running       heartbeats are fresh; an unresponsive rank, and the straggler, are named
           starting      an attempt has begun and no rank has a heartbeat yet
           stopped       the last attempt saved a checkpoint and ended because it was asked to
           failed        the last attempt ended with an error
           unresponsive  the last attempt ended without an error message: killed, or its machines are down
time left  the remaining steps times the median duration of the last steps

It only reads, needs no GPU and no torch, and works on every machine that sees the folder (the clocks should agree).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from aki_megatron.errors import UserError
from aki_megatron.supervise.status import format_status, read_status

LABEL_CHARACTERS = 13


def show(path: Path) -> bool:
    """Print the status of a run; return whether it is done."""
    run = read_status(path, time.time())
    for label, text in format_status(run):
        print(f"{label:{LABEL_CHARACTERS}}" + text.replace("\n", f"\n{'':{LABEL_CHARACTERS}}"))
    sys.stdout.flush()
    return run.paths.done.exists()


def main(argv: Sequence[str] | None = None) -> int:
    """Show the status once or repeatedly; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder (run.dir)")
    parser.add_argument("--watch", type=float, metavar="S", help="show again every S seconds until the run is done")
    arguments = parser.parse_args(argv)
    try:
        while not show(arguments.run) and arguments.watch is not None:
            time.sleep(arguments.watch)
            print("\x1b[H\x1b[2J" if sys.stdout.isatty() else "")  # clear the screen
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass  # how a user ends --watch
    return 0


if __name__ == "__main__":
    sys.exit(main())
