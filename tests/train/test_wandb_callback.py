"""wandb gets the points it should, without a network."""

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from step_reports import step_report

from aki_megatron.masking import mask_command
from aki_megatron.supervise.validations import SourceValidation, ValidationReport
from aki_megatron.train.wandb_callback import WandbCallback, run_id


def attempt(run: Path, start: int, steps: Iterable[int]) -> WandbCallback:
    """Simulate one attempt of a run, offline."""
    callback = WandbCallback(run, project="aki-megatron", mode="offline", interval=1, config={"train": {"steps": 5}})
    callback.on_start(start)
    for step in steps:
        callback.on_step(step, step_report(1 / step))
    callback.on_stop(5)
    return callback


def records(file: Path) -> Iterator[bytes]:
    """Yield the records of wandb's file: LevelDB's log format after 7 bytes, blocks of 32 KiB with split records."""
    content, offset, record = file.read_bytes(), 7, b""
    while offset + 7 <= len(content):
        if (left := 2**15 - offset % 2**15) < 7:
            offset += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, offset)
        record += content[offset + 7 : offset + 7 + size]
        offset += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


def wait_until(true: Callable[[], bool]) -> None:
    """wandb's own process may write a moment after the run has finished."""
    end = time.monotonic() + 300
    while not true() and time.monotonic() < end:
        time.sleep(0.1)


def points(file: Path) -> dict[int, float]:
    """Step -> loss of every point in a file that wandb will upload."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for data in records(file):
        line = Record.FromString(data)
        if line.WhichOneof("record_type") == "history":
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in line.history.item}
            found[values["_step"]] = values["loss"]
    return found


def test_wandb_continues_the_same_run_at_the_right_step(tmp_path: Path) -> None:
    run = tmp_path / "demo" / "sft"
    run.mkdir(parents=True)
    first, second = attempt(run, 0, (1, 2, 3)), attempt(run, 2, (3, 4, 5))
    assert first.run.id == second.run.id == run_id(run) and run_id(run).startswith("demo-sft-")
    files = sorted(run.glob(f"wandb/offline-run-*/run-{run_id(run)}.wandb"))
    assert len(files) == 2, "an attempt has a folder of its own"
    for file in files:
        wait_until(lambda file=file: len(points(file)) == 3)
    found = sorted((points(file) for file in files), key=min)
    assert found == [{step: 1 / step for step in steps} for steps in ((1, 2, 3), (3, 4, 5))]


def test_validations_are_curves_of_the_same_run() -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    callback = WandbCallback(Path("run"), project="p", mode="offline", interval=2, config={})
    callback.run = SimpleNamespace(log=lambda values, step: logged.append((step, dict(values))))  # type: ignore[assignment]
    report = ValidationReport({"vsr": SourceValidation(1.5, 3, 3, questions=4, correct=1)}, 0, 0.0)
    expected = {"validation/loss": 1.5, "validation/accuracy": 25.0}
    expected |= {"validation/vsr/loss": 1.5, "validation/vsr/accuracy": 25.0}
    for step in (1, 2, 3):
        callback.on_step(step, step_report())
        callback.on_validation(step, report)
    assert [step for step, _ in logged] == [1, 2, 2, 3]
    assert logged[2] == (2, expected)
    callback.on_validation(1, report)  # after a rollback: wandb has later steps already
    assert len(logged) == 4


def test_wandb_runs_of_folders_with_equal_names_are_distinct(tmp_path: Path) -> None:
    folders = [tmp_path / parent / "demo" / "sft 1" for parent in ("one", "two")]
    one, two = (run_id(folder) for folder in folders)
    assert one != two and one.startswith("demo-sft-1-") and run_id(folders[0]) == one


def test_the_command_line_goes_to_wandb_without_its_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "correct-horse-9"
    monkeypatch.setattr(
        "sys.argv", ["sft.py", "--data.captions", f"[{{shards: [pipe:curl -u me:{secret} https://h]}}]"]
    )
    mask_command(f"curl -u me:{secret} https://h")
    attempt(tmp_path, 0, [1]).on_end(1)
    assert sys.argv[-1].count(secret) == 1

    def written() -> bytes:
        return b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    wait_until(lambda: b"--data.captions" in written())
    assert b"--data.captions" in written() and secret.encode() not in written()


DISTURBED = """
import os, signal, subprocess, sys
from pathlib import Path
from step_reports import step_report
from aki_megatron.train import wandb_callback
from aki_megatron.train.side_output import isolate_side_outputs
from aki_megatron.train.wandb_callback import WandbCallback

failures = []
wandb = WandbCallback(Path(sys.argv[1]), project="x", mode="offline", interval=1, config={})
(callback,) = isolate_side_outputs([wandb], failures.append)
callback.on_start(0)
callback.on_step(1, step_report())
children = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split()
services = [int(pid) for pid in children if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]
assert services
for pid in services:
    os.kill(pid, getattr(signal, sys.argv[2]))
    if sys.argv[2] != "SIGSTOP":
        os.waitpid(pid, 0)
wandb_callback.END_SECONDS = 2.0
for step in range(2, 50):
    callback.on_step(step, step_report())
callback.on_end(50)
assert len(failures) == 1 and "WandbCallback is off" in failures[0], failures
assert sys.argv[2] != "SIGSTOP" or "wandb did not finish within 2 s" in failures[0], failures
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGSTOP"])
def test_training_outlives_the_process_of_wandb(tmp_path: Path, name: str) -> None:
    """A scheduler sends SIGTERM to every process of a job; wandb's own process ends at once. Or it never responds."""
    # without the variables by which wandb joins the service of this process
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", DISTURBED, str(tmp_path), name]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0 and "atexit" not in result.stderr, result.stderr
