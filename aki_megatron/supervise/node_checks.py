"""The pre-flight check of a node, as each of its processes runs it; supervise/preflight.py reads the findings.

Each process checks its own GPU and disks. Then the processes of each sound node run an all-reduce. Then sound nodes
exchange data in pairs: each with two others.
"""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aki_megatron.parallel.launch import Launch
from aki_megatron.supervise.preflight import DONE, EXCHANGE, UNITS, WAITING, NodeFindings

TIMEOUT_SECONDS = 180
"""Longest wait for other processes."""

MIN_FREE_FRACTION = 0.9
"""Of a GPU's memory; less means that the process of somebody else is on it."""


@dataclass(frozen=True)
class NodeRequirements:
    """What a node must achieve; 0 requires nothing."""

    device: str = "cuda"
    min_matmul_tflops: float = 0.0
    min_all_reduce_gbps: float = 0.0
    min_link_gbps: float = 0.0
    min_free_gb: float = 0.0


def check_gpu(findings: NodeFindings, device: str, local_rank: int) -> None:
    """Check that the GPU is visible and free."""
    if device != "cuda":
        return
    if torch.cuda.device_count() <= local_rank:
        findings.faults.append(f"no GPU {local_rank}: {torch.cuda.device_count()} are visible")
        return
    torch.cuda.set_device(local_rank)
    free, total = torch.cuda.mem_get_info()
    if free < MIN_FREE_FRACTION * total:
        findings.faults.append(f"GPU {local_rank}: {(total - free) / 1e9:.0f} of {total / 1e9:.0f} GB are in use")


def check_matmul(findings: NodeFindings, device: str, min_tflops: float) -> None:
    """Check that products of bf16 matrices are correct, bitwise repeatable, and fast."""
    size, repeats = (8192, 50) if device == "cuda" else (256, 5)
    # small integers: every sum is exact in fp32, so only the rounding of the result may differ
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, (size, size), generator=generator).to(device, torch.bfloat16) for _ in range(2))
    first, expected = a @ b, a[:64].float() @ b.float()
    if not torch.allclose(first[:64].float(), expected, rtol=0.01, atol=0.5):
        findings.faults.append("a product of bf16 matrices is wrong")
    if any(not torch.equal(a @ b, first) for _ in range(repeats)):
        findings.faults.append("the same product of bf16 matrices is not always the same")
    seconds = mean_seconds(lambda: a @ b, repeats, device)
    require(findings, "matmul_tflops", 2 * size**3 / seconds / 1e12, min_tflops)


def check_disks(findings: NodeFindings, folder: Path, min_free_gb: float) -> None:
    """Check the space on the run's disk, and that it and the node's own disk return what was written."""
    require(findings, "free_gb", shutil.disk_usage(folder).free / 1e9, min_free_gb)
    content = os.urandom(1 << 25)
    for parent in (Path(tempfile.gettempdir()), folder):
        began = time.monotonic()
        with tempfile.NamedTemporaryFile(dir=parent, prefix="preflight_") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            findings.measurements["disk_mbps"] = len(content) / 1e6 / max(time.monotonic() - began, 1e-9)
            if Path(file.name).read_bytes() != content:
                findings.faults.append(f"{parent} does not return what was written")


def check_all_reduce(findings: NodeFindings, device: str, group: Any, ranks: Sequence[int], min_gbps: float) -> None:
    """Check that an all-reduce over the processes of a node is correct and fast."""
    elements = 1 << (26 if device == "cuda" else 18)
    values = torch.full((elements,), float(findings.rank + 1), device=device)
    dist.all_reduce(values, group=group)
    if not bool((values == sum(ranks) + len(ranks)).all()):
        findings.faults.append("an all-reduce in the node is wrong")
    seconds = mean_seconds(lambda: dist.all_reduce(values, group=group), 5, device)
    # bus bandwidth, as nccl-tests define it: a ring moves each byte 2 (n - 1) / n times over every link
    moved_bytes = 4 * elements * 2 * (len(ranks) - 1) / len(ranks)
    require(findings, "all_reduce_gbps", moved_bytes / seconds / 1e9, min_gbps)


def check_link(findings: NodeFindings, device: str, peer: int, min_gbps: float) -> bool:
    """Exchange data with a process of another node; return whether that was correct and fast."""
    elements = 1 << (24 if device == "cuda" else 18)
    sent = torch.full((elements,), float(findings.rank), device=device)
    received = torch.full((elements,), -1.0, device=device)

    def exchange() -> None:
        operations = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    exchange()
    correct = bool((received == peer).all())
    speed = 4 * elements / mean_seconds(exchange, 3, device) / 1e9
    findings.measurements["link_gbps"] = min(speed, findings.measurements.get("link_gbps", speed))
    return correct and speed >= min_gbps


def mean_seconds(action: Callable[[], object], repeats: int, device: str) -> float:
    """Return the mean duration of an action, in seconds."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    began = now()
    for _ in range(repeats):
        action()
    return max((now() - began) / repeats, 1e-9)


def require(findings: NodeFindings, name: str, value: float, minimum: float) -> None:
    """Record a measurement, and a fault where it is below the minimum."""
    findings.measurements[name] = value
    if value < minimum:
        findings.faults.append(f"{value:.4g} {UNITS[name]}, less than {minimum:.4g}")


def pairing_rounds(count: int) -> list[list[tuple[int, int]]]:
    """Split the ring of ``count`` nodes into rounds of pairs in which no node appears twice.

    Over all rounds every node meets both its neighbours.
    """
    ring = [(node, (node + 1) % count) for node in range(count if count > 2 else count - 1)]
    if count % 2 and count > 1:
        return [ring[0:-1:2], ring[1:-1:2], ring[-1:]]
    return [pairs for pairs in (ring[0::2], ring[1::2]) if pairs]


def local_checks(
    findings: NodeFindings, folder: Path, required: NodeRequirements, local_rank: int
) -> Iterable[tuple[str, Callable[[], None]]]:
    """Yield the checks that need no other process: a name and an action."""
    device = required.device
    yield "GPU", lambda: check_gpu(findings, device, local_rank)
    yield "matrix products", lambda: check_matmul(findings, device, required.min_matmul_tflops)
    if local_rank == 0:
        yield "disks", lambda: check_disks(findings, folder, required.min_free_gb)


def collective_checks(
    findings: NodeFindings, required: NodeRequirements, per_node: int, name: str, begin: Callable[[str], None]
) -> None:
    """Run the checks over the process group, among the processes of sound nodes.

    name   of this node
    begin  takes the name of the check that begins
    """
    device = required.device
    count, own = dist.get_world_size() // per_node, findings.rank // per_node
    ranks = [list(range(node * per_node, (node + 1) * per_node)) for node in range(count)]
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, (name, bool(findings.faults)))
    sound = [node for node in range(count) if not any(faulty for _, faulty in (names[rank] for rank in ranks[node]))]
    groups = [dist.new_group(each) for each in ranks]
    if own in sound and per_node > 1:
        begin("all-reduce in the node")
        check_all_reduce(findings, device, groups[own], ranks[own], required.min_all_reduce_gbps)
    for pairs in pairing_rounds(len(sound)):
        begin(WAITING)
        dist.all_reduce(torch.zeros(1))
        for one, other in ((sound[a], sound[b]) for a, b in pairs):
            if own in (one, other):
                peer = findings.rank + (other - one if own == one else one - other) * per_node
                begin(EXCHANGE + names[peer][0])
                findings.links[names[peer][0]] = check_link(findings, device, peer, required.min_link_gbps)
    begin(WAITING)
    dist.all_reduce(torch.zeros(1))


def node_name(environ: Mapping[str, str]) -> str:
    """Return the name of this node, as Slurm calls it."""
    return environ.get("SLURMD_NODENAME") or os.uname().nodename


def check_node(launch: Launch, folder: Path, per_node: int, required: NodeRequirements, name: str) -> None:
    """Run this process' part of the check and write its findings below ``folder``; ``name``: of this node."""
    findings = NodeFindings(launch.rank)

    def begin(check: str) -> None:
        findings.check = check
        findings.write(folder)

    def on_signal(number: int, _frame: object) -> None:
        """The job ends, or another process has failed: whatever this one was doing is no fault of its node."""
        begin(WAITING)
        os._exit(128 + number)

    folder.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, on_signal)
    for check, run in local_checks(findings, folder, required, launch.local_rank):
        begin(check)
        try:
            run()
        except (RuntimeError, OSError) as error:
            findings.faults.append(f"{check}: {' '.join(str(error).split())[:200]}")
        if findings.faults:
            break
    begin(WAITING)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if required.device == "cuda" else "gloo",
        init_method=f"tcp://{launch.master_address}:{launch.master_port}",
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    collective_checks(findings, required, per_node, name, begin)
    begin(DONE)
    dist.destroy_process_group()
