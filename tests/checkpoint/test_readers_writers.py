"""safetensors and torch.save files are read and written one tensor at a time, as their own libraries do it."""

import json
import os
import pickle
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from aki_megatron.checkpoint import writers
from aki_megatron.checkpoint.readers import open_safetensors, open_torch_file
from aki_megatron.checkpoint.tensors import LazyTensors, TensorSource, TensorSpec
from aki_megatron.checkpoint.writers import staging_dir, write_safetensors, write_shards, write_torch_file
from aki_megatron.errors import CheckpointError


def some_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(5, 3),
        "half": torch.randn(7).half(),
        "bfloat16": torch.randn(2, 3, 4).bfloat16(),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "double": torch.randn(1, 1).double(),
    }


def source_of(tensors: Mapping[str, Tensor]) -> LazyTensors:
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return LazyTensors(specs, {name: lambda tensor=tensor: tensor for name, tensor in tensors.items()})  # type: ignore[misc]


def assert_holds(source: TensorSource, tensors: Mapping[str, Tensor]) -> None:
    assert source.specs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        got = source.get(name)
        assert source.specs[name] == TensorSpec(tuple(tensor.shape), tensor.dtype), name
        assert got.dtype == tensor.dtype and torch.equal(got, tensor), name


def test_safetensors_files_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "library.safetensors")
    assert_holds(open_safetensors(tmp_path / "library.safetensors"), tensors)
    write_safetensors(tmp_path / "ours.safetensors", source_of(tensors))
    assert_holds(source_of(load_file(tmp_path / "ours.safetensors")), tensors)
    with safe_open(str(tmp_path / "ours.safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_have_an_index_and_respect_the_size_limit(tmp_path: Path) -> None:
    tensors = {f"layer.{number}.weight": torch.full((10,), float(number)) for number in range(7)}
    write_shards(tmp_path, source_of(tensors), shard_bytes=100)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert_holds(open_safetensors(tmp_path), tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 280
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / shard)[name], tensors[name])


def test_torch_files_are_those_of_torch(tmp_path: Path) -> None:
    tensors = some_tensors()
    table = torch.randn(6, 4)
    views = {"transposed": table.t(), "rows": table[2:5], "shared": table, "column": table[:, 1]}
    state = {"module.a.weight": tensors.pop("a.weight"), **tensors, **views, "p": torch.nn.Parameter(torch.ones(2))}
    torch.save({"epoch": 3, "step": None, "model_state_dict": state}, tmp_path / "library.pt")
    expected = {name.removeprefix("module."): tensor.detach() for name, tensor in state.items()}
    assert_holds(open_torch_file(tmp_path / "library.pt"), expected)
    torch.save(state, tmp_path / "bare.pt")
    assert_holds(open_torch_file(tmp_path / "bare.pt"), expected)
    write_torch_file(tmp_path / "ours.pt", source_of(expected), {"epoch": 0, "step": None})
    for mmap in (False, True):
        back = torch.load(tmp_path / "ours.pt", weights_only=True, mmap=mmap)
        assert (back["epoch"], back["step"]) == (0, None)
        assert_holds(source_of(back["model_state_dict"]), expected)


@pytest.mark.parametrize("writer", ["safetensors", "shards", "torch"])
def test_one_tensor_is_in_memory_at_a_time(writer: str, tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def make(number: int) -> Tensor:
        assert not [ref for ref in alive if ref() is not None], "an earlier tensor is still held"
        tensor = torch.full((50,), float(number))
        alive.append(weakref.ref(tensor))
        return tensor

    specs = {f"t{number}": TensorSpec((50,), torch.float32) for number in range(6)}
    source = LazyTensors(specs, {f"t{number}": lambda number=number: make(number) for number in range(6)})  # type: ignore[misc]
    if writer == "torch":
        write_torch_file(tmp_path / "x.pt", source, {})
    elif writer == "shards":
        write_shards(tmp_path, source, shard_bytes=500)
    else:
        write_safetensors(tmp_path / "x.safetensors", source)
    assert len(alive) == 6


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_an_untrusted_pickle_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"model_state_dict": {"a": torch.ones(1)}, "args": Evil(mark)}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="evil.pt is damaged or holds more than tensors"):
        open_torch_file(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(CheckpointError, match="not a readable file of torch.save"):
        open_torch_file(tmp_path / "plain.pt")
    assert not mark.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert mark.exists(), "the file would have run a command"


@pytest.mark.parametrize("content", [{"epoch": 1}, {"model_state_dict": {"a": 1}}, [torch.ones(1)], {}])
def test_a_torch_file_without_a_state_dict(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="neither a state dict nor one under the name model_state_dict"):
        open_torch_file(tmp_path / "x.pt")


def test_a_duplicate_name(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "module.a": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds a twice"):
        open_torch_file(tmp_path / "x.pt")
    for number in (1, 2):
        save_file({"a": torch.ones(1)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="a is in model-00001-of-00002.safetensors and in"):
        open_safetensors(tmp_path)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def long_header(file: Path) -> None:
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def wrong_offsets(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"shape":[2]', b'"shape":[3]'))


def overlapping(file: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, file)
    file.write_bytes(file.read_bytes().replace(b"[8,16]", b"[0,8] "))


def trailing_bytes(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


def name_twice(file: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, file)
    file.write_bytes(file.read_bytes().replace(b'"b":', b'"a":'))


def quantized(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, "not a readable safetensors file .*not fully covered"),
        (long_header, "not a readable safetensors file"),
        (wrong_offsets, "not a readable safetensors file"),
        (overlapping, "not a readable safetensors file .*invalid offset"),
        (name_twice, "not a readable safetensors file .*invalid offset"),
        (trailing_bytes, "not a readable safetensors file .*not fully covered"),
        (quantized, "stored as I32.*full-precision"),
        (lambda file: file.write_bytes(b"x"), "not a readable safetensors file"),
        (lambda file: file.write_bytes(b""), "not a readable safetensors file"),
    ],
)
def test_damaged_safetensors(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, file)
    damage(file)
    with pytest.raises(CheckpointError, match=message):
        open_safetensors(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path)
    cut_off(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="cut off inside a tensor"):
        source.get("a")


def test_folders_without_all_their_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights: looked for model.safetensors"):
        open_safetensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"Pickle files \(pytorch_model.bin\) are not read"):
        open_safetensors(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="of 3 weight files these are missing: model-00001.*, model-00003"):
        open_safetensors(tmp_path)
    for name in ("model-00001-of-00003", "model-00003-of-00003", "model-00001-of-00002"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="of two models: .*of-00002.*of-00003"):
        open_safetensors(tmp_path)


def test_a_staging_dir_is_renamed_or_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyError), staging_dir(out) as folder:
        (folder / "a").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    out.mkdir()  # an empty folder may be there
    with staging_dir(out) as folder:
        (folder / "a").write_text("whole")
        assert not list(out.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "a").read_text() == "whole"
    with pytest.raises(CheckpointError, match="exists and is not empty"), staging_dir(out):
        pass
    assert (out / "a").read_text() == "whole"


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"out cannot be written: .*No space left"),
        staging_dir(tmp_path / "out") as folder,
    ):
        (folder / "a").write_text("x")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", ["safetensors", "torch"])
def test_a_file_that_reads_back_differently_is_an_error(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(handle: Any) -> None:
        handle.flush()
        # the last value of the only tensor: the sixteen bytes of ones in the file
        offset = Path(handle.name).read_bytes().index(torch.ones(4).numpy().tobytes())
        os.pwrite(handle.fileno(), b"\x01", offset + 15)

    monkeypatch.setattr(writers, "_force_to_disk", flip)
    source = source_of({"a": torch.ones(4)})
    with pytest.raises(CheckpointError, match="reads back differently"):
        if writer == "torch":
            write_torch_file(tmp_path / "x.pt", source, {})
        else:
            write_safetensors(tmp_path / "x.safetensors", source)
