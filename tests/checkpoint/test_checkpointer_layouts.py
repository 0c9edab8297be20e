"""Checkpoints of runs whose ranks hold different tensors, loaded under other layouts."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.dcp_io import CheckpointSource, RestrictedIndexReader
from aki_megatron.engine.global_state import shard_first_dim
from aki_megatron.errors import CheckpointError

pytestmark = pytest.mark.distributed

SHAPES = {"weight.first": (5, 3), "weight.table": (7, 2), "weight.last": (1,), "exp_avg.last": (1,)}
NAMES_OF_RANK = {0: ("weight.first", "weight.table"), 1: ("weight.last", "exp_avg.last", "weight.table")}
"""Names of each of two pipeline ranks; the table is tied."""


def whole(name: str) -> Tensor:
    """Values that tell rows apart."""
    size = torch.Size(SHAPES[name]).numel()
    return torch.arange(size, dtype=torch.float32).view(SHAPES[name]) + 100 * list(SHAPES).index(name)


def local_state(topology, *, filled: bool) -> dict[str, Tensor]:
    """The tensors a rank passes to a checkpoint; zeros unless ``filled``, for loading."""
    mesh = DeviceMesh.from_group(topology.pipeline_stage_group, topology.device.type)
    names = SHAPES if topology.pipeline == 1 else NAMES_OF_RANK[topology.pipeline_rank]
    tensors = {name: shard_first_dim(whole(name) * filled, mesh) for name in names}
    return tensors | {"optimizer.step": torch.tensor(9.0 * filled)}


def save(topology, folder: Path) -> None:
    Checkpointer(folder, keep_last=1).save(9, local_state(topology, filled=True), {"step": 9})


def load(topology, folder: Path) -> dict[str, bool]:
    """Whether each of the rank's tensors came back."""
    checkpointer = Checkpointer(folder, keep_last=1)
    tensors = local_state(topology, filled=False)
    assert checkpointer.load(checkpointer.latest(), tensors) == {"step": 9}
    found = {name: tensors[name].full_tensor() for name in tensors if name in SHAPES}
    assert tensors["optimizer.step"] == 9
    return {name: torch.equal(tensor, whole(name)) for name, tensor in found.items()}


LAYOUTS = [(1, 1), (3, 1), (2, 2), (4, 2)]
"""(ranks, pipeline)"""


@pytest.mark.parametrize(("ranks", "pipeline"), LAYOUTS)
def test_saved_by_pipeline_ranks_loaded_by_others(run_on, tmp_path, ranks, pipeline):
    run_on(4, save, tmp_path, pipeline=2)
    for rank, equal in enumerate(run_on(ranks, load, tmp_path, pipeline=pipeline)):
        wanted = SHAPES if pipeline == 1 else NAMES_OF_RANK[rank * pipeline // ranks]
        assert equal == {name: True for name in wanted}


def test_a_tied_table_is_written_once(run_on, tmp_path):
    run_on(4, save, tmp_path, pipeline=2)
    path = tmp_path / "step_000009"
    index = RestrictedIndexReader(path).read_metadata()
    chunks = index.state_dict_metadata["weight.table"].chunks
    assert sorted((chunk.offsets[0], chunk.sizes[0]) for chunk in chunks) == [(0, 4), (4, 3)]
    assert len([entry for entry in index.storage_data if entry.fqn == "weight.table"]) == 2
    assert torch.equal(CheckpointSource(path).get("table"), whole("weight.table"))


def load_error(topology, folder: Path) -> str:
    checkpointer = Checkpointer(folder, keep_last=1)
    tensors = local_state(topology, filled=False)
    if topology.pipeline_rank == 1:
        tensors["weight.other"] = tensors.pop("weight.last")
    try:
        checkpointer.load(checkpointer.latest(), tensors)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_names_are_compared_over_all_ranks(run_on, tmp_path):
    """A name that only other ranks ask for is no error; one that no rank has is an error on every rank."""
    run_on(2, save, tmp_path, pipeline=2)
    for message in run_on(4, load_error, tmp_path, pipeline=2):
        assert "missing: weight.other (1,)\n  unexpected: weight.last (1,)\n" in message


def read_own_weights(topology, folder: Path) -> dict[str, bool]:
    source = CheckpointSource(folder)
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    assert shapes == {name.removeprefix("weight."): SHAPES[name] for name in SHAPES if "weight" in name}
    names = [name.removeprefix("weight.") for name in NAMES_OF_RANK[topology.pipeline_rank] if "weight" in name]
    return {name: torch.equal(source.get(name), whole(f"weight.{name}")) for name in names}


def test_each_rank_reads_the_weights_it_needs(run_on, tmp_path):
    run_on(2, save, tmp_path, pipeline=2)
    found = run_on(2, read_own_weights, tmp_path, pipeline=2)
    assert found == [{"first": True, "table": True}, {"last": True, "table": True}]


def random_numbers(topology, folder: Path) -> list[tuple[float, float]]:
    """Random numbers after a save, and after loading it with other generator states."""
    checkpointer = Checkpointer(folder, keep_last=1)
    torch.manual_seed(topology.rank)
    checkpointer.save(9, local_state(topology, filled=True), {"step": 9})
    after_save = (float(torch.rand(())), random.random())
    torch.manual_seed(99)
    random.seed(99)
    checkpointer.load(checkpointer.latest(), local_state(topology, filled=False))
    return [after_save, (float(torch.rand(())), random.random())]


def test_random_generators_of_every_rank_are_restored(run_on, tmp_path):
    numbers = run_on(4, random_numbers, tmp_path, pipeline=2)
    assert all(before == after for before, after in numbers)
    assert len({before[0] for before, _ in numbers}) == 4
