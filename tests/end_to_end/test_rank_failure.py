"""One rank fails: all end soon, and one error names that rank and its log, under every launcher."""

import json
import re
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest
from launchers import MPIRUN_ENVIRONMENT, launcher_command
from small_demo import DemoWorkspace

from aki_megatron.supervise.first_failure import last_first_failure
from aki_megatron.supervise.run_paths import RunPaths

pytestmark = pytest.mark.end_to_end

FAILING_SFT = "tests/end_to_end/failing_sft.py"
STEP = 3
MAX_SECONDS = 60


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    code: int
    error: str
    log: Path
    seconds_after_failure: float


def run_failing(demo: DemoWorkspace, launcher: str, ranks: int, fails: str) -> Ending:
    """Run with a rank that fails; check what holds however it fails."""
    mark = f"AKI_TEST_MARK={uuid.uuid4()}"
    folder = demo.folder / f"failing_{launcher}_{fails.replace(':', '_')}"
    environment = demo.environment | MPIRUN_ENVIRONMENT | dict([mark.split("=")], AKI_TEST_FAILS=fails)
    flags = [*demo.sft_flags(folder.name, steps=50), "--train.global_batch_size", str(2 * ranks)]
    command = launcher_command(launcher, ranks)
    result = DemoWorkspace(demo.folder, environment).run(*command, FAILING_SFT, *flags, ok=False)
    ended = time.time()

    assert processes_with(mark) == [], "processes left behind"
    errors = re.findall(r"^error.*", result.stderr, flags=re.MULTILINE)
    rank = int(fails[0])
    assert len(errors) == 1 and errors[0].startswith(f"error on rank {rank}: "), result.stderr
    log = folder / f"logs/rank_{rank}.log"
    assert f"\n  log of rank {rank}: {log}\n" in result.stderr
    assert result.returncode != 0
    assert "[rank" not in result.stderr, "a rank printed its traceback"
    cause = last_first_failure(RunPaths(folder))
    assert cause is not None and cause.rank == rank
    last = [line["step"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]
    assert last == list(range(1, STEP))
    failed = max(cause.time, log.stat().st_mtime)
    return Ending(result.returncode, errors[0], log, ended - failed)


def processes_with(mark: str) -> list[int]:
    """Return the processes that have ``mark`` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            continue
    return found


@pytest.mark.parametrize(("launcher", "ranks", "rank"), [("torchrun", 2, 1), ("deepspeed", 2, 0), ("mpirun", 2, 1)])
def test_an_unexpected_error_of_one_rank(demo: DemoWorkspace, launcher: str, ranks: int, rank: int) -> None:
    ending = run_failing(demo, launcher, ranks, f"{rank}:{STEP}:raise")
    assert ending.error == f"error on rank {rank}: ArithmeticError: the answer is 43"
    assert ending.code == 1
    assert ending.seconds_after_failure < MAX_SECONDS
    log = ending.log.read_text()
    assert "Traceback" in log and "failing_sft.py" in log and "step 2 loss" in log


@pytest.mark.parametrize(("launcher", "ranks", "rank"), [("torchrun", 3, 1), ("deepspeed", 2, 1), ("mpirun", 2, 0)])
def test_a_killed_rank(demo: DemoWorkspace, launcher: str, ranks: int, rank: int) -> None:
    ending = run_failing(demo, launcher, ranks, f"{rank}:{STEP}:kill")
    assert "ended without an error message" in ending.error
    assert ending.seconds_after_failure < MAX_SECONDS
    assert "step 2 loss" in ending.log.read_text()


@pytest.mark.parametrize(("launcher", "workers"), [("torchrun", 1), ("deepspeed", 4), ("mpirun", 4)])
def test_a_failing_worker_of_the_loader_of_a_single_rank(demo: DemoWorkspace, launcher: str, workers: int) -> None:
    """The rank ends, and with it its other workers, which are in the middle of something."""
    mark = f"AKI_TEST_MARK={uuid.uuid4()}"
    environment = demo.environment | MPIRUN_ENVIRONMENT | dict([mark.split("=")], AKI_TEST_FAILS=f"0:{STEP}:worker")
    flags = [*demo.sft_flags(f"failing_worker_{launcher}", steps=50), "--parallel.zero_stage", "0"]
    flags += ["--init.weights", "null", "--data.num_workers", str(workers)]
    command = launcher_command(launcher, 1)
    result = DemoWorkspace(demo.folder, environment).run(*command, FAILING_SFT, *flags, ok=False)
    ended = time.time()
    assert result.returncode != 0 and processes_with(mark) == []
    (error,) = re.findall(r"^error.*", result.stderr, flags=re.MULTILINE)
    assert error == "error: ArithmeticError: the answer is 43", result.stderr
    log = demo.folder / f"failing_worker_{launcher}/logs/rank_0.log"
    assert "Original Traceback" in log.read_text() and "in failing_load" in log.read_text()
    assert ended - log.stat().st_mtime < MAX_SECONDS
