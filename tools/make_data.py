"""Draw the embedded data set: scenes, captions, questions, tokenizer.

Example: python tools/make_data.py --out data/demo
"""

import argparse
import sys
import time
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aki_megatron.data.synthetic.dataset import DatasetSize, is_complete, make_dataset, was_interrupted
from aki_megatron.flow import UserError


def main() -> int:
    """Draw, or say that it is there; returns the exit code."""
    default = DatasetSize()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to fill")
    parser.add_argument("--scenes", type=int, default=default.scenes, help="training scenes (default %(default)s)")
    parser.add_argument("--held_out", type=int, default=default.held_out, help="held-out scenes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="default %(default)s")
    arguments = parser.parse_args()
    try:
        size = DatasetSize(arguments.scenes, arguments.held_out, arguments.seed)
        draw(arguments.out, size)
    except UserError as error:
        print(f"make_data: {error}", file=sys.stderr)
        return 2
    return 0


def draw(root: Path, size: DatasetSize) -> None:
    """Make the data set under ``root`` unless it is complete, with a progress bar."""
    if is_complete(root, size):
        print(f"{root}: complete, nothing to do.")
        return
    if was_interrupted(root):
        print(f"{root}: an earlier drawing did not finish; starting again.")
    start = time.monotonic()
    total = size.scenes + size.held_out
    columns = (TextColumn("drawing scenes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("scenes", total=total)

        def report(done: int) -> None:
            if done % 200 == 0 or done == total:
                bar.update(task, completed=done)

        counts = make_dataset(root, size, report)
    for name, number in counts.items():
        print(f"  {name:22} {number:7}")
    print(f"{root}: {total} scenes in {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    sys.exit(main())
