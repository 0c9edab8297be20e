"""Which step is the best, whatever happens to its checkpoint; the pointer ``best`` and what it protects."""

import math
from pathlib import Path

import pytest
import torch

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.errors import CheckpointError
from aki_megatron.train.best_checkpoint import BestCheckpoint, Validated


class Disk:
    """Steps whose checkpoint is there, and the last one that was named best."""

    def __init__(self) -> None:
        self.steps: set[int] = set()
        self.named: int | None = None

    def has_checkpoint(self, step: int) -> bool:
        return step in self.steps

    def name_best(self, step: int) -> None:
        self.named = step


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def best(disk: Disk) -> BestCheckpoint:
    return BestCheckpoint(disk.has_checkpoint, disk.name_best)


def test_the_lowest_loss_is_the_best(best: BestCheckpoint, disk: Disk) -> None:
    found = []
    for step, loss in ((2, 3.0), (4, 2.0), (6, 2.0), (8, math.nan), (10, math.inf), (12, 1.5)):
        found.append(best.update(step, loss, is_saved_next=True))
        assert best.step_after_save(step) == {2: 2, 4: 4, 6: 4, 8: 4, 10: 4, 12: 12}[step]
        disk.steps.add(step)
    assert found == [True, True, False, False, False, True]
    assert best.state_dict(12) == {"step": 12, "loss": 1.5}


def test_a_best_step_that_could_not_be_saved_does_not_count(best: BestCheckpoint, disk: Disk) -> None:
    assert best.update(2, 3.0, is_saved_next=True)
    disk.steps.add(2)
    assert best.update(4, 1.0, is_saved_next=True)
    assert best.best == Validated(2, 3.0), "until the checkpoint of step 4 is there"
    assert best.state_dict(6) == {"step": 2, "loss": 3.0}
    assert not best.update(6, 4.0, is_saved_next=True) and best.update(8, 2.0, is_saved_next=True)


def test_a_start_counts_only_what_has_a_checkpoint(best: BestCheckpoint, disk: Disk) -> None:
    assert not best.update(0, 3.0, is_saved_next=False) and disk.named is None
    disk.steps.add(4)
    assert best.update(4, 3.0, is_saved_next=False) and disk.named == 4


def test_a_resumed_run_goes_on_with_the_best_of_its_checkpoint(best: BestCheckpoint, disk: Disk) -> None:
    disk.steps |= {2, 6}
    best.load_state_dict({"step": 2, "loss": 1.0})
    assert disk.named == 2, "it may have named one that the run does not go on from"
    assert not best.update(8, 1.1, is_saved_next=True)
    disk.steps.remove(2)
    assert best.update(8, 1.1, is_saved_next=True), "somebody has deleted the best checkpoint"


@pytest.mark.parametrize("async_save", [False, True])
def test_best_is_kept_from_deletion(tmp_path: Path, async_save: bool) -> None:
    checkpointer = Checkpointer(tmp_path, keep_last=1, async_save=async_save)

    def save(step: int, best_step: int | None) -> list[str]:
        checkpointer.save(step, {"weight": torch.full((2,), float(step))}, {}, best_step=best_step)
        assert checkpointer.has_checkpoint(step), "complete, or being written"
        checkpointer.wait()
        return [path.name for path in files.list_checkpoints(tmp_path)]

    assert save(2, None) == ["step_000002"] and files.best_checkpoint(tmp_path) is None
    assert save(4, 4) == ["step_000004"]
    assert save(6, 4) == ["step_000004", "step_000006"]
    assert save(8, 4) == ["step_000004", "step_000008"]
    assert not checkpointer.has_checkpoint(6)
    assert files.find_checkpoint(tmp_path / "best") == tmp_path / "step_000004"
    assert files.find_checkpoint(tmp_path / "latest") == files.find_checkpoint(tmp_path) == tmp_path / "step_000008"
    assert save(10, 10) == ["step_000010"]


def test_a_best_that_names_nothing_is_none(tmp_path: Path) -> None:
    (tmp_path / "best").write_text("step_000004\n")
    assert files.best_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError):
        files.find_checkpoint(tmp_path / "best")
