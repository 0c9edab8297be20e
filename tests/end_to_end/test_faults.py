"""The benchmarks of faults and of long runs, in short: nothing is lost, and what they would find is found."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import fault_cases
import faults
import long_run
import pytest
from small_demo import ROOT

TOOLS = ROOT / "tools/bench"
pytestmark = pytest.mark.end_to_end


def run_tool(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    # without the variables by which wandb joins the service of this process
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return subprocess.run(
        [sys.executable, str(TOOLS / name), *flags],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=880, check=False,
    )  # fmt: skip


@pytest.mark.timeout(900)
def test_a_disturbed_run_loses_nothing(tmp_path: Path) -> None:
    """Signals at random moments, under each launcher; see the tool's description."""
    report = tmp_path / "report.json"
    result = run_tool("faults.py", "--rounds", "3", "--seed", "3", "--patience", "240", "--json", str(report))
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    found = json.loads(report.read_text())
    assert found["equal"] and len(found["rounds"]) == 3 and "3 rounds: nothing lost" in result.stdout
    assert len({r["fault"] for r in found["rounds"]}) >= 2 and len({r["launcher"] for r in found["rounds"]}) >= 2


def test_what_is_lost_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        folder = run / f"checkpoints/step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("{}\n")
        digest = fault_cases.files.file_digest(folder / "config.yaml")
        (folder / "manifest.json").write_text(json.dumps({"format": 2, "files": {"config.yaml": digest}}))
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4)))

    class EndedJob:
        """A job whose end damages one checkpoint, loses the other, and repeats a step."""

        name, num_ranks, log, pid = "torchrun", 2, tmp_path / "log", 0

        def __init__(self) -> None:
            self.log.write_text("printed")
            self.launcher = self

        def poll(self) -> int:
            return 0

        def wait(self, seconds: float) -> list[Any]:
            return [self]

        def kill(self) -> None:
            (run / "checkpoints/step_000001/config.yaml").write_text("other\n")
            (run / "checkpoints/step_000002/manifest.json").unlink(missing_ok=True)
            (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 1}\n{"step": 2}\n')
            (run / "attempts.jsonl").write_text('{"attempt": "1", "time": 1.0, "from_step": 0}\n')

    fault = fault_cases.Fault("none", lambda job, generator: None)
    monkeypatch.setattr(faults.time, "sleep", lambda seconds: None)
    result = faults.play(EndedJob, fault, run, 0.0, random.Random(0))
    assert (result.lost, result.half, result.repeats, result.hangs, result.trained_again) == (1, 2, 1, 1, 2)
    assert result.end == "killed" and "printed" in result.text


def test_what_grows_in_a_long_run_is_named(tmp_path: Path) -> None:
    result = run_tool("long_run.py", "--steps", "400", "--json", str(tmp_path / "report.json"))
    assert "memory" in result.stdout and ("flat" in result.stdout or "grew" in result.stdout), (
        result.stdout + result.stderr
    )
    flat = [long_run.Sample(step, 500.0, 40, 20, 4) for step in range(400)]
    leaking = [long_run.Sample(step, 500.0 + step, 40 + step // 10, 20, 4) for step in range(400)]
    for samples, expected in ((flat, []), (leaking, ["memory", "files"])):
        found = long_run.compare(samples, [0.1] * 400)
        assert [name for name, (first, last) in found.items() if last > long_run.GROWTH[name](first)] == expected
