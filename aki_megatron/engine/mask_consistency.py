"""Do all ranks of a replica see the same attention layout? Each rebuilds it from ids that travelled; this compares."""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

from aki_megatron.attention import AttentionMask
from aki_megatron.errors import UserError
from aki_megatron.parallel.topology import Topology


class MaskMismatchError(UserError):
    """Ranks that work on the same samples do not attend to the same places, or lost ids on the way."""


class MaskConsistencyChecker:
    """Fingerprints of the layouts one rank has built in one step."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._entries: dict[tuple[int, int], tuple[int, str]] = {}

    def record(self, stage: int, micro: int, layout: AttentionMask, ids: Tensor) -> None:
        """Note what ``stage`` uses for a micro-batch: its layout, and the positions and targets [B, T, 4] it got."""
        state = hashlib.blake2b(layout.digest.encode(), digest_size=7)
        state.update(ids[..., 2:].contiguous().cpu().numpy().tobytes())
        self._entries[stage, micro] = (int.from_bytes(state.digest()), layout.rule)

    def compare(self) -> None:
        """Raise MaskMismatchError, on every rank of the replica, where two have not used the same; collective."""
        topology = self._topology
        if topology.tensor * topology.pipeline == 1:
            return
        mine = torch.tensor([print_ for _, (print_, _) in sorted(self._entries.items())], device=topology.device)
        ranks = dist.get_process_group_ranks(topology.replica_group)
        everyone = [torch.empty_like(mine) for _ in ranks]
        dist.all_gather(everyone, mine, group=topology.replica_group)
        # a rank's fingerprints, chunk by chunk, are those of the same micro-batches in the same order
        if all(torch.equal(other, everyone[0]) for other in everyone):
            return
        described: list[tuple[int, int, str]] = [(0, 0, "")] * len(ranks)
        rules = "/".join(sorted({rule for _, rule in self._entries.values()}))
        mine_described = (topology.pipeline_rank, topology.tensor_rank, rules)
        dist.all_gather_object(described, mine_described, group=topology.replica_group)
        raise MaskMismatchError(_message(ranks, everyone, described))


def _message(ranks: list[int], prints: list[Tensor], described: list[tuple[int, int, str]]) -> str:
    """Ranks in groups that agree, the largest first."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for rank, own, (pipeline_rank, tensor_rank, rules) in zip(ranks, prints, described, strict=True):
        name = f"rank {rank} (pipeline {pipeline_rank}, tensor {tensor_rank}, rule {rules})"
        groups.setdefault(tuple(own.tolist()), []).append(name)
    listed = sorted(groups.values(), key=len, reverse=True)
    lines = "\n  differs from\n  ".join(", ".join(names) for names in listed)
    return (
        f"The ranks of a replica have built different attention layouts from the same samples:\n  {lines}\n"
        "They must agree on attention.rule, and modality, segment, position and target ids must reach every stage "
        "unchanged. Check that all nodes run the same code and configuration; no weight was changed by this step."
    )
