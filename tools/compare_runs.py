"""Compare two runs: the samples they were trained on, their metrics, their configurations.

    python tools/compare_runs.py runs/a runs/b
    python tools/compare_runs.py runs/uninterrupted runs/killed_and_resumed && echo equal
    python tools/compare_runs.py runs/a runs/b --only samples       # proves that a resume was exact
    python tools/compare_runs.py runs/a runs/b --json > comparison.json

samples   The sample audit logs of both runs (<run>/sample_audit/): for every optimizer step a hash over the content of
          the samples (token ids, targets, pixels) and their positions, which does not depend on the number of GPUs.
          Equal hashes mean the same samples in the same sequences. The first step that differs is where the runs
          diverge. Logs of earlier releases, which hashed the samples' keys only, cannot be compared with later ones.
metrics   metrics.jsonl: the largest relative difference of loss and grad_norm, |a - b| / max(|a|, |b|), and the
          first step past --tolerance. Runs of one configuration on the same number of GPUs agree exactly; on another
          number to about 1e-5 in fp32, since sums are taken in another order. A skipped step has no loss.
config    config.yaml: the keys that differ. Those that say where and how fast a run goes (run.dir, parallel,
          num_workers) are shown, but do not make two runs different.

A run that was killed or is still running can be compared too: the steps that both have are compared, and that one ends
earlier is a difference. Exit code: 0 equal, 1 different, 2 nothing could be compared (a mistake in the command).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from aki_megatron.console import Console
from aki_megatron.errors import UserError
from aki_megatron.train.run_comparison import PARTS, Comparison, compare_runs

EQUAL, DIFFERENT, MISTAKE = 0, 1, 2


def show(a: Path, b: Path, comparisons: Sequence[Comparison], console: Console) -> None:
    """Print one paragraph per comparison, and the result."""
    console.print(f"A {a}\nB {b}")
    for comparison in comparisons:
        style = "green" if comparison.equal else "red"
        console.print(f"{comparison.part:10}", style=style, end="")
        console.print(comparison.text, soft_wrap=True)
    different = [comparison.part for comparison in comparisons if not comparison.equal]
    result = f"different: {', '.join(different)}" if different else "equal"
    console.print(f"{'result':10}{result}", style="bold red" if different else "bold green")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A", help="a run folder")
    parser.add_argument("b", type=Path, metavar="B", help="the other one")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=f"compare only these, of {', '.join(PARTS)}; default: all")  # fmt: skip
    text = "relative difference of a metric that still counts as equal; default: %(default)s"
    parser.add_argument("--tolerance", type=float, default=1e-4, help=text)
    parser.add_argument("--json", action="store_true", help="print an object instead of text")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print the result; return the exit code."""
    arguments = parse(argv)
    try:
        comparisons = compare_runs(arguments.a, arguments.b, arguments.only, arguments.tolerance)
    except UserError as error:
        hint = "--only compares what both runs have, for example --only metrics config."
        print(f"error: {error}\n{hint}", file=sys.stderr)
        return MISTAKE
    equal = all(comparison.equal for comparison in comparisons)
    if arguments.json:
        runs = {"a": str(arguments.a), "b": str(arguments.b), "equal": equal}
        print(json.dumps(runs | {"comparisons": [asdict(comparison) for comparison in comparisons]}, indent=1))
    else:
        show(arguments.a, arguments.b, comparisons, Console())
    return EQUAL if equal else DIFFERENT


if __name__ == "__main__":
    sys.exit(main())
