"""Checkpoints without a run: written from a source and read as one, a tensor at a time."""

import itertools
import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from aki_megatron.checkpoint import dcp_io, files
from aki_megatron.checkpoint.checkpointer import Checkpointer, SavedWeights
from aki_megatron.checkpoint.dcp_io import CheckpointSource, as_stored, write_checkpoint
from aki_megatron.checkpoint.tensors import TensorFact
from aki_megatron.errors import CheckpointError

SHAPES = {"bias": (40,), "table": (300, 7), "nothing": (0, 4), "scalar": (), "last": (500,)}


class Drawn:
    """Random tensors that are made when asked for; half are bf16, and each is a part of a larger storage."""

    def __init__(self) -> None:
        dtypes = itertools.cycle((torch.bfloat16, torch.float32))
        self.facts: Mapping[str, TensorFact] = {
            name: TensorFact(shape, dtype) for (name, shape), dtype in zip(SHAPES.items(), dtypes, strict=False)
        }
        self.alive: list[weakref.ref[torch.Tensor]] = []
        self.most_alive = 0

    def get(self, name: str) -> torch.Tensor:
        fact = self.facts[name]
        draw = torch.Generator().manual_seed(list(SHAPES).index(name))
        large = torch.randn(10 + fact.elements, generator=draw).to(fact.dtype)
        tensor = large[10:].view(fact.shape)
        self.alive.append(weakref.ref(tensor))
        self.most_alive = max(self.most_alive, sum(made() is not None for made in self.alive))
        return tensor


def written(folder: Path, source: Drawn, **more) -> Path:
    return write_checkpoint(folder, 0, as_stored(source), config_yaml="model: {}\n", **more)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_a_source_comes_back_as_it_was(tmp_path, count):
    """Bit by bit, in the dtypes that came, also in more files than there are tensors."""
    source = Drawn()
    path = written(tmp_path, source, files=count)
    assert path == tmp_path / "step_000000" and files.newest(tmp_path) == path
    assert len(list(path.glob("*.distcp"))) == count
    again = CheckpointSource(tmp_path)
    assert again.facts == source.facts and list(again.facts) == list(SHAPES)
    for name in SHAPES:
        assert again.get(name).dtype == source.facts[name].dtype
        assert torch.equal(again.get(name), source.get(name))


def test_one_tensor_at_a_time(tmp_path):
    source = Drawn()
    path = written(tmp_path, source)
    assert source.most_alive == 1
    assert sum(file.stat().st_size for file in path.glob("*.distcp")) < 20_000, "views without the rest of the storage"


def test_files_are_about_equal_and_in_order(tmp_path):
    path = written(tmp_path, Drawn(), files=2)
    index = dcp_io.IndexedReader(path).read_metadata()
    places = {place.fqn.removeprefix("weight."): info.relative_path for place, info in index.storage_data.items()}
    assert places == {n: f"__0_{int(n in ('nothing', 'scalar', 'last'))}.distcp" for n in SHAPES}


def test_what_is_attached_is_there_and_checked(tmp_path):
    (tmp_path / "tokenizer" / "inner").mkdir(parents=True)
    (tmp_path / "tokenizer" / "inner" / "vocabulary.json").write_text("{}")
    attach = {"conversion.json": b"[1]", "tokenizer": tmp_path / "tokenizer"}
    path = written(tmp_path / "out", Drawn(), attach=attach)
    assert (path / "config.yaml").read_text() == "model: {}\n"
    assert json.loads((path / "extra.json").read_text()) == {"extra": {"step": 0}, "random": []}
    assert (path / "conversion.json").read_bytes() == b"[1]"
    (path / "tokenizer" / "inner" / "vocabulary.json").write_text("[]")
    with pytest.raises(CheckpointError, match="tokenizer/inner/vocabulary.json is corrupt"):
        CheckpointSource(path)
    assert CheckpointSource(path, checked=False).facts.keys() == SHAPES.keys()


def test_a_run_starts_from_it(tmp_path):
    """As init.weights reads it: float32, whatever lies on the disk."""
    source = Drawn()
    written(tmp_path, source)
    saved = SavedWeights(tmp_path)
    assert saved.shapes == SHAPES
    for name, tensor in saved.read(SHAPES):
        assert tensor.dtype == torch.float32 and torch.equal(tensor, source.get(name).float())


def test_moments_are_rewritten_bit_by_bit_and_resume(tmp_path):
    """What a run saved, written anew into other files with everything else it saved."""
    keeper, names = Checkpointer(tmp_path / "run", keep_last=1, config_yaml="run: 1\n"), ("weight.a", "exp_avg.a")
    state = {name: torch.randn(6, 2) for name in names} | {"optimizer.step": torch.tensor(5.0)}
    keeper.save(5, state, {"step": 5, "data": {"place": 7}})
    drawn = torch.rand(3)
    before = CheckpointSource(tmp_path / "run", moments=True)
    config = (before.path / "config.yaml").read_text()
    attach = {files.EXTRA: before.path / files.EXTRA}
    path = write_checkpoint(tmp_path / "other", 5, before, config_yaml=config, attach=attach, files=2)
    assert config == "run: 1\n" and (path / "config.yaml").read_text() == config
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    assert keeper.load(path, into) == {"step": 5, "data": {"place": 7}}
    assert torch.equal(torch.rand(3), drawn), "the random generators go on, too"
    assert all(torch.equal(into[name], tensor) for name, tensor in state.items())
    assert CheckpointSource(path).facts.keys() == {"a"}


class Lying(Drawn):
    """A tensor is not what was said of it."""

    def get(self, name: str) -> torch.Tensor:
        return super().get("bias")


def test_nothing_is_left_of_what_cannot_be_written(tmp_path, monkeypatch):
    written(tmp_path, Drawn())
    with pytest.raises(RuntimeError, match="AssertionError: weight.table"):
        written(tmp_path, Lying())

    def full(_tensor, _stream):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp_io.torch, "save", full)
    with pytest.raises(CheckpointError, match="cannot be written: .*No space left on device"):
        written(tmp_path, Drawn())
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000000"]
    CheckpointSource(tmp_path)


def test_a_disk_that_forgets_is_noticed(tmp_path, monkeypatch):
    """What was written is read back and compared before it counts."""
    synced = os.fsync

    def forget(handle: int) -> None:
        synced(handle)
        if os.readlink(f"/proc/self/fd/{handle}").endswith("__0_0.distcp"):
            os.pwrite(handle, b"\xff" * 8, 2000)

    monkeypatch.setattr(os, "fsync", forget)
    with pytest.raises(CheckpointError, match="__0_0.distcp is not read back as it was written"):
        written(tmp_path, Drawn())
    assert files.newest(tmp_path) is None
