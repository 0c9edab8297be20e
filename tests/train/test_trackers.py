"""TensorBoard and wandb get the points they should; wandb without a network."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aki_megatron.flow import StepReport
from aki_megatron.train.hooks import TensorBoardHook
from aki_megatron.train.hooks_wandb import WandbHook


def report(step: int) -> StepReport:
    return StepReport(
        loss=1 / step, grad_norm=float("inf") if step == 4 else 2.0, lr=1e-3, supervised_tokens=7, tokens=40,
        places=50, images=2, bad_samples=0, seconds=0.5, skipped=step == 4,
    )  # fmt: skip


def test_tensorboard_has_every_second_step_and_no_infinite_norm(tmp_path: Path) -> None:
    hook = TensorBoardHook(tmp_path, every=2)
    hook.on_start(0)
    for step in range(1, 7):
        hook.after_step(step, report(step))
    hook.on_end(6)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    losses = {point.step: point.value for point in events.Scalars("loss")}
    assert losses == pytest.approx({2: 1 / 2, 4: 1 / 4, 6: 1 / 6})
    assert [point.step for point in events.Scalars("grad_norm")] == [2, 6]


def test_wandb_writes_an_offline_run_into_the_run_folder(tmp_path: Path) -> None:
    run = tmp_path / "demo" / "sft"
    run.mkdir(parents=True)
    hook = WandbHook(run, project="aki-megatron", mode="offline", every=1, config={"train": {"steps": 2}})
    hook.on_start(0)
    for step in (1, 2):
        hook.after_step(step, report(step))
    assert hook.run.id == "demo-sft"
    hook.on_end(2)
    (file,) = run.glob("wandb/offline-run-*/run-demo-sft.wandb")
    assert file.read_bytes().count(b"tokens_per_second") >= 2, "a point for each step"
