"""Asynchronous saving: training continues, errors are raised later, and collectives do not interleave."""

import importlib.util
import json
import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import RanksFailedError
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from aki_megatron.checkpoint import dcp_io, files
from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.dcp_io import CheckpointSource
from aki_megatron.engine.global_state import shard_first_dim
from aki_megatron.errors import CheckpointError


def tensors(value: float) -> dict[str, Tensor]:
    return {"weight.a": torch.full((5, 3), value)}


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Nothing is written before this event is set."""
    opened, save = threading.Event(), torch.save

    def wait_and_save(*args):
        assert opened.wait(60)
        save(*args)

    monkeypatch.setattr(dcp_io.torch, "save", wait_and_save)
    return opened


@pytest.fixture
def checkpointer(tmp_path) -> Checkpointer:
    return Checkpointer(tmp_path, keep_last=2, async_save=True)


def test_training_does_not_wait_for_a_save(checkpointer, gate):
    state, extra = tensors(1), {"step": 1}
    checkpointer.save(1, state, extra)
    random = torch.rand(3)
    extra["step"] = 2
    assert checkpointer.poll() is None and checkpointer.latest() is None, "it is still being written"
    gate.set()
    saved = checkpointer.wait()
    assert (saved.step, saved.path) == (1, checkpointer.latest()) and saved.seconds > 0
    assert checkpointer.poll() is None and checkpointer.wait() is None, "returned once"
    assert checkpointer.load(checkpointer.latest(), state) == {"step": 1}, "the state at the time of the save"
    assert torch.equal(torch.rand(3), random)


def test_at_most_one_save_is_in_progress(checkpointer, gate):
    checkpointer.save(1, tensors(1), {})
    threading.Timer(0.2, gate.set).start()
    checkpointer.save(2, tensors(2), {})
    assert (checkpointer.folder / "step_000001").exists()
    checkpointer.wait()
    assert [path.name for path in files.list_checkpoints(checkpointer.folder)] == ["step_000001", "step_000002"]


def test_an_error_is_raised_by_the_next_call(checkpointer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    checkpointer.save(1, tensors(1), {})
    checkpointer.wait()
    for call in (
        checkpointer.wait,
        lambda: checkpointer.save(3, tensors(3), {}),
        lambda: checkpointer.load(checkpointer.latest(), tensors(0)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(dcp_io.torch, "save", full)
            checkpointer.save(2, tensors(2), {})
            with pytest.raises(CheckpointError, match="No space left on device.*Earlier checkpoints are intact"):
                call()
        assert checkpointer.wait() is None, "returned once"
    assert sorted(path.name for path in checkpointer.folder.iterdir()) == ["latest", "step_000001"]


def test_checkpoints_that_are_kept(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=2, keep_every=100)
    for step in range(0, 260, 20):
        checkpointer.save(step, tensors(step), {})
    assert [files.step_of(path) for path in files.list_checkpoints(tmp_path)] == [0, 100, 200, 220, 240]


def test_the_configuration_is_in_every_checkpoint(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=1, config_yaml="run: {dir: here}\n")
    checkpointer.save(1, tensors(1), {})
    config = checkpointer.latest() / "config.yaml"
    assert config.read_text() == "run: {dir: here}\n"
    config.write_text("run: {dir: home}\n")
    with pytest.raises(CheckpointError, match="config.yaml is corrupt"):
        checkpointer.load(checkpointer.latest(), tensors(0))


def collective_saves(topology, folder: Path) -> float:
    """Save while training's own collectives continue; return their sum."""
    mesh = DeviceMesh.from_group(topology.pipeline_stage_group, topology.device.type)
    checkpointer = Checkpointer(folder, keep_last=3, async_save=True, group=topology.new_gloo_group(60))
    total = torch.zeros(())
    for step in (1, 2, 3):
        rows = torch.arange(6.0).view(3, 2) * step
        checkpointer.save(step, {"weight.a": shard_first_dim(rows, mesh)}, {})
        for _ in range(100):
            one = torch.ones(())
            dist.all_reduce(one)
            total += one
    checkpointer.wait()
    into = {"weight.a": shard_first_dim(torch.zeros(3, 2), mesh)}
    checkpointer.load(checkpointer.latest(), into)
    assert torch.equal(into["weight.a"].full_tensor(), torch.arange(6.0).view(3, 2) * 3)
    return float(total)


def failing_saves(topology, folder: Path) -> str:
    """The disk of rank 1 is full."""
    checkpointer = Checkpointer(folder, keep_last=3, async_save=True, group=topology.new_gloo_group(60))
    with pytest.MonkeyPatch.context() as patch:
        if topology.rank == 1:
            patch.setattr(dcp_io, "_compact", _full)
        checkpointer.save(4, {f"weight.{topology.rank}": torch.ones(3)}, {})
        try:
            checkpointer.wait()
        except CheckpointError as error:
            return str(error)
    return "saved"


def _full(_tensor: Tensor) -> Tensor:
    raise OSError(28, "No space left on device")


@pytest.mark.distributed
def test_on_several_ranks_beside_training(run_on, tmp_path):
    assert run_on(3, collective_saves, tmp_path) == [900.0] * 3
    for step in (1, 2, 3):
        whole = CheckpointSource(tmp_path / f"step_00000{step}").get("a")
        assert torch.equal(whole, torch.arange(6.0).view(3, 2) * step)
    for message in run_on(3, failing_saves, tmp_path):
        assert "No space left on device" in message, message
    assert files.latest_checkpoint(tmp_path).name == "step_000003" and not list(tmp_path.glob(".*"))


def exit_while_saving(topology, folder: Path) -> None:
    """Rank 1 exits in the middle of writing."""
    checkpointer = Checkpointer(folder, keep_last=3, async_save=True, group=topology.new_gloo_group(60))
    checkpointer.save(1, {f"weight.{topology.rank}": torch.ones(3)}, {})
    checkpointer.wait()
    if topology.rank == 1:
        dcp_io._compact = lambda _tensor: os._exit(9)
    checkpointer.save(2, {f"weight.{topology.rank}": torch.ones(3)}, {})
    checkpointer.wait()


@pytest.mark.distributed
def test_a_rank_that_dies_leaves_no_half_checkpoint(run_on, tmp_path):
    with pytest.raises(RanksFailedError, match="rank 1: died with exit code 9"):
        run_on(2, exit_while_saving, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writing_step_000002", "latest", "step_000001"]
    assert CheckpointSource(tmp_path).path.name == "step_000001"


def missing_group_error(topology, folder: Path) -> str:
    with pytest.raises(AssertionError) as caught:
        Checkpointer(folder, keep_last=1, async_save=True)
    return str(caught.value)


@pytest.mark.distributed
def test_async_save_needs_a_group_of_its_own(run_on, tmp_path):
    assert all("a group of its own" in message for message in run_on(2, missing_group_error, tmp_path))


def test_the_benchmark_prints_both_pauses(tmp_path, capsys):
    path = Path(__file__).parents[2] / "tools" / "bench" / "saving.py"
    spec = importlib.util.spec_from_file_location("bench_saving", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    small = ["--megabytes", "13", "--saves", "1", "--steps", "1", "--folder", str(tmp_path)]
    tool.main([*small, "--json", str(tmp_path / "results.json")])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["ratio"] == results["sync"]["pause"] / results["async"]["pause"]
    assert results["sync"]["pause"] > results["sync"]["complete"], "training waits for all of it"
    assert results["async"]["step while writing"] > 0
    assert f"13 MB: the pause is {results['ratio']:.1f} times shorter" in capsys.readouterr().out
