"""Whether the nodes of a job can train, before hours depend on it; which node cannot, and why.

    srun python tools/preflight.py check FOLDER --per_node 8 --least_matmul_tflops 150       # one process per GPU
    python tools/preflight.py verdict FOLDER --per_node 8 --nodes "gpu01 gpu02"              # in the batch script

check    Each process: its GPU is there and nobody else uses it; products of bf16 matrices are right, the same every
         time, and fast; the disks of FOLDER and of TMPDIR have room and give back what was written. Then the processes
         of each sound node: an all-reduce at full speed. Then sound nodes in pairs: each exchanges data with two
         others. A process writes what it found to FOLDER/rank_N.json, and where it is, so that one that hangs is found.
verdict  Prints a line of figures and ``bad node NAME: reasons`` for each node that failed. Exit code 0 where all are
         good, 1 otherwise. Needs no torch.

What falls below a least figure fails; 0 asks for nothing.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WAITS, DONE = "waits for the others", "done"
EXCHANGE = "exchange with "
"""Begins the names of the stages in which a process talks to one of another node; the node's name follows."""

TIMEOUT_SECONDS = 180
"""Longest wait for other processes."""

FREE_SHARE = 0.9
"""Of a GPU's memory; less means that somebody else's process is on it."""

UNITS = {"matmul_tflops": "TFLOP/s", "all_reduce_gbps": "GB/s all-reduce", "link_gbps": "GB/s between nodes",
         "disk_mbps": "MB/s to disk", "free_gb": "GB free"}  # fmt: skip


@dataclass
class Finding:
    """What one process found, as rank_N.json holds it."""

    rank: int
    stage: str = "start"
    """What it does now, and for ever where it hangs."""
    faults: list[str] = field(default_factory=list)
    """Why this process' node cannot train."""
    figures: dict[str, float] = field(default_factory=dict)
    links: dict[str, bool] = field(default_factory=dict)
    """Other node -> whether the exchange with it was right and fast."""


def path_of(folder: Path, rank: int) -> Path:
    """Where a process writes what it finds."""
    return folder / f"rank_{rank}.json"


# --- Verdict: which nodes are bad, from the files


def read_findings(folder: Path, ranks: int) -> dict[int, Finding]:
    """What the processes wrote, by rank; those that wrote nothing are missing."""
    paths = {rank: path_of(folder, rank) for rank in range(ranks)}
    return {rank: Finding(**json.loads(path.read_text())) for rank, path in paths.items() if path.exists()}


def reasons(findings: dict[int, Finding], nodes: Sequence[str], per_node: int) -> dict[str, list[str]]:
    """Node -> why it is bad, for the nodes that are; process r runs on node r // per_node."""
    links = list(measured_links(findings, nodes, per_node))
    found = {node: [] for node in nodes}  # type: dict[str, list[str]]
    for rank in range(len(nodes) * per_node):
        why, finding = found[nodes[rank // per_node]], findings.get(rank)
        if finding is None:
            why.append(f"process {rank} left no word")
        else:
            why += [f"process {rank}: {fault}" for fault in finding.faults]
            if finding.stage not in (WAITS, DONE) and not finding.stage.startswith(EXCHANGE) and not finding.faults:
                why.append(f"process {rank} did not get past: {finding.stage}")
    for node in nodes:
        others = {other: good for a, b, good in links for other in (a, b) if node in (a, b) and other != node}
        # one bad link has two ends; a node with two of them is where the fault is
        if len(others) > 1 and not any(others.values()):
            found[node].append(f"no good link to {' or to '.join(sorted(others))}")
    return {node: why for node, why in found.items() if why}


def measured_links(
    findings: dict[int, Finding], nodes: Sequence[str], per_node: int
) -> Iterator[tuple[str, str, bool]]:
    """Each pair of nodes that were to exchange data, and whether all their processes could."""
    pairs: dict[tuple[str, str], bool] = {}
    for rank, finding in findings.items():
        node = nodes[rank // per_node]
        links = dict(finding.links)
        if finding.stage.startswith(EXCHANGE):
            links[finding.stage.removeprefix(EXCHANGE)] = False
        for other, good in links.items():
            pair = (min(node, other), max(node, other))
            pairs[pair] = pairs.get(pair, True) and good
    for (one, other), good in pairs.items():
        yield one, other, good


def verdict(folder: Path, nodes: Sequence[str], per_node: int) -> int:
    """Print the figures and the bad nodes; the exit code."""
    findings = read_findings(folder, len(nodes) * per_node)
    ranges = {
        name: [finding.figures[name] for finding in findings.values() if name in finding.figures] for name in UNITS
    }
    figures = [f"{min(each):.4g} to {max(each):.4g} {UNITS[name]}" for name, each in ranges.items() if each]
    print(f"{len(nodes)} x {per_node} processes; {', '.join(figures) or 'no figures'}")
    bad = reasons(findings, nodes, per_node)
    for node, why in bad.items():
        more = f"; {len(why) - 3} more" if len(why) > 3 else ""
        print(f"bad node {node}: {'; '.join(why[:3])}{more}")
    for one, other, good in measured_links(findings, nodes, per_node):
        if not good and one not in bad and other not in bad:
            print(f"slow link between {one} and {other}: one of the two, it cannot be told which")
    return 1 if bad else 0


# --- Check: what each process does


def try_gpu(finding: Finding, device: str, local_rank: int) -> None:
    """The GPU is there, and free."""
    import torch

    if device != "cuda":
        return
    if torch.cuda.device_count() <= local_rank:
        finding.faults.append(f"no GPU {local_rank}: {torch.cuda.device_count()} are visible")
        return
    torch.cuda.set_device(local_rank)
    free, total = torch.cuda.mem_get_info()
    if free < FREE_SHARE * total:
        finding.faults.append(f"GPU {local_rank}: {(total - free) / 1e9:.0f} of {total / 1e9:.0f} GB are in use")


def try_matmul(finding: Finding, device: str, least_tflops: float) -> None:
    """Products of bf16 matrices are right, repeat bit for bit, and are fast."""
    import torch

    size, repeats = (8192, 50) if device == "cuda" else (256, 5)
    # small whole numbers: every sum is exact in fp32, so only the rounding of the result may differ
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, (size, size), generator=generator).to(device, torch.bfloat16) for _ in range(2))
    first, right = a @ b, a[:64].float() @ b.float()
    if not torch.allclose(first[:64].float(), right, rtol=0.01, atol=0.5):
        finding.faults.append("a product of bf16 matrices is wrong")
    if any(not torch.equal(a @ b, first) for _ in range(repeats)):
        finding.faults.append("the same product of bf16 matrices is not always the same")
    seconds = timed(lambda: a @ b, repeats, device)
    at_least(finding, "matmul_tflops", 2 * size**3 / seconds / 1e12, least_tflops)


def try_disks(finding: Finding, folder: Path, least_free_gb: float) -> None:
    """The run's disk has room; that disk and the node's own give back what was written."""
    at_least(finding, "free_gb", shutil.disk_usage(folder).free / 1e9, least_free_gb)
    content = os.urandom(1 << 25)
    for place in (Path(tempfile.gettempdir()), folder):
        began = time.monotonic()
        with tempfile.NamedTemporaryFile(dir=place, prefix="preflight_") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            finding.figures["disk_mbps"] = len(content) / 1e6 / max(time.monotonic() - began, 1e-9)
            if Path(file.name).read_bytes() != content:
                finding.faults.append(f"{place} does not give back what was written")


def try_all_reduce(finding: Finding, device: str, group: Any, ranks: Sequence[int], least_gbps: float) -> None:
    """The processes of a node add numbers up, rightly and fast."""
    import torch
    import torch.distributed as dist

    elements = 1 << (26 if device == "cuda" else 18)
    numbers = torch.full((elements,), float(finding.rank + 1), device=device)
    dist.all_reduce(numbers, group=group)
    if not bool((numbers == sum(ranks) + len(ranks)).all()):
        finding.faults.append("an all-reduce in the node is wrong")
    seconds = timed(lambda: dist.all_reduce(numbers, group=group), 5, device)
    # what the slowest wire carries: each byte leaves and arrives (n - 1) / n times in both halves of the operation
    moved = 4 * elements * 2 * (len(ranks) - 1) / len(ranks)
    at_least(finding, "all_reduce_gbps", moved / seconds / 1e9, least_gbps)


def try_link(finding: Finding, device: str, peer: int, least_gbps: float) -> bool:
    """Exchange data with a process of another node; whether that was right and fast."""
    import torch
    import torch.distributed as dist

    elements = 1 << (24 if device == "cuda" else 18)
    mine = torch.full((elements,), float(finding.rank), device=device)
    theirs = torch.full((elements,), -1.0, device=device)

    def exchange() -> None:
        both = [dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, theirs, peer)]
        for request in dist.batch_isend_irecv(both):
            request.wait()

    exchange()
    right = bool((theirs == peer).all())
    speed = 4 * elements / timed(exchange, 3, device) / 1e9
    finding.figures["link_gbps"] = min(speed, finding.figures.get("link_gbps", speed))
    return right and speed >= least_gbps


def timed(action: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds that an action takes, on average."""
    import torch

    def settle() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    began = settle()
    for _ in range(repeats):
        action()
    return max((settle() - began) / repeats, 1e-9)


def at_least(finding: Finding, name: str, figure: float, least: float) -> None:
    """Note a figure, and a fault where it is too small."""
    finding.figures[name] = figure
    if figure < least:
        finding.faults.append(f"{figure:.4g} {UNITS[name]}, less than {least:.4g}")


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """A ring of ``count`` nodes as rounds of pairs in which no node appears twice: every node meets both neighbours."""
    ring = [(node, (node + 1) % count) for node in range(count if count > 2 else count - 1)]
    if count % 2 and count > 1:
        return [ring[0:-1:2], ring[1:-1:2], ring[-1:]]
    return [pairs for pairs in (ring[0::2], ring[1::2]) if pairs]


def alone(finding: Finding, arguments: argparse.Namespace, local_rank: int) -> Iterable[tuple[str, Callable[[], None]]]:
    """Stages that need no other process."""
    device = arguments.device
    yield "GPU", lambda: try_gpu(finding, device, local_rank)
    yield "matrix products", lambda: try_matmul(finding, device, arguments.least_matmul_tflops)
    if local_rank == 0:
        yield "disks", lambda: try_disks(finding, arguments.folder, arguments.least_free_gb)


def together(finding: Finding, arguments: argparse.Namespace, enter: Callable[[str], None]) -> None:
    """Stages that need others, for the processes of sound nodes; the process group exists."""
    import torch
    import torch.distributed as dist

    per_node, device = arguments.per_node, arguments.device
    count, own = dist.get_world_size() // per_node, finding.rank // per_node
    ranks = [list(range(node * per_node, (node + 1) * per_node)) for node in range(count)]
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, (node_name(), bool(finding.faults)))
    sound = [node for node in range(count) if not any(faulty for _, faulty in (names[rank] for rank in ranks[node]))]
    groups = [dist.new_group(each) for each in ranks]
    if own in sound and per_node > 1:
        enter("all-reduce in the node")
        try_all_reduce(finding, device, groups[own], ranks[own], arguments.least_all_reduce_gbps)
    for pairs in rounds(len(sound)):
        enter(WAITS)
        dist.all_reduce(torch.zeros(1))
        for one, other in ((sound[a], sound[b]) for a, b in pairs):
            if own in (one, other):
                peer = finding.rank + (other - one if own == one else one - other) * per_node
                enter(EXCHANGE + names[peer][0])
                finding.links[names[peer][0]] = try_link(finding, device, peer, arguments.least_link_gbps)
    enter(WAITS)
    dist.all_reduce(torch.zeros(1))


def node_name() -> str:
    """Of this node, as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def check(arguments: argparse.Namespace) -> int:
    """Test this process' part; the exit code is 0 whatever it finds: verdict reads the files."""
    from datetime import timedelta

    import torch.distributed as dist

    from aki_megatron.parallel.launch import discover_launch

    launch = discover_launch(os.environ)
    finding = Finding(launch.rank)

    def enter(stage: str) -> None:
        finding.stage = stage
        path_of(arguments.folder, launch.rank).write_text(json.dumps(asdict(finding)) + "\n")

    def told(number: int, _frame: object) -> None:
        """The job ends, or another process has failed: whatever this one was doing is no fault of its node."""
        enter(WAITS)
        os._exit(128 + number)

    arguments.folder.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, told)
    for stage, test in alone(finding, arguments, launch.local_rank):
        enter(stage)
        try:
            test()
        except (RuntimeError, OSError) as error:
            finding.faults.append(f"{stage}: {' '.join(str(error).split())[:200]}")
        if finding.faults:
            break
    enter(WAITS)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if arguments.device == "cuda" else "gloo",
        init_method=f"tcp://{launch.master_address}:{launch.master_port}",
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    together(finding, arguments, enter)
    enter(DONE)
    dist.destroy_process_group()
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (("check", "test the nodes; every process"), ("verdict", "name the bad nodes")):
        command = commands.add_parser(name, help=words)
        command.add_argument("folder", type=Path, metavar="FOLDER", help="where the findings go; seen by all nodes")
        command.add_argument("--per_node", type=int, required=True, metavar="N", help="processes of a node")
    command.add_argument("--nodes", type=str.split, required=True, help="names in the order of ranks, by blanks")
    command = commands.choices["check"]
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    for flag, words in (
        ("matmul_tflops", "speed of bf16 matrix products"), ("all_reduce_gbps", "speed of an all-reduce in a node"),
        ("link_gbps", "speed of one process to one of another node"), ("free_gb", "room on the disk of FOLDER"),
    ):  # fmt: skip
        command.add_argument(f"--least_{flag}", type=float, default=0.0, metavar="X", help=f"{words}; default: 0")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what was asked; the exit code."""
    arguments = parse(argv)
    if arguments.command == "check":
        return check(arguments)
    return verdict(arguments.folder, arguments.nodes, arguments.per_node)


if __name__ == "__main__":
    sys.exit(main())
