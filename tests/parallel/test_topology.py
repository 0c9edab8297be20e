"""Sizes, ranks and sums over ranks."""

import pytest
import torch

from aki_megatron.errors import ConfigError
from aki_megatron.parallel.topology import GROUPS, Launch, Topology, group_ranks, init_distributed


def ranks_and_sums(topology: Topology) -> tuple[int, int, str, list[float]]:
    sums = topology.sum_over_data([topology.rank, 1, 2.0**40 + topology.rank])
    topology.barrier()
    return topology.rank, topology.data, topology.device.type, sums


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_sub_worlds_of_the_pool(run_on, ranks):
    total = ranks * (ranks - 1) / 2
    for rank, found in enumerate(run_on(ranks, ranks_and_sums)):
        assert found[:2] == (rank, ranks)
        assert found[3] == [total, ranks, ranks * 2.0**40 + total]


def a_topology(rank: int = 0) -> Topology:
    return Topology(rank, 12, 0, tensor=2, pipeline=2, data=3, device=torch.device("cpu"), groups={})


def test_rank_order_is_tensor_then_data_then_pipeline():
    seen = [a_topology(rank) for rank in range(12)]
    assert [(t.pipeline_rank, t.data_rank, t.tensor_rank) for t in seen] == [
        (p, d, t) for p in range(2) for d in range(3) for t in range(2)
    ]


def test_members_of_every_group():
    own = a_topology(9)  # tensor 1, data 1, pipeline 1
    assert {name: group_ranks(own, name) for name in GROUPS} == {
        "tensor": [8, 9],
        "data": [7, 9, 11],
        "pipeline": [3, 9],
        "replica": [2, 3, 8, 9],
        "pipeline_stage": [6, 7, 8, 9, 10, 11],
        "embedding": [3, 9],
        "self": [9],
    }
    assert (own.peer(0), own.replica_source_rank, own.reads_data) == (3, 2, False)
    assert [rank for rank in range(12) if a_topology(rank).reads_data] == [0, 2, 4]


def sums_over_groups(topology: Topology) -> dict[str, tuple[list[int], int]]:
    found = {}
    for name, group in topology.groups.items():
        total = torch.tensor([2**topology.rank])
        torch.distributed.all_reduce(total, group=group)
        found[name] = (group_ranks(topology, name), int(total))
    return found


def test_groups_hold_their_members_and_no_one_else(run_on):
    for rank, found in enumerate(run_on(8, sums_over_groups, tensor=2, pipeline=4)):
        assert ("embedding" in found) == (rank < 2 or rank >= 6), "only the first and the last pipeline rank"
        for ranks, total in found.values():
            assert rank in ranks and total == sum(2**member for member in ranks)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    launch = Launch(rank=1, local_rank=1, world_size=2, local_world_size=2, launcher="torchrun", master_port=1)
    with pytest.raises(ConfigError, match="local rank 1 has no GPU: this machine shows 1"):
        init_distributed(launch, tensor=1, pipeline=1)


def one_rank_fails(topology: Topology) -> None:
    if topology.rank == 1:
        raise ValueError("the disk of rank 1 is gone")
    topology.barrier()


def test_a_failing_rank_ends_the_others_and_is_named(run_on):
    with pytest.raises(Exception, match=r"(?s)rank 1: .*the disk of rank 1 is gone") as caught:
        run_on(2, one_rank_fails)
    assert "rank 0" in str(caught.value), "rank 0 must not hang behind the rank that failed"


def one_rank_hangs(topology: Topology) -> None:
    if topology.rank == 0:
        topology.barrier()
    else:
        import time

        time.sleep(60)


def test_a_hanging_rank_is_shown_where_it_hangs(run_on):
    with pytest.raises(Exception, match="one_rank_hangs"):
        run_on(2, one_rank_hangs, timeout_seconds=3)
