"""The pre-flight names the bad node, and no other, from what the processes left."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from throwaway import ROOT

from tools import preflight
from tools.preflight import DONE, EXCHANGE, WAITS, Finding, reasons, rounds

NODES = ["a", "b", "c"]


def sound(per_node: int = 2) -> dict[int, Finding]:
    """Three nodes that are all well: each has met the two others."""
    return {
        rank: Finding(rank, DONE, links={other: True for other in NODES if other != NODES[rank // per_node]})
        for rank in range(3 * per_node)
    }


def test_sound_nodes_are_good() -> None:
    assert reasons(sound(), NODES, 2) == {}


def test_a_fault_a_silence_and_a_hang_are_their_nodes() -> None:
    found = sound()
    found[0] = Finding(0, WAITS, faults=["no GPU 0: 7 are visible"])
    del found[3]
    found[5] = Finding(5, "matrix products")
    assert reasons(found, NODES, 2) == {
        "a": ["process 0: no GPU 0: 7 are visible"],
        "b": ["process 3 left no word"],
        "c": ["process 5 did not get past: matrix products"],
    }


def test_who_waits_for_a_bad_node_is_not_bad() -> None:
    found = {rank: Finding(rank, WAITS) for rank in range(6)}
    del found[4]
    assert list(reasons(found, NODES, 2)) == ["c"]


@pytest.mark.distributed
def test_a_process_that_is_told_to_end_is_not_to_blame(tmp_path: Path) -> None:
    words = [sys.executable, "tools/preflight.py", "check", str(tmp_path), "--per_node", "1", "--device", "cpu"]
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29834"}
    process = subprocess.Popen(words, cwd=ROOT, env=dict(os.environ) | place)  # the other rank never comes
    path = preflight.path_of(tmp_path, 0)
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert reasons(preflight.read_findings(tmp_path, 2), ["a", "b"], 1) == {"b": ["process 1 left no word"]}


def test_a_node_without_a_good_link_is_bad_and_one_bad_link_has_no_owner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sound(1)
    found[1].links = {"a": False, "c": False}
    assert reasons(found, NODES, 1) == {"b": ["no good link to a or to c"]}
    found[1].links["c"] = True
    assert reasons(found, NODES, 1) == {}
    for rank, finding in found.items():
        preflight.path_of(tmp_path, rank).write_text(json.dumps(asdict(finding)))
    assert preflight.verdict(tmp_path, NODES, 1) == 0
    assert "slow link between a and b" in capsys.readouterr().out


def test_a_process_that_hangs_in_an_exchange_has_a_bad_link() -> None:
    found = sound(1)
    found[0] = Finding(0, EXCHANGE + "b")
    found[2] = Finding(2, EXCHANGE + "b", links={"a": True})
    found[1] = Finding(1, EXCHANGE + "a")
    assert list(reasons(found, NODES, 1)) == ["b"]


@pytest.mark.parametrize("count", range(1, 10))
def test_every_node_meets_its_neighbours_one_at_a_time(count: int) -> None:
    every = rounds(count)
    for pairs in every:
        nodes = [node for pair in pairs for node in pair]
        assert len(nodes) == len(set(nodes)) and nodes
    met = sorted((min(pair), max(pair)) for pairs in every for pair in pairs)
    assert met == sorted({(min(n, (n + 1) % count), max(n, (n + 1) % count)) for n in range(count) if count > 1})


@pytest.mark.distributed
def test_processes_measure_and_find_a_slow_machine(tmp_path: Path) -> None:
    """Two nodes in name with two processes each; the matrix product of the second is too slow for what is asked."""
    ranks = []
    for rank in range(4):
        place = {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank % 2), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": "29833", "SLURMD_NODENAME": "ab"[rank // 2], "OMP_NUM_THREADS": "1"}  # fmt: skip
        least = "0" if rank < 2 else "1e6"
        ranks.append(
            subprocess.Popen(
                [sys.executable, "tools/preflight.py", "check", str(tmp_path), "--per_node", "2", "--device", "cpu",
                 "--least_matmul_tflops", least],
                cwd=ROOT, env=dict(os.environ) | place,
            )
        )  # fmt: skip
    assert [process.wait(timeout=240) for process in ranks] == [0] * 4
    words = [sys.executable, "tools/preflight.py", "verdict", str(tmp_path), "--per_node", "2", "--nodes", "a b"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.returncode == 1
    figures, bad = said.stdout.splitlines()
    assert figures.startswith("2 x 2 processes; ") and "GB/s all-reduce" in figures and "MB/s to disk" in figures
    assert bad.startswith("bad node b: process 2: ") and "TFLOP/s, less than 1e+06; process 3: " in bad
