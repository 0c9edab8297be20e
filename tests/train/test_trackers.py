"""TensorBoard and wandb get the points they should; wandb without a network."""

import json
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aki_megatron.train.callbacks import TensorBoardCallback
from aki_megatron.train.wandb_callback import WandbCallback, run_id
from aki_megatron.types import StepReport


def report(step: int) -> StepReport:
    return StepReport(
        loss=1 / step, grad_norm=float("inf") if step == 4 else 2.0, lr=1e-3, supervised_tokens=7, tokens=40,
        places=50, images=2, bad_samples=0, seconds=0.5, skipped=step == 4,
    )  # fmt: skip


def test_tensorboard_has_every_second_step_and_no_infinite_norm(tmp_path: Path) -> None:
    hook = TensorBoardCallback(tmp_path, every=2)
    hook.on_start(0)
    for step in range(1, 7):
        hook.after_step(step, report(step))
    hook.on_end(6)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    losses = {point.step: point.value for point in events.Scalars("loss")}
    assert losses == pytest.approx({2: 1 / 2, 4: 1 / 4, 6: 1 / 6})
    assert [point.step for point in events.Scalars("grad_norm")] == [2, 6]


def test_tensorboard_after_a_rollback_has_the_new_points(tmp_path: Path) -> None:
    hook = TensorBoardCallback(tmp_path, every=1)
    hook.on_start(0)
    for step in (1, 2, 3):
        hook.after_step(step, report(step))
    hook.on_rollback(1)
    hook.after_step(2, report(20))
    hook.on_stop(2)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    losses = {point.step: point.value for point in events.Scalars("loss")}
    assert losses == pytest.approx({1: 1.0, 2: 1 / 20})


def attempt(run: Path, start: int, steps: Iterable[int]) -> WandbCallback:
    """One attempt of a run, offline."""
    hook = WandbCallback(run, project="aki-megatron", mode="offline", every=1, config={"train": {"steps": 5}})
    hook.on_start(start)
    for step in steps:
        hook.after_step(step, report(step))
    hook.on_stop(5)
    return hook


def records(file: Path) -> Iterator[bytes]:
    """What lies in wandb's file: LevelDB's log format behind 7 bytes, blocks of 32 KiB with records in pieces."""
    content, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last piece
            yield record
            record = b""


def wait_until(true: Callable[[], bool]) -> None:
    """wandb's own process may write a moment after the run has finished."""
    end = time.monotonic() + 60
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


def test_wandb_goes_on_with_the_same_run_at_the_right_step(tmp_path: Path) -> None:
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


def test_wandb_runs_of_folders_with_equal_names_are_apart(tmp_path: Path) -> None:
    folders = [tmp_path / place / "demo" / "sft 1" for place in ("one", "two")]
    one, two = (run_id(folder) for folder in folders)
    assert one != two and one.startswith("demo-sft-1-") and run_id(folders[0]) == one
