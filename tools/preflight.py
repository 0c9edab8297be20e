"""Check whether the nodes of a job can train, before hours depend on it; name those that cannot, and why.

    srun python tools/preflight.py check FOLDER --per_node 8 --min_matmul_tflops 150       # one process per GPU
    python tools/preflight.py report FOLDER --per_node 8 --nodes "gpu01 gpu02"             # in the batch script

check   Each process: its GPU is visible and nobody else uses it; products of bf16 matrices are correct, repeatable, and
        fast; the disks of FOLDER and of TMPDIR have space and return what was written. Then the processes of each sound
        node: an all-reduce at full speed. Then sound nodes in pairs: each exchanges data with two others. A process
        writes its findings, and the check it is running, to FOLDER/rank_N.json, so that one that hangs is found.
report  Prints a line of measurements and ``bad node NAME: reasons`` for each node that failed. Exit code 0 where all
        nodes are good, 1 otherwise. Needs no torch.

A measurement below its minimum is a fault; a minimum of 0 requires nothing.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from aki_megatron.supervise.preflight import bad_nodes, format_report, read_findings

MINIMA = {
    "matmul_tflops": "speed of bf16 matrix products", "all_reduce_gbps": "speed of an all-reduce in a node",
    "link_gbps": "speed of one process to one of another node", "free_gb": "space on the disk of FOLDER",
}  # fmt: skip


def check(arguments: argparse.Namespace) -> int:
    """Check this process' part; the exit code is 0 whatever it finds: ``report`` reads the files."""
    from aki_megatron.parallel.launch import discover_launch
    from aki_megatron.supervise.node_checks import NodeRequirements, check_node, node_name  # needs torch

    minima = {f"min_{name}": getattr(arguments, f"min_{name}") for name in MINIMA}
    required = NodeRequirements(device=arguments.device, **minima)
    launch = discover_launch(os.environ)
    check_node(launch, arguments.folder, arguments.per_node, required, node_name(os.environ))
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Print the measurements and the bad nodes; return the exit code."""
    findings = read_findings(arguments.folder, len(arguments.nodes) * arguments.per_node)
    print(*format_report(findings, arguments.nodes, arguments.per_node), sep="\n")
    return 1 if bad_nodes(findings, arguments.nodes, arguments.per_node) else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for action, text in ((check, "check the nodes; in every process"), (report, "name the bad nodes")):
        command = commands.add_parser(action.__name__, help=text)
        command.set_defaults(action=action)
        command.add_argument("folder", type=Path, metavar="FOLDER", help="where the findings are; seen by all nodes")
        command.add_argument("--per_node", type=int, required=True, metavar="N", help="processes of a node")
    command.add_argument("--nodes", type=str.split, required=True, help="names in the order of ranks, by blanks")
    command = commands.choices["check"]
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    for name, text in MINIMA.items():
        command.add_argument(f"--min_{name}", type=float, default=0.0, metavar="X", help=f"{text}; default: 0")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Check or report; return the exit code."""
    arguments = parse(argv)
    return arguments.action(arguments)


if __name__ == "__main__":
    sys.exit(main())
