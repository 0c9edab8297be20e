"""Whatever happens while a checkpoint is written, the newest complete one is intact: kills, and a full disk."""

import io
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forked import fork

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.dcp_io import CheckpointSource
from aki_megatron.console import Console
from aki_megatron.errors import CheckpointError
from aki_megatron.train.checkpoint_callback import CheckpointCallback
from aki_megatron.types import StepReport

KILLS = 20
ELEMENTS = 2**18
"""A save that takes milliseconds, most of them in writing."""


def tensors(step: int, elements: int = ELEMENTS) -> dict[str, torch.Tensor]:
    return {f"weight.{name}": torch.full((elements,), float(step)) for name in "abcd"}


def open_checkpointer(folder: Path, *, async_save: bool = False, keep_last: int = 1) -> Checkpointer:
    return Checkpointer(folder, keep_last=keep_last, async_save=async_save)


def verify_newest(folder: Path) -> int:
    """The step of the newest checkpoint, after comparing all of its tensors with what that step saved."""
    path = files.latest_checkpoint(folder)
    assert path is not None
    source = CheckpointSource(path)
    step = files.step_of(path)
    assert sorted(source.specs) == ["a", "b", "c", "d"]
    assert all(bool((source.get(name) == step).all()) for name in source.specs)
    return step


def save_for_ever(folder: Path, async_save: bool) -> None:
    """Save steps after the newest, each twice: a checkpoint may be replaced by one of the same step."""
    torch.set_num_threads(1)  # the threads of the parent do not survive the fork
    checkpointer, step = open_checkpointer(folder, async_save=async_save), verify_newest(folder)
    while True:
        step += 1
        for _ in range(2):
            checkpointer.save(step, tensors(step), {})


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_killed_at_random_moments(tmp_path, async_save):
    generator = random.Random(async_save)
    checkpointer = open_checkpointer(tmp_path)
    started = time.monotonic()
    checkpointer.save(1, tensors(1), {})
    longest = 4 * (time.monotonic() - started)  # of a save on an idle machine; longer where none completes
    reached, num_interrupted = [1], 0
    for _ in range(KILLS):
        child = fork(lambda: save_for_ever(tmp_path, async_save))
        time.sleep(generator.uniform(0.25, 1) * longest)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it was still saving"
        num_interrupted += any(tmp_path.glob(".writing_*"))
        reached.append(verify_newest(tmp_path))
        if reached[-1] == 1:
            longest *= 1.5
    assert reached == sorted(reached), "nothing that was complete is lost"
    assert reached[-1] > 1 and num_interrupted > 0
    checkpointer.save(10**6, tensors(10**6), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1000000"], "leftovers are removed"


def kill_at(patch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Raise KeyboardInterrupt before the disk operation with this number; return the list of operations so far."""
    done: list[str] = []

    def watch(owner: object, name: str) -> None:
        original: Callable[..., object] = getattr(owner, name)

        def operation(*args: object, **kwargs: object) -> object:
            if len(done) == number:
                raise KeyboardInterrupt
            done.append(name)
            return original(*args, **kwargs)

        patch.setattr(owner, name, operation)

    for owner, name in ((Path, "rename"), (Path, "mkdir"), (files, "write_text"), (files, "sync_dir")):
        watch(owner, name)
    watch(shutil, "rmtree")
    return done


@pytest.mark.parametrize("step", [1, 2], ids=["same step again", "next step"])
def test_killed_before_every_operation(tmp_path, step):
    """The random moments above rarely hit the microseconds in which a folder is renamed."""
    for number in range(100):
        folder = tmp_path / str(number)
        open_checkpointer(folder).save(1, tensors(1, 8), {})
        with pytest.MonkeyPatch.context() as patch:
            operations = kill_at(patch, number)
            try:
                open_checkpointer(folder).save(step, tensors(step, 8), {})
                break
            except KeyboardInterrupt:
                pass
        assert verify_newest(folder) in (1, step), operations
        open_checkpointer(folder).save(3, tensors(3, 8), {})
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_000003"], operations
    assert operations.count("rename") >= 4 and "rmtree" in operations and number == len(operations)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a full disk needs a small file system, and this user may not mount one: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_full_disk_is_an_error_and_training_goes_on(small_disk, async_save):
    out = io.StringIO()
    checkpointer = open_checkpointer(small_disk, async_save=async_save, keep_last=2)
    sizes = {2: 1000, 4: 10**6, 6: 1000, 7: 10**6}
    callback = CheckpointCallback(
        checkpointer,
        lambda step, keep_older: checkpointer.save(step, tensors(step, sizes[step]), {}),
        2,
        7,
        Console(out, width=500),
    )
    report = StepReport(0.0, 0.0, 0.0, 0, 0, 0, 0, 0, 0.0, False)
    for step in range(1, 6):
        callback.on_step_end(step, report)
    while "no checkpoint" not in out.getvalue():  # an asynchronous save reports its error once it ends
        time.sleep(0.01)
        callback.on_step_end(5, report)
    assert re.search("no checkpoint at step 4, training continues: .*No space left on device", out.getvalue())
    assert verify_newest(small_disk) == 2
    assert not list(small_disk.glob(".*")), "what was half written does not fill the disk"
    callback.on_step_end(6, report)
    with pytest.raises(CheckpointError, match="No space left on device.*Earlier checkpoints are intact"):
        callback.on_step_end(7, report)
    assert verify_newest(small_disk) == 6
    assert "saved step 6: training paused" in out.getvalue()
