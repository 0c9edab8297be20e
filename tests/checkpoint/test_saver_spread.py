"""Checkpoints of a run whose ranks hold different tensors, and weights read by each rank for itself."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from aki_megatron.checkpoint.checkpointer import Checkpointer, SavedWeights
from aki_megatron.checkpoint.dcp_io import CheckpointSource, IndexedReader
from aki_megatron.engine.global_state import shard_rows
from aki_megatron.errors import CheckpointError

pytestmark = pytest.mark.distributed

SHAPES = {"weight.first": (5, 3), "weight.table": (7, 2), "weight.last": (1,), "exp_avg.last": (1,)}
OF_RANK = {0: ("weight.first", "weight.table"), 1: ("weight.last", "exp_avg.last", "weight.table")}
"""Names of each of two pipeline ranks; the table is tied."""


def whole(name: str) -> Tensor:
    """Numbers that tell rows apart."""
    size = torch.Size(SHAPES[name]).numel()
    return torch.arange(size, dtype=torch.float32).view(SHAPES[name]) + 100 * list(SHAPES).index(name)


def share_of(topology, *, filled: bool) -> dict[str, Tensor]:
    """What a rank brings to a checkpoint, or with zeros for one to fill."""
    mesh = DeviceMesh.from_group(topology.stage_group, topology.device.type)
    names = SHAPES if topology.pipeline == 1 else OF_RANK[topology.pipeline_rank]
    tensors = {name: shard_rows(whole(name) * filled, mesh) for name in names}
    return tensors | {"optimizer.step": torch.tensor(9.0 * filled)}


def save(topology, folder: Path) -> None:
    Checkpointer(folder, keep_last=1).save(9, share_of(topology, filled=True), {"step": 9})


def load(topology, folder: Path) -> dict[str, bool]:
    """Whether each of the rank's tensors came back."""
    keeper = Checkpointer(folder, keep_last=1)
    tensors = share_of(topology, filled=False)
    assert keeper.load(keeper.latest(), tensors) == {"step": 9}
    found = {name: tensors[name].full_tensor() for name in tensors if name in SHAPES}
    assert tensors["optimizer.step"] == 9
    return {name: torch.equal(tensor, whole(name)) for name, tensor in found.items()}


LAYOUTS = [(1, 1), (3, 1), (2, 2), (4, 2)]
"""(ranks, pipeline)"""


@pytest.mark.parametrize(("ranks", "pipeline"), LAYOUTS)
def test_saved_by_pipeline_ranks_loaded_by_others(run_on, tmp_path, ranks, pipeline):
    run_on(4, save, tmp_path, pipeline=2)
    for rank, equal in enumerate(run_on(ranks, load, tmp_path, pipeline=pipeline)):
        wanted = SHAPES if pipeline == 1 else OF_RANK[rank * pipeline // ranks]
        assert equal == {name: True for name in wanted}


def test_a_tied_table_is_written_once(run_on, tmp_path):
    run_on(4, save, tmp_path, pipeline=2)
    path = tmp_path / "step_000009"
    index = IndexedReader(path).read_metadata()
    chunks = index.state_dict_metadata["weight.table"].chunks
    assert sorted((chunk.offsets[0], chunk.sizes[0]) for chunk in chunks) == [(0, 4), (4, 3)]
    assert len([place for place in index.storage_data if place.fqn == "weight.table"]) == 2
    assert torch.equal(CheckpointSource(path).get("table"), whole("weight.table"))


def refused(topology, folder: Path) -> str:
    keeper = Checkpointer(folder, keep_last=1)
    tensors = share_of(topology, filled=False)
    if topology.pipeline_rank == 1:
        tensors["weight.other"] = tensors.pop("weight.last")
    try:
        keeper.load(keeper.latest(), tensors)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_names_are_compared_over_all_ranks(run_on, tmp_path):
    """Names that only other ranks ask for are no fault; one that nobody has is, on every rank."""
    run_on(2, save, tmp_path, pipeline=2)
    for message in run_on(4, refused, tmp_path, pipeline=2):
        assert "of another model: 1 missing (weight.other); 1 not in this model (weight.last)" in message


def read_own(topology, folder: Path) -> dict[str, bool]:
    saved = SavedWeights(folder)
    assert saved.shapes == {name.removeprefix("weight."): SHAPES[name] for name in SHAPES if "weight" in name}
    names = [name.removeprefix("weight.") for name in OF_RANK[topology.pipeline_rank] if "weight" in name]
    return {name: torch.equal(tensor, whole(f"weight.{name}")) for name, tensor in saved.read(names)}


def test_each_rank_reads_the_weights_it_needs(run_on, tmp_path):
    run_on(2, save, tmp_path, pipeline=2)
    found = run_on(2, read_own, tmp_path, pipeline=2)
    assert found == [{"first": True, "table": True}, {"last": True, "table": True}]


def open_alone(topology, folder: Path) -> str:
    try:
        SavedWeights(folder / "nowhere" if topology.rank else folder)
    except CheckpointError as error:
        return str(error)
    return "opened"


def test_all_ranks_fail_to_open_together(run_on, tmp_path):
    """One rank does not see the checkpoint (a folder that is not shared); the other does not wait for it."""
    run_on(1, save, tmp_path)
    for message in run_on(2, open_alone, tmp_path):
        assert "No complete checkpoint in" in message and "nowhere" in message


def draw_on(topology, folder: Path) -> list[tuple[float, float]]:
    """Random numbers after a save, and after that is loaded from elsewhere."""
    keeper = Checkpointer(folder, keep_last=1)
    torch.manual_seed(topology.rank)
    keeper.save(9, share_of(topology, filled=True), {"step": 9})
    after_save = (float(torch.rand(())), random.random())
    torch.manual_seed(99)
    random.seed(99)
    keeper.load(keeper.latest(), share_of(topology, filled=False))
    return [after_save, (float(torch.rand(())), random.random())]


def test_random_generators_of_every_rank_go_on(run_on, tmp_path):
    drawn = run_on(4, draw_on, tmp_path, pipeline=2)
    assert all(before == after for before, after in drawn)
    assert len({before[0] for before, _ in drawn}) == 4
