"""Checkpoints are complete or absent, verified before they are read, and readable without torch.distributed."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from aki_megatron.checkpoint import dcp_io, files
from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.dcp_io import CheckpointSource, RestrictedIndexReader
from aki_megatron.errors import CheckpointError


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "weight.layer.weight": torch.full((3, 4), float(value)),
        "exp_avg.layer.weight": torch.full((3, 4), value / 2),
        "optimizer.step": torch.tensor(float(value)),
    }


@pytest.fixture
def run(tmp_path: Path) -> Checkpointer:
    """Two checkpoints: steps 50 and 100."""
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep_last=2)
    for step in (50, 100):
        checkpointer.save(step, tensors(step), {"step": step, "digest": "abc"})
    return checkpointer


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    source = CheckpointSource(path)
    return {name: source.get(name) for name in source.specs}


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(run):
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    assert run.load(run.latest(), into) == {"step": 100, "digest": "abc"}
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors(100).items())
    assert run.latest().name == "step_000100"


def test_random_generators_are_restored(tmp_path):
    torch.manual_seed(5)
    checkpointer = Checkpointer(tmp_path, keep_last=1)
    checkpointer.save(1, tensors(), {})
    expected = torch.rand(3).tolist(), np.random.rand()
    torch.manual_seed(9)
    np.random.seed(9)
    checkpointer.load(checkpointer.latest(), tensors())
    assert (torch.rand(3).tolist(), np.random.rand()) == expected


def test_only_the_newest_are_kept(run):
    run.save(150, tensors(), {})
    assert listed(run.folder) == ["latest", "step_000100", "step_000150"]


def test_saving_a_step_again_replaces_it(run):
    run.save(100, tensors(7), {"step": 100})
    assert read_weights(run.folder)["layer.weight"][0, 0] == 7
    assert listed(run.folder) == ["latest", "step_000050", "step_000100"]


@pytest.mark.parametrize("level", ["run", "folder", "checkpoint"])
def test_weights_of_a_run_a_folder_or_a_checkpoint(run, level):
    path = {"run": run.folder.parent, "folder": run.folder, "checkpoint": run.folder / "step_000050"}[level]
    weights = read_weights(path)
    assert list(weights) == ["layer.weight"]
    assert weights["layer.weight"].dtype == torch.float32
    assert weights["layer.weight"][0, 0] == (50 if level == "checkpoint" else 100)


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "extra.json"])
def test_a_flipped_byte_is_found_and_the_previous_checkpoint_is_offered(run, name):
    flip_a_byte(run.latest() / name)
    with pytest.raises(CheckpointError, match=f"{name} is corrupt.*step_000050 is intact: delete step_000100"):
        run.load(run.latest(), tensors())
    with pytest.raises(CheckpointError, match=name):
        read_weights(run.folder)


def test_a_corrupt_checkpoint_is_not_offered(run):
    flip_a_byte(run.folder / "step_000050" / "__0_0.distcp")
    flip_a_byte(run.latest() / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="no other intact checkpoint"):
        run.load(run.latest(), tensors())


def test_a_missing_or_short_file_is_named(run):
    data = run.latest() / "__0_0.distcp"
    os.truncate(data, 10)
    with pytest.raises(CheckpointError, match="has 10 bytes instead of"):
        run.load(run.latest(), tensors())
    data.unlink()
    with pytest.raises(CheckpointError, match="__0_0.distcp is missing"):
        run.load(run.latest(), tensors())


def test_a_folder_without_a_manifest_is_no_checkpoint(run):
    newest = run.latest()
    (newest / files.MANIFEST).unlink()
    assert run.latest().name == "step_000050"
    with pytest.raises(CheckpointError, match="not a complete checkpoint.*step_000050 is intact"):
        run.load(newest, tensors())


def test_a_broken_manifest(run):
    (run.latest() / files.MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match=f"{files.MANIFEST} is corrupt"):
        run.load(run.latest(), tensors())


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "has checkpoint format 1.*and format 2 is read.*python tools/convert.py upgrade .*step_000100 --out"),
        (3, "has checkpoint format 3 and format 2 is read here: use the newer version"),
        ("2", "manifest.json is corrupt"),
    ],
)
def test_another_format_is_refused_with_the_way_out(run, version, message):
    manifest = run.latest() / files.MANIFEST
    content = json.loads(manifest.read_text())
    assert content.pop("format") == files.FORMAT
    manifest.write_text(json.dumps(content if version is None else content | {"format": version}))
    for read in (lambda: run.load(run.latest(), tensors()), lambda: read_weights(run.folder)):
        with pytest.raises(CheckpointError, match=message):
            read()


def test_a_checkpoint_without_its_configuration_is_refused(run):
    manifest = run.latest() / files.MANIFEST
    content = json.loads(manifest.read_text())
    del content["files"][files.CONFIG]
    manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"before checkpoints held their config\.yaml"):
        run.load(run.latest(), tensors())


def test_no_checkpoint(tmp_path):
    assert Checkpointer(tmp_path / "none", keep_last=1).latest() is None
    with pytest.raises(CheckpointError, match="No complete checkpoint"):
        read_weights(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        read_weights(tmp_path / "step_000001")


def test_another_model_is_refused(run):
    other = tensors() | {"weight.layer.bias": torch.zeros(3), "optimizer.step": torch.zeros(2)}
    del other["exp_avg.layer.weight"]
    with pytest.raises(CheckpointError, match="not those of the model \\(3 differences\\)") as caught:
        run.load(run.latest(), other)
    message = str(caught.value)
    assert "missing: weight.layer.bias (3,)" in message
    assert "unexpected: exp_avg.layer.weight (3, 4)" in message
    assert "shape mismatch: optimizer.step is (), the model needs (2,)" in message
    assert "another run.dir" in message


@pytest.mark.parametrize("broken", ["write_json", "publish"])
def test_a_save_that_is_killed_leaves_the_previous_one(run, monkeypatch, broken):
    monkeypatch.setattr(files, broken, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.save(150, tensors(), {})
    monkeypatch.undo()
    assert run.latest().name == "step_000100"
    run.load(run.latest(), tensors())
    run.save(150, tensors(), {})
    assert listed(run.folder) == ["latest", "step_000100", "step_000150"], "leftovers of the killed save are removed"


def test_latest_names_the_newest_or_the_highest_step_counts(run):
    (run.folder / "latest").write_text("step_000050\n")
    assert run.latest().name == "step_000050"
    (run.folder / "latest").write_text("step_999999\n")
    assert run.latest().name == "step_000100"


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_one_error(run, monkeypatch):
    monkeypatch.setattr(dcp_io.torch, "save", full_disk)
    with pytest.raises(
        CheckpointError, match="cannot be written: .*No space left on device.*Earlier checkpoints are intact"
    ):
        run.save(150, tensors(), {})
    assert listed(run.folder) == ["latest", "step_000050", "step_000100"]


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_an_index_that_asks_for_code_is_refused(run):
    """Even with a manifest that matches_any."""
    path = run.latest()
    (path / files.INDEX).write_bytes(pickle.dumps(Evil()))
    manifest = json.loads((path / files.MANIFEST).read_text())
    manifest["files"][files.INDEX] = files.file_digest(path / files.INDEX)
    (path / files.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="posix.system, which no index needs"):
        run.load(path, tensors())
    with pytest.raises(CheckpointError, match="do not trust"):
        RestrictedIndexReader(path).read_metadata()


def save_and_corrupt(topology, folder: Path) -> str:
    checkpointer = Checkpointer(folder, keep_last=2)
    for step in (1, 2):
        checkpointer.save(step, tensors(), {"step": step})
    names = sorted(path.name for path in checkpointer.latest().iterdir())
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp", "config.yaml", "extra.json", "manifest.json"]
    topology.barrier()
    if topology.rank == 0:
        flip_a_byte(checkpointer.latest() / ".metadata")
    topology.barrier()
    try:
        checkpointer.load(checkpointer.latest(), tensors())
    except CheckpointError as error:
        return str(error)
    return "loaded"


@pytest.mark.distributed
def test_all_ranks_fail_together(run_on, tmp_path):
    for message in run_on(2, save_and_corrupt, tmp_path):
        assert ".metadata is corrupt" in message and "step_000001 is intact" in message


def one_rank_cannot_write(topology, folder: Path) -> str:
    checkpointer = Checkpointer(folder, keep_last=2)
    with pytest.MonkeyPatch.context() as patch:
        if topology.rank == 1:
            patch.setattr(dcp_io.torch, "save", full_disk)
        try:
            checkpointer.save(1, tensors() | {f"weight.of_rank_{topology.rank}": torch.zeros(3)}, {})
        except CheckpointError as error:
            return str(error)
    return "saved"


@pytest.mark.distributed
def test_a_full_disk_of_one_rank_fails_the_save_on_all(run_on, tmp_path):
    (tmp_path / "run").mkdir()
    messages = run_on(2, one_rank_cannot_write, tmp_path / "run")
    assert all("No space left on device" in message for message in messages), messages
    assert Checkpointer(tmp_path / "run", keep_last=1).latest() is None


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_displaces_no_checkpoint(tmp_path, async_save, value):
    checkpointer = Checkpointer(tmp_path, keep_last=1, async_save=async_save)
    checkpointer.save(1, {"weight.a": torch.ones(4), "optimizer.step": torch.tensor(1)}, {})
    checkpointer.wait()
    with pytest.raises(CheckpointError, match=r"the state after step 2 is not finite \(weight.a\)"):
        checkpointer.save(2, {"weight.a": torch.tensor([1.0, value]), "optimizer.step": torch.tensor(2)}, {})
        checkpointer.wait()
    assert checkpointer.latest() == tmp_path / "step_000001"


def test_a_checkpoint_may_keep_older_ones_and_hold_files_of_the_ranks(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=1)
    checkpointer.save(1, {"a": torch.ones(4)}, {})
    checkpointer.save(2, {"a": torch.ones(4)}, {}, rank_files={"unwritten/metrics.jsonl": "{}\n"}, keep_older=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000001", "step_000002"]
    assert (tmp_path / "step_000002/unwritten/metrics.jsonl").read_text() == "{}\n"
    checkpointer.load(tmp_path / "step_000002", {"a": torch.zeros(4)})  # the file is in the manifest, and verified
    checkpointer.save(3, {"a": torch.ones(4)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000003"]
