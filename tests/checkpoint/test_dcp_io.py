"""Checkpoints without a run: written from a source and read as one, one tensor at a time."""

import itertools
import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from aki_megatron.checkpoint import dcp_io, files
from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.dcp_io import CheckpointSource, stored_weights, write_checkpoint
from aki_megatron.checkpoint.tensors import TensorSpec
from aki_megatron.errors import CheckpointError

SHAPES = {"bias": (40,), "table": (300, 7), "nothing": (0, 4), "scalar": (), "last": (500,)}


class RandomSource:
    """Random tensors, made when they are asked for; every other one is bf16, and each is a view of a larger storage."""

    def __init__(self) -> None:
        dtypes = itertools.cycle((torch.bfloat16, torch.float32))
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(shape, dtype) for (name, shape), dtype in zip(SHAPES.items(), dtypes, strict=False)
        }
        self.alive: list[weakref.ref[torch.Tensor]] = []
        self.max_alive = 0

    def get(self, name: str) -> torch.Tensor:
        spec = self.specs[name]
        generator = torch.Generator().manual_seed(list(SHAPES).index(name))
        large = torch.randn(10 + spec.numel, generator=generator).to(spec.dtype)
        tensor = large[10:].view(spec.shape)
        self.alive.append(weakref.ref(tensor))
        self.max_alive = max(self.max_alive, sum(reference() is not None for reference in self.alive))
        return tensor


def write(folder: Path, source: RandomSource, **more) -> Path:
    return write_checkpoint(folder, 0, stored_weights(source), config_yaml="model: {}\n", **more)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_a_source_comes_back_as_it_was(tmp_path, count):
    """Bit for bit, in the same dtypes, also in more files than there are tensors."""
    source = RandomSource()
    path = write(tmp_path, source, num_files=count)
    assert path == tmp_path / "step_000000" and files.latest_checkpoint(tmp_path) == path
    assert len(list(path.glob("*.distcp"))) == count
    again = CheckpointSource(tmp_path)
    assert again.specs == source.specs and list(again.specs) == list(SHAPES)
    for name in SHAPES:
        assert again.get(name).dtype == source.specs[name].dtype
        assert torch.equal(again.get(name), source.get(name))


def test_one_tensor_at_a_time(tmp_path):
    source = RandomSource()
    path = write(tmp_path, source)
    assert source.max_alive == 1
    assert sum(file.stat().st_size for file in path.glob("*.distcp")) < 20_000, "views without the rest of the storage"


def test_files_are_about_equal_and_in_order(tmp_path):
    path = write(tmp_path, RandomSource(), num_files=2)
    index = dcp_io.RestrictedIndexReader(path).read_metadata()
    file_of = {entry.fqn.removeprefix("weight."): info.relative_path for entry, info in index.storage_data.items()}
    assert file_of == {n: f"__0_{int(n in ('nothing', 'scalar', 'last'))}.distcp" for n in SHAPES}


def test_attached_files_are_written_and_verified(tmp_path):
    (tmp_path / "tokenizer" / "inner").mkdir(parents=True)
    (tmp_path / "tokenizer" / "inner" / "vocabulary.json").write_text("{}")
    attach = {"conversion.json": b"[1]", "tokenizer": tmp_path / "tokenizer"}
    path = write(tmp_path / "out", RandomSource(), attach=attach)
    assert (path / "config.yaml").read_text() == "model: {}\n"
    assert json.loads((path / "extra.json").read_text()) == {"extra": {"step": 0}, "rng_states": []}
    assert (path / "conversion.json").read_bytes() == b"[1]"
    (path / "tokenizer" / "inner" / "vocabulary.json").write_text("[]")
    with pytest.raises(CheckpointError, match="tokenizer/inner/vocabulary.json is corrupt"):
        CheckpointSource(path)
    assert CheckpointSource(path, verify=False).specs.keys() == SHAPES.keys()


def test_optimizer_state_is_rewritten_bit_for_bit_and_resumes(tmp_path):
    """What a run saved, written anew into other files with everything else it saved."""
    checkpointer, names = Checkpointer(tmp_path / "run", keep_last=1, config_yaml="run: 1\n"), ("weight.a", "exp_avg.a")
    state = {name: torch.randn(6, 2) for name in names} | {"optimizer.step": torch.tensor(5.0)}
    checkpointer.save(5, state, {"step": 5, "data": {"position": 7}})
    random = torch.rand(3)
    before = CheckpointSource(tmp_path / "run", optimizer_state=True)
    config = (before.path / "config.yaml").read_text()
    attach = {files.EXTRA: before.path / files.EXTRA}
    path = write_checkpoint(tmp_path / "other", 5, before, config_yaml=config, attach=attach, num_files=2)
    assert config == "run: 1\n" and (path / "config.yaml").read_text() == config
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    assert checkpointer.load(path, into) == {"step": 5, "data": {"position": 7}}
    assert torch.equal(torch.rand(3), random), "the random generators are restored, too"
    assert all(torch.equal(into[name], tensor) for name, tensor in state.items())
    assert CheckpointSource(path).specs.keys() == {"a"}


class MismatchedSource(RandomSource):
    """Tensors are not of the shape in ``specs``."""

    def get(self, name: str) -> torch.Tensor:
        return super().get("bias")


def test_nothing_is_left_of_what_cannot_be_write(tmp_path, monkeypatch):
    write(tmp_path, RandomSource())
    with pytest.raises(RuntimeError, match="AssertionError: weight.table"):
        write(tmp_path, MismatchedSource())

    def full(_tensor, _stream):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp_io.torch, "save", full)
    with pytest.raises(CheckpointError, match="cannot be written: .*No space left on device"):
        write(tmp_path, RandomSource())
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000000"]
    CheckpointSource(tmp_path)


def test_a_disk_that_loses_data_is_noticed(tmp_path, monkeypatch):
    """What was written is read back and compared before the checkpoint is published."""
    synced = os.fsync

    def corrupt(handle: int) -> None:
        synced(handle)
        if os.readlink(f"/proc/self/fd/{handle}").endswith("__0_0.distcp"):
            os.pwrite(handle, b"\xff" * 8, 2000)

    monkeypatch.setattr(os, "fsync", corrupt)
    with pytest.raises(CheckpointError, match="__0_0.distcp is not read back as it was written"):
        write(tmp_path, RandomSource())
    assert files.latest_checkpoint(tmp_path) is None
