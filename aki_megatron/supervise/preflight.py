"""Findings of the pre-flight check of a job's nodes, and the bad nodes that follow from them.

Each process of the check (supervise/node_checks.py) writes its findings to FOLDER/rank_N.json. No torch here, standard
library only: the batch script reads the files outside of any container.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

WAITING, DONE = "waiting for other processes", "done"
EXCHANGE = "exchange with "
"""Start of the names of the checks in which a process exchanges data with one of another node, named after it."""

UNITS = {"matmul_tflops": "TFLOP/s", "all_reduce_gbps": "GB/s all-reduce", "link_gbps": "GB/s between nodes",
         "disk_mbps": "MB/s to disk", "free_gb": "GB free"}  # fmt: skip
"""Measurement -> its unit."""

MAX_REASONS = 3
"""Reasons shown for a bad node."""


@dataclass
class NodeFindings:
    """What one process found about its node."""

    rank: int
    check: str = "start"
    """The check that runs now; the last one where the process hangs."""
    faults: list[str] = field(default_factory=list)
    """Why the node cannot train."""
    measurements: dict[str, float] = field(default_factory=dict)
    """In the units of UNITS."""
    links: dict[str, bool] = field(default_factory=dict)
    """Other node -> whether the exchange with it was correct and fast."""

    def write(self, folder: Path) -> None:
        """Write the file of this process."""
        (folder / f"rank_{self.rank}.json").write_text(json.dumps(asdict(self)) + "\n")


def read_findings(folder: Path, ranks: int) -> dict[int, NodeFindings]:
    """Return the findings by rank; processes that wrote nothing are missing."""
    paths = {rank: folder / f"rank_{rank}.json" for rank in range(ranks)}
    return {rank: NodeFindings(**json.loads(path.read_text())) for rank, path in paths.items() if path.exists()}


def bad_nodes(findings: Mapping[int, NodeFindings], nodes: Sequence[str], per_node: int) -> dict[str, list[str]]:
    """Return the bad nodes with the reasons; process r ran on node r // per_node."""
    links = list(measured_links(findings, nodes, per_node))
    reasons: dict[str, list[str]] = {node: [] for node in nodes}
    for rank in range(len(nodes) * per_node):
        found, finding = reasons[nodes[rank // per_node]], findings.get(rank)
        if finding is None:
            found.append(f"process {rank} wrote no findings")
        else:
            found += [f"process {rank}: {fault}" for fault in finding.faults]
            waiting = finding.check in (WAITING, DONE) or finding.check.startswith(EXCHANGE)
            if not waiting and not finding.faults:
                found.append(f"process {rank} did not finish: {finding.check}")
    for node in nodes:
        others = {other: good for a, b, good in links for other in (a, b) if node in (a, b) and other != node}
        # one bad link has two ends; a node with two of them is the one at fault
        if len(others) > 1 and not any(others.values()):
            reasons[node].append(f"no good link to {' or to '.join(sorted(others))}")
    return {node: found for node, found in reasons.items() if found}


def measured_links(
    findings: Mapping[int, NodeFindings], nodes: Sequence[str], per_node: int
) -> Iterator[tuple[str, str, bool]]:
    """Yield each pair of nodes that were to exchange data, and whether all their processes could."""
    pairs: dict[tuple[str, str], bool] = {}
    for rank, finding in findings.items():
        node = nodes[rank // per_node]
        links = dict(finding.links)
        if finding.check.startswith(EXCHANGE):
            links[finding.check.removeprefix(EXCHANGE)] = False
        for other, good in links.items():
            pair = (min(node, other), max(node, other))
            pairs[pair] = pairs.get(pair, True) and good
    for (one, other), good in pairs.items():
        yield one, other, good


def format_report(findings: Mapping[int, NodeFindings], nodes: Sequence[str], per_node: int) -> Iterator[str]:
    """Yield a line of measurements, then ``bad node NAME: reasons`` for each bad node, then slow links."""
    values = {name: [f.measurements[name] for f in findings.values() if name in f.measurements] for name in UNITS}
    ranges = [f"{min(each):.4g} to {max(each):.4g} {UNITS[name]}" for name, each in values.items() if each]
    yield f"{len(nodes)} x {per_node} processes; {', '.join(ranges) or 'no measurements'}"
    bad = bad_nodes(findings, nodes, per_node)
    for node, reasons in bad.items():
        more = f"; {len(reasons) - MAX_REASONS} more" if len(reasons) > MAX_REASONS else ""
        yield f"bad node {node}: {'; '.join(reasons[:MAX_REASONS])}{more}"
    for one, other, good in measured_links(findings, nodes, per_node):
        if not good and one not in bad and other not in bad:
            yield f"slow link between {one} and {other}: which of the two is at fault cannot be told"
