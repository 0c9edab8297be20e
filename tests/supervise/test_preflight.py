"""Pre-flight check: it names the bad node, and no other, from the findings of the processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aki_megatron.supervise.node_checks import pairing_rounds
from aki_megatron.supervise.preflight import DONE, EXCHANGE, WAITING, NodeFindings, bad_nodes, read_findings
from tools import preflight

ROOT = Path(__file__).resolve().parents[2]

NODES = ["a", "b", "c"]


def sound(per_node: int = 2) -> dict[int, NodeFindings]:
    """Return the findings of three sound nodes: each has exchanged data with the two others."""
    return {
        rank: NodeFindings(rank, DONE, links={other: True for other in NODES if other != NODES[rank // per_node]})
        for rank in range(3 * per_node)
    }


def test_sound_nodes_are_good() -> None:
    assert bad_nodes(sound(), NODES, 2) == {}


def test_faults_missing_findings_and_hangs_make_a_node_bad() -> None:
    found = sound()
    found[0] = NodeFindings(0, WAITING, faults=["no GPU 0: 7 are visible"])
    del found[3]
    found[5] = NodeFindings(5, "matrix products")
    assert bad_nodes(found, NODES, 2) == {
        "a": ["process 0: no GPU 0: 7 are visible"],
        "b": ["process 3 wrote no findings"],
        "c": ["process 5 did not finish: matrix products"],
    }


def test_a_node_that_waits_for_a_bad_one_is_not_bad() -> None:
    found = {rank: NodeFindings(rank, WAITING) for rank in range(6)}
    del found[4]
    assert list(bad_nodes(found, NODES, 2)) == ["c"]


@pytest.mark.distributed
def test_a_process_that_is_ended_is_not_at_fault(tmp_path: Path) -> None:
    command = [sys.executable, "tools/preflight.py", "check", str(tmp_path), "--per_node", "1", "--device", "cpu"]
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29834",
    }
    process = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ) | environment)  # the other rank never comes
    path = tmp_path / "rank_0.json"
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert bad_nodes(read_findings(tmp_path, 2), ["a", "b"], 1) == {"b": ["process 1 wrote no findings"]}


def test_a_node_without_a_good_link_is_bad_and_one_bad_link_blames_neither(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sound(1)
    found[1].links = {"a": False, "c": False}
    assert bad_nodes(found, NODES, 1) == {"b": ["no good link to a or to c"]}
    found[1].links["c"] = True
    assert bad_nodes(found, NODES, 1) == {}
    for finding in found.values():
        finding.write(tmp_path)
    assert preflight.main(["report", str(tmp_path), "--per_node", "1", "--nodes", " ".join(NODES)]) == 0
    assert "slow link between a and b" in capsys.readouterr().out


def test_a_process_that_hangs_in_an_exchange_has_a_bad_link() -> None:
    found = sound(1)
    found[0] = NodeFindings(0, EXCHANGE + "b")
    found[2] = NodeFindings(2, EXCHANGE + "b", links={"a": True})
    found[1] = NodeFindings(1, EXCHANGE + "a")
    assert list(bad_nodes(found, NODES, 1)) == ["b"]


@pytest.mark.parametrize("count", range(1, 10))
def test_every_node_is_paired_with_its_neighbours_once_per_round(count: int) -> None:
    every = pairing_rounds(count)
    for pairs in every:
        nodes = [node for pair in pairs for node in pair]
        assert len(nodes) == len(set(nodes)) and nodes
    met = sorted((min(pair), max(pair)) for pairs in every for pair in pairs)
    assert met == sorted({(min(n, (n + 1) % count), max(n, (n + 1) % count)) for n in range(count) if count > 1})


@pytest.mark.distributed
def test_processes_measure_and_find_a_slow_node(tmp_path: Path) -> None:
    """Two simulated nodes with two processes each; the minimum of the second one's matrix product is not reached."""
    ranks = []
    for rank in range(4):
        environment = {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank % 2), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": "29833", "SLURMD_NODENAME": "ab"[rank // 2], "OMP_NUM_THREADS": "1"}  # fmt: skip
        minimum = "0" if rank < 2 else "1e6"
        ranks.append(
            subprocess.Popen(
                [sys.executable, "tools/preflight.py", "check", str(tmp_path), "--per_node", "2", "--device", "cpu",
                 "--min_matmul_tflops", minimum],
                cwd=ROOT, env=dict(os.environ) | environment,
            )
        )  # fmt: skip
    assert [process.wait(timeout=240) for process in ranks] == [0] * 4
    command = [sys.executable, "tools/preflight.py", "report", str(tmp_path), "--per_node", "2", "--nodes", "a b"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    measurements, bad = result.stdout.splitlines()
    assert (
        measurements.startswith("2 x 2 processes; ")
        and "GB/s all-reduce" in measurements
        and "MB/s to disk" in measurements
    )
    assert bad.startswith("bad node b: process 2: ") and "TFLOP/s, less than 1e+06; process 3: " in bad
